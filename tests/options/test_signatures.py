"""What constructors and functions take, as far as signatures and sources tell."""

import pytest
from torch import Tensor, nn

from ast_plugin.options.validation import argument_faults

UNKNOWN = 'unknown key, did you mean '


class Open(nn.Module):
    def __init__(self, size, depth=3, **kwargs):
        super().__init__()


class Child(Open):
    def __init__(self, width: int = 1, **kwargs):
        super().__init__(**kwargs)


def factory(scale=1, **kwargs) -> Open:
    return Open(**kwargs)


def forwards(**kwargs):
    return dict(**kwargs)


def typed(value: float | Tensor = 1.0, pair: tuple[int, int] = (1, 2)):
    return value, pair


@pytest.mark.parametrize(
    ('target', 'arguments', 'expected'),
    [
        (Open, {'size': 1, 'dept': 1}, [f'dept: {UNKNOWN}depth?']),
        (Open, {}, ['size: required by Open, but not there']),
        (Child, {'size': 1, 'width': 2, 'depth': 3}, []),
        (Child, {'size': 1, 'widht': 2}, [f'widht: {UNKNOWN}width?']),
        (Child, {'size': 1, 'width': 'x'}, ["width: expected a whole number, got the text 'x'"]),
        (Child, {'size': 1, 'width': True}, ['width: expected a whole number, got true']),
        (factory, {'size': 1, 'scale': 2}, []),
        (factory, {'size': 1, 'scael': 2}, [f'scael: {UNKNOWN}scale?']),
        (forwards, {'anything': 1}, []),
        (Open, {'size': 1, 'depth': [1, 2]}, []),
        (typed, {'value': 'x'}, ["value: expected a number, got the text 'x'"]),
        (typed, {'pair': [1, 2], 'value': 3}, []),
        (typed, {'pair': [1]}, ['pair.1: required, but not there']),
    ],
)
def test_signatures(target, arguments, expected):
    assert sorted(str(fault) for fault in argument_faults(target, arguments, ())) == sorted(expected)
