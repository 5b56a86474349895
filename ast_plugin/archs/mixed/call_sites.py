"""How the modules of a network are called: what each works on, and where the height and width of tokens are known."""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from ast_plugin.archs.blocks import token_sizes
from ast_plugin.archs.networks import Trial, window_of
from ast_plugin.errors import ShapeError

Shape = tuple[int, ...]
Key = int | str  # position or name of an argument

# What x is, told by the dimensions that change with the image, and the axis of its channels.
_KINDS = {
    (4, (2, 3)): ('nchw', 1),
    (4, (1, 2)): ('nhwc', 3),
    (3, (1,)): ('tokens', 2),
    (3, (0,)): ('windows', 2),
}


class Call(NamedTuple):
    """One call of a module: what it was given, tensors without their values, and the shape of a tensor it returned."""

    args: tuple
    kwargs: dict[str, Any]
    output: Shape | None

    def arguments(self) -> list[tuple[Key, Any]]:
        """Every argument by its position or name."""
        return [*enumerate(self.args), *self.kwargs.items()]

    def first_tensor(self) -> tuple[Key, Shape]:
        """Key and shape of the first tensor that it was given; no dimensions if there was none."""
        found = ((key, tuple(value.shape)) for key, value in self.arguments() if isinstance(value, Tensor))
        return next(found, (0, ()))


