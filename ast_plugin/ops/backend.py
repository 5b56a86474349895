"""Which path computes: the plain reference, or one that is faster where it can run."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ast_plugin.errors import BackendUnavailable, OptionError
from ast_plugin.ops import fused_cpu_kernels, triton_launch

AUTO = 'auto'
VARIABLE = 'AST_BACKEND'
_logger = logging.getLogger(__name__)
_asked_here: ContextVar[str | None] = ContextVar('ast_plugin_backend', default=None)
_said: set[str] = set()


@dataclass(frozen=True)
class Call:
    """What a function is called with, as far as backends care.

    Attributes:
        function: its name in `ast_plugin.ops`.
        device: of the map.
        dtype: what is computed in; autocast's where that is on.
        dtypes: of all tensors that are given.
        shape: [B, H, W, C] of the map.
        needs_grad: whether a backward pass may follow.
        special: what only plain operators can be put through, such as a trace; or None.
        details: further settings of the function that count, by name: of attention its kind, window and num_heads.
    """

    function: str
    device: torch.device
    dtype: torch.dtype
    dtypes: frozenset[torch.dtype]
    shape: tuple[int, ...]
    needs_grad: bool
    special: str | None = None
    details: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """Which backend computes a call, and why.

    Attributes:
        backend: its name.
        asked: 'auto' or the name that was asked for.
        rejected: faster backends and why each cannot run this call.
    """

    backend: str
    asked: str
    rejected: dict[str, str]

    def __str__(self) -> str:
        reasons = ''.join(f'; not {name}: {reason}' for name, reason in self.rejected.items())
        return f'{self.backend} ({"asked for by name" if self.asked != AUTO else "the fastest that can"}{reasons})'


# Fastest first; each says why it cannot run a call, or None. What it computes with is in `functions.IMPLEMENTATIONS`.
BACKENDS: dict[str, Callable[[Call], str | None]] = {
    'fused': fused_cpu_kernels.why_not,
    'triton': triton_launch.why_not,
    'reference': lambda call: None,
}


# `auto` does not ask them about maps elsewhere: that nothing faster is there for a device needs no words.
_DEVICES = {'fused': 'cpu', 'triton': 'cuda'}


def check_name(name: str, where: str = 'backend') -> str:
    """Return the name of a backend, or 'auto'.

    Raises:
        OptionError: if it is unknown; `where` says who asked.
    """
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
    token = _asked_here.set(_asked_here.get() if name is None else check_name(name))
    try:
        yield
    finally:
        _asked_here.reset(token)


def asked() -> str:
    """What is asked for here: by `use_backend`, else by the environment, else 'auto'."""
    here = _asked_here.get()
    if here is not None:
        return here
    return check_name(os.environ.get(VARIABLE) or AUTO, f'the environment variable {VARIABLE}')


# What torch.compiler.assume_constant_result sets, without loading the compiler, which takes seconds: a compiled caller
# keeps the backend that it was compiled with.
asked._dynamo_marked_constant = True


def describe(
    function: str,
    x: Tensor,
    others: Iterable[Tensor | None] = (),
    constants: Iterable[Tensor] = (),
    details: Mapping[str, object] | None = None,
) -> Call:
    """What there is to know of a call on a map x with other tensors; `constants` are not to have a gradient."""
    tensors = [x, *(tensor for tensor in others if tensor is not None)]
    dtype, kind = x.dtype, x.device.type
    # `meta` has shapes and no autocast.
    if dtype is not torch.float64 and kind != 'meta' and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return Call(
        function,
        x.device,
        dtype,
        frozenset(tensor.dtype for tensor in tensors),
        tuple(x.shape),
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
        _special(tensors, constants),
        details or {},
    )


def choose(call: Call) -> Choice:
    """Choose the backend of a call.

    Raises:
        BackendUnavailable: if the one asked for by name cannot run it; says what is missing.
    """
    name = asked()
    if name != AUTO:
        reason = BACKENDS[name](call)
        if reason is not None:
            raise BackendUnavailable(
                f"backend {name!r} cannot run {call.function}: {reason}; ask for {AUTO!r} or 'reference' "
                f'({VARIABLE}, use_backend, or the key "backend" of an option file)'
            )
        return Choice(name, name, {})
    rejected = {}
    for backend, why_not in BACKENDS.items():
        if _DEVICES.get(backend, call.device.type) != call.device.type:
            continue
        reason = why_not(call)
        if reason is None:
            return Choice(backend, name, rejected)
        rejected[backend] = reason
    raise BackendUnavailable(f'no backend can run {call.function}: {rejected}')


def explain(x: Tensor, *others: Tensor | None, function: str = 'frfn', **details: object) -> Choice:
    """Which backend would compute a map here and now, and why: `print(explain(x))`.

    Args:
        x: the map, [B, H, W, C]; its device, dtype, shape and whether it needs gradients count, no value does.
        others: further tensors of the call, such as parameters.
        function: name of the function in `ast_plugin.ops`.
        details: settings of the function, see `Call`.
    Raises:
        BackendUnavailable: if a backend is asked for by name that cannot run it.
    """
    return choose(describe(function, x, others, details=details))


def say_once(choice: Choice) -> None:
    """Log why a faster backend was passed over, each reason once in a process."""
    for name, reason in choice.rejected.items():
        if reason not in _said:
            _said.add(reason)
            _logger.warning('computing by the backend %r and not by %r: %s', choice.backend, name, reason)


def _special(tensors: list[Tensor], constants: Iterable[Tensor]) -> str | None:
    """Callers that follow single operators and their formulas, and would miss those of a fused path."""
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
