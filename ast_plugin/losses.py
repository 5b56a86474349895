"""Losses for image restoration, which BasicSR builds by name.

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


class _Loss(nn.Module):
    """Base class of losses, called as in BasicSR.

    Args:
        loss_weight: factor of the loss.
        reduction: `mean`, `sum` or `none`; `mean` divides by the sum of the weights if there are any.
    """

    reductions = ('mean', 'sum', 'none')

    def __init__(self, loss_weight: float = 1.0, reduction: Reduction = 'mean') -> None:
        super().__init__()
        if reduction not in self.reductions:
            raise OptionError(f'reduction must be one of {", ".join(self.reductions)}; got {reduction!r}')
        self.loss_weight, self.reduction = loss_weight, reduction

    def forward(self, pred: Tensor, target: Tensor | None = None, weight: Tensor | None = None, **kwargs) -> Tensor:
        """Return the loss times `loss_weight`.

        Args:
            pred, target: images [B, C, H, W] of the same shape.
            weight: weights of the pixels, broadcast to the images.
            kwargs: ignored.
        Raises:
            ShapeError: if images or weights have other shapes.
        """
        if weight is not None:
            try:
                weight = _widen(weight).expand_as(pred)
            except RuntimeError:
                shapes = f'{tuple(pred.shape)}; got {tuple(weight.shape)}'
                raise ShapeError(f'weights must broadcast to the images {shapes}') from None
        return self.loss_weight * self.compute(pred, target, weight)

    def reduce(self, values: Tensor, weight: Tensor | None = None) -> Tensor:
        """Reduce elementwise losses, with optional weights of the same shape."""
        if weight is not None:
            values = values * weight
        if self.reduction == 'none':
            return values
        if self.reduction == 'sum':
            return values.sum()
        return values.mean() if weight is None else values.sum() / weight.sum()


class ASTCharbonnierLoss(_Loss):
    """Mean of `sqrt((pred - target)^2 + eps)`, an L1 loss that is smooth at zero.

    BasicSR's CharbonnierLoss is the same with `eps` 1e-12.

    Args:
        loss_weight, reduction: see `_Loss`.
        eps: added under the square root; `sqrt(eps)` is the loss of a perfect prediction.
    Source: Zhou et al., "Adapt or Perish", CVPR 2024.
    """

    def __init__(self, loss_weight: float = 1.0, reduction: Reduction = 'mean', eps: float = 1e-6) -> None:
        super().__init__(loss_weight, reduction)
        self.eps = eps

    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        error = self.compare(pred, target)
        return self.reduce(torch.sqrt(error * error + self.eps), weight)

    def compare(self, pred: Tensor, target: Tensor) -> Tensor:
        return difference(pred, target)


class EdgeLoss(ASTCharbonnierLoss):
    """Charbonnier loss between the Laplacians of two images; MPRNet adds it with a weight of 0.05.

    Numerics: float32 also under autocast. The Laplacian is linear and applied to the difference.
    Source: Zamir et al., "Multi-stage progressive image restoration", CVPR 2021.
    """

    def compare(self, pred: Tensor, target: Tensor) -> Tensor:
        error = difference(_check_image(pred, 'the edge loss'), target)
        with torch.autocast(error.device.type, enabled=False):
            return laplacian(error)


class FFTLoss(_Loss):
    """L1 distance between the real and imaginary parts of two images' Fourier transforms.

    Papers add it to a pixel loss with a weight of 0.1 or less.

    Args:
        loss_weight, reduction: see `_Loss`; `none` returns [..., H, W // 2 + 1, 2]. Pixel weights are applied to the
            difference before the transform.
        norm: scaling of `torch.fft.rfft2`; papers use `backward` (none), with which the loss grows with the image size.
    Numerics: the transform is linear and applied to the difference.
    Source: Cho et al., "Rethinking coarse-to-fine approach in single image deblurring", ICCV 2021.
    """

    norms = ('backward', 'ortho', 'forward')

    def __init__(self, loss_weight: float = 1.0, reduction: Reduction = 'mean', norm: str = 'backward') -> None:
        super().__init__(loss_weight, reduction)
        if norm not in self.norms:
            raise OptionError(f'norm must be one of {", ".join(self.norms)}; got {norm!r}')
        self.norm = norm

    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        error = difference(pred, target)
        error = error if weight is None else error * weight
        return self.reduce(torch.view_as_real(torch.fft.rfft2(error, norm=self.norm)).abs())


class PSNRLoss(_Loss):
    """Mean of `10 log10(mse + 1e-8)` over a batch: the negative PSNR of images in [0, 1], at least -80 dB.

    The option names are those of HINet and NAFNet.

    Args:
        loss_weight: see `_Loss`; the mean squared error of each image divides by the sum of its weights.
        reduction: only `mean`.
        toY: compare the luma (BT.601) of RGB images.
    Source: Chen et al., "HINet", CVPRW 2021, and "Simple baselines for image restoration" (NAFNet), ECCV 2022.
    """

    reductions = ('mean',)

    def __init__(self, loss_weight: float = 1.0, reduction: str = 'mean', toY: bool = False) -> None:
        super().__init__(loss_weight, reduction)
        self.toY = toY

    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        error = difference(_check_image(pred, 'the PSNR loss'), target)
        if self.toY:
            if error.shape[1] != 3:
                raise ShapeError(f'toY expects RGB images with three channels; got {error.shape[1]}')
            error = (error * error.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
            weight = None if weight is None else weight.mean(dim=1, keepdim=True)
        square = (error * error).flatten(1)
        if weight is None:
            mse = square.mean(dim=1)
        else:
            mse = (square * weight.flatten(1)).sum(dim=1) / weight.flatten(1).sum(dim=1)
        return 10 / math.log(10) * torch.log(mse + 1e-8).mean()


class TVLoss(_Loss):
    """Anisotropic total variation of the prediction; the target is ignored.

    `mean` adds the means of the vertical and horizontal differences, `sum` their sums. A direction with a single pixel
    contributes zero. A difference has the weight of its lower or right pixel.

    Source: Rudin, Osher and Fatemi, "Nonlinear total variation based noise removal algorithms", 1992.
    """

    reductions = ('mean', 'sum')

    def compute(self, pred: Tensor, target: Tensor | None, weight: Tensor | None) -> Tensor:
        image = _widen(_check_image(pred, 'total variation'))
        total = image[..., :0].sum()  # zero, but part of the graph even for a single pixel
        for axis in (2, 3):
            steps = image.diff(dim=axis).abs()
            if steps.numel():
                step_weight = None if weight is None else weight.narrow(axis, 1, steps.shape[axis])
                total = total + self.reduce(steps, step_weight)
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
