"""Parameters and forward pass of `fused_cpu_ffn` in strips of rows, and what a backward pass needs of them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_plugin.ops.assa import Affine
from ast_plugin.ops.fused_cpu_kernels import Strip, conv3x3, linear, linear_plus, strips

_PIECE = 128  # hidden channels whose products are added up in one go where it has to be exact


class Weights(NamedTuple):
    """Parameters of a block with a feed-forward network; what it lacks is None.

    Attributes:
        norm_weight, norm_bias: [C], of the LayerNorm before it.
        partial: [C // 4, C // 4, 3, 3], convolution of the first channels.
        expand, expand_bias: [h, C] or, gated, [2h, C].
        depthwise, depthwise_bias: [h, 1, 3, 3].
        project, project_bias: [C, h].
    """

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    partial: Tensor | None
    expand: Tensor
    expand_bias: Tensor | None
    depthwise: Tensor | None
    depthwise_bias: Tensor | None
    project: Tensor
    project_bias: Tensor | None

    @property
    def hidden(self) -> int:
        return self.project.shape[1]

    @property
    def is_gated(self) -> bool:
        return self.expand.shape[0] != self.hidden

    def to(self, dtype: torch.dtype) -> 'Weights':
        """In the dtype that is computed in; the norm's stay as they are."""
        norm, rest = self[:2], self[2:]
        return Weights(*norm, *(None if tensor is None else tensor.detach().to(dtype) for tensor in rest))

    def expansion(self, part: int) -> Affine:
        """Linear layer of a half of the hidden channels: 0 for what is convolved, 1 for the gate."""
        rows = slice(part * self.hidden, (part + 1) * self.hidden)
        return self.expand[rows], None if self.expand_bias is None else self.expand_bias[rows]


class Settings(NamedTuple):
    """What is no tensor: the dtype that is computed in, the norm's eps, whether input is added to the output."""

    dtype: torch.dtype
    eps: float
    is_residual: bool


class Hidden(NamedTuple):
    """What a backward pass needs of the rows of a strip and those around it: see `hidden_of`.

    Attributes:
        a: what the linear layers see, for the rows of `far`.
        before_u, before_v, before_gate: what the GELUs after the linear layer, the convolution and the gate's linear
            layer are given; for the rows of `far`, `near` and `near`. None where there is no such layer.
    """

    a: Tensor
    before_u: Tensor
    before_v: Tensor | None
    before_gate: Tensor | None


def forward_strips(settings: Settings, x: Tensor, scale: Tensor | None, w: Weights) -> Tensor:
    """The network strip by strip, without what a backward pass would need; `w` in the dtype that is computed in."""
    kept = torch.promote_types(x.dtype, settings.dtype) if settings.is_residual else settings.dtype
    out = torch.empty(x.shape, dtype=kept, device=x.device)
    for strip in strips_of(x, w):
        around = strip.wider(1) if w.depthwise is not None else strip
        a = refined(settings, x, w, around)
        u = linear(a, *w.expansion(0), gelu=True)
        if w.depthwise is not None:
            u = conv3x3(u, w.depthwise, w.depthwise_bias, strip.edges, gelu=True)
        if w.is_gated:
            u = u.mul_(linear(strip.within(a, around), *w.expansion(1), gelu=True))
        if not settings.is_residual:
            strip.of(out).copy_(linear(u, w.project, w.project_bias))
        elif scale is None and x.dtype == settings.dtype:
            strip.of(out).copy_(linear_plus(u, w.project, w.project_bias, strip.of(x)))
        else:
            y = linear(u, w.project, w.project_bias)
            if scale is not None:
                y = y.mul_(strip.images_of(scale))
            torch.add(strip.of(x), y, out=strip.of(out))
    return out


def forward_keeping(
    settings: Settings, x: Tensor, scale: Tensor | None, w: Weights
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """`forward_strips` of a small map as a whole, and its `Hidden`."""
    whole = everything(x)
    hidden, u = hidden_of(settings, x, w, whole, whole)
    v = u if hidden.before_v is None else F.gelu(hidden.before_v)
    gate = None if hidden.before_gate is None else F.gelu(hidden.before_gate)
    y, is_added = w.project_bias, settings.is_residual and scale is None and x.dtype == settings.dtype
    size = _PIECE if settings.dtype is torch.float32 else w.hidden  # others would round in between, or are exact
    for first in range(0, w.hidden, size):
        piece = slice(first, first + size)
        part = v[..., piece].contiguous() if gate is None else v[..., piece] * gate[..., piece]
        layer = w.project[:, piece].contiguous()
        if first:
            y = linear_plus(part, layer, None, y)
        elif is_added:
            y = linear_plus(part, layer, w.project_bias, x)
        else:
            y = linear(part, layer, w.project_bias)
    if settings.is_residual and not is_added:
        y = x + (y if scale is None else y * scale)
    # What oneDNN returns is a view; autograd forbids to change views that come out of a Function in place.
    return y.clone() if y._is_view() else y, hidden


def hidden_of(settings: Settings, x: Tensor, w: Weights, near: Strip, far: Strip) -> tuple[Hidden, Tensor]:
    """What the GELUs are given, and what the first gives.

    Args:
        near: rows whose gradient comes to a strip through the depthwise convolution.
        far: what they are computed from.
    """
    a = refined(settings, x, w, far)
    before_u = linear(a, *w.expansion(0))
    u, before_v, before_gate = F.gelu(before_u), None, None
    if w.depthwise is not None:
        before_v = conv3x3(u, w.depthwise, w.depthwise_bias, near.edges)
    if w.is_gated:
        before_gate = linear(near.within(a, far), *w.expansion(1))
    return Hidden(a, before_u, before_v, before_gate), u


def everything(x: Tensor) -> Strip:
    """All rows of all images."""
    B, H, _, _ = x.shape
    return Strip(0, B, 0, H, H)


def strips_of(x: Tensor, w: Weights) -> Iterator[Strip]:
    """Strips of a map whose temporaries have its hidden channels."""
    B, H, W, _ = x.shape
    return strips(B, H, W * w.hidden * w.project.element_size())


def refined(settings: Settings, x: Tensor, w: Weights, strip: Strip) -> Tensor:
    """What the linear layers see, for the rows of a strip: normed, and the first channels convolved."""
    wider = strip.wider(1) if w.partial is not None else strip
    a = wider.of(x)
    if settings.is_residual:
        a = F.layer_norm(a, a.shape[-1:], w.norm_weight, w.norm_bias, settings.eps)
    if w.partial is None:
        return a.to(settings.dtype).contiguous()
    a = a.to(settings.dtype)
    head = a[..., : w.partial.shape[0]].contiguous()
    own = strip.within(a, wider)
    # What came from the norm is nobody else's and may be written to.
    own = own.contiguous() if settings.is_residual else own.clone(memory_format=torch.contiguous_format)
    own[..., : w.partial.shape[0]] = conv3x3(head, w.partial, None, strip.edges)
    return own
