"""Feed-forward networks on CUDA: PyTorch's linear layers with Triton kernels for convolution, GELU and gate.

Equivalent to `ops.ffn.feed_forward`. The backward pass saves the output of the first linear layer and the input of the
last one, and recomputes the activations between them. Imported only if Triton is installed.

A program processes a block of channels at a tile of ROWS × COLUMNS positions; neighbouring positions come from the
caches. Maps between kernels are contiguous [B, H, W, channels] with zero padding. Sums over tiles stay in registers
until a program's last tile: reducing them at each tile took twice as long as everything else together.

Numerics: convolution, GELU and gate are computed in float32 and rounded once to the dtype of the map. Gradients of the
depthwise weights are summed in float32, in an order that depends on shapes only.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ast_plugin.ops import ffn as plain
from ast_plugin.ops.backend import Tensors, cast_once, linear, run_kernel
from ast_plugin.ops.ffn import FeedForward
from ast_plugin.ops.triton.attention import offsets

_BLOCK = 64  # channels per program
_ROWS, _COLUMNS = 2, 8
_PROGRAMS = 2048  # of the kernel with sums; fixed, so that their order does not depend on the device
_SETTINGS = {'BLOCK': _BLOCK, 'ROWS': _ROWS, 'COLUMNS': _COLUMNS, 'num_warps': 4, 'num_stages': 1}

# Arguments that do not trigger recompilation.
_VARYING = ('height', 'width', 'num_tiles')


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_slope(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def _tile(tile, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return image, rows and columns of a tile's positions."""
    across = tl.cdiv(width, COLUMNS)
    in_image = tl.cdiv(height, ROWS) * across
    rest = tile % in_image
    position = tl.arange(0, ROWS * COLUMNS)
    row = (rest // across) * ROWS + position // COLUMNS
    column = (rest % across) * COLUMNS + position % COLUMNS
    return tile // in_image, row, column


@triton.jit
def _load_tap(map_ptr, image, row, column, height, width, channel, channels):
    """Load values of a contiguous map, zero outside of it."""
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    position = (tl.cast(image, tl.int64) * height + row) * width + column
    at = map_ptr + position[:, None] * channels + channel[None, :]
    return tl.load(at, mask=inside[:, None] & (channel[None, :] < channels), other=0.0).to(tl.float32)


@triton.jit
def _convolve(
    map_ptr, weight_ptr, bias_ptr, image, row, column, height, width, channel, channels,
    POSITIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute a tile of the convolution; weights [9, channels]."""
    y = tl.zeros([POSITIONS, BLOCK], dtype=tl.float32)
    for tap in tl.static_range(9):
        weight = tl.load(weight_ptr + tap * channels + channel, mask=channel < channels, other=0.0)
        x = _load_tap(map_ptr, image, row + tap // 3 - 1, column + tap % 3 - 1, height, width, channel, channels)
        y += x * weight[None, :]
    return y + tl.load(bias_ptr + channel, mask=channel < channels, other=0.0)[None, :]


@triton.jit
def _add_tap(
    d_u, d_weight, u, d_before_ptr, weight_ptr, image, row, column, height, width, channel, channels, TAP: tl.constexpr
):  # fmt: skip
    """Add one tap to the transposed convolution, and to the gradient of its weight per position."""
    weight = tl.load(weight_ptr + TAP * channels + channel, mask=channel < channels, other=0.0)
    d = _load_tap(d_before_ptr, image, row + 1 - TAP // 3, column + 1 - TAP % 3, height, width, channel, channels)
    return d_u + d * weight[None, :], d_weight + d * u


@triton.jit(do_not_specialize=_VARYING)
def gelu(
    z_ptr, u_ptr, height, width, channels, z_image, z_row, z_column,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """u = GELU(first half of z), contiguous; inside the convolution each value would be computed nine times."""
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    image, row, column = _tile(tl.program_id(0), height, width, ROWS, COLUMNS)
    inside = ((row < height) & (column < width))[:, None] & (channel[None, :] < channels)
    at_z = z_ptr + offsets(image, row, column, z_image, z_row, z_column)[:, None] + channel[None, :]
    u = _gelu(tl.load(at_z, mask=inside, other=0.0).to(tl.float32))
    position = (tl.cast(image, tl.int64) * height + row) * width + column
    tl.store(u_ptr + position[:, None] * channels + channel[None, :], u.to(u_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_VARYING)
def forward(
    u_ptr, z_ptr, weight_ptr, bias_ptr, out_ptr, height, width, channels, z_image, z_row, z_column,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """out = GELU(conv(u) + bias), times GELU(second half of z) if GATED. Grid: tiles, blocks of channels."""
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    image, row, column = _tile(tl.program_id(0), height, width, ROWS, COLUMNS)
    inside = ((row < height) & (column < width))[:, None] & (channel[None, :] < channels)
    y = _gelu(
        _convolve(
            u_ptr, weight_ptr, bias_ptr, image, row, column, height, width, channel, channels, ROWS * COLUMNS, BLOCK
        )
    )
    if GATED:
        at_z = z_ptr + offsets(image, row, column, z_image, z_row, z_column)[:, None] + channels + channel[None, :]
        y *= _gelu(tl.load(at_z, mask=inside, other=0.0).to(tl.float32))
    position = (tl.cast(image, tl.int64) * height + row) * width + column
    at = out_ptr + position[:, None] * channels + channel[None, :]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_VARYING)
def backward_gate(
    u_ptr, z_ptr, weight_ptr, bias_ptr, grad_ptr, d_before_ptr, d_z_ptr,
    height, width, channels, hidden, z_image, z_row, z_column,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Gradients of the convolution's output and of the gate's half of z, from that of `forward`'s output.

    Grid: tiles, blocks of channels. `d_z` is contiguous [B, H, W, hidden].
    """
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    image, row, column = _tile(tl.program_id(0), height, width, ROWS, COLUMNS)
    inside = ((row < height) & (column < width))[:, None] & (channel[None, :] < channels)
    position = ((tl.cast(image, tl.int64) * height + row) * width + column)[:, None]
    before = _convolve(
        u_ptr, weight_ptr, bias_ptr, image, row, column, height, width, channel, channels, ROWS * COLUMNS, BLOCK
    )
    at = position * channels + channel[None, :]
    d_before = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        at_z = z_ptr + offsets(image, row, column, z_image, z_row, z_column)[:, None] + channels + channel[None, :]
        gate = tl.load(at_z, mask=inside, other=0.0).to(tl.float32)
        d_gate = d_before * _gelu(before) * _gelu_slope(gate)
        at_d_z = d_z_ptr + position * hidden + channels + channel[None, :]
        tl.store(at_d_z, d_gate.to(d_z_ptr.dtype.element_ty), mask=inside)
        d_before = d_before * _gelu(gate)
    d_before = d_before * _gelu_slope(before)
    tl.store(d_before_ptr + at, d_before.to(d_before_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_VARYING)
def backward_convolution(
    d_before_ptr, z_ptr, weight_ptr, d_z_ptr, sums_ptr,
    height, width, num_tiles, channels, hidden, z_image, z_row, z_column,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of z's first half (through its GELU) and of the weights, from that of the convolution's output.

    Grid: groups of tiles, blocks of channels. Program i processes the tiles i, i + groups, i + 2 · groups, ... and
    writes partial sums for the nine taps and the bias, [groups, 10, channels] float32. The gradients loaded for a tap
    serve both z (times the weight) and the weight (times the input of the convolution).
    """
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    # One variable per sum, because Triton does not support lists of tensors.
    s0 = tl.zeros([ROWS * COLUMNS, BLOCK], dtype=tl.float32)
    s1, s2, s3, s4, s5, s6, s7, s8, s9 = s0, s0, s0, s0, s0, s0, s0, s0, s0
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        image, row, column = _tile(tile, height, width, ROWS, COLUMNS)
        inside = ((row < height) & (column < width))[:, None] & real[None, :]
        at_z = z_ptr + offsets(image, row, column, z_image, z_row, z_column)[:, None] + channel[None, :]
        z = tl.load(at_z, mask=inside, other=0.0).to(tl.float32)
        u = _gelu(z)
        y = tl.zeros([ROWS * COLUMNS, BLOCK], dtype=tl.float32)
        y, s0 = _add_tap(y, s0, u, d_before_ptr, weight_ptr, image, row, column, height, width, channel, channels, 0)
        y, s1 = _add_tap(y, s1, u, d_before_ptr, weight_ptr, image, row, column, height, width, channel, channels, 1)
        y, s2 = _add_tap(y, s2, u, d_before_ptr, weight_ptr, image, row, column, height, width, channel, channels, 2)
        y, s3 = _add_tap(y, s3, u, d_before_ptr, weight_ptr, image, row, column, height, width, channel, channels, 3)
        y, s4 = _add_tap(y, s4, u, d_before_ptr, weight_ptr, image, row, column, height, width, channel, channels, 4)
        y, s5 = _add_tap(y, s5, u, d_before_ptr, weight_ptr, image, row, column, height, width, channel, channels, 5)
        y, s6 = _add_tap(y, s6, u, d_before_ptr, weight_ptr, image, row, column, height, width, channel, channels, 6)
        y, s7 = _add_tap(y, s7, u, d_before_ptr, weight_ptr, image, row, column, height, width, channel, channels, 7)
        y, s8 = _add_tap(y, s8, u, d_before_ptr, weight_ptr, image, row, column, height, width, channel, channels, 8)
        s9 += _load_tap(d_before_ptr, image, row, column, height, width, channel, channels)
        position = ((tl.cast(image, tl.int64) * height + row) * width + column)[:, None]
        at = d_z_ptr + position * hidden + channel[None, :]
        tl.store(at, (y * _gelu_slope(z)).to(d_z_ptr.dtype.element_ty), mask=inside)
    at_sums = sums_ptr + tl.cast(tl.program_id(0), tl.int64) * (10 * channels) + channel
    tl.store(at_sums, tl.sum(s0, 0), mask=real)
    tl.store(at_sums + channels, tl.sum(s1, 0), mask=real)
    tl.store(at_sums + 2 * channels, tl.sum(s2, 0), mask=real)
    tl.store(at_sums + 3 * channels, tl.sum(s3, 0), mask=real)
    tl.store(at_sums + 4 * channels, tl.sum(s4, 0), mask=real)
    tl.store(at_sums + 5 * channels, tl.sum(s5, 0), mask=real)
    tl.store(at_sums + 6 * channels, tl.sum(s6, 0), mask=real)
    tl.store(at_sums + 7 * channels, tl.sum(s7, 0), mask=real)
    tl.store(at_sums + 8 * channels, tl.sum(s8, 0), mask=real)
    tl.store(at_sums + 9 * channels, tl.sum(s9, 0), mask=real)


def feed_forward(x: Tensor, op: FeedForward) -> Tensor:
    """See `ops.feed_forward`; an MLP, which has no convolution, uses PyTorch's own kernels."""
    if op.depthwise is None:
        return plain.feed_forward(x, op)
    z = linear(plain.refine(x, cast_once(op.partial_conv, x.dtype)), op.expand, op.expand_bias)
    return linear(activate(z, op.depthwise, op.depthwise_bias), op.project, op.project_bias)


def activate(z: Tensor, depthwise: Tensor, bias: Tensor | None) -> Tensor:
    """See `ops.ffn.activate`. Shapes are not checked, and wrong ones lead to out-of-bounds reads."""
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
        sums, d_before = weight.new_empty(groups, 10, channels), torch.empty_like(u)
        sizes = channels, z.shape[-1], *z.stride()[:3]
        with torch.cuda.device_of(d_z):
            maps = u, z, weight, bias, grad.contiguous(), d_before, d_z
            backward_gate[tiles, blocks](*maps, H, W, *sizes, GATED=z.shape[-1] != channels, **_SETTINGS)
            backward_convolution[groups, blocks](d_before, z, weight, d_z, sums, H, W, tiles, *sizes, **_SETTINGS)
        total, (_, depthwise, depthwise_bias) = sums.sum(0), tensors
        d_weight = total[:9].t().reshape(depthwise.shape).to(depthwise.dtype)
        return d_z, d_weight, None if depthwise_bias is None else total[9].to(depthwise_bias.dtype)

    def reference(self, *tensors: Tensor | None) -> Tensor:
        z, depthwise, bias = tensors
        with torch.autocast(z.device.type, enabled=False):
            return plain.activate(z, depthwise.to(z.dtype), None if bias is None else bias.to(z.dtype))

    def _prepare(self, z: Tensor, weight: Tensor, bias: Tensor | None) -> tuple:
        """Return z, GELU of its first half, weight and bias in kernel layout, and the numbers of tiles and blocks."""
        (B, H, W, _), channels = z.shape, len(weight)
        z = z.detach() if z.stride(-1) == 1 else z.detach().contiguous()  # unit channel stride
        taps = weight.detach().float().reshape(channels, 9).t().contiguous()
        shift = taps.new_zeros(channels) if bias is None else bias.detach().float().contiguous()
        tiles, blocks = B * -(-H // _ROWS) * -(-W // _COLUMNS), -(-channels // _BLOCK)
        u = torch.empty(B, H, W, channels, dtype=z.dtype, device=z.device)
        with torch.cuda.device_of(u):
            gelu[tiles, blocks](z, u, H, W, channels, *z.stride()[:3], **_SETTINGS)
        return z, u, taps, shift, tiles, blocks
