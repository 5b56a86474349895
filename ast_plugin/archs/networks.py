"""Networks by their registered name or by their weights, and the sizes of images that they take."""

import copy
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ast_plugin.archs.ast_arch import AST, AST_B, AST_T, AST_XS
from ast_plugin.archs.spandrel_arch import recognise
from ast_plugin.archs.state import infer_options, load_into, without_prefixes
from ast_plugin.checkpoints import Checkpoint, read_checkpoint
from ast_plugin.errors import (
    BackendUnavailable,
    CheckpointError,
    OptionError,
    PluginError,
    ShapeError,
    did_you_mean,
    first_line,
    one_line,
)
from ast_plugin.ops import use_backend
from ast_plugin.ops.tiles import run_padded
from ast_plugin.plugins import load_plugins

CHANNEL_KEYS = ('in_chans', 'num_in_ch', 'in_channels', 'in_ch', 'img_channel', 'inp_channels')
"""What networks call the number of channels that they take."""

_OWN = {'AST': AST, 'AST_XS': AST_XS, 'AST_T': AST_T, 'AST_B': AST_B}  # found without importing BasicSR
_FALLBACK_SUFFIX = '_basicsr'  # under which BasicSR registers some of its own, and finds them without it
# Networks want sides that are multiples of one of these, or of a window that is halved some times.
_MULTIPLES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
_HALVINGS = 4
_trials: weakref.WeakKeyDictionary[nn.Module, 'Trial'] = weakref.WeakKeyDictionary()


def registered_network(name: Any) -> Callable[..., nn.Module]:
    """Return what builds the network that is registered under a name, by BasicSR, by us or by a plugin.

    Raises:
        OptionError: if there is none; says what is near.
    """
    if isinstance(name, str) and name in _OWN:
        return _OWN[name]
    load_plugins()
    import basicsr.archs  # noqa: F401 - registers the toolbox's networks
    from basicsr.utils.registry import ARCH_REGISTRY

    for key in (name, f'{name}{_FALLBACK_SUFFIX}'):
        if key in ARCH_REGISTRY:
            return ARCH_REGISTRY.get(key)
    known = [key.removesuffix(_FALLBACK_SUFFIX) for key in ARCH_REGISTRY.keys()]  # noqa: SIM118 - not a dictionary
    raise OptionError(
        f'no network is registered as {name}{did_you_mean(str(name), known)} '
        '(is its plugin installed? `basicsr list arch` shows what there is)'
    )


def build_network(options: Mapping[str, Any]) -> nn.Module:
    """Build a registered network, without the toolbox's log lines.

    Args:
        options: `type`, the registered name, and the network's arguments.
    Raises:
        OptionError: if no such network is registered, or it does not take these arguments.
    """
    arguments = dict(options)
    name = arguments.pop('type', None)
    network = registered_network(name)
    try:
        return network(**arguments)
    except PluginError:
        raise
    except Exception as error:  # networks of others check their arguments each in their own way
        raise OptionError(
            f'the network {name} cannot be built with {arguments}: {type(error).__name__}: {one_line(error)}'
        ) from error


def load_network(
    options: Mapping[str, Any] | None,
    weights: str | os.PathLike | None = None,
    param_key: str | None = None,
    say: Callable[[str], Any] = str,
) -> nn.Module:
    """Build a registered network in evaluation mode, with weights where they are given.

    Args:
        options: see `build_network`; None for those that the weights tell, see `network_of`.
        weights, param_key: see `read_checkpoint`.
        say: called with each line on what was taken of the weights, see `load_into`.
    Raises:
        OptionError, CheckpointError: as those.
    """
    checkpoint = None if weights is None else read_checkpoint(weights, param_key)
    network = _build_network_of(checkpoint)[0] if options is None else build_network(options)
    if checkpoint is not None:
        for line in load_into(network, checkpoint):
            say(line)
    return network.eval().requires_grad_(False)


class Loaded(NamedTuple):
    """A network with the weights of a file."""

    network: nn.Module
    options: Mapping[str, Any]  # that it was built with, `type` among them
    notes: tuple[str, ...]  # lines on what was assumed about it, and on what of its file was not taken
    metadata: Mapping[str, str]  # of the file, see `Checkpoint`


def load_file(
    path: str | os.PathLike, options: Mapping[str, Any] | None = None, param_key: str | None = None
) -> Loaded:
    """Build the network that a weights file is of, and load it.

    Args:
        path, param_key: see `read_checkpoint`.
        options: of the network; None for those that the file tells, see `network_of`.
    Raises:
        CheckpointError: if the file cannot be used, or is not of this network.
        OptionError: if the network cannot be built with the options.
    """
    checkpoint = read_checkpoint(path, param_key)
    network, options, notes = (build_network(options), options, []) if options else _build_network_of(checkpoint)
    _, *of_weights = load_into(network, checkpoint)
    return Loaded(network, options, (*of_weights, *notes), checkpoint.metadata)


