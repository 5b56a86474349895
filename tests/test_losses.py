"""Tests of all losses: known values, gradients, half precision, autocast, invalid input."""

import math

import pytest
import torch

from ast_plugin.errors import OptionError, ShapeError
from ast_plugin.losses import (
    BINOMIAL,
    ASTCharbonnierLoss,
    EdgeLoss,
    FFTLoss,
    PSNRLoss,
    TVLoss,
    _blur,
    charbonnier_loss,
    edge_loss,
    fft_loss,
    laplacian,
    psnr_loss,
    total_variation,
)

PAIRED = {
    'charbonnier': (ASTCharbonnierLoss, charbonnier_loss),
    'edge': (EdgeLoss, edge_loss),
    'fft': (FFTLoss, fft_loss),
    'psnr': (PSNRLoss, psnr_loss),
}
MODULES = [ASTCharbonnierLoss, EdgeLoss, FFTLoss, PSNRLoss, TVLoss]


def image(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize('name', PAIRED)
def test_module_is_the_weighted_function(name):
    module, function = PAIRED[name]
    pred, target = image(2, 3, 7, 9), image(2, 3, 7, 9, seed=1)
    torch.testing.assert_close(module(loss_weight=0.25)(pred, target), 0.25 * function(pred, target))


@pytest.mark.parametrize('module', MODULES)
@pytest.mark.parametrize('shape', [(1, 3, 1, 1), (2, 3, 5, 1), (1, 3, 6, 7), (1, 1, 8, 8)])
def test_any_size_gives_finite_values(module, shape):
    pred = image(*shape).requires_grad_()
    loss = module()(pred, image(*shape, seed=1), some_option_of_basicsr=1)
    loss.backward()
    assert loss.shape == () and torch.isfinite(loss) and torch.isfinite(pred.grad).all()


@pytest.mark.parametrize('module', MODULES)
def test_gradient(module):
    pred = image(2, 3, 5, 6, dtype=torch.float64).requires_grad_()
    target = image(2, 3, 5, 6, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: module()(x, target), pred)


@pytest.mark.parametrize('module', MODULES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_inputs_are_summed_in_float32(module, dtype):
    pred, target = image(1, 3, 64, 64).to(dtype), image(1, 3, 64, 64, seed=1).to(dtype)
    loss = module()(pred, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, module()(pred.float(), target.float()), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('module', MODULES)
def test_autocast_changes_nothing(module):
    pred, target = image(1, 3, 12, 10), image(1, 3, 12, 10, seed=1)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = module()(pred, target)
    assert torch.equal(loss, module()(pred, target))


SQUARE = (1, 3, 4, 4)


@pytest.mark.parametrize(
    ('loss', 'shapes', 'told'),
    [
        *((loss(), (SQUARE, (1, 3, 4, 5)), r'\(1, 3, 4, 4\).*\(1, 3, 4, 5\)') for loss, _ in PAIRED.values()),
        (ASTCharbonnierLoss(), (SQUARE, (1, 1, 4, 4)), 'the same shape'),
        (ASTCharbonnierLoss(), (SQUARE, SQUARE, (1, 1, 3, 3)), 'broadcast'),
        (EdgeLoss(), ((3, 4, 4), (3, 4, 4)), 'B, C, H, W'),
        (PSNRLoss(), ((3, 4, 4), (3, 4, 4)), 'B, C, H, W'),
        (TVLoss(), ((3, 4, 4),), 'B, C, H, W'),
        (PSNRLoss(toY=True), ((1, 1, 4, 4), (1, 1, 4, 4)), 'RGB'),
    ],
)
def test_bad_images_are_rejected(loss, shapes, told):
    with pytest.raises(ShapeError, match=told):
        loss(*(image(*shape) for shape in shapes))


def test_bad_options_are_rejected():
    for module, options in [
        (ASTCharbonnierLoss, {'reduction': 'avg'}),
        (PSNRLoss, {'reduction': 'sum'}),
        (TVLoss, {'reduction': 'none'}),
        (FFTLoss, {'norm': 'none'}),
    ]:
        with pytest.raises(OptionError, match='must be'):
            module(**options)


@pytest.mark.parametrize('module', [ASTCharbonnierLoss, EdgeLoss, FFTLoss])
def test_reductions_agree(module):
    pred, target = image(2, 3, 6, 5), image(2, 3, 6, 5, seed=1)
    values = module(reduction='none')(pred, target)
    torch.testing.assert_close(module(reduction='sum')(pred, target), values.sum())
    torch.testing.assert_close(module()(pred, target), values.mean())


@pytest.mark.parametrize('module', [ASTCharbonnierLoss, EdgeLoss, PSNRLoss, TVLoss])
def test_constant_and_zero_weights(module):
    pred, target = image(1, 3, 6, 5), image(1, 3, 6, 5, seed=1)
    torch.testing.assert_close(module()(pred, target, weight=torch.full((1, 1, 6, 5), 3.0)), module()(pred, target))
    weight = torch.ones(1, 1, 6, 5)
    weight[..., 3:, :] = 0
    changed = pred.clone()
    changed[..., 5, :] += 1 if module is not EdgeLoss else 0
    torch.testing.assert_close(module()(changed, target, weight), module()(pred, target, weight))


def test_charbonnier_known_values():
    target = torch.zeros(1, 1, 1, 2)
    pred = torch.tensor([0.0, 0.3]).view(1, 1, 1, 2)
    expected = (math.sqrt(1e-6) + math.sqrt(0.09 + 1e-6)) / 2
    assert charbonnier_loss(pred, target).item() == pytest.approx(expected, rel=1e-6)


def test_total_variation_known_values():
    ramp = torch.arange(12.0).view(1, 1, 3, 4)
    assert total_variation(ramp).item() == 4 + 1
    assert total_variation(ramp, reduction='sum').item() == 8 * 4 + 9 * 1
    assert total_variation(torch.ones(1, 3, 4, 4)).item() == 0


def test_blur_and_laplacian_known_values():
    dot = torch.zeros(1, 1, 9, 9)
    dot[..., 4, 4] = 1
    torch.testing.assert_close(_blur(dot)[0, 0, 4, 2:7], 0.4 * torch.tensor(BINOMIAL))
    torch.testing.assert_close(laplacian(torch.full((1, 2, 8, 8), 0.7))[..., 2:6, 2:6], torch.zeros(1, 2, 4, 4))
    # Computed by hand: the blurred dot is 0.05, 0.4, 0.05 at even positions per axis, doubled, then blurred again.
    coarse = 2 * (0.05 * 0.05 + 0.4 * 0.4 + 0.05 * 0.05)
    assert laplacian(dot)[0, 0, 4, 4].item() == pytest.approx(1 - coarse**2, rel=1e-5)


def test_edge_loss_sees_edges_only():
    pred = image(1, 3, 16, 16)
    inner = edge_loss(pred + 0.2, pred, reduction='none')[..., 4:12, 4:12]
    torch.testing.assert_close(inner, torch.full_like(inner, 1e-3), rtol=1e-3, atol=1e-6)
    edged = pred.clone()
    edged[..., 8:] += 0.2
    assert edge_loss(edged, pred, reduction='none')[..., 4:12, 7:9].min() > 0.01


def test_fft_known_values():
    target = torch.zeros(1, 1, 4, 4)
    dot = target.clone()
    dot[..., 0, 0] = 0.5
    assert fft_loss(dot, target).item() == pytest.approx(0.25)  # all real parts are 0.5, all imaginary parts 0
    assert fft_loss(dot, target, norm='ortho').item() == pytest.approx(0.25 / 4)


def test_psnr_known_values():
    target = torch.zeros(2, 3, 4, 4)
    pred = target.clone()
    pred[0] += 0.1
    pred[1] += 0.01
    assert psnr_loss(pred, target).item() == pytest.approx(-(20 + 40) / 2, abs=1e-3)
    gray = 10 * math.log10((0.1 * 219 / 255) ** 2)
    assert psnr_loss(pred[:1], target[:1], toY=True).item() == pytest.approx(gray, abs=1e-3)
    assert psnr_loss(target, target).item() == pytest.approx(-80)
