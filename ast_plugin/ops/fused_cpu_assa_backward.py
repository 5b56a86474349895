"""Backward pass of `fused_cpu_assa`: groups of windows are computed again and gone through backwards."""

import torch
from torch import Tensor

from ast_plugin.ops.assa import attention_weights
from ast_plugin.ops.fused_cpu_assa_forward import Attention, Layers, Settings, Weights
from ast_plugin.ops.fused_cpu_kernels import Strip, linear, outer_sum
from ast_plugin.ops.fused_cpu_windows import pieces, rolled
from ast_plugin.ops.windows import relative_position_index


class Backward(Attention):
    """One backward pass and its sums of the parameters' gradients.

    Args:
        needed: of x and of each of the weights, whether its gradient is wanted.
    """

    def __init__(
        self,
        settings: Settings,
        x: Tensor,
        mask: Tensor | None,
        scale: Tensor | None,
        weights: Weights,
        needed: tuple[bool, ...],
    ) -> None:
        super().__init__(settings, x, mask, scale, weights, Layers.of(settings, weights))
        self.needed_x, self.needed = needed[0], Weights(*needed[1:])
        self.qkv_t, self.proj_t = self.layers.qkv.t(), self.layers.proj.t()
        C = x.shape[-1]
        zeros = {'dtype': self.core, 'device': x.device}
        self.d_norm = torch.zeros(2, C, **zeros)
        self.d_qkv, self.d_qkv_bias = torch.zeros(3 * C, C, **zeros), torch.zeros(3 * C, **zeros)
        self.d_proj, self.d_proj_bias = torch.zeros(C, C, **zeros), torch.zeros(C, **zeros)
        self.d_bias = torch.zeros_like(self.layers.bias)
        # The gate's gradient is a small difference of these.
        self.d_shares = torch.zeros(2, dtype=torch.float64)

    def run(self, grad: Tensor) -> list[Tensor | None]:
        """Gradients of x and the weights, each in its tensor's dtype."""
        x, shift = self.x, self.settings.shift
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for group in self.groups():
            dx = self._group(group, rolled(grad, group, shift))
            for target, own, above in pieces(grad_x, dx, grad, group, shift):
                torch.add(above.to(own.dtype), own, out=target) if self.settings.is_residual else target.copy_(own)
        found = self._gathered()
        return [
            grad_x if self.needed_x else None,
            *(
                value.to(tensor.dtype) if is_needed else None
                for value, tensor, is_needed in zip(found, self.weights, self.needed, strict=True)
            ),
        ]

    def _gathered(self) -> Weights:
        """The sums, as gradients of the parameters."""
        C, heads = self.x.shape[-1], self.settings.num_heads
        index = relative_position_index(self.settings.window).flatten()
        table = torch.zeros(self.weights.position_bias.shape, dtype=self.core)
        table.index_add_(0, index, self.d_bias.reshape(heads, -1).t().contiguous())
        d_gate = None
        if self.layers.gate is not None:
            shares = self.layers.gate.double().softmax(0)
            d_gate = shares * (self.d_shares - (shares * self.d_shares).sum())
        return Weights(
            *self.d_norm,
            self.d_qkv[:C],
            self.d_qkv_bias[:C],
            self.d_qkv[C:],
            self.d_qkv_bias[C:],
            self.d_proj,
            self.d_proj_bias,
            table,
            d_gate,
        )

    def _group(self, group: Strip, grad: Tensor) -> Tensor:
        """Gradient of the rolled rows of x without the sum's own part, from that of the output's."""
        x = rolled(self.x, group, self.settings.shift)
        normed, mean, rstd = self._normed(x)
        queries, keys, values = self._split(linear(normed, self.layers.qkv, self.layers.qkv_bias))
        scores = self._scores(queries, keys, group)
        dy = grad.to(self.settings.dtype).contiguous()
        if self.scale is not None:
            dy = dy * group.images_of(self.scale).to(dy.dtype)
        d_out = self._split_one(linear(dy, self.proj_t))
        weights, d_scores = self._weights_backward(scores, d_out @ values.transpose(-2, -1))
        self.d_proj += outer_sum(dy, self._joined(weights @ values, group))
        self.d_proj_bias += dy.sum((0, 1, 2), dtype=self.core)
        self.d_bias += d_scores.sum(1, keepdim=True)
        parts = torch.empty((3, *queries.shape), dtype=self.core)
        torch.matmul(weights.transpose(-2, -1), d_out, out=parts[2])
        d_scores = d_scores.mul_(queries.shape[-1] ** -0.5)
        torch.matmul(d_scores, keys, out=parts[0])
        torch.matmul(d_scores.transpose(-2, -1), queries, out=parts[1])
        d_qkv = self._joined(parts, group)
        self.d_qkv += outer_sum(d_qkv, normed)
        self.d_qkv_bias += d_qkv.sum((0, 1, 2), dtype=self.core)
        dx = linear(d_qkv, self.qkv_t)
        if not self.settings.is_residual:
            return dx
        norm = self.weights.norm_weight, self.weights.norm_bias
        dx, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
            dx.to(x.dtype),
            x.contiguous(),
            x.shape[-1:],
            mean,
            rstd,
            *norm,
            (True, *(tensor is not None for tensor in norm)),
        )
        for total, part in zip(self.d_norm, (d_weight, d_bias), strict=True):
            if part is not None:
                total += part
        return dx

    def _split_one(self, rows: Tensor) -> Tensor:
        """[b, rows, W, C] -> [heads, windows, tokens, d]."""
        b, height, W, _ = rows.shape
        window, heads = self.settings.window, self.settings.num_heads
        rows = rows.reshape(b, height // window, window, W // window, window, heads, -1)
        rows = rows.permute(5, 0, 1, 3, 2, 4, 6).to(self.core, memory_format=torch.contiguous_format)
        return rows.reshape(heads, -1, window**2, rows.shape[-1])

    def _weights_backward(self, scores: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The weights, and the gradient of the scores from theirs; adds to the gradient of the gate's shares."""
        if self.settings.kind != 'assa':
            with torch.enable_grad():
                scores = scores.detach().requires_grad_()
                weights = attention_weights(scores, self.settings.kind, None, self.settings.topk_ratio)
            return weights.detach(), torch.autograd.grad(weights, scores, grad)[0]
        dense_share, sparse_share = self.layers.gate.softmax(0)
        dense, positive = scores.softmax(-1), scores.relu_()
        d_dense = grad * dense
        per_row = d_dense.sum(-1, keepdim=True)
        d_sparse = grad * positive
        self.d_shares[0] += per_row.sum(dtype=torch.float64)
        self.d_shares[1] += (d_sparse * positive).sum(-1).sum(dtype=torch.float64)
        # softmax: P · (dP − Σ dP · P), with dP the dense share of the gradient; relu²: 2 · relu · its share of it
        d_scores = d_dense.addcmul_(dense, per_row, value=-1).mul_(dense_share).add_(d_sparse.mul_(2 * sparse_share))
        return dense.mul_(dense_share).addcmul_(positive, positive.mul(sparse_share)), d_scores
