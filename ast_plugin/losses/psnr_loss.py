"""The negative of PSNR, as a loss."""

import math

import torch
from torch import Tensor, nn

from ast_plugin.errors import ShapeError
from ast_plugin.losses.reduction import check_image, check_reduction, difference, widen

LUMA = (65.481 / 255, 128.553 / 255, 24.966 / 255)
"""RGB in [0, 1] to the Y of BT.601 in [16, 235] / 255; its offset of 16 cancels in a difference."""


def psnr_loss(
    pred: Tensor, target: Tensor, weight: Tensor | None = None, toY: bool = False, eps: float = 1e-8
) -> Tensor:
    """Return `10 log10(mse + eps)`, the mean over the images of a batch: minus their PSNR for a range of [0, 1].

    Args:
        pred, target: [B, C, H, W], one shape, range [0, 1].
        weight: weights of the squared errors, broadcast to them; each image's mean divides by their sum.
        toY: compare the luma (BT.601) of RGB images.
        eps: what keeps the logarithm finite; the loss ends at -80 dB with 1e-8.
    Raises:
        ShapeError: if the shapes differ, are not [B, C, H, W], or `toY` is asked of images that are not RGB.
    Numerics: at least float32.
    Source: Chen et al., "HINet", CVPRW 2021, and "Simple baselines for image restoration" (NAFNet), ECCV 2022.
    """
    error = difference(check_image(pred, 'the PSNR loss'), target)
    if toY:
        if error.shape[1] != 3:
            raise ShapeError(f'toY needs RGB images, three channels; got {error.shape[1]}')
        error = (error * error.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    square = (error * error).flatten(1)
    if weight is None:
        mse = square.mean(dim=1)
    else:
        weight = widen(weight).expand_as(error).flatten(1)
        mse = (square * weight).sum(dim=1) / weight.sum(dim=1)
    return 10 / math.log(10) * torch.log(mse + eps).mean()


class PSNRLoss(nn.Module):
    """`psnr_loss` times `loss_weight`; option names are HINet's and NAFNet's."""

    def __init__(self, loss_weight: float = 1.0, reduction: str = 'mean', toY: bool = False) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.reduction = check_reduction(reduction, ('mean',))
        self.toY = toY

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None, **kwargs) -> Tensor:
        """Return the weighted loss; further arguments, which BasicSR's losses take, are ignored."""
        return self.loss_weight * psnr_loss(pred, target, weight, self.toY)
