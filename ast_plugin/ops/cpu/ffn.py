"""Feed-forward networks on CPUs, computed in strips of rows that stay in the caches from norm to residual sum.

Equivalent to `ops.ffn.feed_forward`. Strips are independent: the rows that a 3×3 convolution needs from neighbouring
strips are computed twice, an overhead of a few percent for strips of some tens of rows. For large maps the backward
pass saves only the input and recomputes the strips. Apart from input and output, a call holds a few strips, and the
backward pass one more map of C channels, but never a complete map of hidden channels. For small maps, up to
`KEPT_BYTES`, the inputs of the GELUs are saved.

Numerics: oneDNN accumulates in float32, and its GELU is accurate to 4e-7. Parameter gradients are accumulated in
float32 over strips, also for bfloat16. The order of all sums depends on shapes and the number of threads only. oneDNN
sums the products of thousands of hidden channels at once, MKL blockwise with half the error. When gradients are needed,
small maps are projected with MKL: the gradients of attention gates are small differences of large sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_plugin.ops import ffn as plain
from ast_plugin.ops.backend import Residual, Tensors
from ast_plugin.ops.cpu.operators import (
    Branch,
    Strip,
    conv3x3,
    conv3x3_backward_weight,
    cut_strips,
    gelu_backward,
    linear,
    run_branch,
    transpose_kernel,
)
from ast_plugin.ops.ffn import FeedForward

# Largest map of hidden channels that is saved for the backward pass; each block saves four of them.
KEPT_BYTES = 8 * 2**20


def feed_forward(x: Tensor, op: FeedForward, residual: Residual | None = None) -> Tensor:
    """See `ops.feed_forward`."""
    return run_branch(_FeedForwardBranch, x, op, None, residual)


class _Hidden(NamedTuple):
    """Inputs of the GELUs for a strip and the rows around it, as the backward pass needs them."""

    a: Tensor  # input of the linear layers, for the rows of `before_u`
    before_u: Tensor  # output of the linear layer
    before_v: Tensor | None  # output of the convolution, if there is one
    before_gate: Tensor | None  # output of the gate's linear layer, if there is one


class _FeedForwardBranch(Branch):
    plain = staticmethod(plain.feed_forward)

    @staticmethod
    def prepare(op: FeedForward, dtype: torch.dtype) -> FeedForward:
        return FeedForward(*(None if tensor is None else tensor.detach().to(dtype) for tensor in op))

    def strips(self) -> Iterator[Strip]:
        """Yield strips sized for temporaries with the hidden channels."""
        B, H, W, _ = self.x.shape
        return cut_strips(B, H, W * self.layers.hidden * self.layers.project.element_size())

    def whole(self) -> Strip:
        """Return the strip of all rows of all images."""
        B, H, _, _ = self.x.shape
        return Strip(0, B, 0, H, H)

    def forward(self) -> Tensor:
        op, out = self.layers, self.new_output()
        for strip in self.strips():
            around = strip if op.depthwise is None else strip.widen(1)
            a = self._refine(around)
            u = linear(a, *self._expansion(0), gelu=True)
            if op.depthwise is not None:
                u = conv3x3(u, op.depthwise, op.depthwise_bias, strip.edges, gelu=True)
            if op.is_gated:
                u = u.mul_(linear(strip.crop(a, around), *self._expansion(1), gelu=True))
            if self.residual is not None and self.scale is None and self.x.dtype == self.dtype:
                strip.view(out).copy_(linear(u, op.project, op.project_bias, plus=strip.view(self.x)))
                continue
            y = linear(u, op.project, op.project_bias)
            y = y if self.scale is None else y.mul_(strip.view_images(self.scale))
            self.write(strip.view(out), y, strip.view(self.x))
        return out

    def forward_keeping(self) -> tuple[Tensor, Tensors]:
        """Compute a small map at once and keep its `_Hidden`; compute a large one in strips and keep nothing."""
        x, op, whole = self.x, self.layers, self.whole()
        if x[..., 0].numel() * op.hidden * self.dtype.itemsize > KEPT_BYTES:
            return self.forward(), ()
        hidden, u = self._hidden(whole, whole)
        v = u if hidden.before_v is None else F.gelu(hidden.before_v)
        v = v if hidden.before_gate is None else F.gelu(hidden.before_gate).mul_(v)
        y = (F.linear if self.dtype is torch.float32 else linear)(v, op.project, op.project_bias)
        if self.residual is not None:
            y = x + (y if self.scale is None else y * self.scale)
        # oneDNN returns views, and autograd forbids in-place changes of views returned by a Function.
        return y.clone() if y._is_view() else y, hidden

    def _expansion(self, part: int) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of a half of the first linear layer: 0 for the convolved channels, 1 for the gate."""
        rows = slice(part * self.layers.hidden, (part + 1) * self.layers.hidden)
        return self.layers.expand[rows], None if self.layers.expand_bias is None else self.layers.expand_bias[rows]

    def _refine(self, strip: Strip) -> Tensor:
        """Compute the input of the linear layers for a strip: the norm, then the partial convolution."""
        weight = self.layers.partial_conv
        if weight is None:
            return self.norm(strip.view(self.x))[0].contiguous()
        wider = strip.widen(1)
        a, _, _ = self.norm(wider.view(self.x))
        head = a[..., : len(weight)].contiguous()
        own = strip.crop(a, wider)
        # The output of the norm is not shared and may be overwritten.
        own = own.clone(memory_format=torch.contiguous_format) if self.residual is None else own.contiguous()
        own[..., : len(weight)] = conv3x3(head, weight, None, strip.edges)
        return own

    def _hidden(self, near: Strip, far: Strip) -> tuple[_Hidden, Tensor]:
        """Compute the inputs of the GELUs, and the output of the first GELU.

        Args:
            near: rows whose gradients reach a strip through the depthwise convolution.
            far: rows that `near` is computed from.
        """
        op, a = self.layers, self._refine(far)
        before_u = linear(a, *self._expansion(0))
        u, before_v, before_gate = F.gelu(before_u), None, None
        if op.depthwise is not None:
            before_v = conv3x3(u, op.depthwise, op.depthwise_bias, near.edges)
        if op.is_gated:
            before_gate = linear(near.crop(a, far), *self._expansion(1))
        return _Hidden(a, before_u, before_v, before_gate), u

    def backward(self, grad: Tensor, kept: Tensors) -> dict[str, Tensor | None]:
        op, sums = self.layers, self.sums
        self.wanted |= {name.replace('expand', 'gate') for name in self.wanted if op.is_gated}
        # Views, as copies would take as long as the product on small maps; oneDNN transposes while reading.
        self.expand_t = [self._expansion(part)[0].t() for part in range(1 + op.is_gated)]
        self.project_t = op.project.t()
        self.depthwise_t = None if op.depthwise is None else transpose_kernel(op.depthwise)
        self.partial_t = None if op.partial_conv is None else transpose_kernel(op.partial_conv)
        # Both the depthwise and the partial convolution need neighbouring rows, so the gradient between them, which has
        # C channels, is computed for the complete map.
        if kept:
            strips = [self.whole()]
            down = self._through_linear(strips[0], grad, _Hidden(*kept))
        else:
            strips = list(self.strips())
            down = self.x.new_empty(self.x.shape, dtype=self.dtype)
            for strip in strips:
                strip.view(down).copy_(self._through_linear(strip, grad))
        grad_x = self.x.new_empty(self.x.shape)
        for strip in strips:
            self.write(strip.view(grad_x), self._through_norm(strip, down), strip.view(grad))
        for name in {'gate', 'gate_bias'} & set(sums):
            expansion = name.replace('gate', 'expand')
            sums[expansion] = torch.cat([sums[expansion], sums.pop(name)])
        return {'x': grad_x, **sums}

    def _through_linear(self, strip: Strip, grad: Tensor, kept: _Hidden | None = None) -> Tensor:
        """Backpropagate a strip from the output to the input of the linear layers."""
        op = self.layers
        near = strip if op.depthwise is None else strip.widen(1)
        far = near if op.depthwise is None else near.widen(1)
        (a, before_u, before_v, before_gate), u = (kept, None) if kept else self._hidden(near, far)
        u = F.gelu(before_u) if u is None else u
        before_v, v = (before_u, u) if before_v is None else (before_v, F.gelu(before_v))
        y = self.output_grad(near.view(grad), strip)
        dv = linear(y, self.project_t)
        own_a, own_v, down = strip.crop(a, far), strip.crop(v, near), None
        if op.is_gated:
            gate = F.gelu(before_gate)
            d_gate = gelu_backward(strip.crop(dv, near) * own_v, strip.crop(before_gate, near))
            self.add_linear('gate', d_gate, own_a)
            down = linear(d_gate, self.expand_t[1])
            own_v = own_v * strip.crop(gate, near)
            dv.mul_(gate)
        self.add_linear('project', strip.crop(y, near), own_v)
        du = gelu_backward(dv, before_v)
        if op.depthwise is not None:
            self._add_conv('depthwise', strip.widen(1).crop(u, far), strip.crop(du, near), strip.edges)
            du = gelu_backward(conv3x3(du, self.depthwise_t, None, strip.edges), strip.crop(before_u, far))
        self.add_linear('expand', du, own_a)
        return linear(du, self.expand_t[0], plus=down)

    def _through_norm(self, strip: Strip, down: Tensor) -> Tensor:
        """Backpropagate a strip through the partial convolution and the norm."""
        wide = strip.widen(1)
        x, dn = wide.view(self.x), strip.view(down).to(self.x.dtype)
        normed, *statistics = self.norm(x, x.dtype)
        if self.layers.partial_conv is not None:
            head = slice(0, len(self.layers.partial_conv))
            d_head = wide.view(down)[..., head].contiguous()
            normed_head = normed[..., head].to(self.dtype).contiguous()
            self._add_conv('partial_conv', normed_head, strip.crop(d_head, wide), strip.edges)
            dn = dn.clone() if dn.data_ptr() == strip.view(down).data_ptr() else dn
            dn[..., head] = conv3x3(d_head, self.partial_t, None, strip.edges)
        statistics = (strip.crop(each, wide) for each in statistics if each is not None)
        return self.norm_backward(dn, strip.crop(x, wide), *statistics)

    def _add_conv(self, layer: str, x: Tensor, grad: Tensor, edges: tuple[bool, bool]) -> None:
        if self.wanted & {layer, f'{layer}_bias'}:
            d_weight, d_bias = conv3x3_backward_weight(x, grad.contiguous(), getattr(self.layers, layer), edges)
            self.add(layer, d_weight)
            self.add(f'{layer}_bias', d_bias)
