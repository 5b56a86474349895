"""Checks of the sizes and choices that blocks and networks are built with."""

from collections.abc import Mapping
from numbers import Integral

from ast_plugin.errors import OptionError


def check_choice(key: str, value: str, choices: Mapping[str, object]) -> None:
    """See that a value is one of those there are.

    Raises:
        OptionError: otherwise, naming them.
    """
    if value not in choices:
        raise OptionError(f'{key} must be one of {", ".join(choices)}, not {value!r}')


def check_counts(**counts: int) -> None:
    """See that numbers of things are whole and 1 or more.

    Raises:
        OptionError: otherwise, naming the first that is not.
    """
    for key, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise OptionError(f'{key} must be a whole number of 1 or more, not {value!r}')
