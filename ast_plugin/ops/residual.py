"""A residual branch: what a block puts around an attention or a feed-forward network."""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Residual(NamedTuple):
    """Turns a function f into x + scale · f(layer_norm(x)).

    Attributes:
        weight: of the LayerNorm over channels, [C].
        bias: likewise.
        eps: of the LayerNorm.
        scale: [B, 1, 1, 1], a factor for each sample (stochastic depth); or None.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float = 1e-5
    scale: Tensor | None = None


def with_residual(function: Callable[[Tensor], Tensor], x: Tensor, residual: Residual | None) -> Tensor:
    """function(x), or x + scale · function(layer_norm(x)) where a residual is given."""
    if residual is None:
        return function(x)
    y = function(F.layer_norm(x, x.shape[-1:], residual.weight, residual.bias, residual.eps))
    return x + (y if residual.scale is None else y * residual.scale)
