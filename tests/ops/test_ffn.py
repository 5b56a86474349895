"""Feed-forward networks against an independent implementation of the equations."""

import math
import re

import pytest
import torch

from ast_plugin.errors import ShapeError

from .op_cases import check_definition, feed_forward_case

pytestmark = pytest.mark.usefixtures('_backend')


def exact_gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def slow_conv3x3(x, weight, bias=0):
    """Zero-padded NHWC convolution; weight [out, in or 1, 3, 3], depthwise if its second dimension is 1 and in > 1."""
    B, H, W, C = x.shape
    padded = torch.zeros(B, H + 2, W + 2, C, dtype=x.dtype)
    padded[:, 1:-1, 1:-1] = x
    out = bias
    for dy in range(3):
        for dx in range(3):
            tap = padded[:, dy : dy + H, dx : dx + W]
            w = weight[:, :, dy, dx]
            out = out + (tap @ w.T if w.shape[1] == C else tap * w[:, 0])
    return out


def written_out(x, expand, expand_bias, project, project_bias, depthwise=None, depthwise_bias=None, partial_conv=None):
    if partial_conv is not None:
        x = torch.cat([slow_conv3x3(x[..., :2], partial_conv), x[..., 2:]], dim=-1)
    u = exact_gelu(x @ expand.T + expand_bias)
    if depthwise is not None:
        gate = u[..., 12:] if partial_conv is not None else 1
        u = exact_gelu(slow_conv3x3(u[..., :12], depthwise, depthwise_bias)) * gate
    return u @ project.T + project_bias


@pytest.mark.parametrize('kind', ['frfn', 'leff', 'mlp'])
@pytest.mark.parametrize('size', [(1, 1), (1, 5), (7, 3), (4, 4)])
def test_networks_follow_their_equations(kind, size):
    check_definition(feed_forward_case(kind, size, residual=False), lambda tensors: written_out(**tensors))


@pytest.mark.parametrize(
    ('name', 'shape', 'expected'),
    [
        ('expand', (25, 8), [24, 8]),
        ('expand', (24, 6), [24, 8]),
        ('expand_bias', (13,), [24]),
        ('project', (6, 12), [8, 12]),
        ('depthwise', (9, 1, 3, 3), [12, 1, 3, 3]),
        ('partial_conv', (4, 2, 3, 3), [2, 2, 3, 3]),
    ],
)
def test_frfn_names_wrong_sizes(name, shape, expected):
    function, tensors = feed_forward_case('frfn', (4, 4))
    with pytest.raises(ShapeError, match=re.escape(f'{name}: expected shape {expected}, got {list(shape)}')):
        function(**{**tensors, name: torch.zeros(shape).double()})
