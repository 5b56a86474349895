"""Reading of option files: lookup by name, inheritance, environment variables and command-line overrides.

No code in an option file is executed.
"""

from __future__ import annotations

import copy
import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from yaml.nodes import MappingNode, Node, ScalarNode

from ast_plugin.errors import OptionError, did_you_mean
from ast_plugin.faults import Fault, Where, dotted
from ast_plugin.options import safe_yaml
from ast_plugin.plugins import option_folders

BASE_KEY, DELETE_KEY, STAGES_KEY, NETWORKS_KEY = '_base_', '_delete_', 'stages', 'networks'
_ENTRIES_KEYS = (STAGES_KEY, NETWORKS_KEY)
_MISSING = object()
# Two files that inherit from each other twice would otherwise be read exponentially often.
MAX_FILES = 64
# Section, key in iterations and key in epochs, which exclude each other: setting one removes the inherited other.
EXCLUSIVE_KEYS = (
    (('train',), 'total_iter', 'total_epochs'),
    (('train',), 'warmup_iter', 'warmup_epochs'),
    (('train', 'scheduler'), 'warmup_iter', 'warmup_epochs'),
    (('val',), 'val_freq', 'times_per_epoch'),
    (('logger',), 'save_checkpoint_freq', 'save_checkpoint_epochs'),
)
_ALTERNATIVES = {(*where, key): other for where, *pair in EXCLUSIVE_KEYS for key, other in (pair, pair[::-1])}

_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel the shipped files are inside the package, in a checkout next to it.
_SHIPPED_FOLDERS = (_PACKAGE / 'option_files', _PACKAGE.parent / 'options')
_SUFFIX = re.compile(r'\.ya?ml$')
_TEMPLATE_MARKS = ('{{', '{%')
_WANTS_TEXT = re.compile(r"text|name|'")  # including choices: expected 'fp32' or 'fp16'
_WANTS_NUMBER = re.compile(r'^expected (?:.*number|true or false)(?!.*text)|or (?:more|less)$')
_VARIABLE = re.compile(r'\$\{([A-Za-z_][A-Za-z0-9_]*)(?::([^{}]*))?\}')


def shipped_folder() -> Path:
    """Return the folder of the option files shipped with this package."""
    for folder in _SHIPPED_FOLDERS:
        if folder.is_dir():
            return folder
    raise OptionError(f'this installation has no option files: {_SHIPPED_FOLDERS[0]} is missing, reinstall ast_plugin')


def shipped_files() -> dict[str, Path]:
    """Return the shipped option files by the name that `find` accepts, without files that are only inherited from."""
    return _files_in(shipped_folder())


def known_files() -> dict[str, Path]:
    """Return the shipped option files and those of installed plugins, named `PLUGIN/FILE`."""
    files = shipped_files()
    for plugin, folder in option_folders().items():
        files |= {f'{plugin}/{name}': path for name, path in _files_in(folder).items()}
    return files


def _files_in(folder: Path) -> dict[str, Path]:
    names = {}
    for path in sorted(folder.rglob('*.yml')):
        relative = path.relative_to(folder)
        if not any(part.startswith(('_', '.')) for part in relative.parts):
            names[relative.with_suffix('').as_posix()] = path
    return names


def find(name_or_path: str | Path) -> Path:
    """Return the option file for a path or a name in `known_files`; raise OptionError with a suggestion if missing."""
    path = Path(os.path.expanduser(name_or_path))
    if path.is_file():
        return path
    known = known_files()
    name = _SUFFIX.sub('', path.as_posix())
    if name in known:
        return known[name]
    if path.exists():
        raise OptionError(f'{name_or_path}: expected an option file, got a folder, pipe or device')
    raise OptionError(
        f'{name_or_path}: no such option file{did_you_mean(name, known) or did_you_mean(path.stem, known)} '
        '(`basicsr options` lists the shipped files)'
    )


