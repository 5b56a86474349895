"""Feed-forward networks against an independent implementation of the equations."""

import math
import re

import pytest
import torch

from ast_plugin import ops
from ast_plugin.errors import ShapeError

from .op_cases import as_leaves, feed_forward_case, relative_error


@pytest.fixture(autouse=True, params=['reference', 'auto'])
def _backend(request):
    """Run a test with the reference and with the fast backends."""
    with ops.use_backend(request.param):
        yield


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
    function, tensors = feed_forward_case(kind, size, residual=False)
    leaves = as_leaves(tensors)
    got, want = function(**leaves), written_out(**leaves)
    target = torch.randn_like(want)
    gradients = [torch.autograd.grad((output * target).sum(), list(leaves.values())) for output in (got, want)]
    for ours, theirs in zip((got, *gradients[0]), (want, *gradients[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_frfn_gradcheck():
    function, tensors = feed_forward_case('frfn', (2, 3), batch=1, dim=4, hidden=2, residual=False)
    leaves = as_leaves(tensors)
    assert torch.autograd.gradcheck(
        lambda x, partial_conv: function(**{**leaves, 'x': x, 'partial_conv': partial_conv}),
        (leaves['x'], leaves['partial_conv']),
    )


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_frfn_in_lower_precision(dtype, tolerances):
    function, tensors = feed_forward_case('frfn', (5, 6), residual=False)
    got = function(**{name: tensor.to(dtype) for name, tensor in tensors.items()})
    assert got.dtype == dtype
    assert relative_error(got, function(**tensors)) < tolerances[dtype]


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
