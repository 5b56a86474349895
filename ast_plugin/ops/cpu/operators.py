"""Building blocks of the CPU kernels: oneDNN operators with fused activation or sum, strips of rows, branches.

PyTorch runs float32 linear layers with MKL, which reaches half the speed of oneDNN on non-Intel processors with
AVX-512. oneDNN is called through the private operators that torch.compile uses. They are tested before use, with plain
PyTorch as the fallback.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_plugin.ops.attention import Attention
from ast_plugin.ops.backend import Residual, Tensors, make_once, run_kernel, with_residual
from ast_plugin.ops.ffn import FeedForward

# Size of one temporary. Several must fit in the caches together; smaller strips recompute more rows at their edges and
# synchronise threads more often. Best of the sizes measured from 1 to 32 MB.
STRIP_BYTES = 4 * 2**20
_FEWEST_ROWS = 4
gelu_backward = torch.ops.aten.gelu_backward


@lru_cache(maxsize=8)
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN's operators exist for a dtype, accept our arguments and return correct results."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    with torch.inference_mode(), torch.autocast('cpu', enabled=False):
        steps = torch.linspace(-1, 1, 36, dtype=torch.float32, device='cpu')
        image, layer, kernel = steps.reshape(1, 3, 3, 4).to(dtype), steps[:32].reshape(8, 4).to(dtype), steps.to(dtype)
        bias, kernel = steps[:8].to(dtype), kernel.reshape(4, 1, 3, 3)
        other = image.new_ones(1, 3, 3, 8)
        try:
            got = (
                _onednn_linear(image, layer, bias, 'gelu'),
                torch.ops.mkldnn._linear_pointwise.binary(image, other, layer, bias, 'add'),
                _onednn_conv(image, kernel, bias[:4], (0, 1), 4, 'gelu'),
            )
        # Private operators may be missing, renamed or have different arguments.
        except (RuntimeError, AttributeError, TypeError, NotImplementedError):
            return False
        image, layer, bias, kernel = (tensor.double() for tensor in (image, layer, bias, kernel))
        plain = F.linear(image, layer, bias)
        want = (
            F.gelu(plain),
            plain + 1,
            F.gelu(F.conv2d(image.permute(0, 3, 1, 2), kernel, bias[:4], padding=(0, 1), groups=4)).permute(0, 2, 3, 1),
        )
        near = 1e-5 if dtype is torch.float32 else 3e-2
        return all(bool((a.double() - b).abs().max() < near) for a, b in zip(got, want, strict=True))


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, activation, [], 'none')


def _onednn_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int], groups: int, activation: str
) -> Tensor:
    y = torch.ops.mkldnn._convolution_pointwise.default(
        x.permute(0, 3, 1, 2), weight, bias, padding, (1, 1), (1, 1), groups, activation, [], 'none'
    )
    return y.permute(0, 2, 3, 1)


def _fuses(dtype: torch.dtype) -> bool:
    """Whether to use oneDNN for linear layers and fused activations.

    With AVX2 only, a fused GELU takes five times as long as a separate one, because the accumulators of the product
    occupy all registers, and MKL's products are up to 10 % faster.
    """
    return has_onednn(dtype) and not (dtype is torch.float32 and torch.backends.cpu.get_cpu_capability() == 'AVX2')


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False, plus: Tensor | None = None
) -> Tensor:
    """x · weightᵀ + bias, [..., in] -> [..., out], optionally followed by a GELU or by the sum with `plus`."""
    if not _fuses(x.dtype):
        y = F.linear(x, weight, bias)
        return torch.ops.aten.gelu_(y) if gelu else y if plus is None else y.add_(plus)
    if plus is None:
        return _onednn_linear(x, weight, bias, 'gelu' if gelu else 'none')
    return torch.ops.mkldnn._linear_pointwise.binary(x, plus.contiguous(), weight, bias, 'add')


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, edges: tuple[bool, bool], *, gelu: bool = False) -> Tensor:
    """3×3 convolution of rows of a map, depthwise if `weight` is [C, 1, 3, 3] with C > 1.

    Args:
        x: [B, rows, W, C]: the output rows, plus one row at each side that is not an edge of the map.
        weight, bias: parameters of the convolution.
        edges: whether the rows begin at the top and end at the bottom of the map.
        gelu: whether to apply a GELU to the result.
    Returns:
        [B, output rows, W, out].
    """
    (top, bottom), groups = edges, x.shape[-1] // weight.shape[1]
    # Padding is symmetric: if only one side is an edge of the map, the other gets an extra row, which is cropped.
    padding = (1, 1) if top or bottom else (0, 1)
    is_fused = gelu and _fuses(x.dtype)
    if has_onednn(x.dtype):
        y = _onednn_conv(x, weight, bias, padding, groups, 'gelu' if is_fused else 'none')
    else:
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=groups).permute(0, 2, 3, 1)
    y = torch.ops.aten.gelu_(y) if gelu and not is_fused else y
    return y if padding == (0, 1) else y[:, not top : y.shape[1] - (not bottom)]


def conv3x3_backward_weight(x: Tensor, grad: Tensor, weight: Tensor, edges: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias of `conv3x3`, from its input and the gradient of its output."""
    (top, bottom), groups = edges, x.shape[-1] // weight.shape[1]
    padding = (1, 1) if top and bottom else (0, 1)
    if top != bottom:
        x = F.pad(x, (0, 0, 0, 0, int(top), int(bottom)))
    settings = [len(weight)], (1, 1), padding, (1, 1), False, (0, 0), groups, (False, True, True)
    grad, x = grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)
    _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(grad, x, weight, *settings)
    return grad_weight, grad_bias


