"""Generate the reference pages from the code: one per section of option files and one per public module."""

import inspect
import pkgutil
import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import groupby
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from pydantic import BaseModel, Field, create_model

from ast_plugin.models.preflight import load_registered
from ast_plugin.options.sections import (
    ComparedNetwork,
    CompareSettings,
    Logger,
    Metric,
    MixupOptions,
    Optimizer,
    OptionFile,
    Paths,
    ProtocolOptions,
    Registered,
    Train,
    Val,
    dataset_model,
)
from ast_plugin.options.validation import parameters_of

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
"""Packages and modules with API pages, and their headings. Kernels, commands and internals are not documented."""
HEADINGS = {'file': 'Top level', 'networks': 'networks (of a comparison)', 'compare': 'compare (of a comparison)'}
LEFT_OUT = (
    'ast_plugin.ops.triton',
    'ast_plugin.ops.cpu',
    'ast_plugin.data.prepare',
    'ast_plugin.data.checks',
    'ast_plugin.data.lmdb',
)
KINDS = {
    'integer': 'integer',
    'number': 'number',
    'boolean': 'boolean',
    'string': 'string',
    'object': 'mapping',
    'null': '',
}
LIMITS = {
    'minimum': '≥ {:g}',
    'exclusiveMinimum': '> {:g}',
    'maximum': '≤ {:g}',
    'exclusiveMaximum': '< {:g}',
}


class OptionKey(NamedTuple):
    """One key of an option file as documented; `default` is None if the key has no default."""

    section: str
    key: str
    type: str
    default: Any
    description: str


def write_options(folder: Path) -> None:
    """Write one page per top-level section of option files, with one table per subsection, and an index."""
    keys = list(option_keys(load_registered()))
    pages = list(dict.fromkeys(page_of(key.section) for key in keys))
    for page in pages:
        in_page = [key for key in keys if page_of(key.section) == page]
        tables = (table(section, list(rows)) for section, rows in groupby(in_page, key=lambda key: key.section))
        write(folder / f'{page}.md', f'# {HEADINGS.get(page, page)}\n\n' + '\n'.join(tables))
    lines = ['# Options', '', 'All keys of an option file, by section.', '', '```{toctree}', *pages, '```', '']
    write(folder / 'index.md', '\n'.join(lines))


def page_of(section: str) -> str:
    """Return the page of a section: the first part of its dotted name."""
    return section.partition(' ')[0].partition('.')[0] or 'file'


def table(section: str, keys: Sequence[OptionKey]) -> str:
    """Return a Markdown table of a section's keys; the column of defaults is omitted if no key has one."""
    rows = [['key', 'value', 'default', 'meaning'], ['---'] * 4]
    for key in keys:
        default = '' if key.default is None else f'`{key.default}`'
        rows.append([f'`{key.key}`', cell(key.type), cell(default), cell(key.description)])
    if all(key.default is None for key in keys):
        rows = [[key, value, meaning] for key, value, _, meaning in rows]
    heading = [f'## `{section}`', ''] if section else []
    return '\n'.join([*heading, *(f'| {" | ".join(row)} |' for row in rows), ''])


def cell(text: str) -> str:
    """Escape text for a table cell."""
    return text.replace('|', '\\|').replace('<', '&lt;').replace('*', '\\*')


