"""A loss on what a Gaussian pyramid leaves out: edges and fine texture."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ast_plugin.losses.charbonnier_loss import ASTCharbonnierLoss, charbonnier
from ast_plugin.losses.reduction import Reduction, check_image, difference

BINOMIAL = (0.05, 0.25, 0.4, 0.25, 0.05)
"""The five taps of Burt and Adelson's generating kernel (a = 0.4)."""


def blur(image: Tensor) -> Tensor:
    """Blur [B, C, H, W] with the separable five-tap kernel, the border pixels repeated."""
    C = image.shape[1]
    taps = image.new_tensor(BINOMIAL).expand(C, 1, 5)
    image = F.pad(image, (2, 2, 2, 2), mode='replicate')
    image = F.conv2d(image, taps[:, :, None, :], groups=C)
    return F.conv2d(image, taps[:, :, :, None], groups=C)


def laplacian(image: Tensor) -> Tensor:
    """Return the finest level of the Laplacian pyramid of [B, C, H, W], any size: the image less its coarse copy."""
    kept = torch.zeros_like(image)
    kept[:, :, ::2, ::2] = 4 * blur(image)[:, :, ::2, ::2]
    return image - blur(kept)


def edge_loss(
    pred: Tensor, target: Tensor, weight: Tensor | None = None, eps: float = 1e-6, reduction: Reduction = 'mean'
) -> Tensor:
    """Return the Charbonnier loss between the Laplacians of two images.

    Args:
        pred, target: [B, C, H, W], one shape.
        weight: elementwise weights, see `reduce_loss`.
        eps: what is added under the root.
        reduction: `mean`, `sum` or `none`.
    Raises:
        ShapeError: if the shapes differ or are not [B, C, H, W].
    Numerics: at least float32, also under autocast. The Laplacian is linear, so that of the difference is taken.
    Source: Zamir et al., "Multi-stage progressive image restoration", CVPR 2021.
    """
    error = difference(check_image(pred, 'the edge loss'), target)
    with torch.autocast(error.device.type, enabled=False):
        edges = laplacian(error)
    return charbonnier(edges, weight, eps, reduction)


class EdgeLoss(ASTCharbonnierLoss):
    """`edge_loss` times `loss_weight`; MPRNet adds it to the Charbonnier loss with a weight of 0.05."""

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None, **kwargs) -> Tensor:
        """Return the weighted loss; further arguments, which BasicSR's losses take, are ignored."""
        return self.loss_weight * edge_loss(pred, target, weight, self.eps, self.reduction)