def load(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read an option file with the files that it inherits from, overrides and environment variables.

    Args:
        path: the file; see `find` for names.
        overrides: arguments of `--force_yml`, see `override`. Those of a single stage are applied last.
    Returns:
        The options with environment variables substituted; see `ast_plugin.options.runs.expand` for stages.
    Raises:
        OptionError: with the file and the line or key.
    """
    path = Path(path)
    opt = read(path)
    for text in sorted(overrides, key=lambda text: text.partition(':')[0].strip() in _ENTRIES_KEYS):
        override(opt, text)
    return fill_in(opt, str(path))


def read(path: Path, files: dict[Path, Node] | None = None) -> dict[str, Any]:
    """Read an option file and the files that it inherits from.

    `_base_: other.yml`, or a list of files, is relative to the file that contains it, or a name in `known_files`. Later
    bases are merged over earlier ones, and the file over all of them: see `merge`.

    Args:
        path: the file.
        files: receives the content of each file, in order of precedence.
    """
    return _read(path, (), {} if files is None else files, [0])


def _read(path: Path, including: tuple[Path, ...], files: dict[Path, Node], num_read: list[int]) -> dict[str, Any]:
    num_read[0] += 1
    if num_read[0] > MAX_FILES:
        raise OptionError(f'{including[0]}: {BASE_KEY}: inherits from more than {MAX_FILES} files')
    node = safe_yaml.compose_file(path)
    opt = safe_yaml.build(node, str(path))
    if not isinstance(opt, dict) or not opt:
        kind = {type(None): 'nothing', dict: 'nothing', list: 'a list'}.get(type(opt), 'a single value')
        raise OptionError(f'{path}: expected keys and values (`name: ...`), got {kind}')
    if 'custom_imports' in opt:
        raise OptionError(f'{path}: custom_imports: not supported, option files run no code; install it as a plugin')
    files.setdefault(path, node)
    bases = opt.pop(BASE_KEY, [])
    chain = (*including, path)
    paths = [_base_path(name, chain) for name in (bases if isinstance(bases, list) else [bases])]
    parts = [opt, *(_read(base, chain, files, num_read) for base in reversed(paths))]
    try:
        return functools.reduce(merge, reversed(parts), {}) if bases else opt
    except OptionError as error:
        raise OptionError(f'{path}: {error}') from None


class Sources:
    """Locations of the options of a file: the file, the files that it inherits from, or the command line.

    Args:
        path: the file, which has been read before.
        overrides: as for `load`.
    """

    def __init__(self, path: Path, overrides: Iterable[str] = ()) -> None:
        self.path = path
        self.files: dict[Path, Node] = {}
        read(path, self.files)
        pairs = (text.partition('=') for text in overrides)
        self.overrides = {tuple(keys.split(':')): value for keys, _, value in pairs}

    def explain(self, fault: Fault) -> Fault:
        """Add to a fault the text in the file if YAML does not read it as text, and where it is inherited from."""
        return replace(fault, message=fault.message + self._written(fault) + self._inherited(fault))

    def _written(self, fault: Fault) -> str:
        expected = fault.message.partition(', got')[0]
        node = self._find(fault.where)[1]
        if isinstance(node, ScalarNode) and node.style is not None and _WANTS_NUMBER.search(expected):
            is_number = isinstance(_scalar(node.value), (int, float))
            return ': remove the quotes' if is_number else ''
        if not expected.startswith('expected') or not _WANTS_TEXT.search(expected):
            return ''
        written = node.value if isinstance(node, ScalarNode) and node.style is None else ''
        written = self.overrides.get(tuple(map(str, fault.where)), written)
        variable = _VARIABLE.fullmatch(written)
        written, place = (_value_of(variable), f' in {written}') if variable else (written, '')
        if not written or isinstance(safe_yaml.read_text(written, place), str):
            return ''
        return f", as YAML interprets {written}: put quotes around it{place}, '{written}'"

    def _inherited(self, fault: Fault) -> str:
        """Return where the option of a fault, or the options of a section named in its message, is inherited from."""
        is_section = not fault.unknown_key and isinstance(self._find(fault.where)[1], MappingNode)
        keys = re.findall(r'\w+', fault.message) if is_section else ()
        places = [(*fault.where, key) for key in keys] if is_section else [fault.where]
        found = [(where[-1], *self._find(where)) for where in places]
        found = [(key, path, node) for key, path, node in found if path != self.path]
        if not found:
            return ''
        place = f'{found[0][1]}:{found[0][2].start_mark.line + 1}'
        message = f' ({", ".join(str(key) for key, *_ in found)} inherited from {place})'
        if not is_section and not fault.unknown_key:
            return message
        where = fault.where if is_section else fault.where[:-1]
        section = dotted(where[2:] if where[:1] == (STAGES_KEY,) else where)
        return f'{message}; `{DELETE_KEY}: true` in {section} discards the inherited section'

    def _find(self, where: Where) -> tuple[Path, Node | None]:
        """Return the file that sets the option at `where`, and its node."""
        for place in (where, where[2:]) if where[:1] == (STAGES_KEY,) else (where,):
            for path, content in self.files.items():
                node = safe_yaml.node_at(content, place)
                if node is not None:
                    return path, node
        return self.path, None


def _base_path(name: Any, chain: tuple[Path, ...]) -> Path:
    source = f'{chain[-1]}: {BASE_KEY}'
    expected = f'{source}: expected the path of a .yml file, a list of paths, or the name of a shipped option file'
    if not isinstance(name, str):
        raise OptionError(f'{expected}, got {name!r:.80}')
    if Path(name).is_absolute():
        raise OptionError(f'{source}: expected a path relative to this file, got {name}')
    path = chain[-1].parent / name
    if not _SUFFIX.search(name) or not path.is_file():
        known = known_files()
        shipped = known.get(_SUFFIX.sub('', name))
        if shipped is None and not _SUFFIX.search(name):
            raise OptionError(f'{expected}, got {name!r:.80}{did_you_mean(name, known)}')
        if shipped is None:
            there = [file.name for file in path.parent.glob('*.y*ml')] if path.parent.is_dir() else []
            raise OptionError(f'{source}: no such file: {path}{did_you_mean(path.name, [*there, *known])}')
        path = shipped
    if any(path.samefile(other) for other in chain):
        raise OptionError(f'{source}: inherits from itself: {" -> ".join(map(str, (*chain, path)))}')
    return path


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `changes` over `base` without modifying either.

    Sections are merged key by key; all other values, including lists, are replaced. A section with `_delete_: true`
    replaces the inherited section. Setting one of two `EXCLUSIVE_KEYS` removes the inherited other.
    """
    return _merged(copy.deepcopy(dict(base)), changes, ())


def _merged(base: Any, changes: Any, where: tuple[str, ...]) -> Any:
    if not isinstance(changes, Mapping):
        return copy.deepcopy(changes)
    replaces = changes.get(DELETE_KEY, False)
    if not isinstance(replaces, bool):
        raise OptionError(f'{".".join((*where, DELETE_KEY))}: expected true or false')
    merged = {} if replaces or not isinstance(base, Mapping) else dict(base)
    for key, value in changes.items():
        if value is not None and find_alternative(where, key) not in changes:
            merged.pop(find_alternative(where, key), None)
        if key != DELETE_KEY:
            merged[key] = _merged(merged.get(key), value, (*where, key))
    return merged


def find_alternative(where: Sequence[str | int], key: str) -> str | None:
    """Return the key of the section at `where` that excludes `key`, or None."""
    return _ALTERNATIVES.get((*where, key))


def override(opt: dict[str, Any], text: str) -> None:
    """Apply an override `key:sub=value` to `opt` in place; the value is parsed as YAML, list items are named by index.

    All sections of the path must exist; the last key may be new. The override takes precedence over the values in
    stages and compared networks: `train:total_epochs=1` applies to all of them. A single one is addressed by its index,
    starting at 0: `stages:0:train:total_epochs=1`.

    Raises:
        OptionError: if a section does not exist, or the value is not plain YAML.
    """
    source = f'--force_yml {text}'
    keys, equals, written = text.partition('=')
    steps = [step.strip() for step in keys.split(':')]
    if not equals or not all(steps):
        raise OptionError(f'{source}: expected key:sub=value')
    value = None if written.strip() in ('None', 'none') else safe_yaml.read_value(written, source)
    entries = opt.get(NETWORKS_KEY, opt.get(STAGES_KEY))
    # Networks override only `train`. `name` is the name of the run; stages have names of their own.
    of_all = steps[0] == 'train' if NETWORKS_KEY in opt else steps[0] != STAGES_KEY and steps != ['name']
    entries = entries if of_all and isinstance(entries, list) else []
    overriding = [entry for entry in entries if _overrides(entry, steps, value)]
    for entry in overriding:
        _set(entry, steps, value, source)
    try:
        _set(opt, steps, value, source)
    except OptionError:
        # The section may exist only in entries.
        if not overriding:
            raise


def _overrides(entry: Any, steps: Sequence[str], value: Any) -> bool:
    """Return whether a stage or network sets an option, or removes it by setting its alternative in other units."""
    section = find_at(entry, steps[:-1])
    keys = [steps[-1], find_alternative(steps[:-1], steps[-1]) if value is not None else None]
    is_set = any(find_at(section, [key], _MISSING) is not _MISSING for key in keys)
    return is_set or (isinstance(section, dict) and bool(section.get(DELETE_KEY)))


def _set(opt: dict[str, Any], steps: Sequence[str], value: Any, source: str) -> None:
    """Set the option at `steps`, and remove its alternatives in other units."""
    of_entry = 2 if steps[0] in _ENTRIES_KEYS else 0  # number of steps to a stage or network
    section: Any = opt
    for depth, step in enumerate(steps):
        key: Any = step
        if isinstance(section, list):
            if not step.isdecimal() or int(step) >= len(section):
                raise OptionError(f'{source}: expected a list index from 0 to {len(section) - 1}, got {step}')
            key = int(step)
        elif not isinstance(section, dict):
            raise OptionError(f'{source}: {step} is inside {section!r}, which is neither a section nor a list')
        if depth == len(steps) - 1:
            break
        if isinstance(section, dict) and section.get(key) is None:
            # The entry may not contain a section that the file has.
            is_of_file = of_entry and isinstance(find_at(opt, steps[of_entry : depth + 1]), dict)
            if key not in section and not is_of_file:
                where = ':'.join(steps[:depth]) or 'the file'
                raise OptionError(f'{source}: {where} has no section {key}{did_you_mean(key, section)}')
            section[key] = {}
        section = section[key]
    section[key] = copy.deepcopy(value)  # the file and its entries share no section
    if value is not None and isinstance(section, dict):
        section.pop(find_alternative(steps[of_entry:-1], key), None)


def find_at(value: Any, where: Sequence[str | int], default: Any = None) -> Any:
    """Return the value at these keys and indices below `value`, or the default."""
    for step in where:
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and str(step).isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return default
    return value


def fill_in(opt: dict[str, Any], source: str) -> dict[str, Any]:
    """Substitute environment variables, `${NAME}` or `${NAME:default}`, in options.

    A value that consists only of a variable is parsed as YAML: a number, true, null. Within other text the variable is
    inserted as text. Substituted values are not expanded again.
    OptionError lists every variable that is not set and has no default, and every other kind of template.
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
                faults.append(f'{".".join((*where, key))}: templates are not supported in keys')
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
        yield 'templates are not supported, write the value itself'
    if '${' in _VARIABLE.sub('', text):
        yield f'expected ${{NAME}} or ${{NAME:default}}, got {text[:80]!r}'
    for match in _VARIABLE.finditer(text):
        name, default = match.groups()
        if default is None and name not in os.environ:
            known = did_you_mean(name, os.environ)
            yield f'environment variable {name} is not set{known} (${{{name}:default}} sets a default)'


def _value_of(match: re.Match) -> str:
    name, default = match.groups()
    return os.environ.get(name, default)


def _scalar(text: str) -> Any:
    try:
        value = safe_yaml.read_value(text, 'environment')
    except OptionError:
        return text
    return text if isinstance(value, (dict, list)) else value
