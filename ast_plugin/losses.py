"""Losses for image restoration: a function for each, and a Module that BasicSR builds by name.

All losses are computed in at least float32, regardless of the images' precision, and reject images of different shapes.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ast_plugin.errors import OptionError, ShapeError

Reduction = Literal['mean', 'sum', 'none']

BINOMIAL = (0.05, 0.25, 0.4, 0.25, 0.05)
"""Five taps of Burt and Adelson's generating kernel (a = 0.4)."""
LUMA = (65.481 / 255, 128.553 / 255, 24.966 / 255)
"""RGB in [0, 1] to BT.601 luma / 255 without its offset of 16, which cancels in differences."""


def charbonnier_loss(
    pred: Tensor, target: Tensor, weight: Tensor | None = None, eps: float = 1e-6, reduction: Reduction = 'mean'
) -> Tensor:
    """Return the mean of `sqrt((pred - target)^2 + eps)`, an L1 loss that is smooth at zero.

    Args:
        pred, target: tensors of the same shape.
        weight: elementwise weights, see `reduce_loss`.
        eps: added under the square root; `sqrt(eps)` is the loss of a perfect prediction.
        reduction: `mean`, `sum` or `none`.
    Source: Zhou et al., "Adapt or Perish", CVPR 2024.
    """
    return _charbonnier(difference(pred, target), weight, eps, reduction)


def edge_loss(
    pred: Tensor, target: Tensor, weight: Tensor | None = None, eps: float = 1e-6, reduction: Reduction = 'mean'
) -> Tensor:
    """Return the Charbonnier loss between the Laplacians of two images [B, C, H, W]; see `charbonnier_loss`.

    Numerics: float32 also under autocast. The Laplacian is linear and applied to the difference.
    Source: Zamir et al., "Multi-stage progressive image restoration", CVPR 2021.
    """
    error = difference(_check_image(pred, 'the edge loss'), target)
    with torch.autocast(error.device.type, enabled=False):
        edges = laplacian(error)
    return _charbonnier(edges, weight, eps, reduction)


def fft_loss(
    pred: Tensor, target: Tensor, weight: Tensor | None = None, reduction: Reduction = 'mean', norm: str = 'backward'
) -> Tensor:
    """Return the L1 distance between the real and imaginary parts of two images' Fourier transforms.

    Args:
        pred, target: [..., H, W], same shape.
        weight: pixel weights, applied to the difference before the transform.
        reduction: `mean`, `sum`, or `none` for [..., H, W // 2 + 1, 2].
        norm: scaling of `torch.fft.rfft2`; papers use `backward` (none), with which the loss grows with the image size.
    Numerics: the transform is linear and applied to the difference.
    Source: Cho et al., "Rethinking coarse-to-fine approach in single image deblurring", ICCV 2021.
    """
    error = difference(pred, target)
    if weight is not None:
        error = error * _widen(weight)
    return reduce_loss(torch.view_as_real(torch.fft.rfft2(error, norm=norm)).abs(), None, reduction)