@contextmanager
def record_calls(network: nn.Module) -> Iterator[dict[str, list[Call]]]:
    """Record how the modules of a network are called meanwhile, by their names; for `networks.try_sizes`."""
    calls: dict[str, list[Call]] = {}

    def recorder(name: str):
        def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            shape = tuple(output.shape) if isinstance(output, Tensor) else None
            call = Call(tuple(map(_without_values, args)), {k: _without_values(v) for k, v in kwargs.items()}, shape)
            calls.setdefault(name, []).append(call)

        return record

    handles = [
        module.register_forward_hook(recorder(name), with_kwargs=True) for name, module in network.named_modules()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _without_values(value: Any) -> Any:
    return value.detach().to('meta') if isinstance(value, Tensor) else value


class SizePlace(NamedTuple):
    """Where the (H, W) of tokens are found in the call of a module.

    Attributes:
        caller: name of the module, an ancestor of the one that needs them, or that itself.
        keys: of one argument that is a pair or a map, or of two that are numbers.
        axes: of a map, where H and W are; None of numbers.
    """

    caller: str
    keys: tuple[Key, ...]
    axes: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """One for each place, without the dots that torch.compile stumbles over in names of attributes."""
        return f'{self.caller}/{self.keys}/{self.axes}'.replace('.', '/')

    def read(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """H and W, out of the arguments of a call."""
        values = [args[key] if isinstance(key, int) else kwargs[key] for key in self.keys]
        if self.axes is not None:
            shape = values[0].shape
            return shape[self.axes[0]], shape[self.axes[1]]
        height, width = values[0] if len(values) == 1 else values
        return height, width

    def tell_sizes(self, caller: nn.Module) -> None:
        """Let the blocks below the caller know H and W in `token_sizes` while it runs."""
        caller.register_forward_pre_hook(self._set, with_kwargs=True)
        caller.register_forward_hook(self._unset, always_call=True)

    def _set(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        setattr(token_sizes, self.name, self.read(args, kwargs))

    def _unset(self, module: nn.Module, args: tuple, output: Any) -> None:
        setattr(token_sizes, self.name, None)


class Site(NamedTuple):
    """A module, and what it works on.

    Attributes:
        name: of the module.
        kind: 'nchw', 'nhwc', 'tokens' or 'windows'; what x is, see `block_registry`.
        x_key: position or name of x among the arguments.
        shape: of x in the first run.
        output: of what the module returned.
        size: where tokens have their (H, W) from.
        nominal: (H, W) of the map in the first run, or of the window.
        others: shapes of further tensors with numbers that it is given.
    """

    name: str
    kind: str
    x_key: Key
    shape: Shape
    output: Shape | None
    size: SizePlace | None = None
    nominal: tuple[int, int] = (0, 0)
    others: tuple[Shape, ...] = ()

    @property
    def place(self) -> str:
        """Of `block_registry.PLACES`."""
        return 'maps' if self.kind in ('nchw', 'nhwc') else self.kind

    def channels(self, shape: Shape) -> int:
        """Of x or of the output, given its shape."""
        return shape[1 if self.kind == 'nchw' else -1]


def find_site(name: str, module: nn.Module, trial: Trial, window: int | None = None, needs_window: bool = True) -> Site:
    """Tell what a module works on.

    Args:
        name, module: of the network that was tried.
        trial: with what `record_calls` recorded.
        window: side of its windows, if it does not say so itself.
        needs_window: whether windows whose side nobody says are refused.
    Raises:
        ShapeError: if it is not called, or in different ways, or that cannot be told, with the shapes.
    """
    runs = [run.get(name, []) for run in trial.records]
    if not all(runs):
        raise ShapeError('it is never called, only what it holds')
    pairs = [(one.first_tensor(), two.first_tensor()) for one, two in zip(*runs, strict=False)]
    (key, first), (_, second) = pairs[0]
    if not first or not second:
        raise ShapeError('it is given no tensor')
    kind, axis = _kind(first, second)
    for (other_key, one), (_, two) in pairs:
        if other_key != key or not one or not two or _kind(one, two)[0] != kind:
            raise ShapeError(f'it is called in different ways, with {list(first)} and with {list(one)}')
    if kind is None:
        sizes = ' and '.join(f'{height}x{width}' for height, width in trial.sizes)
        raise ShapeError(
            f'it works on {list(first)}, then on {list(second)} for images {sizes}: expected a map [B, C, H, W] or '
            '[B, H, W, C], tokens [B, H·W, C] or windows'
        )
    if len({call.first_tensor()[1][axis] for call in runs[0]}) > 1:
        raise ShapeError('it is called with maps of different channels')
    call = runs[0][0]
    tensors = [value for _, value in call.arguments() if isinstance(value, Tensor)]
    others = tuple(tuple(value.shape) for value in tensors[1:] if value.is_floating_point())
    size, nominal = None, (0, 0)
    if kind == 'tokens':
        size, nominal = _find_size(name, trial)
    elif kind == 'windows':
        side = window_of(module) or window
        if (side is None and needs_window) or (side is not None and side**2 != first[1]):
            raise ShapeError(
                f'it works on {list(first)}, which must be windows of {first[1]} tokens, and its window_size '
                f'is {side or "not known"}: give it under `with`'
            )
        nominal = (side, side) if side else (0, 0)
    else:
        nominal = first[2:] if kind == 'nchw' else first[1:3]
    return Site(name, kind, key, first, call.output, size, nominal, others)


def _kind(first: Shape, second: Shape) -> tuple[str | None, int]:
    if len(first) != len(second):
        return None, 0
    changed = tuple(axis for axis, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)
    return _KINDS.get((len(first), changed), (None, 0))


def _find_size(name: str, trial: Trial) -> tuple[SizePlace | None, tuple[int, int]]:
    """The nearest caller that knows H and W of the tokens in both runs, and what they are in the first."""
    counts = [run[name][0].first_tensor()[1][1] for run in trial.records]
    steps = name.split('.')
    for depth in range(len(steps), -1, -1):
        caller = '.'.join(steps[:depth])
        calls = [run[caller][0] for run in trial.records if caller in run]
        if len(calls) < 2:
            continue
        for place in _size_places(caller, calls[0]):
            try:
                sizes = [place.read(call.args, call.kwargs) for call in calls]
                if [height * width for height, width in sizes] == counts:
                    return place, sizes[0]
            except (TypeError, ValueError, IndexError, KeyError, AttributeError):  # the second call has other arguments
                continue
    return None, (0, 0)


def _size_places(caller: str, call: Call) -> Iterator[SizePlace]:
    """Where a call could say H and W: a pair, two numbers one after the other, or a map."""
    for items in (list(enumerate(call.args)), list(call.kwargs.items())):
        for key, value in items:
            if isinstance(value, (tuple, list)) and len(value) == 2 and all(type(side) is int for side in value):
                yield SizePlace(caller, (key,))
        for (a, first), (b, second) in itertools.pairwise(items):
            if type(first) is int and type(second) is int:
                yield SizePlace(caller, (a, b))
    for key, value in call.arguments():
        if isinstance(value, Tensor) and value.ndim == 4:
            yield SizePlace(caller, (key,), (2, 3))
            yield SizePlace(caller, (key,), (1, 2))
