"""How the modules of a network are called: watched while it runs on two sizes, nothing being computed.

The network runs as a copy on torch's device `meta`, where tensors have shapes and no values; one that cannot do that
runs on its own device.
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.errors import OptionError, ShapeError, first_line
from ast_plugin.ops import use_backend

Shape = tuple[int, ...]
# Networks want sides that are multiples of one of these, or of a window.
_MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 128)
_USUAL_MULTIPLE = 8


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        args, kwargs: what it was given, tensors as their `Shape` in a `Given`.
        output: the shape of what it returned, None if that was no tensor.
    """

    args: tuple
    kwargs: dict[str, Any]
    output: Shape | None


@dataclass(frozen=True)
class Given:
    """A tensor that a module was given."""

    shape: Shape
    is_floating: bool


@dataclass(frozen=True)
class Watched:
    """What two runs of a network have shown.

    Attributes:
        channels: of the pictures.
        multiple: what both sides of a picture must be multiples of.
        scale: how many times larger than the input the output is.
        sizes: (H, W) of the two pictures.
        calls: for each run, by the name of the module, its calls.
    """

    channels: int
    multiple: int
    scale: int
    sizes: tuple[tuple[int, int], tuple[int, int]]
    calls: tuple[Mapping[str, list[Call]], Mapping[str, list[Call]]]


def watch(network: nn.Module, in_channels: Sequence[int], nominal: int, multiple: int | None = None) -> Watched:
    """Run a network on two sizes and see how its modules are called.

    Args:
        network: maps [B, C, H, W] to [B, D, s·H, s·W]; it stays as it is.
        in_channels: values of C to try.
        nominal: side of pictures that it is meant for; the first picture is about that large.
        multiple: what both sides must be multiples of; None finds it out.
    Raises:
        OptionError: if it runs on no size, with what it raised.
    """
    windows = {side for module in network.modules() for side in [window_of(module)] if side}
    multiples = [multiple] if multiple else sorted({*_MULTIPLES, *windows})
    usual = [multiple] if multiple else sorted({1, _USUAL_MULTIPLE, *windows})
    failure = ''
    for place in ('meta', None):
        twin = _twin(network, place)
        for channels in dict.fromkeys(in_channels):
            # With values each try takes its time, and a network that has failed on `meta` for its size fails again.
            for candidate in multiples if place == 'meta' else usual:
                try:
                    return _watch(twin, channels, nominal, candidate, place)
                except Exception as error:  # whatever somebody's network raises when a size does not suit it
                    if channels == in_channels[0]:
                        failure = f'{type(error).__name__}: {first_line(error)}'
    raise OptionError(
        f'{type(network).__name__} does not run on pictures [1, {in_channels[0]}, H, W] with sides that are multiples '
        f'of {multiples[-1]}, as networks for Mixed must: {failure}'
    )


