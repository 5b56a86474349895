# A wrapper around tools/bootstrap.py, which can be called directly on machines without make.
PYTHON ?= python3

.PHONY: demo test docs
demo test docs:
	@$(PYTHON) tools/bootstrap.py $@
