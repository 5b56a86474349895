"""Which options a registered class or function takes, found out without running it."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticUserError

from ast_plugin.faults import Fault, Where, shown, unknown_key

_UNKNOWN = inspect.Parameter.empty
_WORDS = {
    int: 'a whole number',
    float: 'a number',
    bool: 'true or false',
    str: 'text',
    dict: 'a mapping',
    list: 'a list',
    tuple: 'a list',
    type(None): 'nothing',
}
_POSITIONAL_OR_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def argument_faults(
    target: Callable,
    arguments: Mapping[str, Any],
    where: Where,
    given: Collection[str] = (),
    ignored: Collection[str] = ('type',),
    optional: Collection[str] = (),
) -> list[Fault]:
    """Compare options with the signature of what they will be passed to as keyword arguments.

    Args:
        target: class or function.
        arguments: the options at `where`.
        given: arguments that the caller passes besides, which an option file must not.
        ignored: options that are taken out before the call.
        optional: arguments that the caller passes if the options do not.
    """
    parameters, is_open = _parameters(target)
    if parameters is None:
        return []
    known = {name: parameter for name, parameter in parameters.items() if name not in given}
    faults = []
    for name, value in arguments.items():
        if name in ignored:
            continue
        if name in known:
            complaint = _type_complaint(known[name], value)
            if complaint:
                faults.append(Fault((*where, name), complaint))
        elif not is_open:
            faults.append(unknown_key((*where, name), [*known, *ignored]))
    for name, parameter in known.items():
        if parameter.default is _UNKNOWN and name not in arguments and name not in optional and not is_open:
            faults.append(Fault((*where, name), f'required by {_name(target)}, but not there'))
    return faults


def argument_model(target: type) -> type[BaseModel]:
    """The arguments of a class as a pydantic model, described by its docstring's `Args:`; `self` is left out."""
    parameters, _ = _parameters(target)
    described = _described_arguments(inspect.getdoc(target) or '')
    fields: dict[str, Any] = {}
    for name, parameter in (parameters or {}).items():
        default = ... if parameter.default is _UNKNOWN else parameter.default
        fields[name] = (parameter.annotation, Field(default, description=described.get(name)))
    return create_model(target.__name__, **fields)


def _described_arguments(docstring: str) -> dict[str, str]:
    """What a docstring in Google's style says of each argument, in a line."""
    block = re.search(r'^Args:\n((?:[ ]+.*\n?|\n)*)', docstring, re.MULTILINE)
    entries = re.findall(r'^ {4}([\w, ]+): (.*(?:\n {5,}.*)*)', block[1] if block else '', re.MULTILINE)
    return {name: ' '.join(text.split()) for names, text in entries for name in names.split(', ')}


def _parameters(target: Callable) -> tuple[dict[str, inspect.Parameter] | None, bool]:
    """The parameters by name, and whether others are accepted as well; (None, True) when they cannot be told."""
    if inspect.isclass(target):
        classes = [cls for cls in inspect.getmro(target) if '__init__' in vars(cls)]
        # nn.Module's **kwargs take nothing.
        return _class_parameters([cls for cls in classes if cls.__module__ != 'torch.nn.modules.module'])
    return _function_parameters(target, follow=_returned_class(target))


def _class_parameters(classes: list[type]) -> tuple[dict[str, inspect.Parameter] | None, bool]:
    if not classes or classes[0] is object:
        return {}, False
    inherited = functools.partial(_class_parameters, classes[1:])
    parameters, is_open = _function_parameters(vars(classes[0])['__init__'], follow=inherited)
    if parameters:
        parameters.pop(next(iter(parameters)))  # self
    return parameters, is_open


def _returned_class(function: Callable) -> Callable | None:
    """A factory `def AST_T(**options) -> AST` takes what AST takes."""
    try:
        returned = typing.get_type_hints(function).get('return')
    except (NameError, TypeError, AttributeError):
        return None
    return functools.partial(_parameters, returned) if inspect.isclass(returned) else None


def _function_parameters(function: Callable, follow: Callable | None) -> tuple[dict | None, bool]:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None, True
    with suppress(NameError, AttributeError, SyntaxError, TypeError):  # names may be there for type checkers alone
        signature = inspect.signature(function, eval_str=True)
    parameters = {name: p for name, p in signature.parameters.items() if p.kind in _POSITIONAL_OR_KEYWORD}
    rest = [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    if not rest or not _reads(function, rest[0]):
        return parameters, False
    passed_on, is_open = follow() if follow is not None else (None, True)
    # Own parameters first: the caller takes `self` from the front.
    return parameters | {name: p for name, p in (passed_on or {}).items() if name not in parameters}, is_open


def _reads(function: Callable, name: str) -> bool:
    """Whether `**name` is used: BasicSR's metrics and SwinIR take `**kwargs` and drop what is in it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return True
    return any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(tree))


def _type_complaint(parameter: inspect.Parameter, value: Any) -> str | None:
    annotation = parameter.annotation
    if annotation is _UNKNOWN or isinstance(annotation, str):
        return _default_complaint(parameter.default, value)
    try:
        adapter = TypeAdapter(
            annotation, config=None if _has_config(annotation) else ConfigDict(arbitrary_types_allowed=True)
        )
    except (PydanticUserError, TypeError, NameError):
        return None
    # YAML has lists only; a tuple's annotation means one.
    for candidate in (value, _tuples(value)):
        try:
            adapter.validate_python(candidate, strict=True)
            return None
        except ValidationError:
            continue
    return f'expected {_expected(annotation)}, got {shown(value)}'


def _default_complaint(default: Any, value: Any) -> str | None:
    """Without annotations only text, numbers and truth values are told apart: a default of 8 may allow [8, 8]."""
    if default is None or default is _UNKNOWN or not isinstance(value, (str, bool, int, float)):
        return None
    for kinds, expected in (((bool,), 'true or false'), ((str,), 'text'), ((int, float), 'a number')):
        if isinstance(default, kinds):
            is_right = isinstance(value, kinds) and (kinds[0] is bool or not isinstance(value, bool))
            return None if is_right else f'expected {expected}, got {shown(value)}'
    return None


def _has_config(annotation: Any) -> bool:
    return inspect.isclass(annotation) and hasattr(annotation, 'model_config')


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _expected(annotation: Any) -> str:
    """An annotation in the words of an option file."""
    if isinstance(annotation, type) and annotation in _WORDS:
        return _WORDS[annotation]
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ' or '.join(shown(part) if not isinstance(part, str) else part for part in parts)
    if origin in (typing.Union, types.UnionType):
        # A tensor cannot stand in an option file.
        return ' or '.join(dict.fromkeys(_expected(part) for part in parts if not _is_tensor(part)))
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        items = ', '.join(dict.fromkeys(_expected(part) for part in parts if part is not ...))
        length = f' of {len(parts)}' if origin is tuple and ... not in parts else ''
        return f'a list{length}, each item {items}'
    return inspect.formatannotation(annotation)


def _is_tensor(annotation: Any) -> bool:
    return getattr(annotation, '__name__', '') == 'Tensor'


def _name(target: Callable) -> str:
    return getattr(target, '__name__', str(target))
