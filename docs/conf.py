"""Sphinx's configuration. `make docs` builds the site into docs/_build; a warning is an error."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import generate  # noqa: E402 - beside this file

import ast_plugin  # noqa: E402 - of this checkout

project = 'ast_plugin'
version = release = ast_plugin.__version__
copyright = 'the authors of ast_plugin, Apache-2.0'

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
exclude_patterns = ['_build']
html_theme = 'furo'
html_title = 'ast_plugin'
html_show_sphinx = False

myst_enable_extensions = ['colon_fence']
myst_heading_anchors = 3

default_role = 'code'  # docstrings write names between single backticks
autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
autodoc_default_options = {'members': True, 'show-inheritance': True}
napoleon_custom_sections = ['Numerics', 'Source', ('Option keys', 'params_style')]
napoleon_use_rtype = False
napoleon_use_ivar = True


generate.write_options(HERE / 'options')
generate.write_api(HERE / 'api')
