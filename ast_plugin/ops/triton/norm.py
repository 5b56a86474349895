"""LayerNorm over channels on CUDA, one kernel for forward and one for backward, with autocast's cast fused.

Equivalent to `torch.nn.functional.layer_norm`, computed in float32 and rounded once to the output dtype. Under
autocast, PyTorch's own casts the input to float32, writes a float32 result and casts that again. The backward pass
saves only the input. Imported only if Triton is installed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ast_plugin.ops.backend import Tensors, run_kernel

_ELEMENTS = 2048  # per program: rows × channels
_PROGRAMS = 1024  # of the backward kernel; fixed, so that the order of its sums does not depend on the device


@triton.jit
def _normalise(x, inside, channels, eps):
    """Return normalised rows, zero outside of the map, and the inverse of their standard deviation."""
    mean = tl.sum(x, 1) / channels
    centred = tl.where(inside, x - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / channels + eps)
    return tl.where(inside, centred * inverse[:, None], 0.0), inverse


@triton.jit(do_not_specialize=('num_rows',))
def forward(
    x_ptr, weight_ptr, bias_ptr, y_ptr, num_rows, channels, eps, ROWS: tl.constexpr, CHANNELS_FULL: tl.constexpr
):  # fmt: skip
    """y = normalised(x) · weight + bias. Grid: blocks of ROWS rows. x and y: contiguous [num_rows, channels]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS_FULL)
    is_channel = channel[None, :] < channels
    inside = (row[:, None] < num_rows) & is_channel
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    normalised, _ = _normalise(x, inside, channels, eps)
    y = normalised * weight[None, :] + bias[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=('num_rows',))
def backward(
    x_ptr, weight_ptr, grad_ptr, d_x_ptr, sums_ptr, num_rows, channels, eps,
    ROWS: tl.constexpr, CHANNELS_FULL: tl.constexpr,
):  # fmt: skip
    """Gradient of x, and partial sums of those of weight and bias, [programs, 2, channels].

    Program i processes the blocks of rows i, i + programs, i + 2 · programs, ...
    """
    channel = tl.arange(0, CHANNELS_FULL)
    is_channel = channel[None, :] < channels
    weight = tl.load(weight_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    d_weight = tl.zeros([ROWS, CHANNELS_FULL], dtype=tl.float32)
    d_bias = tl.zeros([ROWS, CHANNELS_FULL], dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        inside = (row[:, None] < num_rows) & is_channel
        at = row.to(tl.int64)[:, None] * channels + channel[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        normalised, inverse = _normalise(x, inside, channels, eps)
        d_weight += grad * normalised
        d_bias += grad
        grad = grad * weight[None, :]
        along = tl.sum(grad * normalised, 1) / channels
        d_x = (grad - normalised * along[:, None] - (tl.sum(grad, 1) / channels)[:, None]) * inverse[:, None]
        tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)
    at_sums = sums_ptr + tl.program_id(0) * (2 * channels) + channel
    tl.store(at_sums, tl.sum(d_weight, 0), mask=channel < channels)
    tl.store(at_sums + channels, tl.sum(d_bias, 0), mask=channel < channels)


def layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`torch.nn.functional.layer_norm` over the last dimension; under autocast the output has the autocast dtype."""
    if weight is None or bias is None:
        return F.layer_norm(x, shape, weight, bias, eps)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return run_kernel(_LayerNorm(eps, dtype), x, weight, bias)


class _LayerNorm(NamedTuple):
    """`layer_norm` as a kernel for `run_kernel`."""

    eps: float
    dtype: torch.dtype

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensors]:
        x, weight, bias = (tensor.detach().contiguous() for tensor in tensors)
        y = torch.empty(x.shape, dtype=self.dtype, device=x.device)
        num_rows, channels, settings = self._sizes(x)
        with torch.cuda.device_of(y):
            blocks = triton.cdiv(num_rows, settings['ROWS'])
            forward[(blocks,)](x, weight, bias, y, num_rows, channels, self.eps, **settings)
        return y, ()

    def backward(self, grad: Tensor, needed: Sequence[bool], tensors: Tensors, kept: Tensors) -> Tensors:
        x, weight = (tensor.detach().contiguous() for tensor in tensors[:2])
        num_rows, channels, settings = self._sizes(x)
        programs = min(_PROGRAMS, triton.cdiv(num_rows, settings['ROWS']))
        d_x = torch.empty_like(x)
        sums = torch.empty(programs, 2, channels, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(d_x):
            maps = x, weight, grad.contiguous(), d_x, sums
            backward[(programs,)](*maps, num_rows, channels, self.eps, **settings)
        d_weight, d_bias = sums.sum(0)
        return d_x, d_weight.to(weight.dtype), d_bias.to(tensors[2].dtype)

    def reference(self, *tensors: Tensor) -> Tensor:
        x, weight, bias = tensors
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, weight.dtype)
            y = F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), self.eps)
        return y.to(self.dtype)

    def _sizes(self, x: Tensor) -> tuple[int, int, dict[str, int]]:
        """Return the numbers of rows and channels, and the launch settings."""
        channels = x.shape[-1]
        full = triton.next_power_of_2(channels)
        settings = {'ROWS': max(1, _ELEMENTS // full), 'CHANNELS_FULL': full, 'num_warps': 4, 'num_stages': 1}
        return x.numel() // channels, channels, settings
