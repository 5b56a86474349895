"""What every loss needs: inputs that fit, in a type that sums can be kept in, and a reduction."""

from typing import Literal

import torch
from torch import Tensor

from ast_plugin.errors import OptionError, ShapeError

Reduction = Literal['mean', 'sum', 'none']
REDUCTIONS = ('mean', 'sum', 'none')


def check_reduction(reduction: str, allowed: tuple[str, ...] = REDUCTIONS) -> str:
    """Return `reduction` if it is one of `allowed`, else raise OptionError."""
    if reduction not in allowed:
        raise OptionError(f'reduction must be one of {", ".join(allowed)}; got {reduction!r}')
    return reduction


def widen(tensor: Tensor) -> Tensor:
    """Return half-precision tensors as float32, others as they are: losses are summed in at least 32 bits."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def difference(pred: Tensor, target: Tensor) -> Tensor:
    """Return `pred - target` in at least float32.

    Raises:
        ShapeError: if the shapes differ; a silent broadcast would compare the wrong pixels.
    """
    if pred.shape != target.shape:
        raise ShapeError(
            f'a loss compares images of one shape; got a prediction of {tuple(pred.shape)} '
            f'and a target of {tuple(target.shape)}. Crop or pad one of them before the loss'
        )
    return widen(pred) - widen(target)


def check_image(image: Tensor, what: str) -> Tensor:
    """Return `image` if it is [B, C, H, W], else raise ShapeError."""
    if image.dim() != 4:
        raise ShapeError(f'{what} works on images [B, C, H, W]; got {tuple(image.shape)}')
    return image


def reduce_loss(values: Tensor, weight: Tensor | None = None, reduction: Reduction = 'mean') -> Tensor:
    """Reduce elementwise losses, with elementwise weights if given.

    Args:
        values: losses of any shape.
        weight: weights that broadcast to `values`; `mean` then divides by their sum, as BasicSR's losses do.
        reduction: `mean`, `sum`, or `none` for the (weighted) values themselves.
    Raises:
        ShapeError: if `weight` does not broadcast to `values`.
    """
    if weight is not None:
        try:
            weight = widen(weight).expand_as(values)
        except RuntimeError:
            raise ShapeError(
                f'weights must broadcast to the losses {tuple(values.shape)}; got {tuple(weight.shape)}'
            ) from None
        values = values * weight
    if reduction == 'none':
        return values
    if reduction == 'sum':
        return values.sum()
    return values.mean() if weight is None else values.sum() / weight.sum()
