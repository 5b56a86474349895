"""Feed-forward networks on a CPU in strips of rows, which stay in the caches from the norm to the sum.

Each function computes what its namesake in `frfn.py` does. Between strips nothing is handed on: the rows that a 3×3
convolution needs from its neighbours are computed twice, which at some tens of rows is a few percent. For the backward
pass only the input is kept; strips are computed again. Beside its input and output a call holds a few strips, and in
the backward pass one more map of C channels: never a whole map of hidden channels.

Numerics: oneDNN accumulates in float32, and its GELU is exact up to 4e-7; gradients of parameters add up in float32
over strips, also for bfloat16. The order of all sums depends on shapes and the number of threads alone.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ast_plugin.ops.assa import Affine
from ast_plugin.ops.frfn import frfn as plain_frfn
from ast_plugin.ops.frfn import leff as plain_leff
from ast_plugin.ops.frfn import mlp as plain_mlp
from ast_plugin.ops.fused_cpu_kernels import (
    Edges,
    Strip,
    conv3x3,
    conv3x3_backward_weight,
    gelu_backward,
    gradients_of,
    linear,
    linear_plus,
    outer_sum,
    strips,
    transposed_kernel,
    without_autocast,
)
from ast_plugin.ops.residual import Residual


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


def frfn(
    x: Tensor, partial_conv: Tensor, expand: Affine, depthwise: Affine, project: Affine, residual: Residual | None
) -> Tensor:
    """See `frfn.frfn`."""
    return _run(x, partial_conv, expand, depthwise, project, residual)


def leff(x: Tensor, expand: Affine, depthwise: Affine, project: Affine, residual: Residual | None) -> Tensor:
    """See `frfn.leff`."""
    return _run(x, None, expand, depthwise, project, residual)


def mlp(x: Tensor, expand: Affine, project: Affine, residual: Residual | None) -> Tensor:
    """See `frfn.mlp`."""
    return _run(x, None, expand, (None, None), project, residual)


def _run(
    x: Tensor,
    partial_conv: Tensor | None,
    expand: Affine,
    depthwise: tuple[Tensor | None, Tensor | None],
    project: Affine,
    residual: Residual | None,
) -> Tensor:
    norm = (None, None) if residual is None else (residual.weight, residual.bias)
    weights = Weights(*norm, partial_conv, *expand, *depthwise, *project)
    scale = None if residual is None else residual.scale
    autocast = torch.is_autocast_enabled('cpu') and x.dtype is not torch.float64
    dtype = torch.get_autocast_dtype('cpu') if autocast else x.dtype
    settings = Settings(dtype, 0.0 if residual is None else residual.eps, residual is not None)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, scale, *weights)):
        return _FeedForward.apply(settings, x, scale, *weights)
    with without_autocast():
        return _forward(settings, x, scale, weights)


def _forward(settings: Settings, x: Tensor, scale: Tensor | None, weights: Weights) -> Tensor:
    w = weights.to(settings.dtype)
    kept = torch.promote_types(x.dtype, settings.dtype) if settings.is_residual else settings.dtype
    out = torch.empty(x.shape, dtype=kept, device=x.device)
    for strip in _strips(x, w):
        around = strip.wider(1) if w.depthwise is not None else strip
        a = _refined(settings, x, w, around)
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


def _strips(x: Tensor, w: Weights):
    B, H, W, _ = x.shape
    return strips(B, H, W * w.hidden * w.project.element_size())


def _refined(settings: Settings, x: Tensor, w: Weights, strip: Strip) -> Tensor:
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


class _FeedForward(torch.autograd.Function):
    """Keeps the input alone, and computes strips again in the backward pass. `scale` is a constant."""

    @staticmethod
    def forward(ctx: FunctionCtx, settings: Settings, x: Tensor, scale: Tensor | None, *weights: Tensor | None):
        ctx.settings = settings
        ctx.save_for_backward(x, scale, *weights)
        with without_autocast():
            return _forward(settings, x, scale, Weights(*weights))

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor):
        x, scale, *tensors = ctx.saved_tensors
        weights, needed = Weights(*tensors), (ctx.needs_input_grad[1], *ctx.needs_input_grad[3:])
        if torch.is_grad_enabled():
            # Gradients of gradients are asked for: autograd has the formulas of the plain reference.
            grad_x, *rest = _differentiable(ctx.settings, grad, x, scale, weights, needed)
        else:
            with without_autocast():
                grad_x, *rest = _Backward(ctx.settings, x, scale, weights, needed).run(grad)
        return None, grad_x, None, *rest


def _differentiable(
    settings: Settings, grad: Tensor, x: Tensor, scale: Tensor | None, w: Weights, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    residual = Residual(w.norm_weight, w.norm_bias, settings.eps, scale) if settings.is_residual else None
    expand, depthwise, project = (w.expand, w.expand_bias), (w.depthwise, w.depthwise_bias), (w.project, w.project_bias)
    autocast = settings.dtype is not x.dtype or settings.dtype is not w.expand.dtype
    with torch.autocast('cpu', settings.dtype) if autocast else without_autocast():
        if w.partial is not None:
            out = plain_frfn(x, w.partial, expand, depthwise, project, residual)
        elif w.depthwise is not None:
            out = plain_leff(x, expand, depthwise, project, residual)
        else:
            out = plain_mlp(x, expand, project, residual)
    return gradients_of(out, grad, (x, *w), needed)


class _Backward:
    """One backward pass: sums of the parameters' gradients, and a map of the gradient on its way to the input.

    Args:
        needed: of x and of each of the weights, whether its gradient is wanted.
    """

    def __init__(
        self, settings: Settings, x: Tensor, scale: Tensor | None, weights: Weights, needed: tuple[bool, ...]
    ) -> None:
        self.settings, self.x, self.scale, self.weights = settings, x, scale, weights
        self.needs_x = needed[0]
        self.w = weights.to(settings.dtype)
        self.expand_t = [self.w.expansion(part)[0].t().contiguous() for part in range(1 + self.w.is_gated)]
        self.project_t = self.w.project.t().contiguous()
        self.depthwise_t = None if self.w.depthwise is None else transposed_kernel(self.w.depthwise)
        self.partial_t = None if self.w.partial is None else transposed_kernel(self.w.partial)
        self.sums_dtype = dtype = torch.promote_types(settings.dtype, torch.float32)
        wanted = zip(weights, needed[1:], strict=True)
        # Each part is written before it is added to: see `_add`.
        self.sums = Weights(*(torch.empty(t.shape, dtype=dtype) if t is not None and n else None for t, n in wanted))
        self.begun: set[tuple[str, int]] = set()

    def run(self, grad: Tensor) -> list[Tensor | None]:
        """Gradients of x and the weights, each in its tensor's dtype."""
        needs_norm = any(total is not None for total in self.sums[:3])
        # A column of hidden channels needs the rows beside it, and so does the partial convolution before it: the map
        # between them is made whole, and has C channels.
        down = torch.empty(self.x.shape, dtype=self.settings.dtype)
        for strip in _strips(self.x, self.w):
            strip.of(down).copy_(self._through_linear(strip, grad))
        grad_x = torch.empty(self.x.shape, dtype=self.x.dtype) if self.needs_x else None
        if self.needs_x or needs_norm:
            for strip in _strips(self.x, self.w):
                self._through_norm(strip, down, grad, grad_x)
        sums = zip(self.sums, self.weights, strict=True)
        return [grad_x, *(None if total is None else total.to(tensor.dtype) for total, tensor in sums)]

    def _through_linear(self, strip: Strip, grad: Tensor) -> Tensor:
        """From the gradient of the output to that of the linear layers' input, for the rows of a strip."""
        w, settings = self.w, self.settings
        # `near`: rows whose gradient comes here through the depthwise convolution; `far`: what they were computed from.
        near = strip.wider(1) if w.depthwise is not None else strip
        far = near.wider(1) if w.depthwise is not None else strip
        a = _refined(settings, self.x, w, far)
        before_u = linear(a, *w.expansion(0))
        u = F.gelu(before_u)
        v, before_v = u, before_u
        if w.depthwise is not None:
            before_v = conv3x3(u, w.depthwise, w.depthwise_bias, near.edges)
            v = F.gelu(before_v)
        y = near.of(grad).to(settings.dtype)
        if self.scale is not None:
            y = y * strip.images_of(self.scale).to(settings.dtype)
        dv = linear(y.contiguous(), self.project_t)
        own_a, own_v, down = strip.within(a, far), strip.within(v, near), None
        if w.is_gated:
            before_gate = linear(near.within(a, far), *w.expansion(1))
            gate = F.gelu(before_gate)
            d_gate = gelu_backward(strip.within(dv, near) * own_v, strip.within(before_gate, near))
            self._add_linear('expand', d_gate, own_a, part=1)
            down = linear(d_gate, self.expand_t[1])
            own_v = own_v * strip.within(gate, near)
            dv.mul_(gate)
        self._add_linear('project', strip.within(y, near), own_v)
        du = gelu_backward(dv, before_v)
        if w.depthwise is not None:
            self._add_conv('depthwise', strip.wider(1).within(u, far), strip.within(du, near), strip.edges)
            du = gelu_backward(conv3x3(du, self.depthwise_t, None, strip.edges), strip.within(before_u, far))
        self._add_linear('expand', du, own_a)
        return linear(du, self.expand_t[0]) if down is None else linear_plus(du, self.expand_t[0], None, down)

    def _through_norm(self, strip: Strip, down: Tensor, grad: Tensor, grad_x: Tensor | None) -> None:
        """On through the partial convolution and the norm, for the rows of a strip, into `grad_x`."""
        w, wide = self.w, strip.wider(1)
        x, dn = wide.of(self.x), strip.of(down).to(self.x.dtype)
        if self.settings.is_residual:
            normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], w.norm_weight, w.norm_bias, self.settings.eps)
        else:
            normed = x
        if w.partial is not None:
            head = slice(0, w.partial.shape[0])
            d_head = wide.of(down)[..., head].contiguous()
            self._add_conv(
                'partial',
                normed[..., head].to(self.settings.dtype).contiguous(),
                strip.within(d_head, wide).contiguous(),
                strip.edges,
            )
            dn = dn.clone() if dn.data_ptr() == strip.of(down).data_ptr() else dn
            dn[..., head] = conv3x3(d_head, self.partial_t, None, strip.edges)
        if self.settings.is_residual:
            dn, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
                dn.contiguous(),
                strip.within(x, wide).contiguous(),
                x.shape[-1:],
                strip.within(mean, wide).contiguous(),
                strip.within(rstd, wide).contiguous(),
                w.norm_weight,
                w.norm_bias,
                (self.needs_x, self.sums.norm_weight is not None, self.sums.norm_bias is not None),
            )
            self._add('norm_weight', d_weight)
            self._add('norm_bias', d_bias)
        if grad_x is not None:
            target = strip.of(grad_x)
            torch.add(strip.of(grad).to(dn.dtype), dn, out=target) if self.settings.is_residual else target.copy_(dn)

    def _add(self, name: str, value: Tensor | None, part: int = 0) -> None:
        """Add to a sum; to one of the equal parts of it, one below the other, that `value` has the size of."""
        total = getattr(self.sums, name)
        if total is None:
            return
        rows = total[part * len(value) : (part + 1) * len(value)]
        if (name, part) in self.begun:
            rows += value
        else:
            self.begun.add((name, part))
            rows.copy_(value)

    def _add_linear(self, layer: str, grad: Tensor, x: Tensor, part: int = 0) -> None:
        """Gradients of a linear layer, or of the part of it that `Weights.expansion` names."""
        if getattr(self.sums, layer) is not None:
            self._add(layer, outer_sum(grad, x), part)
        if getattr(self.sums, f'{layer}_bias') is not None:
            self._add(f'{layer}_bias', grad.sum((0, 1, 2), dtype=self.sums_dtype), part)

    def _add_conv(self, layer: str, x: Tensor, grad: Tensor, edges: Edges) -> None:
        bias_layer = f'{layer}_bias' if layer != 'partial' else None
        bias_total = getattr(self.sums, bias_layer) if bias_layer else None
        if getattr(self.sums, layer) is None and bias_total is None:
            return
        d_weight, d_bias = conv3x3_backward_weight(x, grad, getattr(self.w, layer), edges)
        self._add(layer, d_weight)
        if bias_total is not None:
            self._add(bias_layer, d_bias)
