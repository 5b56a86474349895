"""Shared parts of the backends: call descriptions, residual branches, autograd integration, cached weights."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from ast_plugin.ops.attention import Attention
from ast_plugin.ops.ffn import FeedForward

Tensors = Sequence[Tensor | None]
T = TypeVar('T')
# Each entry also holds its source weights, because keys contain ids, and an id is only unique while its tensor exists.
_cache: ContextVar[dict[Hashable, tuple[tuple[Tensor | None, ...], object]] | None] = ContextVar(
    'ast_plugin_frozen_weights', default=None
)


class Residual(NamedTuple):
    """Parameters of a pre-norm residual branch, x + scale · f(layer_norm(x)).

    Attributes:
        weight, bias: LayerNorm parameters over channels, [C] or None.
        eps: LayerNorm epsilon.
        scale: factor per sample (stochastic depth), [B, 1, 1, 1] or None.
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
    """Return function(x), or x + scale · function(layer_norm(x)) if a residual is given."""
    if residual is None:
        return function(x)
    channels = x.shape[-1] if residual.weight is None else len(residual.weight)  # stays an int during tracing
    y = function(layer_norm(x, [channels], residual.weight, residual.bias, residual.eps))
    return x + (y if residual.scale is None else y * residual.scale)


class Call(NamedTuple):
    """Properties of an operator call that determine which backends support it."""

    op: Attention | FeedForward | None  # None if only the input is known
    device: torch.device
    dtype: torch.dtype  # of the computation, the autocast dtype if autocast is enabled
    dtypes: frozenset[torch.dtype]  # of all tensors
    shape: tuple[int, ...]  # of the input, [B, H, W, C]
    needs_grad: bool
    is_masked: bool = False
    watcher: str | None = None  # reason if single operators are observed, such as by a trace, which cannot see kernels

    @property
    def name(self) -> str:
        """Name of the function in `ast_plugin.ops`."""
        return 'window_attention' if isinstance(self.op, Attention) else 'feed_forward'

    def why_not(self, dtypes: Sequence[torch.dtype]) -> str | None:
        """Return why a kernel that supports only the given dtypes cannot run the call, or None if it can."""
        if self.watcher is not None:
            return self.watcher
        if self.dtype not in dtypes:
            return f'it supports {_names(*dtypes)}, not {_names(self.dtype)}'
        # Autocast casts float32 tensors.
        autocast = torch.is_autocast_enabled(self.device.type)
        if not self.dtypes <= ({self.dtype, torch.float32} if autocast else {self.dtype}):
            return f'it computes in {_names(self.dtype)}, but tensors are {_names(*sorted(self.dtypes, key=str))}'
        if len(self.shape) != 4:
            return f'it expects a feature map [B, H, W, C], not {list(self.shape)}'
        return f'the feature map {list(self.shape)} is empty' if 0 in self.shape else None


def _names(*dtypes: torch.dtype) -> str:
    return ', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)


class _KernelFunction(torch.autograd.Function):
    """Autograd function around a kernel with a custom backward pass.

    The kernel holds no tensors and has three methods: `forward(*tensors)` returns the output and the tensors to save in
    addition to its inputs; `backward(grad, needed, tensors, kept)` returns the gradients of at least the needed inputs;
    `reference(*tensors)` computes the output with PyTorch operators, which gives higher-order gradients.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, kernel: Any, *tensors: Tensor | None) -> Tensor:
        out, kept = kernel.forward(*tensors)
        ctx.kernel, ctx.num_tensors = kernel, len(tensors)
        ctx.save_for_backward(*tensors, *kept)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensors:
        saved = ctx.saved_tensors  # gradient checkpointing allows only one access
        tensors, kept = saved[: ctx.num_tensors], saved[ctx.num_tensors :]
        needed = ctx.needs_input_grad[1:]
        if not torch.is_grad_enabled():
            return None, *ctx.kernel.backward(grad, needed, tensors, kept)
        # Higher-order gradients are requested. Views, because a tensor may depend on another or be passed twice.
        tensors = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
        leaves = [tensor for tensor, is_needed in zip(tensors, needed, strict=True) if is_needed]
        out = ctx.kernel.reference(*tensors)
        gradients = iter(torch.autograd.grad(out, leaves, grad, create_graph=True, allow_unused=True))
        return None, *(next(gradients) if is_needed else None for is_needed in needed)


run_kernel: Callable[..., Tensor] = _KernelFunction.apply  # arguments: a kernel and its tensors


@contextmanager
def frozen_weights() -> Iterator[None]:
    """Context manager that caches casts and concatenations of weights in this thread, for inference.

    Weights must not change inside the context: calls without gradients would continue to use the cached values. Changes
    are not detected, because writes through `.data`, such as those of BasicSR's EMA, leave no trace. The cache is
    cleared when the outermost context exits.
    """
    token = _cache.set({}) if _cache.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _cache.reset(token)


def make_once(make: Callable[[], T], weights: Iterable[Tensor | None], *settings: Hashable) -> T:
    """Return `make()`, cached by weights and settings within `frozen_weights`.

    Args:
        make: function of the weights and settings only; its result is shared and must not be modified.
        weights: tensors that `make` reads. The result is cached only if all are `nn.Parameter` and none needs
            gradients.
        settings: everything else that the result depends on, including a key for `make` if several share weights.
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
    """Cast a weight to a dtype; within `frozen_weights` only once, whereas autocast casts at each call."""
    return None if weight is None else make_once(lambda: weight.to(dtype), [weight], dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer in the dtype of its input."""
    return F.linear(x, cast_once(weight, x.dtype), cast_once(bias, x.dtype))
