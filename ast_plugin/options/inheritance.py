"""Option files that build on others: `_base_`, and `${NAME:default}` for what the environment says."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ast_plugin.errors import OptionError, did_you_mean
from ast_plugin.options import safe_yaml
from ast_plugin.options.merging import merge

BASE_KEY = '_base_'
# More files than any chain needs; two files that name one another twice each would otherwise be read for ever.
MAX_FILES = 64

_SUFFIXES = ('.yml', '.yaml')
_TEMPLATE_MARKS = ('{{', '{%')
_VARIABLE = re.compile(r'\$\{([A-Za-z_][A-Za-z0-9_]*)(?::([^{}]*))?\}')


def read(path: Path) -> dict[str, Any]:
    """Read an option file and all that it inherits from; nothing in any of them is run.

    `_base_: other.yml`, or a list of such, is relative to the file that says it. Later bases are laid over earlier
    ones, the file over all of them: see `ast_plugin.options.merging.merge`.

    Raises:
        OptionError: for a file that is missing, that is no option file, or that inherits from itself.
    """
    return _read(path, (), [0])


def _read(path: Path, including: tuple[Path, ...], num_read: list[int]) -> dict[str, Any]:
    num_read[0] += 1
    if num_read[0] > MAX_FILES:
        raise OptionError(f'{including[0]}: {BASE_KEY}: inherits from more than {MAX_FILES} files')
    opt = safe_yaml.read_file(path)
    if not isinstance(opt, dict) or not opt:
        kind = {type(None): 'nothing', dict: 'nothing', list: 'a list'}.get(type(opt), 'a single value')
        raise OptionError(f'{path}: expected keys and values (`name: ...`), got {kind}')
    if 'custom_imports' in opt:
        raise OptionError(f'{path}: custom_imports: refused, an option file runs no code; install it as a plugin')
    bases = opt.pop(BASE_KEY, [])
    chain = (*including, path)
    inherited: dict[str, Any] = {}
    for name in bases if isinstance(bases, list) else [bases]:
        inherited = _merged(inherited, _read(_base_path(name, chain), chain, num_read), path)
    return _merged(inherited, opt, path) if inherited else opt


def _merged(base: dict[str, Any], changes: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        return merge(base, changes)
    except OptionError as error:
        raise OptionError(f'{path}: {error}') from None


def _base_path(name: Any, chain: tuple[Path, ...]) -> Path:
    source = f'{chain[-1]}: {BASE_KEY}'
    if not isinstance(name, str) or not name.endswith(_SUFFIXES) or '\0' in name:
        raise OptionError(f'{source}: expected the path of a .yml file, or a list of such, got {name!r:.80}')
    if Path(name).is_absolute():
        raise OptionError(f'{source}: expected a path relative to this file, got {name}')
    path = chain[-1].parent / name
    if not path.is_file():
        there = [file.name for file in path.parent.glob('*.y*ml')] if path.parent.is_dir() else []
        raise OptionError(f'{source}: no such file: {path}{did_you_mean(path.name, there)}')
    if any(path.samefile(other) for other in chain):
        raise OptionError(f'{source}: inherits from itself: {" -> ".join(map(str, (*chain, path)))}')
    return path


def fill_in(opt: dict[str, Any], source: str) -> dict[str, Any]:
    """Put values of the environment where the options say `${NAME}` or `${NAME:default}`.

    What is a variable and nothing else becomes what YAML makes of its value: a number, true, nothing. Inside of other
    text it is put in as text. Values that come in are not looked at for further variables.

    Raises:
        OptionError: naming every variable that is not set and has no default, and every other kind of template.
    """
    faults: list[str] = []
    filled = _filled(opt, (), faults)
    if faults:
        raise OptionError('\n'.join(f'{source}: {fault}' for fault in faults))
    return filled


def _filled(value: Any, where: tuple[str, ...], faults: list[str]) -> Any:
    if isinstance(value, dict):
        for key in value:
            if '${' in key or any(mark in key for mark in _TEMPLATE_MARKS):
                faults.append(f'{".".join((*where, key))}: templates are not filled in where keys are')
        return {key: _filled(item, (*where, key), faults) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, (*where, str(number)), faults) for number, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    complaints = list(_complaints(value))
    faults += [f'{".".join(where)}: {complaint}' for complaint in complaints]
    if complaints or '${' not in value:
        return value
    whole = _VARIABLE.fullmatch(value)
    return _scalar(_value_of(whole)) if whole else _VARIABLE.sub(_value_of, value)


def _complaints(text: str) -> Iterator[str]:
    if any(mark in text for mark in _TEMPLATE_MARKS):
        yield 'templates are not filled in, write the value itself'
    if '${' in _VARIABLE.sub('', text):
        yield f'expected ${{NAME}} or ${{NAME:default}}, got {text[:80]!r}'
    for match in _VARIABLE.finditer(text):
        name, default = match.groups()
        if default is None and name not in os.environ:
            known = did_you_mean(name, os.environ)
            yield f'the environment has no variable {name}{known} (${{{name}:default}} would give a default)'


def _value_of(match: re.Match) -> str:
    name, default = match.groups()
    return os.environ.get(name, default)


def _scalar(text: str) -> Any:
    try:
        value = safe_yaml.read_text(text, 'environment')
    except OptionError:
        return text
    return text if isinstance(value, (dict, list)) else value
