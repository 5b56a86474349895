"""Tests of all losses: known values, gradients, half precision, autocast, weights, invalid input."""

import math

import pytest
import torch

from ast_plugin.errors import OptionError, ShapeError
from ast_plugin.losses import BINOMIAL, ASTCharbonnierLoss, EdgeLoss, FFTLoss, PSNRLoss, TVLoss, _blur, laplacian

LOSSES = [ASTCharbonnierLoss, EdgeLoss, FFTLoss, PSNRLoss, TVLoss]


def images(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(shape, dtype=torch.float64).to(dtype), torch.rand(shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize('loss', LOSSES)
def test_gradient_at_any_size(loss):
    for shape in ((1, 3, 1, 1), (2, 3, 5, 1), (1, 1, 8, 8)):
        pred, target = images(*shape)
        value = loss()(pred.requires_grad_(), target, some_option_of_basicsr=1)
        value.backward()
        assert value.shape == () and torch.isfinite(value) and torch.isfinite(pred.grad).all()
        torch.testing.assert_close(loss(loss_weight=0.25)(pred, target), 0.25 * value)
    pred, target = images(2, 3, 5, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss()(x, target), pred.requires_grad_())


@pytest.mark.parametrize('loss', LOSSES)
def test_precision_is_at_least_float32(loss):
    for dtype in (torch.float16, torch.bfloat16):
        pair = images(1, 3, 64, 64, dtype=dtype)
        value = loss()(*pair)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss()(*(each.float() for each in pair)), rtol=1e-6, atol=1e-7)
    pair = images(1, 3, 12, 10)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        value = loss()(*pair)
    assert torch.equal(value, loss()(*pair))


SQUARE, PLANES = (1, 3, 4, 4), (3, 4, 4)


@pytest.mark.parametrize(
    ('loss', 'shapes', 'told'),
    [
        *((loss(), (SQUARE, (1, 3, 4, 5)), r'\(1, 3, 4, 4\).*\(1, 3, 4, 5\)') for loss in LOSSES[:4]),
        (ASTCharbonnierLoss(), (SQUARE, (1, 1, 4, 4)), 'the same shape'),
        *((loss(), (SQUARE, SQUARE, (1, 1, 3, 3)), 'weights must broadcast') for loss in LOSSES),
        (EdgeLoss(), (PLANES, PLANES), 'B, C, H, W'),
        (PSNRLoss(), (PLANES, PLANES), 'B, C, H, W'),
        (TVLoss(), (PLANES,), 'B, C, H, W'),
        (PSNRLoss(toY=True), ((1, 1, 4, 4), (1, 1, 4, 4)), 'RGB'),
    ],
)
def test_bad_images_are_rejected(loss, shapes, told):
    with pytest.raises(ShapeError, match=told):
        loss(*map(torch.rand, shapes))


def test_bad_options_are_rejected():
    for loss, options in [
        (ASTCharbonnierLoss, {'reduction': 'avg'}),
        (PSNRLoss, {'reduction': 'sum'}),
        (TVLoss, {'reduction': 'none'}),
        (FFTLoss, {'norm': 'none'}),
    ]:
        with pytest.raises(OptionError, match='must be'):
            loss(**options)


@pytest.mark.parametrize('loss', LOSSES)
def test_constant_and_zero_weights(loss):
    pred, target = images(1, 3, 6, 5)
    constant = 1.0 if loss is FFTLoss else 3.0  # whose weights multiply the error
    torch.testing.assert_close(loss()(pred, target, torch.full((1, 1, 6, 5), constant)), loss()(pred, target))
    weight = torch.ones(1, 1, 6, 5)
    weight[..., 3:, :] = 0
    changed = pred.clone()
    changed[..., 5, :] += 1 if loss is not EdgeLoss else 0
    torch.testing.assert_close(loss()(changed, target, weight), loss()(pred, target, weight))


def value(loss, pred, target=None):
    target = torch.zeros_like(pred) if target is None else target
    return loss(pred, target).item()


def test_known_values():
    pair = torch.tensor([0.0, 0.3]).view(1, 1, 1, 2)
    assert value(ASTCharbonnierLoss(), pair) == pytest.approx((1e-3 + math.sqrt(0.09 + 1e-6)) / 2, rel=1e-6)
    ramp = torch.arange(12.0).view(1, 1, 3, 4)
    assert value(TVLoss(), ramp) == 4 + 1
    assert value(TVLoss(reduction='sum'), ramp) == 8 * 4 + 9 * 1
    assert value(TVLoss(), torch.ones(1, 3, 4, 4)) == 0
    dot = torch.zeros(1, 1, 4, 4)
    dot[..., 0, 0] = 0.5
    assert value(FFTLoss(), dot) == pytest.approx(0.25)  # all real parts are 0.5, all imaginary parts 0
    assert value(FFTLoss(norm='ortho'), dot) == pytest.approx(0.25 / 4)
    pred = torch.tensor([0.1, 0.01]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    assert value(PSNRLoss(), pred) == pytest.approx(-(20 + 40) / 2, abs=1e-3)
    assert value(PSNRLoss(toY=True), pred[:1]) == pytest.approx(20 * math.log10(0.1 * 219 / 255), abs=1e-3)
    assert value(PSNRLoss(), pred, pred) == pytest.approx(-80)
    for loss in (ASTCharbonnierLoss, EdgeLoss, FFTLoss):
        values = loss(reduction='none')(pred, torch.zeros_like(pred))
        assert value(loss(reduction='sum'), pred) == pytest.approx(values.sum().item())
        assert value(loss(), pred) == pytest.approx(values.mean().item())


def test_blur_and_laplacian_known_values():
    dot = torch.zeros(1, 1, 9, 9)
    dot[..., 4, 4] = 1
    torch.testing.assert_close(_blur(dot)[0, 0, 4, 2:7], 0.4 * torch.tensor(BINOMIAL))
    torch.testing.assert_close(laplacian(torch.full((1, 2, 8, 8), 0.7))[..., 2:6, 2:6], torch.zeros(1, 2, 4, 4))
    # Computed by hand: the blurred dot is 0.05, 0.4, 0.05 at even positions per axis, doubled, then blurred again.
    coarse = 2 * (0.05 * 0.05 + 0.4 * 0.4 + 0.05 * 0.05)
    assert laplacian(dot)[0, 0, 4, 4].item() == pytest.approx(1 - coarse**2, rel=1e-5)


def test_edge_loss_sees_edges_only():
    pred, loss = torch.rand(1, 3, 16, 16), EdgeLoss(reduction='none')
    inner = loss(pred + 0.2, pred)[..., 4:12, 4:12]
    torch.testing.assert_close(inner, torch.full_like(inner, 1e-3), rtol=1e-3, atol=1e-6)
    edged = pred.clone()
    edged[..., 8:] += 0.2
    assert loss(edged, pred)[..., 4:12, 7:9].min() > 0.01
