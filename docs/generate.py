"""Write the pages of the site that come out of the code: one for each section of option files, one for each module."""

import pkgutil
from collections.abc import Sequence
from importlib import import_module
from itertools import groupby
from pathlib import Path
from types import FunctionType, ModuleType

from ast_plugin.models.registries import load_registered
from ast_plugin.options.json_schema import OptionKey, option_keys

ROOMS = {
    'ops': 'Mathematics on tensors',
    'archs': 'Networks and their blocks',
    'archs.mixed': 'Blocks in other networks',
    'evaluation': 'Restore and measure',
    'degradations': 'Synthetic degradations',
    'data': 'Datasets and image files',
    'losses': 'Losses',
    'metrics': 'Metrics',
}
"""Packages whose modules get a page, with a heading. Kernels, commands and plumbing have none."""
HEADINGS = {'file': 'Top level', 'networks': 'networks (of a comparison)', 'compare': 'compare (of a comparison)'}
LEFT_OUT = ('ast_plugin.ops.triton', 'ast_plugin.ops.cpu', 'ast_plugin.data.prepare', 'ast_plugin.data.lmdb')


def write_options(folder: Path) -> None:
    """Write a page for each section of option files, a table for each part of it, and an index."""
    keys = list(option_keys(load_registered()))
    pages = list(dict.fromkeys(page_of(key.section) for key in keys))
    for page in pages:
        in_page = [key for key in keys if page_of(key.section) == page]
        tables = (table(section, list(rows)) for section, rows in groupby(in_page, key=lambda key: key.section))
        write(folder / f'{page}.md', f'# {HEADINGS.get(page, page)}\n\n' + '\n'.join(tables))
    lines = ['# Options', '', 'Every key of an option file, by its section.', '', '```{toctree}', *pages, '```', '']
    write(folder / 'index.md', '\n'.join(lines))


def page_of(section: str) -> str:
    """The page of a section: its first part."""
    return section.partition(' ')[0].partition('.')[0] or 'file'


def table(section: str, keys: Sequence[OptionKey]) -> str:
    """The keys of a section as a table of Markdown, with a column of defaults where there are any."""
    rows = [['key', 'value', 'default', 'meaning'], ['---'] * 4]
    for key in keys:
        default = '' if key.default is None else f'`{key.default}`'
        rows.append([f'`{key.key}`', cell(key.type), cell(default), cell(key.description)])
    if all(key.default is None for key in keys):
        rows = [[key, value, meaning] for key, value, _, meaning in rows]
    heading = [f'## `{section}`', ''] if section else []
    return '\n'.join([*heading, *(f'| {" | ".join(row)} |' for row in rows), ''])


def cell(text: str) -> str:
    """Text as it may stand in a cell of a table."""
    return text.replace('|', '\\|').replace('<', '&lt;').replace('*', '\\*')


def write_api(folder: Path) -> None:
    """Write a page for each public module, whose text autodoc takes from the docstrings, and an index."""
    lines = ['# API', '']
    for room, heading in ROOMS.items():
        package = import_module(f'ast_plugin.{room}')
        found = pkgutil.iter_modules(package.__path__, f'{package.__name__}.')
        own = [package.__name__] if any(defined_in(package, item) for item in vars(package).values()) else []
        pages = own + [info.name for info in found if not info.ispkg and not info.name.startswith(LEFT_OUT)]
        lines += [f'## {heading}', '', '```{toctree}', ':maxdepth: 1', '', *pages, '```', '']
        for name in pages:
            text = f'# {name.removeprefix("ast_plugin.")}\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n'
            write(folder / f'{name}.md', text)
    write(folder / 'index.md', '\n'.join(lines))


def defined_in(package: ModuleType, item: object) -> bool:
    """Whether a class or function is defined in a package's own file."""
    return isinstance(item, type | FunctionType) and item.__module__ == package.__name__


def write(path: Path, text: str) -> None:
    """Write a page unless it says so already, so that Sphinx builds anew only what has changed."""
    path.parent.mkdir(exist_ok=True)
    if not path.is_file() or path.read_text(encoding='utf-8') != text:
        path.write_text(text, encoding='utf-8')
