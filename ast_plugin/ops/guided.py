"""Guided upsampling: a change computed at low resolution, applied to the full image."""

from torch import Tensor
from torch.nn import functional as F

RADIUS = 4  # of the windows in pixels of the low resolution; 1 to 4 and an epsilon of 1e-5 to 1e-3 differ by 0.1 dB
EPSILON = 1e-4  # variance in a window, of values in [0, 1], below which the change hardly depends on the image


def downscale(image: Tensor, shorter_side: int) -> Tensor:
    """Downscale images [B, C, H, W] to a shorter side, with antialiasing; smaller images are returned as they are."""
    height, width = image.shape[-2:]
    if min(height, width) <= shorter_side:
        return image
    size = [round(side * shorter_side / min(height, width)) for side in (height, width)]
    return F.interpolate(image, size, mode='bilinear', antialias=True)


def apply_change(
    image: Tensor, small: Tensor, change: Tensor, radius: int = RADIUS, epsilon: float = EPSILON
) -> Tensor:
    """Apply the change of a downscaled image to the full image.

    In every window and channel, the change is fitted by a linear function a x + b of the image x. Their coefficients
    vary slowly, so that upsampled ones hold for the full image, including its fine details and edges::

        a = cov(x, change) / (var(x) + epsilon)        b = mean(change) - a mean(x)        result = image + a image + b

    Args:
        image: full images, [B, C, H, W].
        small: the same images downscaled, [B, C, h, w].
        change: what is to be added to `small`, [B, C, h, w].
        radius: windows have 2 radius + 1 pixels per side.
        epsilon: regularisation of a.
    Returns:
        The changed full images, [B, C, H, W].
    Source: He and Sun, "Fast guided filter", arXiv:1505.00996, here for the change instead of the result, which keeps
    details at their contrast where nothing can be fitted.
    """

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, 2 * radius + 1, 1, radius, count_include_pad=False)

    mean_small, mean_change = mean(small), mean(change)
    a = (mean(small * change) - mean_small * mean_change) / (mean(small * small) - mean_small**2 + epsilon)
    b = mean_change - a * mean_small
    result = F.interpolate(mean(a), image.shape[-2:], mode='bilinear').add_(1).mul_(image)
    return result.add_(F.interpolate(mean(b), image.shape[-2:], mode='bilinear'))
