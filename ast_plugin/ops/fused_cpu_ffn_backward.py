"""The backward pass of `fused_cpu_ffn`: strip by strip, or at once for a small map, of which more was kept."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_plugin.ops.fused_cpu_ffn_forward import Hidden, Settings, Weights, everything, hidden_of, strips_of
from ast_plugin.ops.fused_cpu_kernels import (
    Edges,
    Strip,
    conv3x3,
    conv3x3_backward_weight,
    gelu_backward,
    linear,
    linear_plus,
    outer_sum,
    transposed_kernel,
)


class Backward:
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
        # Views: on small maps turning the weights would take as long as the product, and oneDNN turns what it reads.
        self.expand_t = [self.w.expansion(part)[0].t() for part in range(1 + self.w.is_gated)]
        self.project_t = self.w.project.t()
        self.depthwise_t = None if self.w.depthwise is None else transposed_kernel(self.w.depthwise)
        self.partial_t = None if self.w.partial is None else transposed_kernel(self.w.partial)
        self.sums_dtype = dtype = torch.promote_types(settings.dtype, torch.float32)
        wanted = zip(weights, needed[1:], strict=True)
        # Each part is written before it is added to: see `_add`.
        self.sums = Weights(*(torch.empty(t.shape, dtype=dtype) if t is not None and n else None for t, n in wanted))
        self.begun: set[tuple[str, int]] = set()

    def run(self, grad: Tensor, kept: Hidden | None = None) -> list[Tensor | None]:
        """Gradients of x and the weights, each in its tensor's dtype; `kept` of the whole map."""
        needs_norm = any(total is not None for total in self.sums[:3])
        # A column of hidden channels needs the rows beside it, and so does the partial convolution before it: the map
        # between them is made whole, and has C channels.
        if kept is not None:
            strips_here = [everything(self.x)]
            down = self._through_linear(strips_here[0], grad, kept)
        else:
            strips_here = list(strips_of(self.x, self.w))
            down = torch.empty(self.x.shape, dtype=self.settings.dtype)
            for strip in strips_here:
                strip.of(down).copy_(self._through_linear(strip, grad))
        grad_x = torch.empty(self.x.shape, dtype=self.x.dtype) if self.needs_x else None
        if self.needs_x or needs_norm:
            for strip in strips_here:
                self._through_norm(strip, down, grad, grad_x)
        sums = zip(self.sums, self.weights, strict=True)
        return [grad_x, *(None if total is None else total.to(tensor.dtype) for total, tensor in sums)]

    def _through_linear(self, strip: Strip, grad: Tensor, kept: Hidden | None = None) -> Tensor:
        """From the gradient of the output to that of the linear layers' input, for the rows of a strip."""
        w, settings = self.w, self.settings
        near = strip.wider(1) if w.depthwise is not None else strip
        far = near.wider(1) if w.depthwise is not None else strip
        if kept is None:
            kept, u = hidden_of(settings, self.x, w, near, far)
        else:
            u = F.gelu(kept.before_u)
        a, before_u, before_v, before_gate = kept
        v = u
        if w.depthwise is None:
            before_v = before_u
        else:
            v = F.gelu(before_v)
        y = near.of(grad).to(settings.dtype)
        if self.scale is not None:
            y = y * strip.images_of(self.scale).to(settings.dtype)
        dv = linear(y.contiguous(), self.project_t)
        own_a, own_v, down = strip.within(a, far), strip.within(v, near), None
        if w.is_gated:
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
