"""Adapters that call blocks in place of modules: recorded calls, layout conversion, token sizes, weight transfer.

Blocks that work on tokens get (H, W) from the arguments of the module that receives it.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ast_plugin.archs.blocks import MLP, WindowAttention, token_sizes
from ast_plugin.archs.networks import Trial, window_of
from ast_plugin.errors import OptionError, ShapeError
from ast_plugin.ops import relative_position_index

Shape = tuple[int, ...]
Arguments = dict[int | str, Any]  # of a call, by position or name

# (number of dimensions, axes that change with the image size) -> layout
_KINDS = {(4, (2, 3)): 'nchw', (4, (1, 2)): 'nhwc', (3, (1,)): 'tokens', (3, (0,)): 'windows'}
# Name components of window attention weights that can be transferred; the gate is set from `dense_share`.
_READ = {
    *('qkv', 'q', 'kv', 'to_q', 'to_kv', 'proj', 'weight', 'bias'),
    *('relative_position_bias_table', 'position_bias', 'gate'),
}


class Call(NamedTuple):
    """Recorded call of a module: arguments, with tensors on the meta device, and the shape of a tensor output."""

    arguments: Arguments
    output: Shape | None

    def first_tensor(self) -> tuple[int | str, Shape]:
        """Return key and shape of the first tensor argument, or an empty shape if there is none."""
        tensors = ((key, tuple(value.shape)) for key, value in self.arguments.items() if isinstance(value, Tensor))
        return next(tensors, (0, ()))


@contextmanager
def record_calls(network: nn.Module) -> Iterator[dict[str, list[Call]]]:
    """Context manager that records the calls of a network's modules by name, for `networks.try_sizes`."""
    calls: dict[str, list[Call]] = {}

    def record(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        arguments = {
            key: value.detach().to('meta') if isinstance(value, Tensor) else value
            for key, value in _arguments(args, kwargs).items()
        }
        calls.setdefault(name, []).append(Call(arguments, tuple(output.shape) if isinstance(output, Tensor) else None))

    with ExitStack() as hooks:
        for name, module in network.named_modules():
            hooks.enter_context(module.register_forward_hook(functools.partial(record, name), with_kwargs=True))
        yield calls


def _arguments(args: tuple, kwargs: Mapping[str, Any]) -> Arguments:
    return {**dict(enumerate(args)), **kwargs}


class SizePlace(NamedTuple):
    """Location of the tokens' (H, W) in the arguments of a module."""

    caller: str  # name of the module, which is the one that needs the size or an ancestor of it
    keys: tuple[int | str, ...]  # of one argument that is a pair or a feature map, or of two integers
    axes: tuple[int, int] | None = None  # H and W axes of a feature map; None for numbers

    @property
    def name(self) -> str:
        """Unique name, without dots, which torch.compile does not support in attribute names."""
        return f'{self.caller}/{self.keys}/{self.axes}'.replace('.', '/')

    def read(self, arguments: Arguments) -> tuple[int, int]:
        """Read H and W from the arguments of a call."""
        values = [arguments[key] for key in self.keys]
        if self.axes is not None:
            values = [values[0].shape[axis] for axis in self.axes]
        height, width = values if len(values) == 2 else values[0]
        return height, width

    def tell_sizes(self, caller: nn.Module) -> None:
        """Register hooks that set H and W in `token_sizes` while the caller runs."""
        caller.register_forward_pre_hook(self._set, with_kwargs=True)
        caller.register_forward_hook(self._unset, always_call=True)

    def _set(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        setattr(token_sizes, self.name, self.read(_arguments(args, kwargs)))

    def _unset(self, module: nn.Module, args: tuple, output: Any) -> None:
        setattr(token_sizes, self.name, None)


class Site(NamedTuple):
    """Module of a network and the layout of its input x, the first tensor argument."""

    name: str
    kind: str  # layout of x: 'nchw', 'nhwc', 'tokens' or 'windows', see `block_registry`
    x_key: int | str  # position or name of the argument
    shape: Shape  # of x in the first trial run
    output: Shape | None  # shape of the output in the first trial run
    size: SizePlace | None = None  # source of the tokens' (H, W)
    nominal: tuple[int, int] = (0, 0)  # (H, W) of the feature map in the first trial run, or of the window
    second: str = ''  # another input that affects the output, unless it is a mask that blocks take; empty for none

    @property
    def place(self) -> str:
        """Position in terms of `block_registry.PLACES`."""
        return 'maps' if self.kind in ('nchw', 'nhwc') else self.kind

    def channels(self, shape: Shape) -> int:
        """Return the number of channels of a shape in the layout of x."""
        return shape[_channel_axis(self.kind)]


def _channel_axis(kind: str) -> int:
    return 1 if kind == 'nchw' else -1


def find_site(name: str, module: nn.Module, trial: Trial, window: int | None = None, needs_window: bool = True) -> Site:
    """Determine the input layout of a module from its recorded calls.

    Args:
        name, module: module of the network.
        trial: trial of the network, with the records of `record_calls`.
        window: window size, if the module does not declare it.
        needs_window: whether to reject windows of unknown size.
    Raises:
        ShapeError: if the module is not called, is called in different ways, or has an unknown input layout; the
            message includes the shapes.
    """
    runs = [run.get(name, []) for run in trial.records]
    if not all(runs):
        raise ShapeError('the module is never called in evaluation mode, at most its method forward or its submodules')
    pairs = [(one.first_tensor(), two.first_tensor()) for one, two in zip(*runs, strict=False)]
    (key, first), (_, second) = pairs[0]
    if not first or not second:
        raise ShapeError('the module has no tensor argument')
    kind = _kind(first, second)
    for (other_key, one), (_, two) in pairs:
        if other_key != key or not one or not two or _kind(one, two) != kind:
            raise ShapeError(f'the module is called with different kinds of input, {list(first)} and {list(one)}')
    if kind is None:
        sizes = ' and '.join(f'{height}x{width}' for height, width in trial.sizes)
        raise ShapeError(
            f'expected a feature map [B, C, H, W] or [B, H, W, C], tokens [B, H·W, C] or windows, '
            f'got {list(first)} and {list(second)} for images {sizes}'
        )
    if len({call.first_tensor()[1][_channel_axis(kind)] for call in runs[0]}) > 1:
        raise ShapeError('the module is called with different numbers of channels')
    call = runs[0][0]
    size, nominal = None, (0, 0)
    if kind == 'tokens':
        size, nominal = _find_size(name, trial)
    elif kind == 'windows':
        side = window_of(module) or window
        if (side is None and needs_window) or (side is not None and side**2 != first[1]):
            raise ShapeError(
                f'its input {list(first)} must be windows of {first[1]} tokens, but its window_size is '
                f'{side or "unknown"}: specify window_size under `with`'
            )
        nominal = (side, side) if side else (0, 0)
    else:
        nominal = first[2:] if kind == 'nchw' else first[1:3]
    second = next(filter(None, (_second_input(call, kind) for run in runs for call in run)), '')
    return Site(name, kind, key, first, call.output, size, nominal, second)


def _second_input(call: Call, kind: str) -> str:
    """Describe an input of a call, other than x and indices, that a block does not get; return '' if there is none."""
    key, shape = call.first_tensor()
    for tensor in _tensors_in([value for other, value in call.arguments.items() if other != key]):
        is_mask = kind == 'windows' and _is_window_mask(tensor, shape[1])
        if not is_mask and (tensor.is_floating_point() or tensor.dtype == torch.bool):
            return f'{list(tensor.shape)} of {tensor.dtype}'
    return ''


def _is_window_mask(value: Any, tokens: int) -> bool:
    """Return whether an argument is a mask [num_windows, tokens, tokens] that is added to the scores."""
    return isinstance(value, Tensor) and value.shape[1:] == (tokens, tokens) and value.is_floating_point()


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item)


def _kind(first: Shape, second: Shape) -> str | None:
    changed = tuple(axis for axis, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return _KINDS.get((len(first), changed)) if len(first) == len(second) else None


def _find_size(name: str, trial: Trial) -> tuple[SizePlace | None, tuple[int, int]]:
    """Find the nearest module with H and W of the tokens among its arguments; return also the size in the first run."""
    counts = [run[name][0].first_tensor()[1][1] for run in trial.records]
    steps = name.split('.')
    for depth in range(len(steps), -1, -1):
        caller = '.'.join(steps[:depth])
        calls = [run[caller][0] for run in trial.records if caller in run]
        if len(calls) < 2:
            continue
        for place in _size_places(caller, calls[0]):
            # The arguments may differ between the runs.
            with suppress(TypeError, ValueError, IndexError, KeyError, AttributeError):
                sizes = [place.read(call.arguments) for call in calls]
                # The first image is wider than high; (W, H) instead of (H, W) would be another arrangement of tokens.
                if [height * width for height, width in sizes] == counts and sizes[0][0] <= sizes[0][1]:
                    return place, sizes[0]
    return None, (0, 0)


def _size_places(caller: str, call: Call) -> Iterator[SizePlace]:
    """Yield the arguments of a call that may contain H and W: a pair, two consecutive integers, or a feature map."""
    for key, value in call.arguments.items():
        if isinstance(value, (tuple, list)) and len(value) == 2 and all(type(side) is int for side in value):
            yield SizePlace(caller, (key,))
    for (a, first), (b, second) in itertools.pairwise(call.arguments.items()):
        if type(first) is int and type(second) is int:
            yield SizePlace(caller, (a, b))
    for key, value in call.arguments.items():
        if isinstance(value, Tensor) and value.ndim == 4:
            yield SizePlace(caller, (key,), (2, 3))
            yield SizePlace(caller, (key,), (1, 2))


class MixedIn(nn.Module):
    """Adapter that takes the place of a module in a network and calls a block.

        replace   block(x)
        append    block(original(x))
        prepend   original(block(x))
        wrap      y + gain · block(norm(y)) with y = original(x), a pre-norm residual branch

    Args:
        block: block to call, see `block_registry`.
        works_in: layout of the block.
        site: original position, with the layout of its input.
        op: 'replace', 'append', 'prepend' or 'wrap'.
        original: original module; None for `replace`.
        gain: initial value of the learned gain per channel, for `wrap`; with 0 the network is unchanged initially.
    Raises:
        ShapeError: in the forward pass, if the token size is not available or does not match.
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
        arguments = _arguments(args, kwargs)
        if self.op in ('append', 'wrap'):
            return self._run(self.original(*args, **kwargs), arguments)
        y = self._run(arguments[self.site.x_key], arguments)
        if self.op == 'replace':
            return y
        arguments[self.site.x_key] = y
        return self.original(*(arguments[key] for key in range(len(args))), **{key: arguments[key] for key in kwargs})

    def _run(self, y: Tensor, arguments: Arguments) -> Tensor:
        """Apply the block to y, which has the layout of the site."""
        is_nchw = self.site.kind == 'nchw'
        last = y.permute(0, 2, 3, 1) if is_nchw else y
        if self.gain is None:
            last = self._run_channels_last(last, arguments)
        else:
            last = last + self.gain * self._run_channels_last(self.norm(last), arguments)
        return last.permute(0, 3, 1, 2) if is_nchw else last

    def _run_channels_last(self, x: Tensor, arguments: Arguments) -> Tensor:
        """Apply the block to windows, tokens or an NHWC feature map."""
        if self.works_in == 'any':
            return self.block(x)
        if self.site.kind == 'windows':
            # x has the shape of a mask, too, if the number of channels equals the number of tokens
            others = (value for key, value in arguments.items() if key != self.site.x_key)
            mask = next((value for value in others if _is_window_mask(value, x.shape[1])), None)
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
            raise ShapeError(f'{tokens} have an unknown height and width outside of a call of {caller}')
        if size[0] * size[1] != x.shape[1]:
            raise ShapeError(f'{tokens} do not match the size {size[0]}x{size[1]} given to {caller}')
        return size

    def extra_repr(self) -> str:
        return f'{self.op}, {self.site.kind}'


def put_in(network: nn.Module, adapters: Sequence[tuple[nn.Module, MixedIn]]) -> None:
    """Replace modules of a network by adapters, and register the hooks for token sizes."""
    modules = dict(network.named_modules())
    # Innermost first, so that an original module is moved into its adapter with its submodules already replaced.
    for module, adapter in sorted(adapters, key=lambda item: -item[1].site.name.count('.')):
        for parent in list(network.modules()):
            for key, child in list(parent._modules.items()):  # a module may have several names
                if child is module and parent is not adapter:
                    setattr(parent, key, adapter)
    # If a caller is replaced itself, its adapter gets the hooks, so that they cover the adapter's block, too.
    modules |= {adapter.site.name: adapter for _, adapter in adapters}
    for size in dict.fromkeys(adapter.site.size for _, adapter in adapters if adapter.site.size is not None):
        size.tell_sizes(modules[size.caller])


def keep_weights(block: nn.Module, source: nn.Module, dense_share: float | None = None) -> None:
    """Transfer the weights of a replaced module to a block.

    Window attention takes over queries, keys, values, projection and position bias; ASSA's gate is set so that softmax
    has the share `dense_share` and the squared ReLU the rest. An MLP takes over both layers. Third-party blocks can
    implement a method `keep_weights(source)`.

    Args:
        block: block that takes the weights.
        source: replaced module; an attention has q, k and v in a linear layer `qkv`, or in `q` and `kv`, or in `to_q`
            and `to_kv`.
        dense_share: share of softmax, in (0, 1), for ASSA only.
    Raises:
        OptionError: if the block cannot take over the weights of such a module, or not all of them.
        ShapeError: if sizes differ.
    """
    if not isinstance(block, (WindowAttention, MLP)) and hasattr(block, 'keep_weights'):
        block.keep_weights(source)
        return
    refusal = f'{type(block).__name__} cannot keep weights of {type(source).__name__}'
    if isinstance(block, WindowAttention):
        weights = _read_attention(source)
        if weights is None:
            raise OptionError(f'{refusal}: expected a window attention with qkv, proj and a position bias table')
        left = [name for name, _ in source.named_parameters() if not _READ.issuperset(name.split('.'))]
    elif isinstance(block, MLP):
        layers = [module for module in source.modules() if isinstance(module, nn.Linear)]
        has_gelu = any(isinstance(module, nn.GELU) and module.approximate == 'none' for module in source.modules())
        if len(layers) != 2 or not has_gelu:
            raise OptionError(f'{refusal}: expected two linear layers with a GELU between them')
        weights = _layers(expand=layers[0], project=layers[1])
        kept = {id(parameter) for layer in layers for parameter in layer.parameters()}
        left = [name for name, parameter in source.named_parameters() if id(parameter) not in kept]
    else:
        raise OptionError(f'{refusal}: remove keep_weights')
    if left:
        raise OptionError(f'{refusal}: the block has no counterpart for {", ".join(left[:4])}')
    _fill(block, weights)
    if dense_share is not None:
        if getattr(block, 'gate', None) is None:
            raise OptionError(f'dense_share requires ASSA: {type(block).__name__} has no gate')
        half = 0.5 * math.log(dense_share / (1 - dense_share))  # softmax of (half, -half) is (dense_share, the rest)
        block.gate.data.copy_(torch.tensor([half, -half]))


def _fill(block: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights to a block by name; set biases without a counterpart to zero."""
    own = dict(block.named_parameters())
    for name, weight in weights.items():
        if name not in own or own[name].shape != weight.shape:
            place = list(own[name].shape) if name in own else 'no such parameter'
            raise ShapeError(f'{name} is {list(weight.shape)}, but the block has {place}: omit sizes from the rule')
    with torch.no_grad():
        for name, parameter in own.items():
            if name in weights:
                parameter.copy_(weights[name])
            elif name.endswith('.bias'):
                parameter.zero_()


def _layers(**layers: nn.Linear) -> dict[str, Tensor]:
    """Return weights and biases of linear layers, by the layers' names in a block."""
    weights = {f'{name}.weight': layer.weight for name, layer in layers.items()}
    return weights | {f'{name}.bias': layer.bias for name, layer in layers.items() if layer.bias is not None}


def _read_attention(source: nn.Module) -> dict[str, Tensor] | None:
    """Return the weights of a window attention by the names of `WindowAttention`, or None for any other module.

    Queries are rescaled if the source uses another scale than 1 / sqrt(channels of a head).
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
    """Return the position bias table with its rows in the order of `ops.relative_position_index`."""
    theirs, side = getattr(source, 'relative_position_index', None), window_of(source)
    if not isinstance(theirs, Tensor) or side is None or theirs.numel() != side**4 or len(table) != (2 * side - 1) ** 2:
        return table
    ours, theirs = relative_position_index(side).flatten().to(table.device), theirs.flatten().long().to(table.device)
    ordered = torch.empty_like(table)
    ordered[ours] = table.detach()[theirs]
    if not torch.equal(ordered[ours], table.detach()[theirs]):
        raise OptionError(f'the position bias of {type(source).__name__} depends on more than relative position')
    return ordered
