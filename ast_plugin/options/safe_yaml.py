"""Safe YAML parser for plain data: no tags that construct objects, no alias bombs, no duplicate keys.

Numbers follow YAML 1.2 (`1e-4` is a number, `010` is ten, `1:30`, dates and `2024_06_01` are text), except that
thousands may be grouped (`100_000`). Booleans follow YAML 1.1 (`true`, `yes`, `on`), as used in BasicSR's option files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ast_plugin.errors import OptionError

MAX_BYTES = 256 * 1024
# Number of values after expanding all aliases; a file of one kilobyte can expand to billions.
MAX_VALUES = 20_000
MAX_DEPTH = 50

_TAG = 'tag:yaml.org,2002:'
_MERGE_TAG = f'{_TAG}merge'
_INT = re.compile(r'^[-+]?(?:[0-9]+|[0-9]{1,3}(?:_[0-9]{3})+|0o[0-7]+|0x[0-9a-fA-F]+)$')
_FLOAT = re.compile(
    r'^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$'
)
_BOOL = re.compile(r'^(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$')
_NULL = re.compile(r'^(?:~|null|Null|NULL|)$')
_TRUE = {'yes', 'true', 'on'}
_CONTROL = re.compile(r'[\x00-\x1f\x7f]')
_BACKSLASH = 'in double quotes a backslash starts an escape sequence: write paths with / or in single quotes'


class _Loader(yaml.SafeLoader):
    """Loader that composes nodes. `_Builder` converts them to values, so that no constructor of PyYAML runs."""

    yaml_implicit_resolvers: dict = {}


# The order matters where patterns overlap: int is tried before float.
_Loader.add_implicit_resolver(f'{_TAG}int', _INT, list('-+0123456789'))
_Loader.add_implicit_resolver(f'{_TAG}float', _FLOAT, list('-+0123456789.'))
_Loader.add_implicit_resolver(f'{_TAG}bool', _BOOL, list('yYnNtTfFoO'))
_Loader.add_implicit_resolver(f'{_TAG}null', _NULL, ['~', 'n', 'N', ''])
_Loader.add_implicit_resolver(_MERGE_TAG, re.compile(r'^<<$'), ['<'])


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes text which `_Loader` would not read as text."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


def write_text(value: Any) -> str:
    """Format plain values as YAML that `read_text` parses to equal values."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)


def read_file(path: Path) -> Any:
    """Read a YAML file of at most 256 KiB; see `read_text`."""
    return build(compose_file(path), str(path))


def compose_file(path: Path) -> Node | None:
    """Read a YAML file into nodes, which keep line numbers and quoting style."""
    try:
        with open(path, 'rb') as stream:
            content = stream.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise OptionError(f'{path}: expected an option file, got a folder') from None
    except OSError as error:
        raise OptionError(f'{path}: cannot be read: {error.strerror}') from None
    if len(content) > MAX_BYTES:
        raise OptionError(f'{path}: expected an option file of at most {MAX_BYTES // 1024} KiB, got a larger file')
    try:
        text = content.decode('utf-8-sig')
    except UnicodeDecodeError:
        raise OptionError(f'{path}: expected YAML text in UTF-8, got other data') from None
    return _compose(text, str(path))


def node_at(node: Node | None, where: Sequence[str | int]) -> Node | None:
    """Return the node at these keys and indices below a node, or None."""
    for step in where:
        items: dict[Any, Node] = {}
        if isinstance(node, MappingNode):
            items = {key.value: value for key, value in node.value}
        elif isinstance(node, SequenceNode):
            items = dict(enumerate(node.value))
        if step not in items:
            return None
        node = items[step]
    return node


def read_text(text: str, source: str) -> Any:
    """Parse YAML into dicts, lists, strings, numbers, booleans and None; `source` is its name in messages.

    Raises:
        OptionError: if the text is not YAML, or contains more than plain data.
    """
    return build(_compose(text, source), source)


def read_value(text: str, source: str) -> Any:
    """Parse a value of the command line or environment: as `read_text`, but ` #` starts no comment in unquoted text."""
    value, text = read_text(text, source), text.strip()
    is_plain = isinstance(value, str) and not text.startswith(("'", '"', '!'))
    return text if is_plain or text.startswith('#') else value


def build(node: Node | None, source: str) -> Any:
    """Convert a node of `compose_file` to its value; see `read_text`."""
    return None if node is None else _Builder(source).build(node, 0)


