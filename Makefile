# The work is done by tools/bootstrap.py, which is all that a machine without make needs.
PYTHON ?= python3

.PHONY: demo test docs
demo test docs:
	@$(PYTHON) tools/bootstrap.py $@
