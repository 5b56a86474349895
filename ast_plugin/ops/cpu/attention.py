"""Window attention on CPUs, computed over groups of windows without copies of the feature map.

Equivalent to `ops.attention.window_attention`. Each group, some rows of windows, is processed from norm to residual sum
while it is in the caches. Shifted rows and columns are read in place instead of from a rolled copy. Only the windows in
the last row and column of a shifted map are masked, with masks that do not depend on its size. The backward pass saves
only the input and recomputes group by group, as windows are independent.

Numerics: for bfloat16, scores, weights and their product with the values are computed in float32, as in the reference.
Parameter gradients are accumulated in float32 over groups; the order depends on shapes and the number of threads only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ast_plugin.ops import attention as plain
from ast_plugin.ops.attention import Attention, attention_weights
from ast_plugin.ops.backend import Residual, Tensors
from ast_plugin.ops.cpu.operators import Branch, Strip, cut_strips, linear, run_branch
from ast_plugin.ops.windows import edge_masks, relative_position_index


def window_attention(x: Tensor, op: Attention, mask: Tensor | None = None, residual: Residual | None = None) -> Tensor:
    """See `ops.window_attention`."""
    return run_branch(_AttentionBranch, x, op, mask, residual)


class _Layers(NamedTuple):
    """Parameters, concatenated and gathered, in the dtypes of the computation."""

    qkv: Tensor  # [3C, C], for queries, keys and values
    qkv_bias: Tensor | None
    proj: Tensor
    proj_bias: Tensor | None
    bias: Tensor  # [heads, 1, window**2, window**2], added to the scores
    gate: Tensor | None


class _AttentionBranch(Branch):
    plain = staticmethod(plain.window_attention)

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.core = self.sums_dtype  # dtype of scores and attention weights
        self.sides = {'y': self.op.window, 'x': self.op.window}
        if self.mask is not None:
            H, W = (side // self.op.window for side in self.x.shape[1:3])
            self.mask = rearrange(self.mask.to(self.core), '(b h w) q k -> b h w q k', h=H, w=W)

    @staticmethod
    def prepare(op: Attention, dtype: torch.dtype) -> _Layers:
        op = op.with_tensors([None if tensor is None else tensor.detach() for tensor in op.tensors])
        core = torch.promote_types(dtype, torch.float32)
        linear_layers = *plain.qkv_layer(op), op.proj, op.proj_bias
        return _Layers(
            *(None if tensor is None else tensor.to(dtype) for tensor in linear_layers),
            plain.gather_bias(op).to(core)[:, None].contiguous(),
            None if op.gate is None else op.gate.to(core),
        )

    def groups(self) -> Iterator[Strip]:
        """Yield groups of rows of windows in the rolled map."""
        B, H, W, C = self.x.shape
        widest = max(3 * C, self.op.num_heads * self.op.window**2)
        return cut_strips(B, H, W * widest * self.layers.proj.element_size(), self.op.window)

    def forward(self) -> Tensor:
        out = self.new_output()
        for group in self.groups():
            normed, _, _ = self.norm(self._read(self.x, group))
            queries, keys, values = self._split(linear(normed, self.layers.qkv, self.layers.qkv_bias), 3)
            weights = self._weights(self._scores(queries, keys, group))
            y = linear(self._join((weights @ values)[None], group), self.layers.proj, self.layers.proj_bias)
            y = y if self.scale is None else y.mul_(group.view_images(self.scale))
            self._write(out, y, self.x, group)
        return out

    def _read(self, x: Tensor, group: Strip) -> Tensor:
        """Read rows of a map as if it were rolled by the shift up and left, [b, rows, W, C]."""
        images, parts = group.view_images(x), self._parts(group)
        if len(parts) == 1:
            return images[parts[0][1]]
        rows = images.new_empty(len(images), group.last - group.first, *images.shape[2:])
        for rolled, original in parts:
            rows[rolled] = images[original]
        return rows

    def _write(self, out: Tensor, rows: Tensor, beside: Tensor, group: Strip) -> None:
        """Write rolled rows to their original positions, see `write`."""
        out, beside = group.view_images(out), group.view_images(beside)
        for rolled, original in self._parts(group):
            self.write(out[original], rows[rolled], beside[original])

    def _parts(self, group: Strip) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """Return the one, two or four parts of a group that the shift leaves in one piece: rolled, and original."""
        H, W = self.x.shape[1:3]
        rows, columns = _segments(group.first, group.last, H, self.op.shift), _segments(0, W, W, self.op.shift)
        return [
            ((slice(None), row, column), (slice(None), original_row, original_column))
            for (row, original_row), (column, original_column) in itertools.product(rows, columns)
        ]

    def _split(self, rows: Tensor, count: int) -> Tensor:
        """[b, rows, W, count · C] -> [count, heads, windows, tokens, d]."""
        pattern = 'b (h y) (w x) (n heads d) -> n heads b h w y x d'
        rows = rearrange(rows, pattern, **self.sides, n=count, heads=self.op.num_heads)
        rows = rows.to(self.core, memory_format=torch.contiguous_format)  # cast and reordered in one copy
        return rearrange(rows, 'n heads b h w y x d -> n heads (b h w) (y x) d')

    def _join(self, parts: Tensor, group: Strip) -> Tensor:
        """[n, heads, windows, tokens, d] -> [b, rows, W, n · C], the inverse of `_split`."""
        counts = {'b': group.num_images, 'w': self.x.shape[2] // self.op.window}
        parts = rearrange(parts, 'n heads (b h w) (y x) d -> b h y w x n heads d', **counts, **self.sides)
        parts = parts.to(self.dtype, memory_format=torch.contiguous_format)
        return rearrange(parts, 'b h y w x n heads d -> b (h y) (w x) (n heads d)')

    def _scores(self, queries: Tensor, keys: Tensor, group: Strip) -> Tensor:
        """(q · kᵀ) / √d + position bias + masks: [heads, windows, tokens, tokens]."""
        heads, N, T, d = queries.shape
        window, shift = self.op.window, self.op.shift
        bias = self.layers.bias.expand(heads, N, T, T).reshape(-1, T, T)
        scores = torch.baddbmm(bias, queries.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), alpha=d**-0.5)
        scores = scores.reshape(heads, group.num_images, -1, self.x.shape[2] // window, T, T)
        if shift:
            # Only windows in the last row and column are masked.
            _, beside, below, corner = edge_masks(window, shift, scores.device).to(self.core)
            scores[:, :, :, -1] += beside
            if group.edges[1]:
                scores[:, :, -1, :-1] += below
                scores[:, :, -1, -1] += corner - beside
        if self.mask is not None:
            mask = self.mask if len(self.mask) == 1 else group.view_images(self.mask)
            scores += mask[:, group.first // window : group.last // window]
        return scores.reshape(heads, N, T, T)

    def _weights(self, scores: Tensor) -> Tensor:
        """Compute `attention_weights`, overwriting `scores`."""
        if self.op.kind != 'assa':
            return attention_weights(scores, self.op.kind, None, self.op.topk_ratio)
        dense_share, sparse_share = self.layers.gate.softmax(0)
        weights = scores.softmax(-1).mul_(dense_share)
        positive = scores.relu_()
        return weights.addcmul_(positive, positive.mul(sparse_share))

    def backward(self, grad: Tensor, kept: Tensors) -> dict[str, Tensor | None]:
        """Recompute each group and backpropagate through it, accumulating the parameter gradients."""
        C, layers, sums = self.x.shape[-1], self.layers, self.sums
        self.wanted |= {'qkv', 'qkv_bias', 'bias'}
        self.qkv_t, self.proj_t = layers.qkv.t(), layers.proj.t()
        # In float64: the gradient of the gate is a small difference of these sums.
        self.d_shares = torch.zeros(2, dtype=torch.float64, device='cpu')
        grad_x = self.x.new_empty(self.x.shape)
        for group in self.groups():
            self._write(grad_x, self._run_group(group, self._read(grad, group)), grad, group)
        index = relative_position_index(self.op.window).flatten()
        table = torch.zeros((2 * self.op.window - 1) ** 2, self.op.num_heads, dtype=self.core, device='cpu')
        table.index_add_(0, index, rearrange(sums['bias'], 'heads 1 q k -> (q k) heads').contiguous())
        d_gate = None
        if layers.gate is not None:
            shares = layers.gate.double().softmax(0)
            d_gate = shares * (self.d_shares - (shares * self.d_shares).sum())
        (d_q, d_kv), (d_q_bias, d_kv_bias) = (sums[name].split([C, 2 * C]) for name in ('qkv', 'qkv_bias'))
        inputs = {'q': d_q, 'q_bias': d_q_bias, 'kv': d_kv, 'kv_bias': d_kv_bias}
        return {'x': grad_x, 'position_bias': table, 'gate': d_gate, **inputs, **sums}

    def _run_group(self, group: Strip, grad: Tensor) -> Tensor:
        """Compute the gradient of the rolled rows of x, except the identity path, from that of the output."""
        x = self._read(self.x, group)
        normed, *statistics = self.norm(x)
        queries, keys, values = self._split(linear(normed, self.layers.qkv, self.layers.qkv_bias), 3)
        scores = self._scores(queries, keys, group)
        dy = self.output_grad(grad, group)
        d_out = self._split(linear(dy, self.proj_t), 1)[0]
        weights, d_scores = self._weights_backward(scores, d_out @ values.transpose(-2, -1))
        self.add_linear('proj', dy, self._join((weights @ values)[None], group))
        self.add('bias', d_scores.sum(1, keepdim=True))
        parts = queries.new_empty(3, *queries.shape)
        torch.matmul(weights.transpose(-2, -1), d_out, out=parts[2])
        d_scores = d_scores.mul_(queries.shape[-1] ** -0.5)
        torch.matmul(d_scores, keys, out=parts[0])
        torch.matmul(d_scores.transpose(-2, -1), queries, out=parts[1])
        d_qkv = self._join(parts, group)
        self.add_linear('qkv', d_qkv, normed)
        return self.norm_backward(linear(d_qkv, self.qkv_t), x, *statistics)

    def _weights_backward(self, scores: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights and the gradient of the scores; add to the gradient of the branch shares."""
        if self.op.kind != 'assa':
            with torch.enable_grad():
                scores = scores.detach().requires_grad_()
                weights = attention_weights(scores, self.op.kind, None, self.op.topk_ratio)
            return weights.detach(), torch.autograd.grad(weights, scores, grad)[0]
        dense_share, sparse_share = self.layers.gate.softmax(0)
        dense, positive = scores.softmax(-1), scores.relu_()
        d_dense = grad * dense
        per_row = d_dense.sum(-1, keepdim=True)
        d_sparse = grad * positive
        self.d_shares[0] += per_row.sum(dtype=torch.float64)
        self.d_shares[1] += (d_sparse * positive).sum(-1).sum(dtype=torch.float64)
        # softmax P: P · (dP − Σ dP · P); relu²: 2 · relu · d(relu²); each times its share
        d_scores = d_dense.addcmul_(dense, per_row, value=-1).mul_(dense_share).add_(d_sparse.mul_(2 * sparse_share))
        return dense.mul_(dense_share).addcmul_(positive, positive.mul(sparse_share)), d_scores


def _segments(first: int, last: int, size: int, shift: int) -> list[tuple[slice, slice]]:
    """Return the one or two segments of [first, last) of a rolled side: within it, and on the original side."""
    start, end = first + shift, last + shift
    if end <= size or start >= size:
        return [(slice(0, last - first), slice(start % size, (end - 1) % size + 1))]
    return [(slice(0, size - start), slice(start, size)), (slice(size - start, last - first), slice(0, end - size))]