def transpose_kernel(weight: Tensor) -> Tensor:
    """Return the weight of the convolution that computes a 3×3 convolution's input gradient."""
    flipped = weight.flip(2, 3)
    return flipped if weight.shape[1] == 1 else flipped.transpose(0, 1).contiguous()


def outer_sum(grad: Tensor, x: Tensor) -> Tensor:
    """gradᵀ · x over all positions, the weight gradient of a linear layer: [..., out], [..., in] -> [out, in]."""
    grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    if grad.dtype is not torch.float32 or not has_onednn(torch.float32):
        return grad.t() @ x
    # Transposing happens in the caches; oneDNN is faster with a smaller first factor.
    if grad.shape[1] <= x.shape[1]:
        return _onednn_linear(grad.t(), x.t(), None, 'none')
    return _onednn_linear(x.t(), grad.t(), None, 'none').t()


class Strip(NamedTuple):
    """Rows [first, last) of images [image, image + num_images); always all rows if there are several images."""

    image: int
    num_images: int
    first: int
    last: int
    height: int

    def widen(self, rows: int) -> Strip:
        """Return a strip extended by `rows` at each side, clipped to the map."""
        return self._replace(first=max(0, self.first - rows), last=min(self.height, self.last + rows))

    @property
    def edges(self) -> tuple[bool, bool]:
        """Whether the rows begin at the top and end at the bottom of the map, where zero padding applies."""
        return self.first == 0, self.last == self.height

    def view(self, x: Tensor) -> Tensor:
        """Return a view of the strip's rows of a map [B, H, W, C]."""
        return x[self.image : self.image + self.num_images, self.first : self.last]

    def view_images(self, x: Tensor) -> Tensor:
        """Return a view of the strip's images of a tensor [B, ...]."""
        return x[self.image : self.image + self.num_images]

    def crop(self, x: Tensor, wider: Strip) -> Tensor:
        """Return a view of the strip's rows of `x`, which holds the rows of `wider`."""
        return x[:, self.first - wider.first : self.last - wider.first]


