"""An L1 loss between spectra."""

import torch
from torch import Tensor, nn

from ast_plugin.errors import OptionError
from ast_plugin.losses.reduction import Reduction, check_reduction, difference, reduce_loss, widen

NORMS = ('backward', 'ortho', 'forward')


def fft_loss(
    pred: Tensor, target: Tensor, weight: Tensor | None = None, reduction: Reduction = 'mean', norm: str = 'backward'
) -> Tensor:
    """Return the L1 distance of the real and imaginary parts of two images' Fourier transforms.

    Args:
        pred, target: [..., H, W], one shape.
        weight: weights of the pixels, applied to the difference before the transform.
        reduction: `mean`, `sum`, or `none` for [..., H, W // 2 + 1, 2].
        norm: scaling of `torch.fft.rfft2`; papers leave it at `backward` (none), where the loss grows with the image.
    Raises:
        ShapeError: if the shapes differ.
    Numerics: at least float32. The transform is linear, so that of the difference is taken.
    Source: Cho et al., "Rethinking coarse-to-fine approach in single image deblurring", ICCV 2021.
    """
    error = difference(pred, target)
    if weight is not None:
        error = error * widen(weight)
    spectrum = torch.view_as_real(torch.fft.rfft2(error, norm=norm))
    return reduce_loss(spectrum.abs(), None, reduction)


class FFTLoss(nn.Module):
    """`fft_loss` times `loss_weight`; papers add it to a pixel loss with a weight of 0.1 or less."""

    def __init__(self, loss_weight: float = 1.0, reduction: Reduction = 'mean', norm: str = 'backward') -> None:
        super().__init__()
        if norm not in NORMS:
            raise OptionError(f'norm must be one of {", ".join(NORMS)}; got {norm!r}')
        self.loss_weight = loss_weight
        self.reduction = check_reduction(reduction)
        self.norm = norm

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None, **kwargs) -> Tensor:
        """Return the weighted loss; further arguments, which BasicSR's losses take, are ignored."""
        return self.loss_weight * fft_loss(pred, target, weight, self.reduction, self.norm)
