"""Window attention with ASSA's weights and those its ablation compares. The plain reference."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_plugin.errors import OptionError
from ast_plugin.ops.residual import Residual, with_residual
from ast_plugin.ops.windows import check_windows, merge_windows, partition_windows, relative_position_index, shift_mask

ATTENTION_KINDS = ('assa', 'dense', 'sparse', 'sparse_relu', 'topk')

Affine = tuple[Tensor, Tensor | None]  # weight [out, in] and bias [out] of a linear layer


def attention_weights(scores: Tensor, kind: str, gate: Tensor | None = None, topk_ratio: float = 0.5) -> Tensor:
    """Weights of the values, from the scores of queries and keys.

        dense        softmax(S)                         rows sum to 1
        sparse       relu(S)²                           no normalisation
        sparse_relu  relu(S)                            no normalisation
        assa         g₀ · softmax(S) + g₁ · relu(S)²    g = softmax(gate)
        topk         softmax over the highest scores of each row

    Args:
        scores: [..., queries, keys], any float dtype.
        kind: one of `ATTENTION_KINDS`.
        gate: [2], logits of the dense and the sparse branch, for `assa` only.
        topk_ratio: share of the keys that `topk` keeps, in (0, 1].
    Returns:
        Shape and dtype of `scores`.
    Raises:
        OptionError: for an unknown kind.
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
        keep = max(1, round(topk_ratio * scores.shape[-1]))
        lowest = scores.topk(keep, dim=-1).values[..., -1:]
        return scores.masked_fill(scores < lowest, float('-inf')).softmax(-1)
    raise OptionError(f'attention {kind!r} is unknown: one of {", ".join(ATTENTION_KINDS)}')


def window_attention(
    x: Tensor,
    q: Affine,
    kv: Affine,
    proj: Affine,
    position_bias: Tensor,
    *,
    num_heads: int,
    window: int,
    shift: int = 0,
    kind: str = 'assa',
    gate: Tensor | None = None,
    mask: Tensor | None = None,
    topk_ratio: float = 0.5,
    residual: Residual | None = None,
) -> Tensor:
    """Multi-head self-attention within (shifted) windows of a map.

    Args:
        x: [B, H, W, C], H and W multiples of `window`, C a multiple of `num_heads`.
        q: linear layer of the queries, C -> C.
        kv: linear layer of keys and values, C -> 2C.
        proj: linear layer of the output, C -> C.
        position_bias: [(2 * window - 1)**2, num_heads], added to the scores by relative position.
        num_heads: number of heads.
        window: side of a window.
        shift: the map is rolled by this much up and left before it is cut, and back afterwards.
        kind, gate, topk_ratio: see `attention_weights`.
        mask: [num_windows or B * num_windows, window**2, window**2], added to the scores of all heads.
        residual: a norm before and the sum with x after it, see `Residual`.
    Returns:
        [B, H, W, C].
    Raises:
        ShapeError: if sizes do not divide, or the shift is not within a window.
    Numerics: scores, weights and their product with the values are computed in float32 for half inputs: the sparse
        branch is not normalised and leaves float16's range. float64 stays float64.
    Source: Zhou et al., CVPR 2024, section 3.2.
    """
    check_windows(x.shape, num_heads, window, shift)
    _, H, W, C = x.shape
    if shift:
        regions = shift_mask((H, W), window, shift, x.device)
        mask = regions if mask is None else _add_by_window(mask, regions)

    def branch(x: Tensor) -> Tensor:
        if shift:
            x = x.roll((-shift, -shift), dims=(1, 2))
        windows = partition_windows(x, window)
        N, T, _ = windows.shape
        queries = F.linear(windows, *q).reshape(N, T, num_heads, C // num_heads).transpose(1, 2)
        keys, values = F.linear(windows, *kv).reshape(N, T, 2, num_heads, C // num_heads).permute(2, 0, 3, 1, 4)
        # Shapes alone, on `meta`, are computed without autocast, which that device does not have.
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            scores = _scores(queries, keys, position_bias, window, mask)
            weights = attention_weights(scores, kind, gate, topk_ratio)
            out = (weights @ values.to(weights.dtype)).to(values.dtype)
        out = F.linear(out.transpose(1, 2).reshape(N, T, C), *proj)
        out = merge_windows(out, window, (H, W))
        return out.roll((shift, shift), dims=(1, 2)) if shift else out

    return with_residual(branch, x, residual)


def _scores(queries: Tensor, keys: Tensor, position_bias: Tensor, window: int, mask: Tensor | None) -> Tensor:
    """(q · kᵀ) / √d + position bias + mask: [N, heads, T, T]."""
    N, heads, T, d = queries.shape
    dtype = torch.promote_types(queries.dtype, torch.float32)
    index = relative_position_index(window).to(queries.device)
    bias = position_bias[index.flatten()].reshape(T, T, heads).permute(2, 0, 1)
    scores = (queries.to(dtype) * d**-0.5) @ keys.to(dtype).transpose(-2, -1) + bias
    if mask is None:
        return scores
    scores = scores.reshape(-1, mask.shape[0], heads, T, T) + mask.to(dtype)[:, None]
    return scores.reshape(N, heads, T, T)


def _add_by_window(mask: Tensor, regions: Tensor) -> Tensor:
    """Sum of a mask [(1 or B) * num_windows, T, T] and one of [num_windows, T, T]."""
    return (mask.reshape(-1, *regions.shape) + regions).reshape(mask.shape)
