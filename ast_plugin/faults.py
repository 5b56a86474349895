"""Errors in an option file, one line each, converted from pydantic's error reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ast_plugin.errors import did_you_mean

Where = tuple[str | int, ...]

_EXPECTED = {
    'int_type': 'a whole number',
    'int_from_float': 'a whole number',
    'int_parsing': 'a whole number',
    'float_type': 'a number',
    'float_parsing': 'a number',
    'finite_number': 'a finite number',
    'bool_type': 'true or false',
    'bool_parsing': 'true or false',
    'string_type': 'text',
    'dict_type': 'a mapping of keys to values',
    'model_type': 'a mapping of keys to values',
    'model_attributes_type': 'a mapping of keys to values',
    'list_type': 'a list',
    'tuple_type': 'a list',
    'sequence_type': 'a list',
    'none_required': 'null',
    'greater_than': 'more than {gt}',
    'greater_than_equal': '{ge} or more',
    'less_than': 'less than {lt}',
    'less_than_equal': '{le} or less',
    'literal_error': '{expected}',
    'enum': '{expected}',
    'string_too_short': 'non-empty text',
    'string_pattern_mismatch': 'a valid folder name (without / or \\, not starting with a dot or blank)',
    'too_short': '{min_length} items or more',
    'too_long': '{max_length} items or fewer',
}


@dataclass(frozen=True)
class Fault:
    """Error in an option file: the key and the message."""

    where: Where
    message: str
    unknown_key: bool = False

    def __str__(self) -> str:
        return f'{dotted(self.where)}: {self.message}'


def dotted(where: Where) -> str:
    """Format `('a', 0, 'b')` as `a.0.b`; `--force_yml` takes the same with colons instead of dots."""
    return '.'.join(map(str, where)) or 'top level'


def shown(value: Any) -> str:
    """Format a value for a message: shortened, and with its type if that could be ambiguous."""
    if value is None:
        return 'nothing'
    if isinstance(value, bool):
        return 'true' if value else 'false'
    if isinstance(value, dict):
        return 'a mapping'
    text = repr(value)
    text = text if len(text) <= 60 else f'{text[:57]}...'
    return f'the text {text}' if isinstance(value, str) else f'the list {text}' if isinstance(value, list) else text


def unknown_key(where: Where, known: Sequence[str]) -> Fault:
    """Return the fault for an unknown key."""
    return Fault(where, f'unknown key{did_you_mean(str(where[-1]), known)}', unknown_key=True)


def faults_of(error: ValidationError, model: Any, value: Any, prefix: Where = ()) -> list[Fault]:
    """Convert a pydantic error to one fault per key.

    Args:
        error: raised by `model` when validating `value`.
        model: pydantic model or annotation; its names are used for suggestions.
        prefix: location of `value` in the file.
    """
    faults: dict[Where, Fault] = {}
    reports = error.errors(include_url=False)
    # A signature may accept a tensor, but an option file cannot contain one.
    for report in [each for each in reports if each['type'] != 'needs_python_object'] or reports:
        where = _keys_only(report['loc'], value, report['type'] == 'missing')
        place = (*prefix, *where)
        if report['type'] == 'union_tag_invalid':
            key = report['ctx']['discriminator'].strip("'")
            got = report['input'].get(key)
            expected = f'expected {report["ctx"]["expected_tags"]}, got {shown(got)}'
            place, report = (*place, key), {**report, 'expected': expected}
        if report['type'] == 'extra_forbidden':
            fault = unknown_key(place, list(_section_at(model, report['loc'][:-1]).model_fields))
        else:
            fault = Fault(place, report.get('expected') or _message(report))
        faults[place] = _joined(faults[place], fault) if place in faults else fault
    # For a union, report only the most specific location; type errors of the other members are not helpful.
    return [
        fault
        for place, fault in faults.items()
        if not any(other[: len(place)] == place for other in faults if other != place)
    ]


def _message(report: dict[str, Any]) -> str:
    kind = report['type']
    if kind == 'missing':
        return 'required, but missing'
    expected = _EXPECTED.get(kind)
    if expected is None:
        got = '' if isinstance(report['input'], dict) else f' (got {shown(report["input"])})'
        return report['msg'].removeprefix('Value error, ') + got
    context = report.get('ctx', {})
    limits = {name: f'{value:g}' if isinstance(value, float) else value for name, value in context.items()}
    return f'expected {expected.format(**limits)}, got {shown(report["input"])}'


def _joined(first: Fault, second: Fault) -> Fault:
    """Join the errors of the members of a union: `expected A or B, got X`."""
    expected, comma, got = first.message.partition(', got')
    other = second.message.partition(', got')[0].removeprefix('expected ')
    if not comma or not second.message.startswith('expected ') or other in expected:
        return first
    return Fault(first.where, f'{expected} or {other}{comma}{got}')


def _keys_only(loc: Where, value: Any, is_missing: bool) -> Where:
    """Return `loc` without the names of union members that pydantic inserts between the keys."""
    where: list[str | int] = []
    for number, step in enumerate(loc):
        if (isinstance(value, dict) and step in value) or (isinstance(value, list) and step in range(len(value))):
            where.append(step)
            value = value[step]
        elif is_missing and number == len(loc) - 1:
            where.append(step)
    return tuple(where)


def _section_at(model: Any, loc: Where) -> type[BaseModel]:
    """Return the model of the section at `loc` below `model`; members of tagged unions are named by their tags."""
    current = _models_in(model)
    for step in loc:
        for member in current:
            fields = member.model_fields
            if step in fields:
                current = _models_in(fields[step].annotation) or current
                break
            if 'type' in fields and step in get_args(fields['type'].annotation):
                current = [member]
                break
    return current[0]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the models contained in annotations such as `Train | None`, `dict[str, Dataset]` or `list[Stage]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for candidate in get_args(annotation) for model in _models_in(candidate)]
