"""Which options a registered class or function takes, found out without running it."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import textwrap
import typing
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from ast_plugin.faults import Fault, Where, faults_of, unknown_key

_UNKNOWN = inspect.Parameter.empty
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
    parameters, is_open = parameters_of(target)
    known = {name: parameter for name, parameter in parameters.items() if name not in given}
    faults = []
    for name, value in arguments.items():
        if name in known:
            faults += _value_faults(known[name], value, (*where, name))
        elif name not in ignored and not is_open:
            faults.append(unknown_key((*where, name), [*known, *ignored]))
    for name, parameter in known.items():
        if parameter.default is _UNKNOWN and name not in arguments and name not in optional and not is_open:
            faults.append(Fault((*where, name), f'required by {getattr(target, "__name__", target)}, but not there'))
    return faults


def _value_faults(parameter: inspect.Parameter, value: Any, where: Where) -> list[Fault]:
    annotation, default = parameter.annotation, parameter.default
    if annotation is _UNKNOWN or isinstance(annotation, str):
        # Then only text, numbers and truth values are told apart: a default of 8 may allow [8, 8].
        if not isinstance(value, (str, bool, int, float)):
            return []
        annotation = next((kind for kind in (bool, str, int, float) if isinstance(default, kind)), Any)
        annotation = float if annotation is int else annotation
    has_config = hasattr(annotation, 'model_config')
    try:
        adapter = TypeAdapter(annotation, config=None if has_config else ConfigDict(arbitrary_types_allowed=True))
    except (PydanticUserError, TypeError, NameError):
        return []
    try:
        # YAML has lists only, and in JSON a list may be a tuple, however strict one is.
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        return faults_of(error, annotation, value, where)
    return []


def parameters_of(target: Callable) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters by name, and whether others are accepted as well."""
    if not inspect.isclass(target):
        return _function_parameters(target, functools.partial(_returned_class_parameters, target))
    # nn.Module's **kwargs take nothing.
    classes = [cls for cls in target.__mro__ if cls is not object and cls.__module__ != 'torch.nn.modules.module']
    return _constructor_parameters([vars(cls)['__init__'] for cls in classes if '__init__' in vars(cls)])


def _constructor_parameters(constructors: list[Callable]) -> tuple[dict[str, inspect.Parameter], bool]:
    if not constructors:
        return {}, False
    inherited = functools.partial(_constructor_parameters, constructors[1:])
    parameters, is_open = _function_parameters(constructors[0], inherited)
    return dict(list(parameters.items())[1:]), is_open  # without self


def _returned_class_parameters(function: Callable) -> tuple[dict[str, inspect.Parameter], bool]:
    """A factory `def AST_T(**options) -> AST` takes what AST takes."""
    returned = None
    with suppress(NameError, TypeError, AttributeError):
        returned = typing.get_type_hints(function).get('return')
    return parameters_of(returned) if inspect.isclass(returned) else ({}, True)


def _function_parameters(function: Callable, rest: Callable) -> tuple[dict[str, inspect.Parameter], bool]:
    """Those of a function; where it passes on its `**kwargs`, with those that `rest` returns."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return {}, True
    with suppress(NameError, AttributeError, SyntaxError, TypeError):  # names may be there for type checkers alone
        signature = inspect.signature(function, eval_str=True)
    parameters = {name: p for name, p in signature.parameters.items() if p.kind in _POSITIONAL_OR_KEYWORD}
    open_names = [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    if not open_names or not _reads(function, open_names[0]):
        return parameters, False
    others, is_open = rest()
    return parameters | {name: p for name, p in others.items() if name not in parameters}, is_open


def _reads(function: Callable, name: str) -> bool:
    """Whether `**name` is used: BasicSR's metrics and SwinIR take `**kwargs` and drop what is in it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return True
    return any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(tree))
