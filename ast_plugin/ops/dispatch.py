"""Dispatch of operator calls to backends: the PyTorch reference or a faster implementation."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ast_plugin.errors import BackendUnavailable, OptionError
from ast_plugin.ops import attention, cpu, ffn, triton
from ast_plugin.ops.attention import Attention
from ast_plugin.ops.backend import Call, Residual, with_residual
from ast_plugin.ops.ffn import FeedForward

AUTO = 'auto'
VARIABLE = 'AST_BACKEND'
_logger = logging.getLogger(__name__)
_backend_here: ContextVar[str | None] = ContextVar('ast_plugin_backend', default=None)


class Backend(NamedTuple):
    """One implementation of the operators."""

    device: str | None  # 'auto' considers the backend for this device type only; None: any device
    why_not: Callable[[Call], str | None]  # reason why the backend cannot run a call, or None if it can
    window_attention: Callable[..., Tensor]
    feed_forward: Callable[..., Tensor]


# Fastest first.
BACKENDS = {
    'fused': Backend('cpu', cpu.why_not, cpu.window_attention, cpu.feed_forward),
    'triton': Backend('cuda', triton.why_not, triton.window_attention, triton.feed_forward),
    'reference': Backend(None, lambda call: None, attention.window_attention, ffn.feed_forward),
}


class Choice(NamedTuple):
    """The backend selected for a call, and the reasons."""

    backend: str
    requested: str  # 'auto' or a backend name
    rejected: dict[str, str]  # faster backends and why each cannot run this call

    def __str__(self) -> str:
        reasons = ''.join(f'; not {name}: {reason}' for name, reason in self.rejected.items())
        return f'{self.backend} ({"requested by name" if self.requested != AUTO else "fastest available"}{reasons})'


def window_attention(x: Tensor, op: Attention, mask: Tensor | None = None, residual: Residual | None = None) -> Tensor:
    """Multi-head self-attention within (shifted) windows; see the reference, `attention.window_attention`.

    Args:
        x: [B, H, W, C], with H and W multiples of the window size.
        op: parameters and settings.
        mask: [num_windows or B * num_windows, window**2, window**2], added to the scores of all heads.
        residual: LayerNorm before the attention and sum with x after it.
    Returns:
        [B, H, W, C].
    Raises:
        ShapeError: if sizes are not divisible or tensor shapes do not match.
        BackendUnavailable: if a backend requested by name cannot run the call.
    """
    op.check(x, mask)
    return _compute('window_attention', residual, x, op, mask)


def feed_forward(x: Tensor, op: FeedForward, residual: Residual | None = None) -> Tensor:
    """Feed-forward network (FRFN, LeFF or MLP) on a feature map; see the reference, `ffn.feed_forward`.

    Arguments and exceptions as for `window_attention`.
    """
    op.check(x)
    return _compute('feed_forward', residual, x, op)


def _compute(
    name: str, residual: Residual | None, x: Tensor, op: Attention | FeedForward, *mask: Tensor | None
) -> Tensor:
    if torch.compiler.is_compiling() and requested_backend() in (AUTO, 'reference'):
        # The compiler fuses plain operators itself.
        backend = BACKENDS['reference']
    elif torch.compiler.is_dynamo_compiling():
        # A backend requested by name runs eagerly, outside of the compiled graph.
        return torch.compiler.disable(_compute)(name, residual, x, op, *mask)
    else:
        choice = explain(x, op, *mask, residual=residual)
        backend = BACKENDS[choice.backend]
        for rejected, reason in choice.rejected.items():
            _warn_once(f'using backend {choice.backend!r} instead of {rejected!r}: {reason}')
    function = getattr(backend, name)
    if backend is BACKENDS['reference']:  # the others fuse the residual branch
        return with_residual(lambda x: function(x, op, *mask), x, residual)
    return function(x, op, *mask, residual=residual)


@cache
def _warn_once(message: str) -> None:
    _logger.warning(message)


def _check_name(name: str, where: str = 'backend') -> str:
    if name not in (AUTO, *BACKENDS):
        raise OptionError(f'{where} is {name!r}: expected one of {", ".join((AUTO, *BACKENDS))}')
    return name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Context manager that selects a backend, in the current thread and the asyncio tasks started from it.

    Takes precedence over the environment variable AST_BACKEND.

    Args:
        name: a backend, which runs or raises BackendUnavailable; 'auto' for the fastest that supports each call; None
            to keep the current selection.
    Raises:
        OptionError: if there is no backend of that name.
    """
    token = _backend_here.set(_backend_here.get() if name is None else _check_name(name))
    try:
        yield
    finally:
        _backend_here.reset(token)


def requested_backend() -> str:
    """Return the backend requested by `use_backend`, else by the environment variable AST_BACKEND, else 'auto'."""
    here = _backend_here.get()
    if here is not None:
        return here
    return _check_name(os.environ.get(VARIABLE) or AUTO, f'the environment variable {VARIABLE}')


# Equivalent to torch.compiler.assume_constant_result, without importing the compiler, which takes seconds. A compiled
# caller keeps the backend that it was compiled with.
requested_backend._dynamo_marked_constant = True


def explain(
    x: Tensor, op: Attention | FeedForward | None = None, mask: Tensor | None = None, residual: Residual | None = None
) -> Choice:
    """Return which backend would run a call in the current context, and why: `print(explain(x))`.

    Args:
        x: the input, [B, H, W, C]; only its device, dtype, shape and `requires_grad` matter.
        op, mask, residual: arguments of the call, as far as they are known.
    Raises:
        BackendUnavailable: if a backend requested by name cannot run the call.
    """
    weight, bias, _, scale = residual or (None,) * 4
    given = x, weight, bias, *(() if op is None else op.tensors)
    tensors = [tensor for tensor in given if tensor is not None]
    dtypes, dtype, kind = frozenset(tensor.dtype for tensor in tensors), x.dtype, x.device.type
    # The meta device does not support autocast.
    if dtype is not torch.float64 and not x.is_meta and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    watcher = _find_watcher(tensors, mask, scale)
    return choose(Call(op, x.device, dtype, dtypes, x.shape, needs_grad, mask is not None, watcher))


def choose(call: Call) -> Choice:
    """Choose the backend of a call; raise BackendUnavailable if the one requested by name cannot run it."""
    name = requested_backend()
    if name != AUTO:
        reason = BACKENDS[name].why_not(call)
        if reason is not None:
            raise BackendUnavailable(
                f'backend {name!r} cannot run {call.name}: {reason}; '
                f'request {AUTO!r} or \'reference\' ({VARIABLE}, use_backend, or the key "backend" of an option file)'
            )
        return Choice(name, name, {})
    rejected = {}
    for name, backend in BACKENDS.items():
        if backend.device not in (None, call.device.type):
            continue
        reason = backend.why_not(call)
        if reason is None:
            break
        rejected[name] = reason
    return Choice(name, AUTO, rejected)


def _find_watcher(tensors: list[Tensor], *constants: Tensor | None) -> str | None:
    """Return why fused kernels cannot be used because single operators are observed or constants need gradients."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in constants):
        return "a mask or a residual branch's scale requires gradients"
    if torch.jit.is_tracing():
        return 'torch.jit is tracing the call'
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return 'the call is inside a torch.func transform'
    if torch.autograd.forward_ad._current_level >= 0:
        return 'forward-mode automatic differentiation is active'
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f'it expects plain tensors, not {type(tensor).__name__}'
    return None
