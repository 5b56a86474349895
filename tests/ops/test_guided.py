import pytest
import torch
from torch.nn import functional as F

from ast_plugin.ops.guided import apply_change, downscale


def scene(height=96, width=128):
    """Return an image [1, 3, H, W] with a vertical edge in the middle and fine texture."""
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 0.02
    image[..., width // 2 :] += 0.6
    return image


@pytest.mark.parametrize(('size', 'side', 'want'), [((90, 60), 30, (45, 30)), ((41, 100), 20, (20, 49))])
def test_downscale_to_a_shorter_side(size, side, want):
    assert downscale(torch.rand(2, 3, *size), side).shape == (2, 3, *want)


def test_downscale_keeps_small_images():
    image = torch.rand(1, 3, 20, 50)
    assert downscale(image, 20) is image


@pytest.mark.parametrize('size', [(96, 128), (50, 33), (1, 7)])
def test_apply_change_constants(size):
    image = torch.rand(1, 3, *size, dtype=torch.float64)
    small = downscale(image, 24)
    torch.testing.assert_close(apply_change(image, small, torch.full_like(small, 0.25)), image + 0.25)


def test_apply_change_raises_contrast():
    image = scene().double()
    small = downscale(image, 24)
    result = apply_change(image, small, 0.5 * small - 0.2, epsilon=0)
    torch.testing.assert_close(result, 1.5 * image - 0.2)


def test_apply_change_follows_edges():
    image = scene()
    want = torch.where(image > 0.3, -0.3, 0.2)
    small, change = downscale(image, 24), downscale(want, 24)
    error = (apply_change(image, small, change) - image - want).abs().mean()
    blurred = (F.interpolate(change, image.shape[-2:], mode='bilinear') - want).abs().mean()
    assert error < 0.6 * blurred
