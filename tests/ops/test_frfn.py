"""Feed-forward networks against a second writing of the equations."""

import math

import pytest
import torch

from ast_plugin import ops


@pytest.fixture(autouse=True, params=['reference', 'auto'])
def _backend(request):
    """The equations hold for the plain reference, and for whatever is faster."""
    with ops.use_backend(request.param):
        yield


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def exact_gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def slow_conv3x3(x, weight, bias):
    """NHWC, zero padded; weight [out, in or 1, 3, 3], depthwise where its second size is 1 and in is not."""
    B, H, W, C = x.shape
    padded = torch.zeros(B, H + 2, W + 2, C, dtype=x.dtype)
    padded[:, 1:-1, 1:-1] = x
    out = 0 if bias is None else bias
    for dy in range(3):
        for dx in range(3):
            tap = padded[:, dy : dy + H, dx : dx + W]
            w = weight[:, :, dy, dx]
            out = out + (tap @ w.T if w.shape[1] == C else tap * w[:, 0])
    return out


@pytest.mark.parametrize('size', [(1, 1), (1, 5), (7, 3), (4, 4)])
def test_frfn_follows_the_equation(size):
    C, h = 8, 12
    x = draw(2, *size, C)
    partial, expand = draw(C // 4, C // 4, 3, 3), (draw(2 * h, C), draw(2 * h))
    depthwise, project = (draw(h, 1, 3, 3), draw(h)), (draw(C, h), draw(C))
    a = torch.cat([slow_conv3x3(x[..., : C // 4], partial, None), x[..., C // 4 :]], dim=-1)
    u = exact_gelu(a @ expand[0].T + expand[1])
    gated = exact_gelu(slow_conv3x3(u[..., :h], *depthwise)) * u[..., h:]
    want = gated @ project[0].T + project[1]
    got = ops.frfn(x, partial, expand, depthwise, project)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    leaves = [x, partial, *expand, *depthwise, *project]
    target = torch.randn_like(want)
    for ours, theirs in zip(
        torch.autograd.grad((got * target).sum(), leaves),
        torch.autograd.grad((want * target).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_leff_and_mlp_follow_their_equations():
    x, expand = draw(2, 3, 5, 4), (draw(6, 4), draw(6))
    depthwise, project = (draw(6, 1, 3, 3), draw(6)), (draw(4, 6), draw(4))
    u = exact_gelu(x @ expand[0].T + expand[1])
    torch.testing.assert_close(ops.mlp(x, expand, project), u @ project[0].T + project[1])
    want = exact_gelu(slow_conv3x3(u, *depthwise)) @ project[0].T + project[1]
    torch.testing.assert_close(ops.leff(x, expand, depthwise, project), want)


def test_gradcheck():
    x, partial = draw(1, 2, 3, 4), draw(1, 1, 3, 3)
    expand, depthwise, project = (draw(4, 4), draw(4)), (draw(2, 1, 3, 3), draw(2)), (draw(4, 2), draw(4))
    assert torch.autograd.gradcheck(lambda x, p: ops.frfn(x, p, expand, depthwise, project), (x, partial))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precisions_stay_near_float64(dtype, tolerances):
    parts = [
        draw(1, 5, 6, 8),
        draw(2, 2, 3, 3),
        draw(24, 8),
        draw(24),
        draw(12, 1, 3, 3),
        draw(12),
        draw(8, 12),
        draw(8),
    ]

    def run(parts):
        x, partial, *rest = parts
        return ops.frfn(x, partial, tuple(rest[:2]), tuple(rest[2:4]), tuple(rest[4:]))

    want, got = run(parts), run([part.detach().to(dtype) for part in parts])
    assert got.dtype == dtype
    assert (got.double() - want).norm() / want.norm() < tolerances[dtype]
