"""Feed-forward networks over NHWC maps, FRFN and those it is compared with: the plain reference."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_plugin.errors import ShapeError


class FeedForward(NamedTuple):
    """Parameters of a feed-forward network, as every backend takes them; which there are says which network it is.

    Attributes:
        expand, expand_bias: linear layer, [h, C], or with a gate [2h, C]; bias of as many rows or None.
        project, project_bias: linear layer, [C, h] and [C] or None.
        depthwise, depthwise_bias: convolution over h channels, [h, 1, 3, 3] and [h] or None.
        partial_conv: convolution of the first channels, [C // 4, C // 4, 3, 3].
    """

    expand: Tensor
    expand_bias: Tensor | None
    project: Tensor
    project_bias: Tensor | None
    depthwise: Tensor | None = None
    depthwise_bias: Tensor | None = None
    partial_conv: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:]

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> 'FeedForward':
        """Replace the parameters."""
        return FeedForward(*tensors)

    @property
    def hidden(self) -> int:
        return self.project.shape[1]

    @property
    def is_gated(self) -> bool:
        return self.expand.shape[0] != self.hidden

    def check(self, x: Tensor) -> None:
        """Raise ShapeError unless map and parameters go together: a kernel would read what is not there."""
        C, h = x.shape[-1], self.hidden
        rows = (h,) if self.depthwise is None else (h, 2 * h)
        fits = self.depthwise is None or tuple(self.depthwise.shape) == (h, 1, 3, 3)
        if not fits or len(self.expand) not in rows or self.expand.shape[1] != C or len(self.project) != C:
            weights = {'expand': self.expand, 'project': self.project, 'depthwise': self.depthwise}
            found = ', '.join(f'{name} {list(weight.shape)}' for name, weight in weights.items() if weight is not None)
            raise ShapeError(
                f'a map of {C} channels and {found} do not go together: expected expand [h or 2h, C], project [C, h] '
                'and depthwise [h, 1, 3, 3]'
            )


def feed_forward(x: Tensor, op: FeedForward) -> Tensor:
    """A feed-forward network, one of three::

        MLP   project(GELU(expand(x)))
        LeFF  project(GELU(depthwise3×3(GELU(expand(x)))))
        FRFN  project(GELU(depthwise3×3(u₁)) · u₂),  u₁, u₂ = GELU(expand([conv3×3(x[:C/4]), x[C/4:]]))

    Args:
        x: [B, H, W, C]; for an MLP any number of dimensions.
        op: parameters.
    Returns:
        Shape of x.
    Source: FRFN: Zhou et al., CVPR 2024, section 3.3; as in the released code and weights, there is no GELU after the
        last linear layer, which the paper's equation 8 has. LeFF: Uformer (Wang et al., CVPR 2022), section 3.2.
    """
    z = F.linear(refine(x, op.partial_conv), op.expand, op.expand_bias)
    return F.linear(activate(z, op.depthwise, op.depthwise_bias), op.project, op.project_bias)


def refine(x: Tensor, partial_conv: Tensor | None) -> Tensor:
    """[conv3×3(x[:C/4]), x[C/4:]], or x itself without a convolution."""
    if partial_conv is None:
        return x
    head, tail = x[..., : len(partial_conv)], x[..., len(partial_conv) :]
    return torch.cat([conv3x3(head, partial_conv, None), tail.to(head.dtype)], dim=-1)


def activate(z: Tensor, depthwise: Tensor | None, bias: Tensor | None) -> Tensor:
    """GELU(depthwise3×3(GELU(z₁))), times GELU(z₂) where z has 2h channels: [B, H, W, h or 2h] -> [B, H, W, h]."""
    u = F.gelu(z)
    if depthwise is None:
        return u
    if z.shape[-1] == len(depthwise):
        return F.gelu(conv3x3(u, depthwise, bias))
    u, gate = u.chunk(2, dim=-1)
    return F.gelu(conv3x3(u, depthwise, bias)) * gate


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """3×3 convolution of an NHWC map; the permuted views are channels_last, so nothing is copied."""
    groups = x.shape[-1] // weight.shape[1]
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=groups).permute(0, 2, 3, 1)