def _build_network_of(checkpoint: Checkpoint) -> tuple[nn.Module, dict[str, Any], list[str]]:
    """Build the network that a weights file is of, and return it with what `network_of` returns."""
    options, assumed = network_of(checkpoint)
    try:
        return build_network(options), options, assumed
    except OptionError as error:
        raise CheckpointError(f'{checkpoint.path}: the network that it tells of cannot be built: {error}') from error


def network_of(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[str]]:
    """The options of the network that a weights file is of, and a line for each that was assumed.

    They are those that the file carries. Else names and shapes tell those of an AST, or where spandrel is installed of
    a network that spandrel knows.

    Raises:
        CheckpointError: if nothing tells.
    """
    options, assumed = checkpoint.network, []
    if options is None:
        try:
            told, assumed = infer_options(checkpoint.state)
            options = {'type': 'AST', **told}
        except CheckpointError as error:
            for state in without_prefixes(checkpoint.state):
                with suppress(OptionError, BackendUnavailable):
                    return recognise(state)
            raise CheckpointError(
                f'{checkpoint.path} does not say which network it is of, and {error}; name the network with an option '
                'file (-opt) or network_g'
            ) from error
    _check_claims(checkpoint, options)
    return options, assumed


def _check_claims(checkpoint: Checkpoint, options: Mapping[str, Any]) -> None:
    """Refuse options of a network that is far larger than its file, before building it takes the memory or an hour."""
    num_bytes = checkpoint.path.stat().st_size
    for key, value in options.items():
        numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, (int, float))]
        if sum(numbers) > max(4096, num_bytes // 64):
            raise CheckpointError(f'{checkpoint.path}: tells of a network with {key} {value}, more than it can hold')
    with suppress(OptionError), torch.device('meta'):
        network = build_network(options)
        count = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
        if count > 2**26 + num_bytes:
            raise CheckpointError(f'{checkpoint.path}: tells of a network of {count:,} weights, more than it can hold')


def input_channels(options: Mapping[str, Any], network: nn.Module | None = None) -> int:
    """Channels of the images that a network takes, as its options or it itself say; 3 if nothing says it."""
    base = options.get('base')  # of a Mixed
    told = options | base if isinstance(base, Mapping) else options
    stated = [*map(told.get, CHANNEL_KEYS), *(getattr(network, key, None) for key in CHANNEL_KEYS)]
    return next((channels for channels in stated if isinstance(channels, int)), 3)


class AnySize(nn.Module):
    """A network whose H and W must be multiples of `size_multiple`, on images of any size.

    Images are padded at the bottom and the right by reflection, and the result is cropped.
    """

    takes_any_size = True

    def __init__(self, network: nn.Module, size_multiple: int) -> None:
        super().__init__()
        self.network, self.size_multiple = network, size_multiple

    def forward(self, image: Tensor) -> Tensor:
        """Pad, run the network, crop."""
        height, width = image.shape[-2:]
        return run_padded(self.network, image, -height % self.size_multiple, -width % self.size_multiple)


def any_size(network: nn.Module, channels: int = 3) -> nn.Module:
    """Let a network, [B, channels, H, W] to [B, D, s·H, s·W], take images of any size.

    Networks that take them all, or say so by a true attribute `takes_any_size`, are returned as they are, and so are
    those that run on no size that is tried: what is wrong with them shows on the image. All others pad by `AnySize`.
    """
    if getattr(network, 'takes_any_size', False):
        return network
    try:
        multiple = _trial(network, channels).multiple
    except OptionError:
        return network
    return network if multiple == 1 else AnySize(network, multiple).train(network.training)


def required_multiple(network: nn.Module, channels: int = 3) -> int:
    """Of what height and width must be for a network to give a result of its input's size, found by trying.

    Raises:
        OptionError: if it works on no size, or its results have another one.
    """
    stated = 1, getattr(network, 'scale', 1)
    multiple, scale = stated if getattr(network, 'takes_any_size', False) else _trial(network, channels)[1:3]
    if scale != 1:
        raise OptionError(f'{type(network).__name__} enlarges images {scale} times: expected the same size')
    return multiple


def _trial(network: nn.Module, channels: int) -> 'Trial':
    if network not in _trials:
        _trials[network] = try_sizes(network, [channels], nominal=32)
    return _trials[network]


class Trial(NamedTuple):
    """What two runs of a network on images of different sizes have shown."""

    channels: int  # of the images
    multiple: int  # what both sides of an image must be multiples of
    scale: int  # how many times larger than the input the output is
    sizes: tuple[tuple[int, int], tuple[int, int]]  # (H, W) of the two images
    records: tuple[Any, Any]  # what `record` yielded for each run


Record = Callable[[nn.Module], AbstractContextManager[Any]]


def try_sizes(
    network: nn.Module,
    in_channels: Sequence[int],
    nominal: int,
    multiple: int | None = None,
    record: Record | None = None,
) -> Trial:
    """Run a network on growing multiples until two sizes work, nothing being computed where that can be.

    A copy runs on torch's device `meta`, where tensors have shapes and no values. A network that cannot do that runs on
    its own device.

    Args:
        network: maps [B, C, H, W] to [B, D, s·H, s·W]; left as it is.
        in_channels: values of C to try, the likeliest first.
        nominal: side of images that it is meant for, in pixels; the first image is about that large.
        multiple: what both sides must be multiples of; None finds it out.
        record: context around each run of the network that it is given.
    Raises:
        OptionError: if it runs on no size, with what it raised.
    """
    windows = {side for module in network.modules() if (side := window_of(module))}
    halved = {side << number for side in windows for number in range(_HALVINGS)}
    multiples = [multiple] if multiple else sorted({*_MULTIPLES, *halved})
    failure = ''
    for device in _devices(network):
        copied = _copy_to(network, device)
        for channels in dict.fromkeys(in_channels):
            for candidate in multiples:
                # Neighbouring multiples, so that no larger number divides all sides; far apart, so that no padding
                # makes them one.
                count = -(-nominal // candidate)
                counts = ((count, count + 1), (3 * count, 2 * count + 1))
                sizes = tuple((candidate * rows, candidate * columns) for rows, columns in counts)
                try:
                    runs = [_run(copied, channels, size, device, record) for size in sizes]
                    (scale, other), records = zip(*runs, strict=True)
                    if scale != other:
                        raise ShapeError(f'the output is {scale} times as large as the input, then {other} times')
                    return Trial(channels, candidate, scale, sizes, records)
                except Exception as error:  # whatever somebody's network raises when a size does not suit it
                    if channels == in_channels[0]:
                        failure = f'{type(error).__name__}: {first_line(error)}'
    raise OptionError(
        f'{type(network).__name__} does not run on images [1, {in_channels[0]}, H, W] with sides that are multiples '
        f'of {multiples[-1]}: {failure}'
    )


def check_runs(network: nn.Module, trial: Trial) -> None:
    """Run a network that was tried and then changed on the larger size.

    Raises:
        Exception: whatever it raises.
        ShapeError: if the output has another size than before.
    """
    (meta, own), size = _devices(network), trial.sizes[1]
    try:
        scale, _ = _run(_copy_to(network, meta), trial.channels, size, meta)
    except Exception:  # perhaps only because something cannot go without values
        scale, _ = _run(_copy_to(network, own), trial.channels, size, own)
    if scale != trial.scale:
        raise ShapeError(f'the output is {scale} times as large as the input, it was {trial.scale} times')


def window_of(module: nn.Module) -> int | None:
    """The side of a module's windows, where it says so and they are square."""
    return square_side(getattr(module, 'window_size', getattr(module, 'win_size', None))) or None


def square_side(stated: Any) -> int | None:
    """n, stated as n or as (n, n), from 0 up; otherwise None."""
    if isinstance(stated, (tuple, list)) and len(stated) == 2 and stated[0] == stated[1]:
        stated = stated[0]
    return stated if type(stated) is int and stated >= 0 else None


def _devices(network: nn.Module) -> tuple[torch.device, torch.device]:
    own = next((parameter.device for parameter in network.parameters()), torch.device('cpu'))
    return torch.device('meta'), own


def _copy_to(network: nn.Module, device: torch.device) -> nn.Module:
    """A copy in evaluation mode; on `meta` without memory for its weights."""
    memo = {}
    if device.type == 'meta':
        for tensor in (*network.parameters(), *network.buffers()):
            meta = torch.empty_like(tensor, device=device)
            memo[id(tensor)] = nn.Parameter(meta, False) if isinstance(tensor, nn.Parameter) else meta
    for module in network.modules():
        for tensor in vars(module).values():
            if isinstance(tensor, Tensor):  # computed, as weight_norm does: no deepcopy of what has a history
                memo[id(tensor)] = tensor.detach().to(device, copy=True)
    return copy.deepcopy(network, memo).eval()


def _run(
    network: nn.Module, channels: int, size: tuple[int, int], device: torch.device, record: Record | None = None
) -> tuple[int, Any]:
    """Run a network on an image, and return how many times larger the output is, and the record."""
    image = torch.zeros(1, channels, *size, device=device)
    # On `meta` shapes come out of plain operators alone.
    with torch.no_grad(), use_backend('reference'), record(network) if record else nullcontext() as recorded:
        output = network(image)
    if not isinstance(output, Tensor) or output.ndim != 4:
        shown = list(output.shape) if isinstance(output, Tensor) else f'a {type(output).__name__}'
        raise ShapeError(f'it returns {shown}, expected images [B, C, H, W]')
    scale = output.shape[-2] // size[0]
    if scale < 1 or tuple(output.shape[-2:]) != (scale * size[0], scale * size[1]):
        raise ShapeError(f'the output of a {size[0]}x{size[1]} image is {list(output.shape)}')
    return scale, recorded