def _compose(text: str, source: str) -> Node | None:
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, 'problem_mark', None)
        place = f':{mark.line + 1}' if mark else ''
        raise OptionError(f'{source}{place}: not YAML: {_reason(error)}{_hard_space(text)}') from None
    except (ValueError, OverflowError) as error:  # PyYAML passes any code point, such as \UDEADBEEF, to chr()
        raise OptionError(f'{source}: not YAML: {error} ({_BACKSLASH})') from None
    except RecursionError:
        raise OptionError(f'{source}: nested deeper than {MAX_DEPTH} levels') from None


def _hard_space(text: str) -> str:
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip(' ').startswith('\u00a0'):
            return f' (line {number} starts with a non-breaking space, U+00A0: use ordinary spaces)'
    return ''


def _reason(error: yaml.YAMLError) -> str:
    reason = getattr(error, 'problem', None) or getattr(error, 'reason', None) or str(error)
    if "'\\t'" in reason:
        reason += ' (indent with spaces, not tabs)'
    elif 'escape' in reason:
        reason += f' ({_BACKSLASH})'
    elif any(words in reason for words in ('mapping values', 'cannot start any token', 'undefined alias')):
        reason += " (put quotes around text that contains ': ' or starts with one of * & ! % @ `)"
    return ' '.join(reason.split())


class _Builder:
    """Converter from nodes to values. Aliases become separate copies, so that changing one does not change others."""

    def __init__(self, source: str):
        self.source = source
        self.num_values = 0

    def build(self, node: Node, depth: int) -> Any:
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise self._error(node, f'expands to more than {MAX_VALUES} values through aliases')
        if depth > MAX_DEPTH:
            raise self._error(node, f'nested deeper than {MAX_DEPTH} levels (does an alias contain itself?)')
        if isinstance(node, MappingNode) and node.tag == f'{_TAG}map':
            return self._mapping(node, depth)
        if isinstance(node, SequenceNode) and node.tag == f'{_TAG}seq':
            return [self.build(item, depth + 1) for item in node.value]
        if isinstance(node, ScalarNode):
            return self._scalar(node)
        raise self._tag_error(node)

    def _mapping(self, node: MappingNode, depth: int) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE_TAG:
                merged = {**self._merged(value_node, depth), **merged}
                continue
            key = self.build(key_node, depth + 1)
            if not isinstance(key, str):
                message = f'keys must be text, got {key!r}'
                if isinstance(key_node, ScalarNode):
                    message += f", as YAML interprets {key_node.value}: put quotes around it, '{key_node.value}'"
                raise self._error(key_node, message)
            if key in own:
                raise self._error(key_node, f'duplicate key {key}')
            own[key] = self.build(value_node, depth + 1)
        return {**merged, **own}

    def _merged(self, node: Node, depth: int) -> dict[str, Any]:
        parts = node.value if isinstance(node, SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for part in parts:
            if not isinstance(part, MappingNode):
                raise self._error(node, '<<: expected a mapping, or a list of mappings')
            merged = {**self.build(part, depth + 1), **merged}
        return merged

    def _scalar(self, node: ScalarNode) -> Any:
        kind = node.tag.removeprefix(_TAG)
        value: str = node.value
        if node.style == '"' and _CONTROL.search(value):
            raise self._error(node, f'{value!r} contains {_CONTROL.search(value).group()!r}: {_BACKSLASH}')
        try:
            if kind == 'str' or node.tag == _MERGE_TAG:
                return value
            if kind == 'null' and _NULL.match(value):
                return None
            if kind == 'bool' and _BOOL.match(value):
                return value.lower() in _TRUE
            if kind == 'int':
                return int(value, 0) if 'x' in value or 'o' in value else int(value)
            if kind == 'float':
                return float(value.lower().replace('.inf', 'inf').replace('.nan', 'nan'))
        except ValueError:
            raise self._error(node, f'cannot be read as {kind}: {value[:40]!r}') from None
        raise self._tag_error(node)

    def _tag_error(self, node: Node) -> OptionError:
        tag = node.tag.replace(_TAG, '!!')
        what = 'option files contain only plain values, put quotes around text that starts with !'
        return self._error(node, f'the tag {tag} is not supported: {what}')

    def _error(self, node: Node, message: str) -> OptionError:
        return OptionError(f'{self.source}:{node.start_mark.line + 1}: {message}')