def _watch(twin: nn.Module, channels: int, nominal: int, multiple: int, place: str | None) -> Watched:
    # Neighbouring multiples, so that no larger number divides all sides; far apart, so that no padding makes them one.
    count = -(-nominal // multiple)
    sizes = tuple((multiple * a, multiple * b) for a, b in ((count, count + 1), (3 * count, 2 * count + 1)))
    runs, scales = [], []
    for size in sizes:
        output, calls = _run(twin, torch.zeros(1, channels, *size, device=_device(twin, place)))
        scales.append(_scale(size, output))
        runs.append(calls)
    if scales[0] != scales[1]:
        raise ShapeError(f'the output is {scales[0]} times as large as the input, then {scales[1]} times')
    return Watched(channels, multiple, scales[0], sizes, tuple(runs))


def check_runs(network: nn.Module, watched: Watched) -> None:
    """Run a network that was watched and then changed on the larger size.

    Raises:
        Exception: whatever it raises.
        ShapeError: if the output has another size than before.
    """
    size = watched.sizes[1]
    for place in ('meta', None):
        twin = _twin(network, place)
        try:
            output, _ = _run(twin, torch.zeros(1, watched.channels, *size, device=_device(twin, place)))
            break
        except Exception:  # on `meta` perhaps only because something cannot go without values
            if place is None:
                raise
    if _scale(size, output) != watched.scale:
        raise ShapeError(f'the output of a {size[0]}x{size[1]} picture is {list(output.shape)}')


def _device(twin: nn.Module, place: str | None) -> torch.device:
    return torch.device(place) if place else next((p.device for p in twin.parameters()), torch.device('cpu'))


def _twin(network: nn.Module, place: str | None) -> nn.Module:
    """A copy in evaluation mode; on `meta` without memory for its weights."""
    memo = {}
    if place is not None:
        for module in network.modules():
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                meta = torch.empty_like(tensor, device=place)
                memo[id(tensor)] = nn.Parameter(meta, False) if isinstance(tensor, nn.Parameter) else meta
    for module in network.modules():
        for tensor in vars(module).values():
            if isinstance(tensor, Tensor):  # computed, as weight_norm does: no deepcopy of what has a history
                memo[id(tensor)] = tensor.detach().to(place or tensor.device, copy=True)
    return copy.deepcopy(network, memo).eval()


def _run(twin: nn.Module, picture: Tensor) -> tuple[Tensor, dict[str, list[Call]]]:
    calls: dict[str, list[Call]] = {}
    handles = [
        module.register_forward_hook(_recorder(calls, name), with_kwargs=True) for name, module in twin.named_modules()
    ]
    try:
        # Shapes come out of plain operators alone.
        with torch.no_grad(), use_backend('reference'):
            output = twin(picture)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(output, Tensor) or output.ndim != 4:
        raise ShapeError(f'it returns {_described(output)}, expected pictures [B, C, H, W]')
    return output, calls


def _recorder(calls: dict[str, list[Call]], name: str) -> Callable:
    def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        shape = tuple(output.shape) if isinstance(output, Tensor) else None
        call = Call(tuple(map(_noted, args)), {key: _noted(value) for key, value in kwargs.items()}, shape)
        calls.setdefault(name, []).append(call)

    return record


def _noted(value: Any) -> Any:
    return Given(tuple(value.shape), value.is_floating_point()) if isinstance(value, Tensor) else value


def _scale(size: tuple[int, int], output: Tensor) -> int:
    scale = output.shape[-2] // size[0]
    if scale < 1 or tuple(output.shape[-2:]) != (scale * size[0], scale * size[1]):
        raise ShapeError(f'the output of a {size[0]}x{size[1]} picture is {list(output.shape)}')
    return scale


def _described(output: Any) -> str:
    return str(list(output.shape)) if isinstance(output, Tensor) else f'a {type(output).__name__}'


def window_of(module: nn.Module) -> int | None:
    """The side of a module's windows, where it says so and they are square."""
    return square_side(getattr(module, 'window_size', getattr(module, 'win_size', None))) or None


def square_side(said: Any) -> int | None:
    """n, said as n or as (n, n), from 0 up; otherwise None."""
    if isinstance(said, (tuple, list)) and len(said) == 2 and said[0] == said[1]:
        said = said[0]
    return said if type(said) is int and said >= 0 else None


@dataclass(frozen=True)
class SizePlace:
    """Where the (H, W) of tokens are found in the call of a module.

    Attributes:
        giver: name of the module, an ancestor of the one that needs them, or that itself.
        keys: of one argument that is a pair or a map, or of two that are numbers; positions and names.
        axes: of a map, where H and W are; None of numbers.
    """

    giver: str
    keys: tuple[int | str, ...]
    axes: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """One for each place, without the dots that torch.compile stumbles over in names of attributes."""
        return f'{self.giver}/{self.keys}/{self.axes}'.replace('.', '/')

    def read(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """H and W, out of the arguments of a call."""
        values = [args[key] if isinstance(key, int) else kwargs[key] for key in self.keys]
        if self.axes is not None:
            shape = values[0].shape
            return shape[self.axes[0]], shape[self.axes[1]]
        height, width = values[0] if len(values) == 1 else values
        return height, width


@dataclass(frozen=True)
class Site:
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
    x_key: int | str
    shape: Shape
    output: Shape | None
    size: SizePlace | None = None
    nominal: tuple[int, int] = (0, 0)
    others: tuple[Shape, ...] = field(default=())

    @property
    def place(self) -> str:
        """Of `block_registry.PLACES`."""
        return 'maps' if self.kind in ('nchw', 'nhwc') else self.kind


def find_site(
    name: str, module: nn.Module, watched: Watched, window: int | None = None, needs_window: bool = True
) -> Site:
    """What a module works on.

    Args:
        name, module: of the network that was watched.
        watched: what `watch` found.
        window: side of its windows, if it does not say so itself.
        needs_window: whether windows whose side nobody says are refused.
    Raises:
        ShapeError: if it is not called, or in different ways, or that cannot be told, with the shapes.
    """
    what = f'{name} ({type(module).__name__})'
    calls = [run.get(name, []) for run in watched.calls]
    if not calls[0] or not calls[1]:
        raise ShapeError(f'{what} is never called, only what it holds')
    (key, first), (_, second) = (_first_tensor(call[0]) for call in calls)
    if first is None or second is None:
        raise ShapeError(f'{what} is given no tensor')
    kind, axis = _kind(first, second)
    for others in zip(*calls, strict=False):
        (other_key, shape), (_, other) = map(_first_tensor, others)
        if other_key != key or shape is None or other is None or _kind(shape, other)[0] != kind:
            raise ShapeError(f'{what} is called in different ways, with {list(first)} and with {list(shape or ())}')
    if kind is None:
        raise ShapeError(
            f'{what} works on {list(first)}, then on {list(second)} for pictures {_by(watched.sizes[0])} and '
            f'{_by(watched.sizes[1])}: expected a map [B, C, H, W] or [B, H, W, C], tokens [B, H·W, C] or windows'
        )
    if len({_first_tensor(call)[1][axis] for call in calls[0]}) > 1:
        raise ShapeError(f'{what} is called with maps of different channels')
    tensors = [value for value in (*calls[0][0].args, *calls[0][0].kwargs.values()) if isinstance(value, Given)]
    others = tuple(value.shape for value in tensors[1:] if value.is_floating)
    size, nominal = None, (0, 0)
    if kind == 'tokens':
        size = _find_size(name, watched)
        if size is not None:
            nominal = _values(size, watched.calls[0][size.giver][0])
    elif kind == 'windows':
        side = window_of(module) or window
        if (side is None and needs_window) or (side is not None and side**2 != first[1]):
            raise ShapeError(
                f'{what} works on {list(first)}, which must be windows of {first[1]} tokens, and its window_size '
                f'is {side or "not known"}: give it under `with`'
            )
        nominal = (side, side) if side else (0, 0)
    else:
        nominal = first[2:] if kind == 'nchw' else first[1:3]
    return Site(name, kind, key, first, calls[0][0].output, size, nominal, others)


def _first_tensor(call: Call) -> tuple[int | str, Shape | None]:
    for key, value in (*enumerate(call.args), *call.kwargs.items()):
        if isinstance(value, Given):
            return key, value.shape
    return 0, None


def _kind(first: Shape, second: Shape) -> tuple[str | None, int]:
    """What x is, told by the dimensions that change with the picture, and the axis of its channels."""
    if len(first) != len(second):
        return None, 0
    changed = {axis for axis, (a, b) in enumerate(zip(first, second, strict=True)) if a != b}
    found = {
        (4, frozenset({2, 3})): ('nchw', 1),
        (4, frozenset({1, 2})): ('nhwc', 3),
        (3, frozenset({1})): ('tokens', 2),
        (3, frozenset({0})): ('windows', 2),
    }
    return found.get((len(first), frozenset(changed)), (None, 0))


def _find_size(name: str, watched: Watched) -> SizePlace | None:
    """The nearest caller that knows H and W of the tokens, in both runs."""
    count = [_first_tensor(run[name][0])[1][1] for run in watched.calls]
    steps = name.split('.')
    for depth in range(len(steps), -1, -1):
        giver = '.'.join(steps[:depth])
        calls = [run.get(giver) for run in watched.calls]
        if not all(calls):
            continue
        for place in _places(giver, calls[0][0]):
            try:
                if all(
                    _values(place, c[0])[0] * _values(place, c[0])[1] == n for c, n in zip(calls, count, strict=True)
                ):
                    return place
            except (TypeError, ValueError, IndexError, KeyError):
                continue
    return None


def _places(giver: str, call: Call) -> list[SizePlace]:
    """Where a call could say H and W: a pair, two numbers one after the other, or a map."""
    found = []
    for items in (list(enumerate(call.args)), list(call.kwargs.items())):
        found += [SizePlace(giver, (key,)) for key, value in items if _is_pair(value)]
        found += [
            SizePlace(giver, (a, b))
            for (a, first), (b, second) in itertools.pairwise(items)
            if type(first) is int and type(second) is int
        ]
    for key, value in (*enumerate(call.args), *call.kwargs.items()):
        if isinstance(value, Given) and len(value.shape) == 4:
            found += [SizePlace(giver, (key,), axes) for axes in ((2, 3), (1, 2))]
    return found


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(type(side) is int for side in value)


def _values(place: SizePlace, call: Call) -> tuple[int, int]:
    return place.read(call.args, call.kwargs)


def _by(size: tuple[int, int]) -> str:
    return f'{size[0]}x{size[1]}'