def psnr_loss(
    pred: Tensor, target: Tensor, weight: Tensor | None = None, toY: bool = False, eps: float = 1e-8
) -> Tensor:
    """Return the mean of `10 log10(mse + eps)` over a batch: the negative PSNR of images in [0, 1].

    Args:
        pred, target: [B, C, H, W], same shape, range [0, 1].
        weight: weights of the squared errors, broadcast to them; the mean of each image divides by their sum.
        toY: compare the luma (BT.601) of RGB images.
        eps: keeps the logarithm finite; with 1e-8 the minimum loss is -80 dB.
    Source: Chen et al., "HINet", CVPRW 2021, and "Simple baselines for image restoration" (NAFNet), ECCV 2022.
    """
    error = difference(_check_image(pred, 'the PSNR loss'), target)
    if toY:
        if error.shape[1] != 3:
            raise ShapeError(f'toY expects RGB images with three channels; got {error.shape[1]}')
        error = (error * error.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    square = (error * error).flatten(1)
    if weight is None:
        mse = square.mean(dim=1)
    else:
        weight = _widen(weight).expand_as(error).flatten(1)
        mse = (square * weight).sum(dim=1) / weight.sum(dim=1)
    return 10 / math.log(10) * torch.log(mse + eps).mean()


def total_variation(image: Tensor, weight: Tensor | None = None, reduction: Reduction = 'mean') -> Tensor:
    """Return the anisotropic total variation of an image.

    Args:
        image: [B, C, H, W].
        weight: pixel weights, broadcast to `image`; a difference has the weight of its lower or right pixel.
        reduction: `mean` adds the means of the vertical and horizontal differences, `sum` their sums.
    Returns:
        A scalar; a direction with a single pixel contributes zero.
    Source: Rudin, Osher and Fatemi, "Nonlinear total variation based noise removal algorithms", 1992.
    """
    image = _widen(_check_image(image, 'total variation'))
    total = image[..., :0].sum()  # zero, but part of the graph even for a single pixel
    for axis in (2, 3):
        steps = image.diff(dim=axis).abs()
        if steps.numel():
            step_weight = None if weight is None else weight.expand_as(image).narrow(axis, 1, steps.shape[axis])
            total = total + reduce_loss(steps, step_weight, reduction)
    return total


def laplacian(image: Tensor) -> Tensor:
    """Return the finest level of the Laplacian pyramid of [B, C, H, W], any size: the image minus its coarse copy."""
    coarse = torch.zeros_like(image)
    coarse[:, :, ::2, ::2] = 4 * _blur(image)[:, :, ::2, ::2]
    return image - _blur(coarse)


def difference(pred: Tensor, target: Tensor) -> Tensor:
    """Return `pred - target` in at least float32; raise ShapeError instead of broadcasting."""
    if pred.shape != target.shape:
        raise ShapeError(
            f'a loss expects images of the same shape; got a prediction of {tuple(pred.shape)} and a target of '
            f'{tuple(target.shape)}. Crop or pad one of them before the loss'
        )
    return _widen(pred) - _widen(target)


def reduce_loss(values: Tensor, weight: Tensor | None = None, reduction: Reduction = 'mean') -> Tensor:
    """Reduce elementwise losses with optional weights, broadcast to them; `mean` divides by the sum of the weights."""
    if weight is not None:
        try:
            weight = _widen(weight).expand_as(values)
        except RuntimeError:
            shapes = f'{tuple(values.shape)}; got {tuple(weight.shape)}'
            raise ShapeError(f'weights must broadcast to the losses {shapes}') from None
        values = values * weight
    if reduction == 'none':
        return values
    if reduction == 'sum':
        return values.sum()
    return values.mean() if weight is None else values.sum() / weight.sum()


class _Loss(nn.Module):
    """Base class of losses with `loss_weight`, called as in BasicSR; further arguments are ignored."""

    reductions = ('mean', 'sum', 'none')

    def __init__(self, loss_weight: float = 1.0, reduction: Reduction = 'mean') -> None:
        super().__init__()
        if reduction not in self.reductions:
            raise OptionError(f'reduction must be one of {", ".join(self.reductions)}; got {reduction!r}')
        self.loss_weight = loss_weight
        self.reduction = reduction

    def forward(self, pred: Tensor, target: Tensor | None = None, weight: Tensor | None = None, **kwargs) -> Tensor:
        """Return the weighted loss."""
        return self.loss_weight * self.compute(pred, target, weight)


class ASTCharbonnierLoss(_Loss):
    """`charbonnier_loss` times `loss_weight`; BasicSR's CharbonnierLoss is the same with `eps` 1e-12."""

    def __init__(self, loss_weight: float = 1.0, reduction: Reduction = 'mean', eps: float = 1e-6) -> None:
        super().__init__(loss_weight, reduction)
        self.eps = eps

    def compute(self, pred, target, weight):
        return charbonnier_loss(pred, target, weight, self.eps, self.reduction)


class EdgeLoss(ASTCharbonnierLoss):
    """`edge_loss` times `loss_weight`; MPRNet adds it to the Charbonnier loss with a weight of 0.05."""

    def compute(self, pred, target, weight):
        return edge_loss(pred, target, weight, self.eps, self.reduction)


class FFTLoss(_Loss):
    """`fft_loss` times `loss_weight`; papers add it to a pixel loss with a weight of 0.1 or less."""

    norms = ('backward', 'ortho', 'forward')

    def __init__(self, loss_weight: float = 1.0, reduction: Reduction = 'mean', norm: str = 'backward') -> None:
        super().__init__(loss_weight, reduction)
        if norm not in self.norms:
            raise OptionError(f'norm must be one of {", ".join(self.norms)}; got {norm!r}')
        self.norm = norm

    def compute(self, pred, target, weight):
        return fft_loss(pred, target, weight, self.reduction, self.norm)


class PSNRLoss(_Loss):
    """`psnr_loss` times `loss_weight`; the option names are those of HINet and NAFNet."""

    reductions = ('mean',)

    def __init__(self, loss_weight: float = 1.0, reduction: str = 'mean', toY: bool = False) -> None:
        super().__init__(loss_weight, reduction)
        self.toY = toY

    def compute(self, pred, target, weight):
        return psnr_loss(pred, target, weight, self.toY)


class TVLoss(_Loss):
    """`total_variation` of the prediction times `loss_weight`; the target is ignored."""

    reductions = ('mean', 'sum')

    def compute(self, pred, target, weight):
        return total_variation(pred, weight, self.reduction)


def _charbonnier(error: Tensor, weight: Tensor | None, eps: float, reduction: Reduction) -> Tensor:
    return reduce_loss(torch.sqrt(error * error + eps), weight, reduction)


def _blur(image: Tensor) -> Tensor:
    """Blur [B, C, H, W] with the separable five-tap kernel and replicated borders."""
    C = image.shape[1]
    taps = image.new_tensor(BINOMIAL).expand(C, 1, 5)
    image = F.pad(image, (2, 2, 2, 2), mode='replicate')
    image = F.conv2d(image, taps[:, :, None, :], groups=C)
    return F.conv2d(image, taps[:, :, :, None], groups=C)


def _widen(tensor: Tensor) -> Tensor:
    """Convert half-precision tensors to float32; return others unchanged."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _check_image(image: Tensor, what: str) -> Tensor:
    if image.dim() != 4:
        raise ShapeError(f'{what} expects images [B, C, H, W]; got {tuple(image.shape)}')
    return image