def cut_strips(B: int, H: int, bytes_per_row: int, unit: int = 1) -> Iterator[Strip]:
    """Split a batch into strips with temporaries of about `STRIP_BYTES`: rows of one image, or several complete images.

    Args:
        B, H: number of images and rows.
        bytes_per_row: size of a row of the largest temporary.
        unit: number of rows that must stay together, a divisor of H.
    """
    rows = max(unit, _FEWEST_ROWS, STRIP_BYTES // bytes_per_row)
    if rows >= H:
        together = max(1, rows // H)
        for image in range(0, B, together):
            yield Strip(image, min(together, B - image), 0, H, H)
        return
    count = -(-H // rows)
    rows = -(-H // (count * unit)) * unit
    for image in range(B):
        for first in range(0, H, rows):
            yield Strip(image, 1, first, min(H, first + rows), H)


class Branch:
    """One call of a branch: f(x), or x + scale · f(norm(x)), where subclasses define f.

    Subclasses have a function `plain`, f computed by PyTorch's operators; `prepare(op, dtype)`, which concatenates,
    gathers and casts the parameters of f; `forward()`; and `backward(grad, kept)`, which returns the gradients by name,
    at least those in `wanted`: x, norm_weight, norm_bias, tensors of `op`.
    """

    def __init__(
        self, kernel: _BranchKernel, x: Tensor, mask: Tensor | None, residual: Residual | None, layers: NamedTuple
    ) -> None:
        self.op, self.dtype = kernel.op, kernel.dtype
        self.x, self.mask, self.residual, self.layers = x, mask, residual, layers
        self.scale = None if residual is None else residual.scale
        self.sums_dtype = torch.promote_types(self.dtype, torch.float32)
        self.wanted: set[str] = set()
        self.sums: dict[str, Tensor] = {}  # gradients of parameters, accumulated over strips

    def forward_keeping(self) -> tuple[Tensor, Tensors]:
        """Compute the branch, and the tensors to save for the backward pass in addition to the inputs."""
        return self.forward(), ()

    def new_output(self) -> Tensor:
        """Return uninitialised memory for the result."""
        dtype = self.dtype if self.residual is None else torch.promote_types(self.x.dtype, self.dtype)
        return self.x.new_empty(self.x.shape, dtype=dtype)

    def norm(self, x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Apply the LayerNorm, if there is a residual, and cast; return the rows, mean and 1 / std."""
        dtype = dtype or self.dtype
        if self.residual is None:
            return x.to(dtype).contiguous(), None, None
        weight, bias, eps, _ = self.residual
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        return y.to(dtype), mean, rstd

    def norm_backward(self, grad: Tensor, x: Tensor, *statistics: Tensor | None) -> Tensor:
        """Return the gradient of the norm's input from that of its output, and add those of weight and bias."""
        if self.residual is None:
            return grad
        names = 'norm_weight', 'norm_bias'
        dx, *gradients = torch.ops.aten.native_layer_norm_backward(
            *(grad.to(x.dtype).contiguous(), x.contiguous(), x.shape[-1:]),
            *(statistic.contiguous() for statistic in statistics),
            *(*self.residual[:2], (True, *(name in self.wanted for name in names))),
        )
        for name, gradient in zip(names, gradients, strict=True):
            self.add(name, gradient)
        return dx

    def write(self, out: Tensor, y: Tensor, beside: Tensor) -> None:
        """Write rows of f's result, or of the gradient of its input, to `out`; with a residual, add those `beside`."""
        if self.residual is None:
            out.copy_(y)
        else:
            torch.add(beside, y, out=out)

    def output_grad(self, grad: Tensor, strip: Strip) -> Tensor:
        """Return the gradient of f's result from that of the branch."""
        grad = grad.to(self.dtype)
        return (grad if self.scale is None else grad * strip.view_images(self.scale).to(grad.dtype)).contiguous()

    def add(self, name: str, value: Tensor | None) -> None:
        """Add to the gradient of a parameter."""
        if name not in self.wanted:
            return
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value.to(self.sums_dtype)

    def add_linear(self, name: str, grad: Tensor, x: Tensor) -> None:
        """Add to the gradients of a linear layer's weight and bias."""
        if name in self.wanted:
            self.add(name, outer_sum(grad, x))
        if f'{name}_bias' in self.wanted:
            self.add(f'{name}_bias', grad.sum((0, 1, 2), dtype=self.sums_dtype))


class _BranchKernel:
    """Branch as a kernel for `run_kernel`; its tensors are x, mask, scale, norm weight and bias, and those of `op`."""

    def __init__(self, branch: type[Branch], x: Tensor, op: Attention | FeedForward, residual: Residual | None) -> None:
        self.branch, self.op = branch, op.with_tensors([None] * len(op.tensors))
        self.eps = None if residual is None else residual.eps
        self.in_autocast = torch.is_autocast_enabled('cpu') and x.dtype is not torch.float64
        self.dtype = torch.get_autocast_dtype('cpu') if self.in_autocast else x.dtype

    def start(self, *tensors: Tensor | None) -> Branch:
        x, mask, residual, op = self._unpack(tensors)
        return self.branch(self, x, mask, residual, self.branch.prepare(op, self.dtype))

    def forward(self, *tensors: Tensor | None) -> tuple[Tensor, Tensors]:
        with torch.autocast('cpu', enabled=False):
            return self.start(*tensors).forward_keeping()

    def backward(self, grad: Tensor, needed: Sequence[bool], tensors: Tensors, kept: Tensors) -> Tensors:
        names = 'x', 'mask', 'scale', 'norm_weight', 'norm_bias', *self.op._fields[: len(self.op.tensors)]
        with torch.autocast('cpu', enabled=False):
            branch = self.start(*tensors)
            branch.wanted = {name for name, is_needed in zip(names, needed, strict=True) if is_needed}
            gradients = branch.backward(grad, kept)
        named = zip(names, tensors, strict=True)
        return [gradients[name].to(tensor.dtype) if name in branch.wanted else None for name, tensor in named]

    def reference(self, *tensors: Tensor | None) -> Tensor:
        x, mask, residual, op = self._unpack(tensors)
        masks = () if mask is None else (mask,)
        with torch.autocast('cpu', self.dtype, enabled=self.in_autocast):
            return with_residual(lambda x: self.branch.plain(x, op, *masks), x, residual)

    def _unpack(self, tensors: Tensors) -> tuple[Tensor, Tensor | None, Residual | None, Attention | FeedForward]:
        x, mask, scale, weight, bias, *rest = tensors
        residual = None if self.eps is None else Residual(weight, bias, self.eps, scale)
        return x, mask, residual, self.op.with_tensors(rest)


def run_branch(
    branch: type[Branch], x: Tensor, op: Attention | FeedForward, mask: Tensor | None, residual: Residual | None
) -> Tensor:
    """Compute a branch, through autograd if gradients are needed."""
    kernel = _BranchKernel(branch, x, op, residual)
    weight, bias, _, scale = residual or (None,) * 4
    tensors = x, mask, scale, weight, bias, *op.tensors
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return run_kernel(kernel, *tensors)
    with torch.autocast('cpu', enabled=False):
        layers = make_once(lambda: branch.prepare(op, kernel.dtype), op.tensors, branch, kernel.dtype, kernel.op)
        return branch(kernel, x, mask, residual, layers).forward()
