"""Which backend computes: the plain reference, or one that is faster where it can run."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
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
_logged: set[str] = set()


class Backend(NamedTuple):
    """A way to compute, and why it cannot run a call, or None.

    `auto` asks it about maps on its device alone: that nothing faster is there for another needs no words. Where it
    takes a residual, its functions compute the whole branch in one.
    """

    device: str | None  # None for any
    why_not: Callable[[Call], str | None]
    window_attention: Callable[..., Tensor]
    feed_forward: Callable[..., Tensor]
    takes_residual: bool = False


# Fastest first.
BACKENDS = {
    'fused': Backend('cpu', cpu.why_not, cpu.window_attention, cpu.feed_forward, takes_residual=True),
    'triton': Backend('cuda', triton.why_not, triton.window_attention, triton.feed_forward, takes_residual=True),
    'reference': Backend(None, lambda call: None, attention.window_attention, ffn.feed_forward),
}


@dataclass(frozen=True)
class Choice:
    """Which backend computes a call, and why."""

    backend: str
    requested: str  # 'auto' or a name
    rejected: dict[str, str]  # faster backends and why each cannot run this call

    def __str__(self) -> str:
        reasons = ''.join(f'; not {name}: {reason}' for name, reason in self.rejected.items())
        return f'{self.backend} ({"asked for by name" if self.requested != AUTO else "the fastest that can"}{reasons})'


def window_attention(x: Tensor, op: Attention, mask: Tensor | None = None, residual: Residual | None = None) -> Tensor:
    """Multi-head self-attention within (shifted) windows of a map; see `attention.window_attention`, the reference.

    Args:
        x: [B, H, W, C], H and W multiples of the window.
        op: parameters and settings.
        mask: [num_windows or B * num_windows, window**2, window**2], added to the scores of all heads.
        residual: a norm before and the sum with x after it.
    Raises:
        ShapeError: if sizes do not divide, or tensors do not go together.
        BackendUnavailable: if a backend is asked for by name that cannot run the call.
    """
    op.check(x, mask)
    return _compute('window_attention', residual, x, op, mask)


def feed_forward(x: Tensor, op: FeedForward, residual: Residual | None = None) -> Tensor:
    """A feed-forward network, FRFN, LeFF or MLP, of a map [B, H, W, C]; see `ffn.feed_forward`, the reference.

    Arguments and errors are those of `window_attention`.
    """
    op.check(x)
    return _compute('feed_forward', residual, x, op)


def _compute(
    name: str, residual: Residual | None, x: Tensor, op: Attention | FeedForward, *mask: Tensor | None
) -> Tensor:
    if torch.compiler.is_compiling() and requested_backend() in (AUTO, 'reference'):
        # The compiler is to see plain operators, which it fuses itself.
        backend = BACKENDS['reference']
    elif torch.compiler.is_dynamo_compiling():
        # What is asked for by name is left out of the graph, and chosen when it runs.
        return torch.compiler.disable(_compute)(name, residual, x, op, *mask)
    else:
        choice = explain(x, op, *mask, residual=residual)
        backend = BACKENDS[choice.backend]
        for rejected, reason in choice.rejected.items():
            if reason not in _logged:  # once in a process
                _logged.add(reason)
                _logger.warning('computing by the backend %r and not by %r: %s', choice.backend, rejected, reason)
    function = getattr(backend, name)
    if backend.takes_residual:
        return function(x, op, *mask, residual=residual)
    return with_residual(lambda x: function(x, op, *mask), x, residual)


def _check_name(name: str, where: str = 'backend') -> str:
    """Return the name of a backend, or 'auto'; raise OptionError, which tells `where` it stands, for others."""
    if name not in (AUTO, *BACKENDS):
        raise OptionError(f'{where} is {name!r}: expected one of {", ".join((AUTO, *BACKENDS))}')
    return name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Compute by a backend within a `with`: in this thread and the tasks it starts there, and nowhere else.

    It comes before the environment's AST_BACKEND. A backend by name runs or raises BackendUnavailable; 'auto' takes the
    fastest that can; None leaves it as it is.

    Raises:
        OptionError: if there is no backend of that name.
    """
    token = _backend_here.set(_backend_here.get() if name is None else _check_name(name))
    try:
        yield
    finally:
        _backend_here.reset(token)


def requested_backend() -> str:
    """What is asked for here: by `use_backend`, else by the environment, else 'auto'."""
    here = _backend_here.get()
    if here is not None:
        return here
    return _check_name(os.environ.get(VARIABLE) or AUTO, f'the environment variable {VARIABLE}')


# What torch.compiler.assume_constant_result sets, without loading the compiler, which takes seconds: a compiled caller
# keeps the backend that it was compiled with.
requested_backend._dynamo_marked_constant = True


def explain(
    x: Tensor, op: Attention | FeedForward | None = None, mask: Tensor | None = None, residual: Residual | None = None
) -> Choice:
    """Which backend would compute a map here and now, and why: `print(explain(x))`.

    Args:
        x: the map, [B, H, W, C]; its device, dtype, shape and whether it needs gradients count, no value does.
        op, mask, residual: of the call, as far as they are known.
    Raises:
        BackendUnavailable: if a backend is asked for by name that cannot run it.
    """
    scale = None if residual is None else residual.scale
    given = (x, *(() if op is None else op.tensors), *(() if residual is None else residual[:2]))
    tensors = [tensor for tensor in given if tensor is not None]
    constants = [tensor for tensor in (mask, scale) if tensor is not None]
    dtype, device = x.dtype, x.device
    # `meta` has shapes and no autocast.
    if dtype is not torch.float64 and not x.is_meta and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    dtypes, shape = frozenset(tensor.dtype for tensor in tensors), tuple(x.shape)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    watcher = _find_watcher(tensors, constants)
    return choose(Call(op, device, dtype, dtypes, shape, needs_grad, mask is not None, watcher))


def choose(call: Call) -> Choice:
    """Choose the backend of a call; raise BackendUnavailable if the one asked for by name cannot run it."""
    name = requested_backend()
    if name != AUTO:
        reason = BACKENDS[name].why_not(call)
        if reason is not None:
            raise BackendUnavailable(
                f'backend {name!r} cannot run {call.name}: {reason}; '
                f'ask for {AUTO!r} or \'reference\' ({VARIABLE}, use_backend, or the key "backend" of an option file)'
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


def _find_watcher(tensors: list[Tensor], constants: list[Tensor]) -> str | None:
    """Callers that follow single operators; fused paths give no gradient of constants."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in constants):
        return "a gradient is asked of a mask or of a residual branch's scale"
    if torch.jit.is_tracing():
        return 'torch.jit traces the call'
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return 'a transform of torch.func follows the call'
    if torch.autograd.forward_ad._current_level >= 0:
        return 'forward-mode differentiation follows the call'
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f'it is given a {type(tensor).__name__}, no plain tensor'
    return None
