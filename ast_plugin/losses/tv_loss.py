"""Total variation: how much an image changes from pixel to pixel."""

from torch import Tensor, nn

from ast_plugin.losses.reduction import Reduction, check_image, check_reduction, reduce_loss, widen


def total_variation(image: Tensor, weight: Tensor | None = None, reduction: Reduction = 'mean') -> Tensor:
    """Return the anisotropic total variation of an image.

    Args:
        image: [B, C, H, W].
        weight: weights of the pixels, broadcast to `image`; a difference is weighted by its lower or right pixel.
        reduction: `mean` is the mean vertical difference plus the mean horizontal one; `sum` their sums.
    Returns:
        A scalar; a direction with one pixel only counts as zero.
    Raises:
        ShapeError: if `image` is not [B, C, H, W].
    Source: Rudin, Osher and Fatemi, "Nonlinear total variation based noise removal algorithms", 1992.
    """
    image = widen(check_image(image, 'total variation'))
    pixel_weight = None if weight is None else weight.expand_as(image)
    total = image[..., :0].sum()  # zero, and part of the graph even where there is no difference to take
    for axis in (2, 3):
        steps = image.diff(dim=axis).abs()
        if steps.numel():
            step_weight = None if weight is None else pixel_weight.narrow(axis, 1, steps.shape[axis])
            total = total + reduce_loss(steps, step_weight, reduction)
    return total


class TVLoss(nn.Module):
    """`total_variation` of the prediction times `loss_weight`; the target is not looked at."""

    def __init__(self, loss_weight: float = 1.0, reduction: Reduction = 'mean') -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.reduction = check_reduction(reduction, ('mean', 'sum'))

    def forward(self, pred: Tensor, target: Tensor | None = None, weight: Tensor | None = None, **kwargs) -> Tensor:
        """Return the weighted loss; takes a target so that it can stand wherever the other losses do."""
        return self.loss_weight * total_variation(pred, weight, self.reduction)
