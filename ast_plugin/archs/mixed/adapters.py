"""Blocks in the places of modules: what a module is called with, where tokens have their size from, kept weights.

Layouts are turned, and tokens get their (H, W) from whichever caller is given it.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ast_plugin.archs.blocks import MLP, WindowAttention, token_sizes
from ast_plugin.archs.networks import Trial, window_of
from ast_plugin.errors import OptionError, ShapeError
from ast_plugin.ops import relative_position_index

Shape = tuple[int, ...]
Key = int | str  # position or name of an argument

# What x is, told by the dimensions that change with the image, and the axis of its channels.
_KINDS = {
    (4, (2, 3)): ('nchw', 1),
    (4, (1, 2)): ('nhwc', 3),
    (3, (1,)): ('tokens', 2),
    (3, (0,)): ('windows', 2),
}
# Names in the state of a window attention that can be read; the gate of one of ours is what `dense_share` says.
_READ = {
    *('qkv', 'q', 'kv', 'to_q', 'to_kv', 'proj', 'weight', 'bias'),
    *('relative_position_bias_table', 'position_bias', 'gate'),
}


class Call(NamedTuple):
    """One call of a module: what it was given, tensors without their values, and the shape of a tensor it returned."""

    args: tuple
    kwargs: dict[str, Any]
    output: Shape | None

    def tensors(self) -> list[tuple[Key, Tensor]]:
        """Those that it was given, by position or name."""
        arguments = (*enumerate(self.args), *self.kwargs.items())
        return [(key, value) for key, value in arguments if isinstance(value, Tensor)]

    def first_tensor(self) -> tuple[Key, Shape]:
        """Key and shape of the first of them; no dimensions if there was none."""
        return next(((key, tuple(value.shape)) for key, value in self.tensors()), (0, ()))


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

    with ExitStack() as hooks:
        for name, module in network.named_modules():
            hooks.enter_context(module.register_forward_hook(recorder(name), with_kwargs=True))
        yield calls


def _without_values(value: Any) -> Any:
    return value.detach().to('meta') if isinstance(value, Tensor) else value


class SizePlace(NamedTuple):
    """Where the (H, W) of tokens are found in the call of a module."""

    caller: str  # name of the module, an ancestor of the one that needs them, or that itself
    keys: tuple[Key, ...]  # of one argument that is a pair or a map, or of two that are numbers
    axes: tuple[int, int] | None = None  # of a map, where H and W are; None of numbers

    @property
    def name(self) -> str:
        """One for each place, without the dots that torch.compile stumbles over in names of attributes."""
        return f'{self.caller}/{self.keys}/{self.axes}'.replace('.', '/')

    def read(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """H and W, out of the arguments of a call."""
        values = [args[key] if isinstance(key, int) else kwargs[key] for key in self.keys]
        if self.axes is not None:
            values = [values[0].shape[axis] for axis in self.axes]
        height, width = values if len(values) == 2 else values[0]
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
    """A module, and what it works on: x, the first tensor that it is given."""

    name: str
    kind: str  # 'nchw', 'nhwc', 'tokens' or 'windows'; what x is, see `block_registry`
    x_key: Key
    shape: Shape  # of x in the first run
    output: Shape | None  # of what the module returned then
    size: SizePlace | None = None  # where tokens have their (H, W) from
    nominal: tuple[int, int] = (0, 0)  # of the map in the first run, or of the window
    others: tuple[Shape, ...] = ()  # of further tensors of floating point that it is given

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
    others = tuple(tuple(value.shape) for _, value in call.tensors()[1:] if value.is_floating_point())
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
    for key, value in call.tensors():
        if value.ndim == 4:
            yield SizePlace(caller, (key,), (2, 3))
            yield SizePlace(caller, (key,), (1, 2))


class MixedIn(nn.Module):
    """A block in the place of a module, called as that was.

        replace   block(x)
        append    block(original(x))
        prepend   original(block(x))
        wrap      y + gain · block(norm(y)), y being original(x): a branch as transformers have them

    Args:
        block: see `block_registry` for what it is called with.
        works_in: how.
        site: what the module worked on.
        op: 'replace', 'append', 'prepend' or 'wrap'.
        original: the module that stood there; None for `replace`.
        gain: what each channel of the branch begins with, for `wrap`: 0 leaves the network as it was.
    Raises:
        ShapeError: in the forward pass, if the caller gives the tokens' size no longer, or another one.
    """

    def __init__(
        self, block: nn.Module, works_in: str, site: Site, op: str, original: nn.Module | None, gain: float = 0.0
    ) -> None:
        super().__init__()
        self.block, self.original = block, original
        self.works_in, self.site, self.op = works_in, site, op
        self.size_key = site.size.name if site.size is not None else ''
        self.norm = self.gain = None
        if op == 'wrap':
            dim = site.channels(site.output)
            self.norm = nn.LayerNorm(dim)
            self.gain = nn.Parameter(torch.full((dim,), float(gain)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        key = self.site.x_key
        x = args[key] if isinstance(key, int) else kwargs[key]
        if self.op in ('append', 'wrap'):
            return self._run(self.original(*args, **kwargs), args, kwargs)
        y = self._run(x, args, kwargs)
        if self.op == 'replace':
            return y
        if isinstance(key, int):
            return self.original(*args[:key], y, *args[key + 1 :], **kwargs)
        return self.original(*args, **{**kwargs, key: y})

    def _run(self, y: Tensor, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """The block on y, which has the site's layout."""
        is_nchw = self.site.kind == 'nchw'
        last = y.permute(0, 2, 3, 1) if is_nchw else y
        if self.gain is None:
            last = self._run_channels_last(last, args, kwargs)
        else:
            last = last + self.gain * self._run_channels_last(self.norm(last), args, kwargs)
        return last.permute(0, 3, 1, 2) if is_nchw else last

    def _run_channels_last(self, x: Tensor, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """The block on windows, tokens or a map."""
        if self.works_in == 'any':
            return self.block(x)
        if self.site.kind == 'windows':
            mask = self._window_mask(x, args, kwargs)
            return self.block(x, mask) if self.works_in == 'windows' else self.block.attend_windows(x, mask)
        if self.site.kind == 'tokens':
            size = self._size(x)
            if self.works_in == 'tokens':
                return self.block(x, size)
            return self._run_map(x.unflatten(1, size)).flatten(1, 2)
        if self.works_in == 'tokens':
            size = (x.shape[1], x.shape[2])
            return self.block(x.flatten(1, 2), size).unflatten(1, size)
        return self._run_map(x)

    def _run_map(self, x: Tensor) -> Tensor:
        if self.works_in == 'nchw':
            return self.block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.block(x)

    def _size(self, x: Tensor) -> tuple[int, int]:
        size = getattr(token_sizes, self.size_key, None)
        caller = self.site.size.caller or 'the base'
        tokens = f'the tokens {list(x.shape)} of {self.site.name}'
        if size is None:
            raise ShapeError(f'{tokens} have no size outside of {caller}, which is told height and width')
        if size[0] * size[1] != x.shape[1]:
            raise ShapeError(f'{tokens} are not the {size[0]}x{size[1]} that {caller} is told')
        return size

    def _window_mask(self, x: Tensor, args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
        """Of what the caller gives besides x, the tensor [num_windows, T, T]."""
        tokens = x.shape[1]
        for key, value in (*enumerate(args), *kwargs.items()):
            # x looks the same where a window has as many tokens as there are channels
            is_other = isinstance(value, Tensor) and key != self.site.x_key
            if is_other and value.is_floating_point() and value.shape[1:] == (tokens, tokens):
                return value
        return None

    def extra_repr(self) -> str:
        return f'{self.op}, {self.site.kind}'


def put_in(network: nn.Module, adapters: Sequence[tuple[nn.Module, MixedIn]]) -> None:
    """Put adapters where the modules before them stand, and let their blocks know the sizes of tokens."""
    modules = dict(network.named_modules())
    # From the inside out: a module that is kept goes into its adapter with what lies in it exchanged already.
    for module, adapter in sorted(adapters, key=lambda item: -item[1].site.name.count('.')):
        for parent in list(network.modules()):
            for key, child in list(parent._modules.items()):  # a module may have two names
                if child is module and parent is not adapter:
                    setattr(parent, key, adapter)
    # A caller that is exchanged itself tells its adapter's block, too: the hooks go around both.
    modules |= {adapter.site.name: adapter for _, adapter in adapters}
    for size in dict.fromkeys(adapter.site.size for _, adapter in adapters if adapter.site.size is not None):
        size.tell_sizes(modules[size.caller])


def keep_weights(block: nn.Module, source: nn.Module, dense_share: float | None = None) -> None:
    """Put what `source` has learned into `block`.

    Window attentions keep queries, keys, values, projection and position bias; ASSA's gate is set so that softmax has
    the share `dense_share` and the squared ReLU the rest. An MLP keeps both layers. Another block can do so with a
    method `keep_weights(source)`.

    Args:
        block: ours.
        source: of the network that the block is mixed into: q, k and v in one linear layer `qkv`, or in `q` and `kv`
            or `to_q` and `to_kv`.
        dense_share: in (0, 1), for ASSA alone.
    Raises:
        OptionError: if the block can keep nothing of such a module, or not all of it.
        ShapeError: if their sizes differ.
    """
    if not isinstance(block, (WindowAttention, MLP)) and hasattr(block, 'keep_weights'):
        block.keep_weights(source)
        return
    refusal = f'{type(block).__name__} can keep nothing of {type(source).__name__}'
    if isinstance(block, WindowAttention):
        weights = _read_attention(source)
        if weights is None:
            raise OptionError(f'{refusal}: it is no window attention with qkv, proj and a table of position bias')
        left = [name for name, _ in source.named_parameters() if not _READ.issuperset(name.split('.'))]
    elif isinstance(block, MLP):
        layers = [module for module in source.modules() if isinstance(module, nn.Linear)]
        has_gelu = any(isinstance(module, nn.GELU) and module.approximate == 'none' for module in source.modules())
        if len(layers) != 2 or not has_gelu:
            raise OptionError(f'{refusal}: it is not two linear layers with a GELU between')
        weights = _layers(expand=layers[0], project=layers[1])
        kept = {id(parameter) for layer in layers for parameter in layer.parameters()}
        left = [name for name, parameter in source.named_parameters() if id(parameter) not in kept]
    else:
        raise OptionError(f'{refusal}: leave keep_weights out')
    if left:
        raise OptionError(f'{refusal}: it has learned more than the block has a place for, {", ".join(left[:4])}')
    _fill(block, weights)
    if dense_share is not None:
        if getattr(block, 'gate', None) is None:
            raise OptionError(f'dense_share is for ASSA: {type(block).__name__} has no gate')
        half = 0.5 * math.log(dense_share / (1 - dense_share))  # softmax of (half, -half) is (dense_share, the rest)
        block.gate.data.copy_(torch.tensor([half, -half]))


def _fill(block: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights by their names in the block; biases that are not among them become zero."""
    own = dict(block.named_parameters())
    for name, weight in weights.items():
        if name not in own or own[name].shape != weight.shape:
            place = list(own[name].shape) if name in own else 'nothing'
            raise ShapeError(f'{name} is {list(weight.shape)}, the block has {place} for it: leave sizes out')
    with torch.no_grad():
        for name, parameter in own.items():
            if name in weights:
                parameter.copy_(weights[name])
            elif name.endswith('.bias'):
                parameter.zero_()


def _layers(**layers: nn.Linear) -> dict[str, Tensor]:
    """Weights of layers, by the names that the layers have in a block."""
    weights = {f'{name}.weight': layer.weight for name, layer in layers.items()}
    return weights | {f'{name}.bias': layer.bias for name, layer in layers.items() if layer.bias is not None}


def _read_attention(source: nn.Module) -> dict[str, Tensor] | None:
    """What `source` has learned by the names of `WindowAttention`, if it is a window attention that we can read.

    Queries are brought to our scale, 1 / sqrt(channels of a head), where the source has another.
    """
    table = getattr(source, 'relative_position_bias_table', getattr(source, 'position_bias', None))
    proj = getattr(source, 'proj', None)
    weights = _read_queries(source)
    if weights is None or not isinstance(proj, nn.Linear) or not isinstance(table, Tensor) or table.ndim != 2:
        return None
    scale = getattr(source, 'scale', None)
    if isinstance(scale, (int, float)):
        factor = scale * (len(weights['q.weight']) // table.shape[1]) ** 0.5
        if not math.isclose(factor, 1):
            weights |= {name: factor * tensor for name, tensor in weights.items() if name.startswith('q.')}
    return {**weights, **_layers(proj=proj), 'position_bias': _in_our_order(table, source)}


def _read_queries(source: nn.Module) -> dict[str, Tensor] | None:
    qkv = getattr(source, 'qkv', None)
    if isinstance(qkv, nn.Linear) and qkv.out_features == 3 * qkv.in_features:
        dim = qkv.in_features
        rows = _layers(qkv=qkv).items()
        return {
            **{name.replace('qkv', 'q'): tensor[:dim] for name, tensor in rows},
            **{name.replace('qkv', 'kv'): tensor[dim:] for name, tensor in rows},
        }
    for holder, prefix in ((source, ''), (qkv, 'to_'), (source, 'to_')):
        q, kv = (getattr(holder, f'{prefix}{name}', None) for name in ('q', 'kv'))
        if isinstance(q, nn.Linear) and isinstance(kv, nn.Linear):
            return _layers(q=q, kv=kv)
    return None


def _in_our_order(table: Tensor, source: nn.Module) -> Tensor:
    """The table of position bias, its rows in the order of `ops.relative_position_index`, should they differ."""
    theirs, side = getattr(source, 'relative_position_index', None), window_of(source)
    if not isinstance(theirs, Tensor) or side is None or theirs.numel() != side**4 or len(table) != (2 * side - 1) ** 2:
        return table
    ours, theirs = relative_position_index(side).flatten().to(table.device), theirs.flatten().long().to(table.device)
    ordered = torch.empty_like(table)
    ordered[ours] = table.detach()[theirs]
    if not torch.equal(ordered[ours], table.detach()[theirs]):
        raise OptionError(f'the position bias of {type(source).__name__} depends on more than relative position')
    return ordered
