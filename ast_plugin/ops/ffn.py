"""Reference implementation of feed-forward networks on NHWC feature maps: FRFN, LeFF and MLP."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_plugin.ops.windows import check_shapes


class FeedForward(NamedTuple):
    """Parameters of a feed-forward network, shared by all backends; those present select FRFN, LeFF or MLP.

    Attributes:
        expand, expand_bias: first linear layer, [h, C] and [h] or None; with a gate [2h, C] and [2h].
        project, project_bias: last linear layer, [C, h] and [C] or None.
        depthwise, depthwise_bias: depthwise convolution over h channels, [h, 1, 3, 3] and [h] or None.
        partial_conv: convolution of the first C // 4 channels, [C // 4, C // 4, 3, 3].
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
        """Return a copy with other parameters."""
        return FeedForward(*tensors)

    @property
    def hidden(self) -> int:
        return self.project.shape[1]

    @property
    def is_gated(self) -> bool:
        return self.expand.shape[0] != self.hidden

    def check(self, x: Tensor) -> None:
        """Raise ShapeError if the shapes of x and parameters do not match: kernels would read out of bounds."""
        C, h = x.shape[-1], self.hidden
        rows = 2 * h if self.is_gated and self.depthwise is not None else h
        shapes = (rows, C), (rows,), (C, h), (C,), (h, 1, 3, 3), (h,), (C // 4, C // 4, 3, 3)
        given = zip(self._fields, self, shapes, strict=True)
        check_shapes({name: (tensor, shape) for name, tensor, shape in given if tensor is not None})


def feed_forward(x: Tensor, op: FeedForward) -> Tensor:
    """Feed-forward network, one of three::

        MLP   project(GELU(expand(x)))
        LeFF  project(GELU(depthwise3×3(GELU(expand(x)))))
        FRFN  project(GELU(depthwise3×3(u₁)) · u₂),  u₁, u₂ = GELU(expand([conv3×3(x[:C/4]), x[C/4:]]))

    Args:
        x: [B, H, W, C]; an MLP accepts any number of dimensions.
        op: parameters.
    Returns:
        Tensor with the shape of x.
    Source: FRFN: Zhou et al., CVPR 2024, section 3.3, without the GELU after the last linear layer of equation 8,
        as in the released code and weights. LeFF: Uformer (Wang et al., CVPR 2022), section 3.2.
    """
    z = F.linear(refine(x, op.partial_conv), op.expand, op.expand_bias)
    return F.linear(activate(z, op.depthwise, op.depthwise_bias), op.project, op.project_bias)


def refine(x: Tensor, partial_conv: Tensor | None) -> Tensor:
    """Apply the partial convolution, [conv3×3(x[:C/4]), x[C/4:]]; return x unchanged if there is none."""
    if partial_conv is None:
        return x
    head, tail = x[..., : len(partial_conv)], x[..., len(partial_conv) :]
    return torch.cat([conv3x3(head, partial_conv, None), tail.to(head.dtype)], dim=-1)


def activate(z: Tensor, depthwise: Tensor | None, bias: Tensor | None) -> Tensor:
    """GELU(depthwise3×3(GELU(z₁))), times GELU(z₂) if z has 2h channels: [B, H, W, h or 2h] -> [B, H, W, h]."""
    u = F.gelu(z)
    if depthwise is None:
        return u
    if z.shape[-1] == len(depthwise):
        return F.gelu(conv3x3(u, depthwise, bias))
    u, gate = u.chunk(2, dim=-1)
    return F.gelu(conv3x3(u, depthwise, bias)) * gate


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """3×3 convolution of an NHWC feature map; its permuted view is channels_last, so no data is copied."""
    groups = x.shape[-1] // weight.shape[1]
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=groups).permute(0, 2, 3, 1)
