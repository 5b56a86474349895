"""Feed-forward networks on CUDA: linear layers by PyTorch, convolution, GELU and gate between them by kernels.

Computes what `ops.ffn.feed_forward` does. For the backward pass what the first linear layer gave and what the last one
takes are kept; activations between are computed again. Imported only where Triton is.

A program takes channels by the block and a tile of ROWS × COLUMNS positions, whose neighbours come from the caches.
Maps between kernels are [B, H, W, channels] without gaps; what is outside counts as zero.

Numerics: convolution, GELU and gate in float32, rounded once to the map's type; gradients of the depthwise weights are
summed in float32, in an order that shapes determine.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ast_plugin.ops import ffn as plain
from ast_plugin.ops.backend import Tensors, run_kernel
from ast_plugin.ops.ffn import FeedForward

_BLOCK = 64  # channels of a program
_ROWS, _COLUMNS = 4, 8
_PROGRAMS = 2048  # of the kernel with sums; fixed, so that their order is the same everywhere
_SETTINGS = {'BLOCK': _BLOCK, 'ROWS': _ROWS, 'COLUMNS': _COLUMNS, 'num_warps': 8, 'num_stages': 1}

# Compiled once for all values.
_VARYING = ('height', 'width', 'num_tiles')
_TAPS_FULL = tl.constexpr(16)  # nine taps and the bias, filled up to a power of two


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_slope(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def _tile(tile, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Image, rows and columns of a tile's positions."""
    across = tl.cdiv(width, COLUMNS)
    in_image = tl.cdiv(height, ROWS) * across
    rest = tile % in_image
    position = tl.arange(0, ROWS * COLUMNS)
    row = (rest // across) * ROWS + position // COLUMNS
    column = (rest % across) * COLUMNS + position % COLUMNS
    return tile // in_image, row, column


@triton.jit
def _tap(map_ptr, image, row, column, height, width, channel, channels):
    """Values of a map without gaps, zero outside."""
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    position = (tl.cast(image, tl.int64) * height + row) * width + column
    at = map_ptr + position[:, None] * channels + channel[None, :]
    return tl.load(at, mask=inside[:, None] & (channel[None, :] < channels), other=0.0).to(tl.float32)


@triton.jit
def _convolved(
    map_ptr, weight_ptr, image, row, column, height, width, channel, channels,
    POSITIONS: tl.constexpr, BLOCK: tl.constexpr, FLIPPED: tl.constexpr,
):  # fmt: skip
    """A tile of the convolution, or with FLIPPED of its transpose; weights [9, channels]."""
    y = tl.zeros([POSITIONS, BLOCK], dtype=tl.float32)
    for tap in tl.static_range(9):
        weight = tl.load(weight_ptr + tap * channels + channel, mask=channel < channels, other=0.0)
        if FLIPPED:
            x = _tap(map_ptr, image, row + 1 - tap // 3, column + 1 - tap % 3, height, width, channel, channels)
        else:
            x = _tap(map_ptr, image, row + tap // 3 - 1, column + tap % 3 - 1, height, width, channel, channels)
        y += x * weight[None, :]
    return y


@triton.jit(do_not_specialize=_VARYING)
def forward(
    u_ptr, z_ptr, weight_ptr, bias_ptr, out_ptr, height, width, channels, z_image, z_row, z_column,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """out = GELU(conv(u) + bias), with GATED times GELU of z's second half. Grid: tiles, blocks of channels."""
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    image, row, column = _tile(tl.program_id(0), height, width, ROWS, COLUMNS)
    inside = ((row < height) & (column < width))[:, None] & (channel[None, :] < channels)
    before = _convolved(
        u_ptr, weight_ptr, image, row, column, height, width, channel, channels, ROWS * COLUMNS, BLOCK, False
    )
    before += tl.load(bias_ptr + channel, mask=channel < channels, other=0.0)[None, :]
    y = _gelu(before)
    if GATED:
        at_z = row.to(tl.int64) * z_row + column.to(tl.int64) * z_column + tl.cast(image, tl.int64) * z_image
        at_z = z_ptr + at_z[:, None] + channels + channel[None, :]
        y *= _gelu(tl.load(at_z, mask=inside, other=0.0).to(tl.float32))
    position = (tl.cast(image, tl.int64) * height + row) * width + column
    at = out_ptr + position[:, None] * channels + channel[None, :]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_VARYING)
def backward_gate(
    u_ptr, z_ptr, weight_ptr, bias_ptr, grad_ptr, d_before_ptr, d_z_ptr, sums_ptr,
    height, width, num_tiles, channels, hidden, z_image, z_row, z_column,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """From the gradient of `forward`'s result to that of the convolution's, of the gate's half of z, and of weights.

    Grid: groups of tiles, blocks of channels. A program takes every so many-th tile and writes one sum of the gradients
    of the nine taps and the bias: [groups, 16, channels] float32. `d_z` is [B, H, W, hidden] without gaps.
    """
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0.0)
    tap_of_row = tl.arange(0, _TAPS_FULL)[:, None]
    sums = tl.zeros([_TAPS_FULL, BLOCK], dtype=tl.float32)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        image, row, column = _tile(tile, height, width, ROWS, COLUMNS)
        inside = ((row < height) & (column < width))[:, None] & (channel[None, :] < channels)
        position = ((tl.cast(image, tl.int64) * height + row) * width + column)[:, None]
        before = _convolved(
            u_ptr, weight_ptr, image, row, column, height, width, channel, channels, ROWS * COLUMNS, BLOCK, False
        )
        before += bias[None, :]
        at = position * channels + channel[None, :]
        d_before = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            at_z = row.to(tl.int64) * z_row + column.to(tl.int64) * z_column + tl.cast(image, tl.int64) * z_image
            at_z = z_ptr + at_z[:, None] + channels + channel[None, :]
            gate = tl.load(at_z, mask=inside, other=0.0).to(tl.float32)
            d_gate = d_before * _gelu(before) * _gelu_slope(gate)
            at_d_z = d_z_ptr + position * hidden + channels + channel[None, :]
            tl.store(at_d_z, d_gate.to(d_z_ptr.dtype.element_ty), mask=inside)
            d_before = d_before * _gelu(gate)
        d_before = d_before * _gelu_slope(before)
        tl.store(d_before_ptr + at, d_before.to(d_before_ptr.dtype.element_ty), mask=inside)
        for tap in tl.static_range(9):
            x = _tap(u_ptr, image, row + tap // 3 - 1, column + tap % 3 - 1, height, width, channel, channels)
            sums += tl.where(tap_of_row == tap, tl.sum(d_before * x, 0)[None, :], 0.0)
        sums += tl.where(tap_of_row == 9, tl.sum(d_before, 0)[None, :], 0.0)
    first = tl.cast(tl.program_id(0), tl.int64) * (_TAPS_FULL * channels)
    at_sums = sums_ptr + first + tap_of_row * channels + channel[None, :]
    tl.store(at_sums, sums, mask=(tap_of_row < _TAPS_FULL) & (channel[None, :] < channels))


@triton.jit(do_not_specialize=_VARYING)
def backward_convolution(
    d_before_ptr, z_ptr, weight_ptr, d_z_ptr, height, width, channels, hidden, z_image, z_row, z_column,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """From the gradient of the convolution's result to that of z's first half, through its GELU. Grid as `forward`."""
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    image, row, column = _tile(tl.program_id(0), height, width, ROWS, COLUMNS)
    inside = ((row < height) & (column < width))[:, None] & (channel[None, :] < channels)
    d_u = _convolved(
        d_before_ptr, weight_ptr, image, row, column, height, width, channel, channels, ROWS * COLUMNS, BLOCK, True
    )
    at_z = row.to(tl.int64) * z_row + column.to(tl.int64) * z_column + tl.cast(image, tl.int64) * z_image
    z = tl.load(z_ptr + at_z[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    position = ((tl.cast(image, tl.int64) * height + row) * width + column)[:, None]
    at = d_z_ptr + position * hidden + channel[None, :]
    tl.store(at, (d_u * _gelu_slope(z)).to(d_z_ptr.dtype.element_ty), mask=inside)


def feed_forward(x: Tensor, op: FeedForward) -> Tensor:
    """See `ops.feed_forward`; an MLP, two products and a GELU, is left to PyTorch's own kernels."""
    if op.depthwise is None:
        return plain.feed_forward(x, op)
    z = F.linear(plain.refine(x, op.partial_conv), op.expand, op.expand_bias)
    return F.linear(activate(z, op.depthwise, op.depthwise_bias), op.project, op.project_bias)


def activate(z: Tensor, depthwise: Tensor, bias: Tensor | None) -> Tensor:
    """See `ops.ffn.activate`. Sizes are not checked: a kernel would read what is not there."""
    return run_kernel(_Activate(), z, depthwise, bias)


class _Activate:
    """`activate` as a kernel for `run_kernel`."""

    def forward(self, *tensors: Tensor | None) -> tuple[Tensor, Tensors]:
        z, u, weight, bias, tiles, blocks = self._prepare(*tensors)
        out, (_, H, W, channels) = torch.empty_like(u), u.shape
        with torch.cuda.device_of(out):
            sizes = H, W, channels, *z.stride()[:3]
            forward[tiles, blocks](u, z, weight, bias, out, *sizes, GATED=z.shape[-1] != channels, **_SETTINGS)
        return out, ()

    def backward(self, grad: Tensor, needed: Sequence[bool], tensors: Tensors, kept: Tensors) -> Tensors:
        z, u, weight, bias, tiles, blocks = self._prepare(*tensors)
        _, H, W, channels = u.shape
        d_z = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        groups = max(1, min(tiles, _PROGRAMS // blocks))
        sums, d_before = weight.new_empty(groups, 16, channels), torch.empty_like(u)
        sizes = channels, z.shape[-1], *z.stride()[:3]
        with torch.cuda.device_of(d_z):
            maps = u, z, weight, bias, grad.contiguous(), d_before, d_z, sums
            is_gated = z.shape[-1] != channels
            backward_gate[groups, blocks](*maps, H, W, tiles, *sizes, GATED=is_gated, **_SETTINGS)
            backward_convolution[tiles, blocks](d_before, z, weight, d_z, H, W, *sizes, **_SETTINGS)
        total, (_, depthwise, depthwise_bias) = sums.sum(0), tensors
        d_weight = total[:9].t().reshape(depthwise.shape).to(depthwise.dtype)
        return d_z, d_weight, None if depthwise_bias is None else total[9].to(depthwise_bias.dtype)

    def reference(self, *tensors: Tensor | None) -> Tensor:
        z, depthwise, bias = tensors
        with torch.autocast(z.device.type, enabled=False):
            return plain.activate(z, depthwise.to(z.dtype), None if bias is None else bias.to(z.dtype))

    def _prepare(self, z: Tensor, weight: Tensor, bias: Tensor | None) -> tuple:
        """z, GELU of its first half, weight and bias as the kernels take them, numbers of tiles and of blocks."""
        (B, H, W, _), channels = z.shape, len(weight)
        z = z.detach() if z.stride(-1) == 1 else z.detach().contiguous()  # channels lie side by side
        # A pass of its own: inside the convolution each GELU would be computed nine times.
        u = F.gelu(z[..., :channels]).contiguous()
        weight = weight.detach().float().reshape(channels, 9).t().contiguous()
        bias = weight.new_zeros(channels) if bias is None else bias.detach().float().contiguous()
        return z, u, weight, bias, B * -(-H // _ROWS) * -(-W // _COLUMNS), -(-channels // _BLOCK)
