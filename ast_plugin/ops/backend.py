"""What backends share: a call and whether they can run it, the residual around it, its gradients, cached weights."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from ast_plugin.ops.attention import Attention
from ast_plugin.ops.ffn import FeedForward

Tensors = Sequence[Tensor | None]
T = TypeVar('T')
# Beside what was made stand the weights it was made of: an id is not given to another tensor while its own lives.
_cache: ContextVar[dict[Hashable, tuple[tuple[Tensor | None, ...], object]] | None] = ContextVar(
    'ast_plugin_frozen_weights', default=None
)


class Residual(NamedTuple):
    """Turns a function f into x + scale · f(layer_norm(x)).

    Attributes:
        weight, bias: of the LayerNorm over channels, [C] or None.
        eps: of the LayerNorm.
        scale: [B, 1, 1, 1], a factor for each sample (stochastic depth); or None.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float = 1e-5
    scale: Tensor | None = None


def with_residual(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    residual: Residual | None,
    layer_norm: Callable[..., Tensor] = F.layer_norm,
) -> Tensor:
    """Return function(x), or x + scale · function(layer_norm(x)) where a residual is given."""
    if residual is None:
        return function(x)
    channels = x.shape[-1] if residual.weight is None else len(residual.weight)  # a number, while it is traced, too
    y = function(layer_norm(x, [channels], residual.weight, residual.bias, residual.eps))
    return x + (y if residual.scale is None else y * residual.scale)


@dataclass(frozen=True)
class Call:
    """What a function is called with, as far as backends care."""

    op: Attention | FeedForward | None  # None where only the map is known
    device: torch.device
    dtype: torch.dtype  # what is computed in; autocast's where that is on
    dtypes: frozenset[torch.dtype]  # of all tensors
    shape: tuple[int, ...]  # of the map, [B, H, W, C]
    needs_grad: bool
    is_masked: bool = False
    watcher: str | None = None  # who follows single operators, such as a trace, and would miss a kernel's formulas

    @property
    def name(self) -> str:
        """Name of the function in `ast_plugin.ops`."""
        return 'window_attention' if isinstance(self.op, Attention) else 'feed_forward'

    def why_not(self, dtypes: Sequence[torch.dtype]) -> str | None:
        """Why no kernel that computes in some dtypes can run the call, or None."""
        if self.watcher is not None:
            return self.watcher
        if self.dtype not in dtypes:
            return f'it computes in {_names(dtypes)}, not in {_names([self.dtype])}'
        # Autocast casts what is given in float32.
        autocast = torch.is_autocast_enabled(self.device.type)
        if not self.dtypes <= ({self.dtype, torch.float32} if autocast else {self.dtype}):
            return f'it computes in {_names([self.dtype])}, and tensors are {_names(sorted(self.dtypes, key=str))}'
        if len(self.shape) != 4:
            return f'a map is [B, H, W, C], not {list(self.shape)}'
        if 0 in self.shape:
            return f'there is nothing to compute in {list(self.shape)}'
        return None


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)


class _KernelFunction(torch.autograd.Function):
    """A function of tensors with a backward pass of its own, as a node of autograd.

    The kernel holds no tensors and has three methods: `forward(*tensors)` returns the output and what the backward pass
    needs beside the tensors; `backward(grad, needed, tensors, kept)` the gradients of the tensors, at least of those
    that are needed; `reference(*tensors)` the output by PyTorch's operators, of which autograd has the formulas.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, kernel: Any, *tensors: Tensor | None) -> Tensor:
        out, kept = kernel.forward(*tensors)
        ctx.kernel, ctx.num_tensors = kernel, len(tensors)
        ctx.save_for_backward(*tensors, *kept)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensors:
        saved = ctx.saved_tensors  # once: checkpoints hand them out a single time
        tensors, kept = saved[: ctx.num_tensors], saved[ctx.num_tensors :]
        needed = ctx.needs_input_grad[1:]
        if not torch.is_grad_enabled():
            return None, *ctx.kernel.backward(grad, needed, tensors, kept)
        # Gradients of gradients are wanted.
        leaves = [tensor for tensor, is_needed in zip(tensors, needed, strict=True) if is_needed]
        out = ctx.kernel.reference(*tensors)
        gradients = iter(torch.autograd.grad(out, leaves, grad, create_graph=True, allow_unused=True))
        return None, *(next(gradients) if is_needed else None for is_needed in needed)


run_kernel: Callable[..., Tensor] = _KernelFunction.apply  # of a kernel and its tensors


@contextmanager
def frozen_weights() -> Iterator[None]:
    """Say that no weights change within a `with`: in this thread, casts and joins of weights are made once and cached.

    For inference over many images or tiles. Where weights change after all, calls without gradients go on with those
    of before: no trace of the change is looked for, as writes through `.data`, such as those of BasicSR's moving
    average, leave none. The cache is given up at the end of the outermost `with`.
    """
    token = _cache.set({}) if _cache.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _cache.reset(token)


def make_once(make: Callable[[], T], weights: Iterable[Tensor | None], *settings: Hashable) -> T:
    """`make()`, or what it gave before for the same weights and settings within `frozen_weights`.

    Args:
        make: computes from the weights and the settings alone; its result is shared, not to be written to.
        weights: what it reads. What is no parameter is another tensor in each call, and nothing is cached of it, nor of
            what gradients are asked of.
        settings: what else it depends on, itself included where several share weights.
    """
    cache, weights = _cache.get(), tuple(weights)
    given = [weight for weight in weights if weight is not None]
    is_trained = torch.is_grad_enabled() and any(weight.requires_grad for weight in given)
    if cache is None or is_trained or not all(isinstance(weight, nn.Parameter) for weight in given):
        return make()
    key = (*map(id, weights), *settings)
    if key not in cache:
        cache[key] = weights, make()
    return cache[key][1]


def cast_once(weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A weight in a dtype; within `frozen_weights` it is cast once, where autocast would do so at each call."""
    return None if weight is None else make_once(lambda: weight.to(dtype), [weight], dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer, in the dtype of its input."""
    return F.linear(x, cast_once(weight, x.dtype), cast_once(bias, x.dtype))
