"""The Charbonnier loss as AST is trained with it."""

import torch
from torch import Tensor, nn

from ast_plugin.losses.reduction import Reduction, check_reduction, difference, reduce_loss


def charbonnier_loss(
    pred: Tensor, target: Tensor, weight: Tensor | None = None, eps: float = 1e-6, reduction: Reduction = 'mean'
) -> Tensor:
    """Return the mean of `sqrt((pred - target)^2 + eps)`, an L1 loss that is smooth at zero.

    Args:
        pred, target: tensors of one shape.
        weight: elementwise weights, see `reduce_loss`.
        eps: what is added under the root; its root is the loss of a perfect prediction.
        reduction: `mean`, `sum` or `none`.
    Raises:
        ShapeError: if the shapes differ.
    Numerics: at least float32, whatever comes in.
    Source: Zhou et al., "Adapt or Perish", CVPR 2024.
    """
    return charbonnier(difference(pred, target), weight, eps, reduction)


def charbonnier(error: Tensor, weight: Tensor | None, eps: float, reduction: Reduction) -> Tensor:
    """Return the same of a difference that is known already, of any shape; see `charbonnier_loss`."""
    return reduce_loss(torch.sqrt(error * error + eps), weight, reduction)


class ASTCharbonnierLoss(nn.Module):
    """`charbonnier_loss` times `loss_weight`. BasicSR's CharbonnierLoss is this one with `eps` 1e-12."""

    def __init__(self, loss_weight: float = 1.0, reduction: Reduction = 'mean', eps: float = 1e-6) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.reduction = check_reduction(reduction)
        self.eps = eps

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None, **kwargs) -> Tensor:
        """Return the weighted loss; further arguments, which BasicSR's losses take, are ignored."""
        return self.loss_weight * charbonnier_loss(pred, target, weight, self.eps, self.reduction)
