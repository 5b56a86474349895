"""Feed-forward networks on CUDA: linear layers by PyTorch, convolution, GELU and gate between them by kernels.

Each function computes what its namesake in `frfn.py` does. For the backward pass what the first linear layer gave and
what the last one takes are kept; activations between are computed again.

Numerics: convolution, GELU and gate in float32, rounded once to the map's type; gradients of the depthwise weights are
summed in float32, in an order that shapes determine.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ast_plugin.errors import ShapeError
from ast_plugin.ops.assa import Affine
from ast_plugin.ops.fused_cpu_kernels import gradients_of
from ast_plugin.ops.residual import Residual, with_residual
from ast_plugin.ops.triton_launch import on_device, packed

_BLOCK = 64  # channels of a program
_ROWS, _COLUMNS = 4, 8
_PROGRAMS = 2048  # of the kernel with sums; fixed, so that their order is the same everywhere
_SETTINGS = {'BLOCK': _BLOCK, 'ROWS': _ROWS, 'COLUMNS': _COLUMNS, 'num_warps': 8, 'num_stages': 1}


def frfn(
    x: Tensor, partial_conv: Tensor, expand: Affine, depthwise: Affine, project: Affine, residual: Residual | None
) -> Tensor:
    """See `frfn.frfn`."""

    def branch(x: Tensor) -> Tensor:
        refined = partial_conv.shape[0]
        head, tail = x.split([refined, x.shape[-1] - refined], dim=-1)
        head = F.conv2d(head.permute(0, 3, 1, 2), partial_conv, padding=1).permute(0, 2, 3, 1)
        z = F.linear(torch.cat([head, tail.to(head.dtype)], dim=-1), *expand)
        return F.linear(activate(z, *depthwise), *project)

    return with_residual(branch, x, residual)


def leff(x: Tensor, expand: Affine, depthwise: Affine, project: Affine, residual: Residual | None) -> Tensor:
    """See `frfn.leff`."""
    return with_residual(lambda x: F.linear(activate(F.linear(x, *expand), *depthwise), *project), x, residual)


def activate(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """GELU(depthwise3×3(GELU(z₁))), times GELU(z₂) where z has twice as many channels as the convolution.

    Args:
        z: [B, H, W, h or 2h], what the first linear layer gave.
        weight: [h, 1, 3, 3].
        bias: [h], or None.
    Returns:
        [B, H, W, h].
    Raises:
        ShapeError: if the sizes do not go together; a kernel would read what is not there.
    """
    h = len(weight)
    if z.shape[-1] not in (h, 2 * h) or weight.shape != (h, 1, 3, 3) or (bias is not None and bias.shape != (h,)):
        sizes = ', '.join(str(list(tensor.shape)) for tensor in (z, weight, bias) if tensor is not None)
        raise ShapeError(f'map, depthwise weight and bias are {sizes}: expected [B, H, W, h or 2h], [h, 1, 3, 3], [h]')
    return _Activate.apply(z, weight, bias)


def plain_activate(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `activate`, by PyTorch's operators: for gradients of gradients, and what the kernels are checked against."""
    channels, dtype = len(weight), torch.promote_types(z.dtype, torch.float32)
    u = F.gelu(z.to(dtype))
    bias = None if bias is None else bias.to(dtype)
    before = F.conv2d(u[..., :channels].permute(0, 3, 1, 2), weight.to(dtype), bias, padding=1, groups=channels)
    y = F.gelu(before.permute(0, 2, 3, 1))
    return (y if z.shape[-1] == channels else y * u[..., channels:]).to(z.dtype)


class _Activate(torch.autograd.Function):
    """Keeps its inputs alone."""

    @staticmethod
    def forward(ctx: FunctionCtx, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, weight, bias)
        return _Launch(z, weight, bias).forward()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor):
        z, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Gradients of gradients are asked for: autograd has the formulas of plain operators.
            with torch.autocast(z.device.type, enabled=False):
                out = plain_activate(z, weight, bias)
            return tuple(gradients_of(out, grad, (z, weight, bias), ctx.needs_input_grad))
        return _Launch(z, weight, bias).backward(grad)


class _Launch:
    """One call's tensors as the kernels take them."""

    def __init__(self, z: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.z, self.like_weight, self.like_bias = packed(z.detach()), weight, bias
        self.channels, self.hidden = len(weight), z.shape[-1]
        self.weight = weight.detach().float().reshape(self.channels, 9).t().contiguous()
        self.bias = self.weight.new_zeros(self.channels) if bias is None else bias.detach().float().contiguous()
        self.num_blocks = -(-self.channels // _BLOCK)
        B, H, W, _ = z.shape
        self.size = H, W
        self.num_tiles = B * -(-H // _ROWS) * -(-W // _COLUMNS)
        self.gated = self.hidden != self.channels
        # A pass of its own: inside the convolution each GELU would be computed nine times.
        self.u = F.gelu(self.z[..., : self.channels]).contiguous()

    def forward(self) -> Tensor:
        from ast_plugin.ops import triton_frfn_kernels as kernels

        out = torch.empty_like(self.u)
        if out.numel():
            with on_device(out):
                kernels.forward[(self.num_tiles, self.num_blocks)](
                    self.u,
                    self.z,
                    self.weight,
                    self.bias,
                    out,
                    *self.size,
                    self.channels,
                    *self.z.stride()[:3],
                    GATED=self.gated,
                    **_SETTINGS,
                )
        return out

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of z, the weight and the bias."""
        from ast_plugin.ops import triton_frfn_kernels as kernels

        d_z = torch.empty(self.z.shape, dtype=self.z.dtype, device=self.z.device)
        groups = max(1, min(self.num_tiles, _PROGRAMS // self.num_blocks))
        sums = self.weight.new_zeros(groups, 16, self.channels) if not d_z.numel() else None
        if sums is None:
            sums = self.weight.new_empty(groups, 16, self.channels)
            d_before, strides = torch.empty_like(self.u), self.z.stride()[:3]
            with on_device(d_z):
                kernels.backward_gate[(groups, self.num_blocks)](
                    self.u,
                    self.z,
                    self.weight,
                    self.bias,
                    grad.contiguous(),
                    d_before,
                    d_z,
                    sums,
                    *self.size,
                    self.num_tiles,
                    self.channels,
                    self.hidden,
                    *strides,
                    GATED=self.gated,
                    **_SETTINGS,
                )
                kernels.backward_convolution[(self.num_tiles, self.num_blocks)](
                    d_before,
                    self.z,
                    self.weight,
                    d_z,
                    *self.size,
                    self.channels,
                    self.hidden,
                    *strides,
                    **_SETTINGS,
                )
        total = sums.sum(0)
        d_weight = total[:9].t().reshape(self.like_weight.shape).to(self.like_weight.dtype)
        return d_z, d_weight, None if self.like_bias is None else total[9].to(self.like_bias.dtype)
