"""Reference implementation of window attention: ASSA and the attention variants of its ablation study."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ast_plugin.errors import OptionError, ShapeError
from ast_plugin.ops.windows import check_shapes, check_size, keep_shape_in_trace, relative_position_index, shift_mask

ATTENTION_KINDS = ('assa', 'dense', 'sparse', 'sparse_relu', 'topk')


class Attention(NamedTuple):
    """Parameters and settings of window attention, shared by all backends.

    Attributes:
        q, kv, proj: weights of the linear layers for queries [C, C], keys and values [2C, C], and output [C, C];
            each bias may be None.
        position_bias: relative position bias table, [(2 * window - 1)**2, num_heads], added to the scores.
        num_heads: number of heads, a divisor of C.
        window: side length of a window in tokens.
        shift: cyclic shift up and left before the map is partitioned, undone afterwards; in [0, window).
        kind, gate, topk_ratio: see `attention_weights`.
    """

    q: Tensor
    q_bias: Tensor | None
    kv: Tensor
    kv_bias: Tensor | None
    proj: Tensor
    proj_bias: Tensor | None
    position_bias: Tensor
    gate: Tensor | None
    num_heads: int
    window: int
    shift: int = 0
    kind: str = 'assa'
    topk_ratio: float = 0.5

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:8]

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> 'Attention':
        """Return a copy with other parameters and the same settings."""
        return Attention(*tensors, *self[8:])

    def check(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Raise ShapeError if the shapes of x, parameters and mask do not match: kernels would read out of bounds."""
        if x.ndim != 4:
            raise ShapeError(f'expected a feature map [B, H, W, C], got {list(x.shape)}')
        B, H, W, C = x.shape
        if not 0 <= self.shift < self.window:
            raise ShapeError(f'expected a shift in [0, {self.window}), the window size, got {self.shift}')
        if C % self.num_heads:
            raise ShapeError(f'{C} channels are not divisible by {self.num_heads} heads')
        check_size(H, W, self.window)
        tokens, num_windows = self.window**2, (H // self.window) * (W // self.window)
        table = (2 * self.window - 1) ** 2, self.num_heads
        shapes = (C, C), (C,), (2 * C, C), (2 * C,), (C, C), (C,), table, (2,)
        given = zip(self._fields, self.tensors, shapes, strict=False)
        expected = {name: (tensor, shape) for name, tensor, shape in given if tensor is not None}
        if self.kind == 'assa':
            expected['gate'] = self.gate, (2,)
        if mask is not None:
            count = B * num_windows if mask.shape[0] == B * num_windows else num_windows
            expected['mask'] = mask, (count, tokens, tokens)
        check_shapes(expected)


def attention_weights(scores: Tensor, kind: str, gate: Tensor | None = None, topk_ratio: float = 0.5) -> Tensor:
    """Compute attention weights from the scores S of queries and keys::

        dense        softmax(S)                         rows sum to 1
        sparse       relu(S)²                           no normalisation
        sparse_relu  relu(S)                            no normalisation
        assa         g₀ · softmax(S) + g₁ · relu(S)²    g = softmax(gate)
        topk         softmax over the highest scores of each row

    Args:
        scores: [..., queries, keys], any float dtype.
        kind: one of `ATTENTION_KINDS`.
        gate: [2], logits of the dense and the sparse branch; used by `assa` only.
        topk_ratio: fraction of the keys kept by `topk`, in (0, 1].
    Returns:
        Tensor with the shape and dtype of `scores`.
    Raises:
        OptionError: if `kind` is unknown.
    Source: Zhou et al., CVPR 2024, equations 3 to 6; top-k after DRSformer (Chen et al., CVPR 2023).
    """
    if kind == 'dense':
        return scores.softmax(-1)
    if kind == 'sparse':
        return scores.relu().square()
    if kind == 'sparse_relu':
        return scores.relu()
    if kind == 'assa':
        dense_share, sparse_share = gate.to(scores.dtype).softmax(0)
        return dense_share * scores.softmax(-1) + sparse_share * scores.relu().square()
    if kind == 'topk':
        num_keys = int(scores.shape[-1])  # constant per window size, but a tensor during tracing
        scores = keep_shape_in_trace(scores, [-1] * (scores.ndim - 1) + [num_keys])
        keep = max(1, round(topk_ratio * num_keys))
        lowest = scores.topk(keep, dim=-1).values[..., -1:]
        return scores.masked_fill(scores < lowest, float('-inf')).softmax(-1)
    raise OptionError(f'unknown attention {kind!r}: expected one of {", ".join(ATTENTION_KINDS)}')


def window_attention(x: Tensor, op: Attention, mask: Tensor | None = None) -> Tensor:
    """Multi-head self-attention within (shifted) windows of a feature map::

        out = proj(weights(q · kᵀ / √d + position bias + mask) · v)

    Args:
        x: [B, H, W, C], with H and W multiples of the window size.
        op: parameters and settings.
        mask: [num_windows or B * num_windows, window**2, window**2], added to the scores of all heads.
    Returns:
        [B, H, W, C].
    Numerics: for half-precision inputs, scores, weights and their product with the values are computed in float32,
        because the sparse branch is not normalised and exceeds the range of float16. float64 stays float64.
    Source: Zhou et al., CVPR 2024, section 3.2.
    """
    qkv = F.linear(_roll(x, -op.shift), *qkv_layer(op))
    out = _attend_rolled(qkv, gather_bias(op), op.gate, mask, op)
    return _roll(F.linear(out, op.proj, op.proj_bias), op.shift)


def attend(qkv: Tensor, bias: Tensor, gate: Tensor | None, mask: Tensor | None, op: Attention) -> Tensor:
    """Window attention without its linear layers.

    Args:
        qkv: queries, keys and values concatenated along channels, [B, H, W, 3C].
        bias: position bias, [num_heads, window**2, window**2], see `gather_bias`.
        gate, mask: see `Attention` and `window_attention`.
        op: settings; its tensors are not used.
    Returns:
        [B, H, W, C].
    """
    return _roll(_attend_rolled(_roll(qkv, -op.shift), bias, gate, mask, op), op.shift)


def _roll(x: Tensor, shift: int) -> Tensor:
    return x.roll((shift, shift), dims=(1, 2)) if shift else x


def _attend_rolled(qkv: Tensor, bias: Tensor, gate: Tensor | None, mask: Tensor | None, op: Attention) -> Tensor:
    _, H, W, _ = qkv.shape
    if op.shift:
        regions = shift_mask((H, W), op.window, op.shift, qkv.device)
        mask = regions if mask is None else (mask.reshape(-1, *regions.shape) + regions).reshape(mask.shape)
    q, k, v = rearrange(
        qkv, 'b (h y) (w x) (n heads d) -> n (b h w) heads (y x) d', y=op.window, x=op.window, n=3, heads=op.num_heads
    )
    # The meta device does not support autocast.
    with nullcontext() if qkv.is_meta else torch.autocast(qkv.device.type, enabled=False):
        dtype = torch.promote_types(qkv.dtype, torch.float32)
        scores = (q.to(dtype) * q.shape[-1] ** -0.5) @ k.to(dtype).transpose(-2, -1) + bias
        if mask is not None:
            scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask.to(dtype)[:, None]).flatten(0, 1)
        out = (attention_weights(scores, op.kind, gate, op.topk_ratio) @ v.to(dtype)).to(v.dtype)
    size = {'h': H // op.window, 'w': W // op.window, 'y': op.window}
    return rearrange(out, '(b h w) heads (y x) d -> b (h y) (w x) (heads d)', **size)


def qkv_layer(op: Attention) -> tuple[Tensor, Tensor | None]:
    """Return weight [3C, C] and bias ([3C] or None) of one fused linear layer for queries, keys and values."""
    layers = (op.q, op.q_bias), (op.kv, op.kv_bias)
    bias = None
    if op.q_bias is not None or op.kv_bias is not None:
        bias = torch.cat([weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in layers])
    return torch.cat([op.q, op.kv]), bias


def gather_bias(op: Attention) -> Tensor:
    """Gather the position bias of every pair of tokens in a window, [num_heads, window**2, window**2]."""
    index = relative_position_index(op.window, op.position_bias.device)
    return rearrange(op.position_bias[index], 'q k heads -> heads q k')
