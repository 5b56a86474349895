"""What the fused path on CPUs is made of: oneDNN's operators with an activation or a sum, strips of rows, reductions.

PyTorch's own linear layers in float32 go to MKL, which on processors of other makers reaches half of what oneDNN does.
torch.compile calls oneDNN through operators that are not public: here they are tried before they are used, and plain
PyTorch does the same work where they are missing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from ast_plugin.ops.backend import Call

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# Of one temporary. Several are alive at a time and shall stay in the caches; smaller ones recompute more of their edges
# and leave less to do between the threads' meetings. Measured from 1 to 32 MB.
STRIP_BYTES = 4 * 2**20
_FEWEST_ROWS = 4


def why_not(call: Call) -> str | None:
    """Why the fused path cannot run a call, or None."""
    if call.device.type != 'cpu':
        return f'it computes on CPUs, the map is on {call.device.type}'
    if call.special is not None:
        return call.special
    if call.dtype not in DTYPES:
        return f'it computes in {", ".join(map(_name, DTYPES))}, not in {_name(call.dtype)}'
    if not call.dtypes <= ({call.dtype, torch.float32} if torch.is_autocast_enabled('cpu') else {call.dtype}):
        return f'it computes in {_name(call.dtype)}, and tensors are {", ".join(sorted(map(_name, call.dtypes)))}'
    if len(call.shape) != 4:
        return f'a map is [B, H, W, C], not {list(call.shape)}'
    if 0 in call.shape:
        return f'there is nothing to compute in {list(call.shape)}'
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


@lru_cache(maxsize=8)
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN's operators are there for a dtype, take what we give them, and compute what they should."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    with torch.inference_mode(), torch.autocast('cpu', enabled=False):
        steps = torch.linspace(-1, 1, 36, dtype=torch.float32)
        image, layer, kernel = steps.reshape(1, 3, 3, 4).to(dtype), steps[:32].reshape(8, 4).to(dtype), steps.to(dtype)
        bias, kernel = steps[:8].to(dtype), kernel.reshape(4, 1, 3, 3)
        other = torch.ones(1, 3, 3, 8, dtype=dtype)
        try:
            got = (
                _onednn_linear(image, layer, bias, 'gelu'),
                torch.ops.mkldnn._linear_pointwise.binary(image, other, layer, bias, 'add'),
                _onednn_conv(image, kernel, bias[:4], (0, 1), 4, 'gelu'),
            )
        # A private operator may be missing, renamed or have other arguments.
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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """x · weightᵀ + bias, [..., in] -> [..., out], with a GELU where asked."""
    if has_onednn(x.dtype):
        return _onednn_linear(x, weight, bias, 'gelu' if gelu else 'none')
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


def linear_plus(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    """x · weightᵀ + bias + other; `other` of the result's shape and dtype."""
    if has_onednn(x.dtype):
        return torch.ops.mkldnn._linear_pointwise.binary(x, other.contiguous(), weight, bias, 'add')
    return F.linear(x, weight, bias).add_(other)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, edges: Edges, *, gelu: bool = False) -> Tensor:
    """3×3 convolution of rows of a map, depthwise where `weight` is [C, 1, 3, 3] and C > 1; with a GELU where asked.

    Args:
        x: [B, rows, W, C]: the rows that are wanted, one more at either side where the map goes on there.
    Returns:
        [B, rows wanted, W, out].
    """
    groups = x.shape[-1] // weight.shape[1]
    # Padding has one width for both sides: at an edge of the map one side gets a row too much.
    padding = (1, 1) if edges.top or edges.bottom else (0, 1)
    if has_onednn(x.dtype):
        y = _onednn_conv(x, weight, bias, padding, groups, 'gelu' if gelu else 'none')
    else:
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=groups).permute(0, 2, 3, 1)
        y = F.gelu(y) if gelu else y
    return y if padding == (0, 1) else y[:, not edges.top : y.shape[1] - (not edges.bottom)]


