"""Window attention on a CPU over groups of windows, read from the map and written to it where they lie.

Computes what `assa.window_attention` does. Rows of windows go together from the norm to the sum and stay in the caches;
a shift takes the rows and columns from where they are, without a rolled copy of the map. Of all windows of a shifted
map only those of the last row and column are masked, with masks that any map shares. For the backward pass only the
input is kept; windows do not depend on one another and are computed again group by group.

Numerics: scores, weights and their product with the values in float32 for bfloat16, as in the reference; gradients of
parameters add up in float32 over groups, in an order that shapes and the number of threads determine.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ast_plugin.ops.assa import Affine, attention_weights
from ast_plugin.ops.assa import window_attention as plain_window_attention
from ast_plugin.ops.fused_cpu_kernels import Strip, gradients_of, linear, outer_sum, strips, without_autocast
from ast_plugin.ops.fused_cpu_windows import edge_masks, pieces, rolled
from ast_plugin.ops.residual import Residual
from ast_plugin.ops.windows import check_windows, relative_position_index


class Weights(NamedTuple):
    """Parameters of a block with window attention; what it lacks is None. See `assa.window_attention`."""

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    q: Tensor
    q_bias: Tensor | None
    kv: Tensor
    kv_bias: Tensor | None
    proj: Tensor
    proj_bias: Tensor | None
    position_bias: Tensor
    gate: Tensor | None


class Settings(NamedTuple):
    """What is no tensor. `dtype` is what linear layers compute in; `eps` and `is_residual` are of the block."""

    dtype: torch.dtype
    eps: float
    is_residual: bool
    num_heads: int
    window: int
    shift: int
    kind: str
    topk_ratio: float


def window_attention(
    x: Tensor,
    q: Affine,
    kv: Affine,
    proj: Affine,
    position_bias: Tensor,
    *,
    num_heads: int,
    window: int,
    shift: int,
    kind: str,
    gate: Tensor | None,
    mask: Tensor | None,
    topk_ratio: float,
    residual: Residual | None,
) -> Tensor:
    """See `assa.window_attention`."""
    check_windows(x.shape, num_heads, window)
    norm = (None, None) if residual is None else (residual.weight, residual.bias)
    weights = Weights(*norm, *q, *kv, *proj, position_bias, gate)
    scale = None if residual is None else residual.scale
    autocast = torch.is_autocast_enabled('cpu') and x.dtype is not torch.float64
    settings = Settings(
        torch.get_autocast_dtype('cpu') if autocast else x.dtype,
        0.0 if residual is None else residual.eps,
        residual is not None,
        num_heads,
        window,
        shift,
        kind,
        topk_ratio,
    )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights)):
        return _WindowAttention.apply(settings, x, mask, scale, *weights)
    with without_autocast():
        return _Attention(settings, x, mask, scale, weights).forward()


class _Attention:
    """One call's tensors, prepared, and what its forward and backward passes do with a group of windows."""

    def __init__(
        self, settings: Settings, x: Tensor, mask: Tensor | None, scale: Tensor | None, weights: Weights
    ) -> None:
        self.settings, self.x, self.scale, self.weights = settings, x, scale, weights
        dtype, window = settings.dtype, settings.window
        self.core = torch.promote_types(dtype, torch.float32)
        H, W = x.shape[1:3]
        tokens = window**2
        self.mask = None if mask is None else mask.to(self.core).reshape(-1, H // window, W // window, tokens, tokens)

        def joined(first: Tensor | None, second: Tensor | None) -> Tensor | None:
            return None if first is None else torch.cat([first.detach().to(dtype), second.detach().to(dtype)])

        # Made anew by each call, a thousandth of its work: what is kept would have to be told of every change of the
        # parameters, and writes through `.data`, as in BasicSR's moving average, leave no trace.
        self.qkv, self.qkv_bias = joined(weights.q, weights.kv), joined(weights.q_bias, weights.kv_bias)
        self.proj = weights.proj.detach().to(dtype)
        self.proj_bias = None if weights.proj_bias is None else weights.proj_bias.detach().to(dtype)
        index = relative_position_index(window).flatten()
        bias = weights.position_bias.detach().to(self.core)[index]
        self.bias = bias.t().reshape(settings.num_heads, 1, tokens, tokens).contiguous()
        self.gate = None if weights.gate is None else weights.gate.detach().to(self.core)

    def groups(self) -> Iterator[Strip]:
        """Rows of windows in the rolled map."""
        B, H, W, C = self.x.shape
        widest = max(3 * C, self.settings.num_heads * self.settings.window**2)
        return strips(B, H, W * widest * self.proj.element_size(), self.settings.window)

    def forward(self) -> Tensor:
        x, settings = self.x, self.settings
        kept = torch.promote_types(x.dtype, settings.dtype) if settings.is_residual else settings.dtype
        out = torch.empty(x.shape, dtype=kept, device=x.device)
        for group in self.groups():
            normed = self._normed(rolled(x, group, settings.shift))[0]
            queries, keys, values = self._split(linear(normed, self.qkv, self.qkv_bias))
            weights = self._weights(self._scores(queries, keys, group))
            y = linear(self._joined(weights @ values, group), self.proj, self.proj_bias)
            if self.scale is not None:
                y = y.mul_(group.images_of(self.scale))
            for target, own, source in pieces(out, y, x, group, settings.shift):
                torch.add(source, own, out=target) if settings.is_residual else target.copy_(own)
        return out

    def _normed(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Rows of x as linear layers see them, and mean and reciprocal deviation of the norm."""
        if not self.settings.is_residual:
            return x.to(self.settings.dtype).contiguous(), None, None
        norm = self.weights.norm_weight, self.weights.norm_bias
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], *norm, self.settings.eps)
        return y.to(self.settings.dtype), mean, rstd

    def _split(self, qkv: Tensor) -> Tensor:
        """[b, rows, W, 3C] -> [3, heads, windows, tokens, d]."""
        b, rows, W, _ = qkv.shape
        window, heads = self.settings.window, self.settings.num_heads
        qkv = qkv.reshape(b, rows // window, window, W // window, window, 3, heads, -1)
        qkv = qkv.permute(5, 6, 0, 1, 3, 2, 4, 7).to(self.core, memory_format=torch.contiguous_format)
        return qkv.reshape(3, heads, -1, window**2, qkv.shape[-1])

    def _joined(self, parts: Tensor, group: Strip) -> Tensor:
        """[..., heads, windows, tokens, d] -> [b, rows, W, ... * C], the inverse of `_split`."""
        window, W = self.settings.window, self.x.shape[2]
        count = parts.shape[0] if parts.ndim == 5 else 1
        rows = (group.last - group.first) // window
        parts = parts.reshape(count, self.settings.num_heads, group.num_images, rows, W // window, window, window, -1)
        parts = parts.permute(2, 3, 5, 4, 6, 0, 1, 7).to(self.settings.dtype, memory_format=torch.contiguous_format)
        return parts.reshape(group.num_images, rows * window, W, -1)

    def _scores(self, queries: Tensor, keys: Tensor, group: Strip) -> Tensor:
        """(q · kᵀ) / √d + position bias + masks: [heads, windows, tokens, tokens]."""
        heads, N, T, d = queries.shape
        window, W = self.settings.window, self.x.shape[2]
        scores = torch.baddbmm(
            self.bias.expand(heads, N, T, T).reshape(-1, T, T),
            queries.reshape(-1, T, d),
            keys.reshape(-1, T, d).transpose(1, 2),
            alpha=d**-0.5,
        )
        if not self.settings.shift and self.mask is None:
            return scores.reshape(heads, N, T, T)
        scores = scores.reshape(heads, group.num_images, -1, W // window, T, T)
        if self.settings.shift:
            below, beside, corner = (mask.to(self.core) for mask in edge_masks(window, self.settings.shift))
            scores[:, :, :, -1] += beside
            if group.edges.bottom:
                scores[:, :, -1, :-1] += below
                scores[:, :, -1, -1] += corner - beside
        if self.mask is not None:
            mask = self.mask if self.mask.shape[0] == 1 else group.images_of(self.mask)
            scores += mask[:, group.first // window : group.last // window]
        return scores.reshape(heads, N, T, T)

    def _weights(self, scores: Tensor) -> Tensor:
        """As `attention_weights`; writes to `scores`."""
        if self.settings.kind != 'assa':
            return attention_weights(scores, self.settings.kind, self.gate, self.settings.topk_ratio)
        dense_share, sparse_share = self.gate.softmax(0)
        weights = scores.softmax(-1).mul_(dense_share)
        positive = scores.relu_()
        return weights.addcmul_(positive, positive.mul(sparse_share))


class _WindowAttention(torch.autograd.Function):
    """Keeps the input alone, and computes groups again in the backward pass. `mask` and `scale` are constants."""

    @staticmethod
    def forward(ctx: FunctionCtx, settings: Settings, x: Tensor, mask: Tensor | None, scale: Tensor | None, *weights):
        ctx.settings = settings
        ctx.save_for_backward(x, mask, scale, *weights)
        with without_autocast():
            return _Attention(settings, x, mask, scale, Weights(*weights)).forward()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor):
        x, mask, scale, *tensors = ctx.saved_tensors
        weights, needed = Weights(*tensors), (ctx.needs_input_grad[1], *ctx.needs_input_grad[4:])
        if torch.is_grad_enabled():
            # Gradients of gradients are asked for: autograd has the formulas of the plain reference.
            grad_x, *rest = _differentiable(ctx.settings, grad, x, mask, scale, weights, needed)
        else:
            with without_autocast():
                grad_x, *rest = _Backward(ctx.settings, x, mask, scale, weights, needed).run(grad)
        return None, grad_x, None, None, *rest


def _differentiable(
    settings: Settings,
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    w: Weights,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    residual = Residual(w.norm_weight, w.norm_bias, settings.eps, scale) if settings.is_residual else None
    autocast = settings.dtype is not x.dtype or settings.dtype is not w.q.dtype
    with torch.autocast('cpu', settings.dtype) if autocast else without_autocast():
        out = plain_window_attention(
            x,
            (w.q, w.q_bias),
            (w.kv, w.kv_bias),
            (w.proj, w.proj_bias),
            w.position_bias,
            num_heads=settings.num_heads,
            window=settings.window,
            shift=settings.shift,
            kind=settings.kind,
            gate=w.gate,
            mask=mask,
            topk_ratio=settings.topk_ratio,
            residual=residual,
        )
    return gradients_of(out, grad, (x, *w), needed)


class _Backward(_Attention):
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
        super().__init__(settings, x, mask, scale, weights)
        self.needed_x, self.needed = needed[0], Weights(*needed[1:])
        self.qkv_t, self.proj_t = self.qkv.t(), self.proj.t()
        C = x.shape[-1]
        zeros = {'dtype': self.core, 'device': x.device}
        self.d_norm = torch.zeros(2, C, **zeros)
        self.d_qkv, self.d_qkv_bias = torch.zeros(3 * C, C, **zeros), torch.zeros(3 * C, **zeros)
        self.d_proj, self.d_proj_bias = torch.zeros(C, C, **zeros), torch.zeros(C, **zeros)
        self.d_bias = torch.zeros_like(self.bias)
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
        if self.gate is not None:
            shares = self.gate.double().softmax(0)
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
        queries, keys, values = self._split(linear(normed, self.qkv, self.qkv_bias))
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
            dx.to(x.dtype), x.contiguous(), x.shape[-1:], mean, rstd, *norm, (True, True, norm[1] is not None)
        )
        self.d_norm[0] += d_weight
        if d_bias is not None:
            self.d_norm[1] += d_bias
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
        dense_share, sparse_share = self.gate.softmax(0)
        dense, positive = scores.softmax(-1), scores.relu_()
        d_dense = grad * dense
        per_row = d_dense.sum(-1, keepdim=True)
        d_sparse = grad * positive
        self.d_shares[0] += per_row.sum(dtype=torch.float64)
        self.d_shares[1] += (d_sparse * positive).sum(-1).sum(dtype=torch.float64)
        # softmax: P · (dP − Σ dP · P), with dP the dense share of the gradient; relu²: 2 · relu · its share of it
        d_scores = d_dense.addcmul_(dense, per_row, value=-1).mul_(dense_share).add_(d_sparse.mul_(2 * sparse_share))
        return dense.mul_(dense_share).addcmul_(positive, positive.mul(sparse_share)), d_scores
