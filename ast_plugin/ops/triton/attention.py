"""Window attention on CUDA: PyTorch's linear layers with one fused Triton kernel between them, forward and backward.

Equivalent to `ops.attention.window_attention`. The kernels read q, k and v of a window directly from the feature map,
shifted or not, and write the result in place: no rolled or partitioned copies and no score matrices are stored. The
backward pass saves q, k and v and recomputes the scores. Imported only if Triton is installed.

A program handles one head and a block of queries and loops over windows; all keys and values of a window are loaded.
Positions in the map are computed on the fly. The numbers of tokens and channels are padded to powers of two of at least
16, with masking.

Numerics: scores, weights and all sums are in float32. For half precision, weights are rounded to the dtype of the
values before their product; for float16, each row is scaled into its range first. The order of sums over windows
depends on shapes only.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ast_plugin.ops import attention as plain
from ast_plugin.ops.attention import Attention
from ast_plugin.ops.backend import Tensors, linear, make_once, run_kernel
from ast_plugin.ops.windows import MASKED

# Whether there is a softmax, and the exponent of the sparse branch's relu (0: no sparse branch).
_BRANCHES = {'assa': (True, 2), 'dense': (True, 0), 'sparse': (False, 2), 'sparse_relu': (False, 1)}
_MIN_SIDE = 16  # smallest dimension of a matrix product
# For more tokens a program handles `_MIN_SIDE` queries at a time, so that its matrices stay in registers.
_MAX_TOKENS = 64
_MAX_PREFETCHED_HEAD = 32  # with larger heads, prefetching windows exceeds the shared memory of some devices
# Programs share the position bias of a head over a group of windows; fewer programs would leave large devices idle.
# Fixed, so that the order of sums does not depend on the device.
_PROGRAMS = 2048
_IS_INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'  # fixed when the kernels are defined

_MASKED = tl.constexpr(MASKED)
# Arguments that do not trigger recompilation; specialising on multiples of 16 would not make the kernels faster.
_VARYING = ('height', 'width', 'shift', 'num_windows', 'per_program', 'num_masks')


@triton.jit
def _locate(token, window, height, width, shift, SIDE: tl.constexpr):
    """Return image, row and column of a shifted window's tokens, and which edges of the map they wrapped around."""
    across = width // SIDE
    in_image = (height // SIDE) * across
    rest = window % in_image
    row = (rest // across) * SIDE + token // SIDE + shift
    column = (rest % across) * SIDE + token % SIDE + shift
    below = row >= height
    beside = column >= width
    row = tl.where(below, row - height, row)
    column = tl.where(beside, column - width, column)
    return window // in_image, row, column, below.to(tl.int32) * 2 + beside.to(tl.int32)


@triton.jit
def offsets(image, row, column, stride_image, stride_row, stride_column):
    """Return the memory offsets of positions, as int64 because large batches exceed 2**31 elements."""
    wide = row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column
    return wide + tl.cast(image, tl.int64) * stride_image


@triton.jit
def _dot(a, b, WIDE: tl.constexpr):
    """a · b in float32. WIDE: cast the factors to float32 first, as the interpreter cannot multiply bfloat16."""
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision='ieee')


@triton.jit
def _scores(
    q, k, bias, mask_ptr, window, query, key, edges_q, edges_k, scale, num_masks,
    TOKENS: tl.constexpr, SHIFTED: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(q · kᵀ) · scale + bias + masks in float32; -inf for padding keys."""
    scores = _dot(q, tl.trans(k), WIDE) * scale + bias
    if SHIFTED:
        scores += tl.where(edges_q[:, None] != edges_k[None, :], _MASKED, 0.0)
    inside = (query[:, None] < TOKENS) & (key[None, :] < TOKENS)
    if MASK:
        first = (window % num_masks).to(tl.int64) * (TOKENS * TOKENS)
        scores += tl.load(mask_ptr + first + query[:, None] * TOKENS + key[None, :], mask=inside, other=0.0)
    return tl.where(key[None, :] < TOKENS, scores, float('-inf'))


@triton.jit
def _load_head(head, query, key, bias_ptr, shares_ptr, TOKENS: tl.constexpr, DENSE: tl.constexpr, POWER: tl.constexpr):
    """Load the values shared by all windows: position bias, and shares of the dense and the sparse branch."""
    inside = (query[:, None] < TOKENS) & (key[None, :] < TOKENS)
    table = bias_ptr + head * (TOKENS * TOKENS) + query[:, None] * TOKENS + key[None, :]
    bias = tl.load(table, mask=inside, other=0.0)
    dense_share = 1.0
    sparse_share = 1.0
    if DENSE and POWER > 0:
        dense_share = tl.load(shares_ptr)
        sparse_share = tl.load(shares_ptr + 1)
    return bias, dense_share, sparse_share


@triton.jit
def _softmax(scores):
    shifted = tl.exp(scores - tl.max(scores, 1)[:, None])
    return shifted / tl.sum(shifted, 1)[:, None]


@triton.jit
def _product(a, b, SCALED: tl.constexpr, WIDE: tl.constexpr):
    """a · b in float32, with a rounded from float32 to b's dtype; SCALED: scale its rows into float16's range."""
    if SCALED:
        top = tl.max(tl.abs(a), 1)
        top = tl.where(top > 0.0, top, 1.0)
        y = _dot((a / top[:, None]).to(b.dtype), b, WIDE) * top[:, None]
    else:
        y = _dot(a.to(b.dtype), b, WIDE)
    return y


@triton.jit
def _transposed_product(a, b, SCALED: tl.constexpr, WIDE: tl.constexpr):
    """aᵀ · b, otherwise like `_product`."""
    if SCALED:
        top = tl.max(tl.abs(a), 0)
        top = tl.where(top > 0.0, top, 1.0)
        scaled = tl.trans((a / top[None, :]).to(b.dtype))
        y = _dot(scaled, b, WIDE) * top[:, None]
    else:
        y = _dot(tl.trans(a.to(b.dtype)), b, WIDE)
    return y


@triton.jit(do_not_specialize=_VARYING)
def forward(
    qkv_ptr, bias_ptr, shares_ptr, mask_ptr, out_ptr,
    height, width, shift, channels, num_windows, per_program, num_masks, scale,
    qkv_image, qkv_row, qkv_column, out_image, out_row, out_column,
    HEAD: tl.constexpr, HEAD_FULL: tl.constexpr,
    SIDE: tl.constexpr, TOKENS: tl.constexpr, TOKENS_FULL: tl.constexpr, QUERIES: tl.constexpr,
    DENSE: tl.constexpr, POWER: tl.constexpr, SHIFTED: tl.constexpr, MASK: tl.constexpr, SCALED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Attention weights times values.

    Grid: heads, groups of `per_program` windows, blocks of QUERIES queries. qkv is [B, H, W, 3C] with unit channel
    stride; bias [heads, TOKENS, TOKENS] and masks [num_masks, TOKENS, TOKENS] are contiguous float32.
    DENSE: whether there is a softmax. POWER: exponent of the sparse branch's relu, or 0. `shares` [2]: used with both.
    """
    head = tl.program_id(0)
    query = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    key = tl.arange(0, TOKENS_FULL)
    channel = tl.arange(0, HEAD_FULL)
    bias, dense_share, sparse_share = _load_head(head, query, key, bias_ptr, shares_ptr, TOKENS, DENSE, POWER)
    own = head * HEAD + channel[None, :]
    real_q = (query[:, None] < TOKENS) & (channel[None, :] < HEAD)
    real_k = (key[:, None] < TOKENS) & (channel[None, :] < HEAD)

    first = tl.program_id(1) * per_program
    for window in range(first, tl.minimum(first + per_program, num_windows)):
        image, row_q, column_q, edges_q = _locate(query, window, height, width, shift, SIDE)
        image, row_k, column_k, edges_k = _locate(key, window, height, width, shift, SIDE)
        at_q = qkv_ptr + offsets(image, row_q, column_q, qkv_image, qkv_row, qkv_column)[:, None] + own
        at_k = qkv_ptr + offsets(image, row_k, column_k, qkv_image, qkv_row, qkv_column)[:, None] + own
        q = tl.load(at_q, mask=real_q, other=0.0)
        k = tl.load(at_k + channels, mask=real_k, other=0.0)
        v = tl.load(at_k + 2 * channels, mask=real_k, other=0.0)
        scores = _scores(
            q, k, bias, mask_ptr, window, query, key, edges_q, edges_k, scale, num_masks, TOKENS, SHIFTED, MASK, WIDE
        )
        weights = tl.zeros([QUERIES, TOKENS_FULL], dtype=tl.float32)
        if DENSE:
            weights += dense_share * _softmax(scores)
        if POWER > 0:
            positive = tl.maximum(scores, 0.0)
            if POWER == 2:
                positive = positive * positive
            weights += sparse_share * positive
        y = _product(weights, v, SCALED, WIDE)
        at_out = out_ptr + offsets(image, row_q, column_q, out_image, out_row, out_column)[:, None] + own
        tl.store(at_out, y.to(out_ptr.dtype.element_ty), mask=real_q)


@triton.jit(do_not_specialize=_VARYING)
def backward(
    qkv_ptr, bias_ptr, shares_ptr, mask_ptr, grad_ptr, d_q_ptr, d_kv_ptr, d_bias_ptr, d_shares_ptr,
    height, width, shift, channels, num_windows, per_program, num_masks, scale,
    qkv_image, qkv_row, qkv_column, grad_image, grad_row, grad_column,
    d_q_image, d_q_row, d_q_column, d_kv_block, d_kv_image, d_kv_row, d_kv_column,
    HEAD: tl.constexpr, HEAD_FULL: tl.constexpr,
    SIDE: tl.constexpr, TOKENS: tl.constexpr, TOKENS_FULL: tl.constexpr, QUERIES: tl.constexpr,
    DENSE: tl.constexpr, POWER: tl.constexpr, SHIFTED: tl.constexpr, MASK: tl.constexpr, SCALED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of `forward`'s inputs, with recomputed scores and weights. The grid is that of `forward`.

    Each block of queries writes its own part of the gradients of keys and values, `d_kv_block` elements apart. Each
    program writes the sums over its windows: [QUERIES, TOKENS_FULL] for the bias and two numbers for the shares, at
    [groups, heads, blocks, ...].
    """
    head = tl.program_id(0)
    block = tl.program_id(2)
    query = block * QUERIES + tl.arange(0, QUERIES)
    key = tl.arange(0, TOKENS_FULL)
    channel = tl.arange(0, HEAD_FULL)
    bias, dense_share, sparse_share = _load_head(head, query, key, bias_ptr, shares_ptr, TOKENS, DENSE, POWER)
    own = head * HEAD + channel[None, :]
    real_q = (query[:, None] < TOKENS) & (channel[None, :] < HEAD)
    real_k = (key[:, None] < TOKENS) & (channel[None, :] < HEAD)
    d_bias = tl.zeros([QUERIES, TOKENS_FULL], dtype=tl.float32)
    d_dense_share = tl.zeros([QUERIES], dtype=tl.float32)
    d_sparse_share = tl.zeros([QUERIES], dtype=tl.float32)

    first = tl.program_id(1) * per_program
    for window in range(first, tl.minimum(first + per_program, num_windows)):
        image, row_q, column_q, edges_q = _locate(query, window, height, width, shift, SIDE)
        image, row_k, column_k, edges_k = _locate(key, window, height, width, shift, SIDE)
        at_q = qkv_ptr + offsets(image, row_q, column_q, qkv_image, qkv_row, qkv_column)[:, None] + own
        at_k = qkv_ptr + offsets(image, row_k, column_k, qkv_image, qkv_row, qkv_column)[:, None] + own
        at_grad = grad_ptr + offsets(image, row_q, column_q, grad_image, grad_row, grad_column)[:, None] + own
        q = tl.load(at_q, mask=real_q, other=0.0)
        k = tl.load(at_k + channels, mask=real_k, other=0.0)
        v = tl.load(at_k + 2 * channels, mask=real_k, other=0.0)
        grad = tl.load(at_grad, mask=real_q, other=0.0)
        scores = _scores(
            q, k, bias, mask_ptr, window, query, key, edges_q, edges_k, scale, num_masks, TOKENS, SHIFTED, MASK, WIDE
        )
        d_weights = _dot(grad, tl.trans(v), WIDE)
        weights = tl.zeros([QUERIES, TOKENS_FULL], dtype=tl.float32)
        d_scores = tl.zeros([QUERIES, TOKENS_FULL], dtype=tl.float32)
        if DENSE:
            dense = _softmax(scores)
            weights += dense_share * dense
            d_dense = dense * d_weights
            per_row = tl.sum(d_dense, 1)
            d_dense_share += per_row
            d_scores += dense_share * (d_dense - dense * per_row[:, None])
        if POWER > 0:
            positive = tl.maximum(scores, 0.0)
            d_sparse = d_weights * positive
            if POWER == 2:
                weights += sparse_share * (positive * positive)
                d_scores += (2.0 * sparse_share) * d_sparse
                d_sparse_share += tl.sum(d_sparse * positive, 1)
            else:
                weights += sparse_share * positive
                d_scores += tl.where(scores > 0.0, sparse_share * d_weights, 0.0)
                d_sparse_share += tl.sum(d_sparse, 1)
        d_bias += d_scores
        d_v = _transposed_product(weights, grad, SCALED, WIDE)
        d_q = _product(d_scores, k, SCALED, WIDE) * scale
        d_k = _transposed_product(d_scores, q, SCALED, WIDE) * scale
        at_d_q = d_q_ptr + offsets(image, row_q, column_q, d_q_image, d_q_row, d_q_column)[:, None] + own
        at_d_kv = d_kv_ptr + offsets(image, row_k, column_k, d_kv_image, d_kv_row, d_kv_column)[:, None] + own
        at_d_kv += tl.cast(block, tl.int64) * d_kv_block
        tl.store(at_d_q, d_q.to(d_q_ptr.dtype.element_ty), mask=real_q)
        tl.store(at_d_kv, d_k.to(d_kv_ptr.dtype.element_ty), mask=real_k)
        tl.store(at_d_kv + channels, d_v.to(d_kv_ptr.dtype.element_ty), mask=real_k)

    part = (tl.cast(tl.program_id(1), tl.int64) * tl.num_programs(0) + head) * tl.num_programs(2) + block
    at_bias = d_bias_ptr + part * (QUERIES * TOKENS_FULL) + tl.arange(0, QUERIES)[:, None] * TOKENS_FULL + key[None, :]
    tl.store(at_bias, d_bias)
    tl.store(d_shares_ptr + part * 2, tl.sum(d_dense_share, 0))
    tl.store(d_shares_ptr + part * 2 + 1, tl.sum(d_sparse_share, 0))


def window_attention(x: Tensor, op: Attention, mask: Tensor | None = None) -> Tensor:
    """See `ops.window_attention`; `topk` is not supported."""

    def prepare() -> tuple[Tensor | None, ...]:
        layer = (tensor if tensor is None else tensor.to(x.dtype) for tensor in plain.qkv_layer(op))
        return *layer, plain.gather_bias(op).float().contiguous()

    weight, weight_bias, table = make_once(prepare, op.tensors[:7], x.dtype, op.window)
    qkv = F.linear(x, weight, weight_bias)
    return linear(attend(qkv, table, op.gate, mask, op), op.proj, op.proj_bias)


def attend(qkv: Tensor, bias: Tensor, gate: Tensor | None, mask: Tensor | None, op: Attention) -> Tensor:
    """See `ops.attention.attend`. Shapes are not checked, and wrong ones lead to out-of-bounds reads."""
    return run_kernel(_Attend(op.with_tensors([None] * 8)), qkv, bias, gate if op.kind == 'assa' else None, mask)


class _Attend(NamedTuple):
    """`attend` as a kernel for `run_kernel`; its tensors are qkv, bias, gate and mask, which gets no gradient."""

    op: Attention

    def forward(self, *tensors: Tensor | None) -> tuple[Tensor, Tensors]:
        return _Launch(self.op, *tensors).forward(), ()

    def backward(self, grad: Tensor, needed: Sequence[bool], tensors: Tensors, kept: Tensors) -> Tensors:
        qkv, bias, gate, mask = tensors
        if self.op.window**2 <= _MAX_TOKENS or len(qkv) == 1:
            return *_Launch(self.op, *tensors).backward(grad), None
        # Large windows need one partial gradient per block of queries: process one image at a time to save memory.
        num_windows = (qkv.shape[1] // self.op.window) * (qkv.shape[2] // self.op.window)
        has_own_masks = mask is not None and len(mask) != num_windows
        masks = mask.chunk(len(qkv)) if has_own_masks else [mask] * len(qkv)
        images = zip(qkv.split(1), masks, grad.split(1), strict=True)
        parts = [_Launch(self.op, own, bias, gate, own_mask).backward(d) for own, own_mask, d in images]
        d_qkv, d_bias, d_gate = zip(*parts, strict=True)
        return torch.cat(d_qkv), sum(d_bias), None if gate is None else sum(d_gate), None

    def reference(self, *tensors: Tensor | None) -> Tensor:
        return plain.attend(*tensors, self.op)


class _Launch:
    """Tensors of one call in kernel layout, and launch settings."""

    def __init__(self, op: Attention, qkv: Tensor, bias: Tensor, gate: Tensor | None, mask: Tensor | None) -> None:
        # The kernels need unit channel stride.
        self.op, self.qkv, self.gate = op, qkv if qkv.stride(-1) == 1 else qkv.contiguous(), gate
        num_images, height, width, channels = qkv.shape
        self.channels = channels // 3
        self.bias = bias.detach().to(torch.float32).contiguous()
        # Unused arguments are not read: any tensor can be passed.
        self.shares = self.bias if gate is None else gate.detach().float().softmax(0)
        self.mask = self.bias if mask is None else mask.detach().to(torch.float32).contiguous()
        tokens, head = op.window**2, self.channels // op.num_heads
        full = max(_MIN_SIDE, triton.next_power_of_2(tokens))
        self.queries = full if full <= _MAX_TOKENS else _MIN_SIDE
        self.num_blocks = -(-tokens // self.queries)
        num_windows = num_images * (height // op.window) * (width // op.window)
        groups = max(1, _PROGRAMS // (op.num_heads * self.num_blocks))
        per_program = max(1, -(-num_windows // groups))
        self.grid = op.num_heads, -(-num_windows // per_program), self.num_blocks
        num_masks = 1 if mask is None else mask.shape[0]
        self.sizes = height, width, op.shift, self.channels, num_windows, per_program, num_masks, float(head**-0.5)
        sides = head, max(_MIN_SIDE, triton.next_power_of_2(head)), op.window, tokens, full, self.queries
        wide = qkv.dtype == torch.bfloat16 and _IS_INTERPRETED
        self.constants = *sides, *_BRANCHES[op.kind], op.shift > 0, mask is not None, qkv.dtype == torch.float16, wide
        # float32 products use no tensor cores and more registers; otherwise the next windows are prefetched.
        is_light = full <= _MAX_TOKENS and qkv.dtype != torch.float32
        num_stages = 3 if is_light and head <= _MAX_PREFETCHED_HEAD else 1
        self.options = {'num_warps': 4 if is_light else 8, 'num_stages': num_stages}
        self.tokens, self.full = tokens, full

    def forward(self) -> Tensor:
        out = self.qkv.new_empty(*self.qkv.shape[:3], self.channels)
        tensors = self.qkv, self.bias, self.shares, self.mask, out
        strides = *self.qkv.stride()[:3], *out.stride()[:3]
        with torch.cuda.device_of(out):
            forward[self.grid](*tensors, *self.sizes, *strides, *self.constants, **self.options)
        return out

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gradients of qkv, bias and gate."""
        tokens, full = self.tokens, self.full
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        d_qkv = torch.empty(self.qkv.shape, dtype=self.qkv.dtype, device=self.qkv.device)
        whole = d_qkv[..., self.channels :]
        d_kv = whole[None]
        if self.num_blocks > 1:  # one partial gradient of keys and values per block of queries
            d_kv = self.bias.new_empty(self.num_blocks, *whole.shape)
        heads, groups, blocks = self.grid
        d_bias = self.bias.new_empty(groups, heads, blocks, self.queries, full)
        d_shares = self.bias.new_empty(groups, heads, blocks, 2)
        tensors = self.qkv, self.bias, self.shares, self.mask, grad, d_qkv, d_kv, d_bias, d_shares
        strides = *self.qkv.stride()[:3], *grad.stride()[:3], *d_qkv.stride()[:3], *d_kv.stride()[:4]
        with torch.cuda.device_of(d_qkv):
            backward[self.grid](*tensors, *self.sizes, *strides, *self.constants, **self.options)
        if self.num_blocks > 1:
            whole.copy_(d_kv.sum(0))
        d_bias = d_bias.sum(0).reshape(heads, -1, full)[:, :tokens, :tokens]
        d_gate = None
        if self.gate is not None:
            # In float64: a small difference of large sums.
            totals, shares = d_shares.double().sum((0, 1, 2)), self.shares.double()
            d_gate = (shares * (totals - (shares * totals).sum())).to(self.gate.dtype)
        return d_qkv, d_bias, d_gate