def conv3x3_backward_weight(x: Tensor, grad: Tensor, weight: Tensor, edges: Edges) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias of `conv3x3` from x as it was given there, and the gradient of its result."""
    groups = x.shape[-1] // weight.shape[1]
    padding = (1, 1) if edges.top and edges.bottom else (0, 1)
    if edges.top != edges.bottom:
        x = F.pad(x, (0, 0, 0, 0, int(edges.top), int(edges.bottom)))
    _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2),
        x.permute(0, 3, 1, 2),
        weight,
        [weight.shape[0]],
        (1, 1),
        padding,
        (1, 1),
        False,
        (0, 0),
        groups,
        (False, True, True),
    )
    return grad_weight, grad_bias


def transposed_kernel(weight: Tensor) -> Tensor:
    """Weights of the convolution that takes a 3×3 convolution's gradient back to its input."""
    flipped = weight.flip(2, 3)
    return flipped if weight.shape[1] == 1 else flipped.transpose(0, 1).contiguous()


def outer_sum(grad: Tensor, x: Tensor) -> Tensor:
    """gradᵀ · x over all positions, a linear layer's gradient: [..., out], [..., in] -> [out, in]."""
    grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    if grad.dtype is not torch.float32 or not has_onednn(torch.float32):
        return grad.t() @ x
    # Both are turned inside the caches; oneDNN is the faster the smaller its first factor.
    if grad.shape[1] <= x.shape[1]:
        return _onednn_linear(grad.t(), x.t(), None, 'none')
    return _onednn_linear(x.t(), grad.t(), None, 'none').t()


def gelu_backward(grad: Tensor, before: Tensor) -> Tensor:
    """Gradient of the exact GELU's input."""
    return torch.ops.aten.gelu_backward(grad, before)


class Edges(NamedTuple):
    """Whether rows begin at the map's top, and end at its bottom: there zeros lie beyond, elsewhere further rows."""

    top: bool
    bottom: bool


class Strip(NamedTuple):
    """Rows [first, last) of images [image, image + num_images); of several images all rows."""

    image: int
    num_images: int
    first: int
    last: int
    height: int

    def wider(self, rows: int) -> Strip:
        """With so many rows more at either side, as far as the map goes."""
        return self._replace(first=max(0, self.first - rows), last=min(self.height, self.last + rows))

    @property
    def edges(self) -> Edges:
        return Edges(self.first == 0, self.last == self.height)

    def of(self, x: Tensor) -> Tensor:
        """View of a map [B, H, W, C]."""
        return x[self.image : self.image + self.num_images, self.first : self.last]

    def images_of(self, x: Tensor) -> Tensor:
        """View of what there is one of for each image, [B, ...]."""
        return x[self.image : self.image + self.num_images]

    def within(self, x: Tensor, wider: Strip) -> Tensor:
        """View of these rows in `x`, which holds those of `wider`."""
        return x[:, self.first - wider.first : self.last - wider.first]


def strips(B: int, H: int, bytes_per_row: int, unit: int = 1) -> Iterator[Strip]:
    """Cut maps into strips whose temporaries are about `STRIP_BYTES`: of one image each, or of several whole ones.

    Args:
        bytes_per_row: of the largest temporary.
        unit: rows that must stay together; H is a multiple.
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


def without_autocast() -> contextlib.AbstractContextManager:
    """A context in which operators take tensors as they are."""
    if not torch.is_autocast_enabled('cpu'):
        return contextlib.nullcontext()
    return torch.autocast('cpu', enabled=False)


def gradients_of(
    out: Tensor, grad: Tensor, tensors: tuple[Tensor | None, ...], needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients that can be differentiated in turn: of `out`, where `needed`, by each of the tensors."""
    wanted = [tensor for tensor, is_needed in zip(tensors, needed, strict=True) if is_needed]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if is_needed else None for is_needed in needed]
