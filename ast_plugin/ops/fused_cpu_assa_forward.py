"""Parameters and forward pass of `fused_cpu_assa` over groups of windows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ast_plugin.ops.assa import attention_weights
from ast_plugin.ops.fused_cpu_kernels import Strip, linear, strips
from ast_plugin.ops.fused_cpu_windows import edge_masks, pieces, rolled
from ast_plugin.ops.windows import relative_position_index


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

    @property
    def core(self) -> torch.dtype:
        """What scores and their weights are computed in."""
        return torch.promote_types(self.dtype, torch.float32)


class Layers(NamedTuple):
    """What is computed with: weights joined, gathered, and in the dtypes that are computed in.

    Attributes:
        qkv, qkv_bias: [3C, C] and [3C], of queries, keys and values; likewise `proj`.
        bias: [heads, 1, window**2, window**2], added to the scores.
        gate: [2], or None.
    """

    qkv: Tensor
    qkv_bias: Tensor | None
    proj: Tensor
    proj_bias: Tensor | None
    bias: Tensor
    gate: Tensor | None

    @classmethod
    def of(cls, settings: Settings, weights: Weights) -> Layers:
        dtype, core, tokens = settings.dtype, settings.core, settings.window**2

        def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(dtype)

        qkv_bias = None
        if weights.q_bias is not None or weights.kv_bias is not None:
            layers = (weights.q, weights.q_bias), (weights.kv, weights.kv_bias)
            qkv_bias = torch.cat([cast(w.new_zeros(len(w)) if b is None else b, dtype) for w, b in layers])
        bias = cast(weights.position_bias, core)[relative_position_index(settings.window).flatten()]
        return cls(
            torch.cat([cast(weights.q, dtype), cast(weights.kv, dtype)]),
            qkv_bias,
            cast(weights.proj, dtype),
            cast(weights.proj_bias, dtype),
            bias.t().reshape(settings.num_heads, 1, tokens, tokens).contiguous(),
            cast(weights.gate, core),
        )


class Attention:
    """One call's tensors, and what its forward and backward passes do with a group of windows."""

    def __init__(
        self, settings: Settings, x: Tensor, mask: Tensor | None, scale: Tensor | None, weights: Weights, layers: Layers
    ) -> None:
        self.settings, self.x, self.scale, self.weights, self.layers = settings, x, scale, weights, layers
        self.core = settings.core
        H, W = x.shape[1:3]
        window, tokens = settings.window, settings.window**2
        self.mask = None if mask is None else mask.to(self.core).reshape(-1, H // window, W // window, tokens, tokens)

    def groups(self) -> Iterator[Strip]:
        """Rows of windows in the rolled map."""
        B, H, W, C = self.x.shape
        widest = max(3 * C, self.settings.num_heads * self.settings.window**2)
        return strips(B, H, W * widest * self.layers.proj.element_size(), self.settings.window)

    def forward(self) -> Tensor:
        x, settings = self.x, self.settings
        kept = torch.promote_types(x.dtype, settings.dtype) if settings.is_residual else settings.dtype
        out = torch.empty(x.shape, dtype=kept, device=x.device)
        for group in self.groups():
            normed = self._normed(rolled(x, group, settings.shift))[0]
            queries, keys, values = self._split(linear(normed, self.layers.qkv, self.layers.qkv_bias))
            weights = self._weights(self._scores(queries, keys, group))
            y = linear(self._joined(weights @ values, group), self.layers.proj, self.layers.proj_bias)
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
            self.layers.bias.expand(heads, N, T, T).reshape(-1, T, T),
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
            return attention_weights(scores, self.settings.kind, self.layers.gate, self.settings.topk_ratio)
        dense_share, sparse_share = self.layers.gate.softmax(0)
        weights = scores.softmax(-1).mul_(dense_share)
        positive = scores.relu_()
        return weights.addcmul_(positive, positive.mul(sparse_share))
