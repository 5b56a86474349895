"""Write the pages of the site that come out of the code: one for each section of option files, one for each module."""

import pkgutil
from importlib import import_module
from pathlib import Path

ROOMS = {
    'ops': 'Mathematics on tensors; needs torch alone',
    'archs': 'Networks and their blocks',
    'evaluation': 'Restore and measure',
    'degradations': 'Synthetic degradations',
    'data': 'Datasets and image files',
    'losses': 'Losses',
    'metrics': 'Metrics',
}
"""Packages whose modules get a page, with a heading. Kernels, commands and plumbing have none."""
LEFT_OUT = ('ast_plugin.ops.triton', 'ast_plugin.ops.cpu', 'ast_plugin.data.prepare', 'ast_plugin.data.lmdb')


def write_api(folder: Path) -> None:
    """Write a page for each public module, whose text autodoc takes from the docstrings, and an index."""
    lines = ['# API', '']
    for room, heading in ROOMS.items():
        package = import_module(f'ast_plugin.{room}')
        modules = [
            package.__name__,
            *(f'{package.__name__}.{info.name}' for info in pkgutil.iter_modules(package.__path__)),
        ]
        pages = [name for name in modules if not name.startswith(LEFT_OUT) and (name.count('.') > 1 or room == 'ops')]
        lines += [f'## {heading}', '', '```{toctree}', ':maxdepth: 1', '', *(name for name in pages), '```', '']
        for name in pages:
            members = ':imported-members:\n' if name.count('.') == 1 else ''
            text = f'# {name.removeprefix("ast_plugin.")}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   {members}```\n'
            write(folder / f'{name}.md', text)
    write(folder / 'index.md', '\n'.join(lines))


def write(path: Path, text: str) -> None:
    """Write a page unless it says so already, so that Sphinx builds anew only what has changed."""
    path.parent.mkdir(exist_ok=True)
    if not path.is_file() or path.read_text(encoding='utf-8') != text:
        path.write_text(text, encoding='utf-8')
