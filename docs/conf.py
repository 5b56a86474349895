"""Sphinx configuration. `make docs` builds the site into docs/_build; warnings are errors."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import generate  # noqa: E402 - in this folder

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

default_role = 'code'  # docstrings put names in single backticks
autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
autodoc_default_options = {'members': True, 'show-inheritance': True}
napoleon_custom_sections = ['Numerics', 'Source', 'Shapes']
napoleon_use_rtype = False
napoleon_use_ivar = True


generate.write_options(HERE / 'options')
generate.write_api(HERE / 'api')


def shape_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Convert `Source: text` into a section and indented examples into literal blocks."""
    shaped: list[str] = []
    for line in lines:
        section, colon, text = line.partition(': ')
        if colon and section in (*napoleon_custom_sections, 'Returns'):
            shaped += [f'{section}:', f'    {text}']
        elif line.startswith('    ') and shaped[-1:] == [''] and shaped[-2][:1] != ' ' and shaped[-2][-1:] != ':':
            shaped += ['::', '', line]
        else:
            shaped.append(line)
    lines[:] = shaped


def setup(app) -> None:
    """Register the docstring conversion to run before napoleon."""
    app.connect('autodoc-process-docstring', shape_docstring, priority=100)