def option_keys(registered: Registered) -> Iterator[OptionKey]:
    """Yield every key of every section, in the order of an option file.

    Args:
        registered: provides the dataset types with described keys, and the arguments of AST.
    Yields:
        Keys whose section is a dotted name, followed by the type if the keys depend on it: `datasets.* (PairsDataset)`.
    """
    datasets = [(name, dataset_model(name, target)) for name, target in registered.by_kind['dataset'].items()]
    sections: dict[str, type[BaseModel]] = {
        '': OptionFile,
        **{f'datasets.* ({name})': model for name, model in sorted(datasets) if model is not None},
        'network_g (AST)': argument_model(registered.by_kind['arch']['AST']),
        'path': Paths,
        'train': Train,
        'train.optim_g': Optimizer,
        'train.mixing': MixupOptions,
        'val': Val,
        'val.protocol': ProtocolOptions,
        'val.metrics.*': Metric,
        'logger': Logger,
        'networks.*': ComparedNetwork,
        'compare': CompareSettings,
    }
    for section, model in sections.items():
        schema = model.model_json_schema()
        required = schema.get('required', ())
        for key, value in schema['properties'].items():
            kind = in_words(value, schema.get('$defs', {})) + (', required' if key in required else '')
            yield OptionKey(section, key, kind, value.get('default'), value.get('description', ''))


def in_words(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Describe the valid values of a JSON schema: `integer, ≥ 1`, `mixup or cutmix`."""
    if '$ref' in schema:
        return in_words(definitions[schema['$ref'].rpartition('/')[2]], definitions)
    if 'anyOf' in schema or 'oneOf' in schema:
        parts = (in_words(part, definitions) for part in schema.get('anyOf') or schema['oneOf'])
        return ' or '.join(dict.fromkeys(part for part in parts if part))
    if 'enum' in schema or 'const' in schema:
        return ' or '.join(map(str, schema.get('enum') or [schema['const']]))
    if schema.get('type') == 'array':
        items = in_words(schema.get('items', {}), definitions)
        return f'list of ({items})' if items else 'list'
    limits = [text.format(schema[name]) for name, text in LIMITS.items() if name in schema]
    return ', '.join([KINDS.get(schema.get('type', ''), 'anything'), *limits])


def argument_model(target: type) -> type[BaseModel]:
    """Return a pydantic model of a class's constructor arguments, described by its docstring's `Args:`."""
    parameters, _ = parameters_of(target)
    described = described_arguments(inspect.getdoc(target) or '')
    fields: dict[str, Any] = {}
    for name, parameter in parameters.items():
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[name] = (parameter.annotation, Field(default, description=described.get(name)))
    return create_model(target.__name__, **fields)


def described_arguments(docstring: str) -> dict[str, str]:
    """Return the description of each argument in a Google-style docstring, as one line."""
    block = re.search(r'^Args:\n((?:[ ]+.*\n?|\n)*)', docstring, re.MULTILINE)
    entries = re.findall(r'^ {4}([\w, ]+): (.*(?:\n {5,}.*)*)', block[1] if block else '', re.MULTILINE)
    return {name: ' '.join(text.split()) for names, text in entries for name in names.split(', ')}


def write_api(folder: Path) -> None:
    """Write a page for each public module, to be filled from docstrings by autodoc, and an index."""
    lines = ['# API', '']
    for room, heading in ROOMS.items():
        package = import_module(f'ast_plugin.{room}')
        found = pkgutil.iter_modules(getattr(package, '__path__', ()), f'{package.__name__}.')
        own = [package.__name__] if any(defined_in(package, item) for item in vars(package).values()) else []
        pages = own + [info.name for info in found if not info.ispkg and not info.name.startswith(LEFT_OUT)]
        lines += [f'## {heading}', '', '```{toctree}', ':maxdepth: 1', '', *pages, '```', '']
        for name in pages:
            text = f'# {name.removeprefix("ast_plugin.")}\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n'
            write(folder / f'{name}.md', text)
    write(folder / 'index.md', '\n'.join(lines))


def defined_in(package: ModuleType, item: object) -> bool:
    """Return whether a class or function is defined in the package's own `__init__.py`."""
    return isinstance(item, type | FunctionType) and item.__module__ == package.__name__


def write(path: Path, text: str) -> None:
    """Write a page if its text has changed, so that Sphinx rebuilds only changed pages."""
    path.parent.mkdir(exist_ok=True)
    if not path.is_file() or path.read_text(encoding='utf-8') != text:
        path.write_text(text, encoding='utf-8')
