"""Building networks by registered name or from a weights file, and running them on images of any size."""

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
"""Names that networks use for their number of input channels."""

_OWN = {'AST': AST, 'AST_XS': AST_XS, 'AST_T': AST_T, 'AST_B': AST_B}  # available without importing BasicSR
_FALLBACK_SUFFIX = '_basicsr'  # BasicSR registers some of its networks with this suffix, and finds them without it
# Candidates for the size multiple; windows of the network, doubled up to `_HALVINGS` - 1 times, are added.
_MULTIPLES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
_HALVINGS = 4
_trials: weakref.WeakKeyDictionary[nn.Module, 'Trial'] = weakref.WeakKeyDictionary()


def registered_network(name: Any) -> Callable[..., nn.Module]:
    """Return the class or function registered under a name by BasicSR, this plugin or a third-party plugin.

    Raises:
        OptionError: if there is none; the message suggests similar names.
    """
    if isinstance(name, str) and name in _OWN:
        return _OWN[name]
    load_plugins()
    import basicsr.archs  # noqa: F401 - registers BasicSR's networks
    from basicsr.utils.registry import ARCH_REGISTRY

    for key in (name, f'{name}{_FALLBACK_SUFFIX}'):
        if key in ARCH_REGISTRY:
            return ARCH_REGISTRY.get(key)
    known = [key.removesuffix(_FALLBACK_SUFFIX) for key in ARCH_REGISTRY.keys()]  # noqa: SIM118 - not a dictionary
    raise OptionError(
        f'no network is registered as {name}{did_you_mean(str(name), known)} '
        '(is its plugin installed? `basicsr list arch` lists the available networks)'
    )


def build_network(options: Mapping[str, Any]) -> nn.Module:
    """Build a registered network, without BasicSR's log lines.

    Args:
        options: `type`, the registered name, and the arguments of the network.
    Raises:
        OptionError: if no such network is registered, or it rejects the arguments.
    """
    arguments = dict(options)
    name = arguments.pop('type', None)
    network = registered_network(name)
    try:
        return network(**arguments)
    except PluginError:
        raise
    except Exception as error:  # third-party networks may raise anything
        raise OptionError(
            f'the network {name} cannot be built with {arguments}: {type(error).__name__}: {one_line(error)}'
        ) from error


def load_network(
    options: Mapping[str, Any] | None,
    weights: str | os.PathLike | None = None,
    param_key: str | None = None,
    say: Callable[[str], Any] = str,
) -> nn.Module:
    """Build a registered network in evaluation mode, without gradients, and optionally load weights.

    Args:
        options: see `build_network`; None infers them from the weights, see `network_of`.
        weights, param_key: see `read_checkpoint`.
        say: called with each line of the loading report, see `Loaded`.
    Raises:
        OptionError, CheckpointError: see the functions above.
    """
    if weights is None:
        network = build_network(options)
    else:
        network, _, report, _ = load_file(weights, options, param_key)
        for line in report:
            say(line)
    return network.eval().requires_grad_(False)


class Loaded(NamedTuple):
    """A network with the weights of a file."""

    network: nn.Module
    options: Mapping[str, Any]  # options of the network, including `type`
    report: list[str]  # the lines of `load_into`, and one for each option that had to be assumed
    metadata: Mapping[str, str]  # metadata of the file, see `Checkpoint`


def load_file(
    path: str | os.PathLike, options: Mapping[str, Any] | None = None, param_key: str | None = None
) -> Loaded:
    """Build the network of a weights file and load its weights.

    Args:
        path, param_key: see `read_checkpoint`.
        options: options of the network; None reads or infers them from the file, see `network_of`.
    Raises:
        CheckpointError: if the file cannot be used, or belongs to another network.
        OptionError: if the network cannot be built with the options.
    """
    checkpoint = read_checkpoint(path, param_key)
    if options:
        network, assumed = build_network(options), []
    else:
        options, assumed = network_of(checkpoint)
        try:
            network = build_network(options)
        except OptionError as error:
            raise CheckpointError(f'{checkpoint.path}: the network of this file cannot be built: {error}') from error
    return Loaded(network, options, load_into(network, checkpoint) + assumed, checkpoint.metadata)


def network_of(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[str]]:
    """Return the network options of a weights file, and a line for each that had to be assumed.

    The options are read from the file's metadata if present. Otherwise they are inferred from names and shapes, for an
    AST or, if spandrel is installed, for any network that spandrel recognises.

    Raises:
        CheckpointError: if the network cannot be identified.
    """
    options, assumed = checkpoint.network, []
    if options is None:
        try:
            inferred, assumed = infer_options(checkpoint.state)
            options = {'type': 'AST', **inferred}
        except CheckpointError as error:
            for state in without_prefixes(checkpoint.state):
                with suppress(OptionError, BackendUnavailable):
                    return recognise(state)
            raise CheckpointError(
                f'{checkpoint.path} does not name its network, and {error}; specify the network with an option file '
                '(-opt) or network_g'
            ) from error
    _check_claims(checkpoint, options)
    return options, assumed


def _check_claims(checkpoint: Checkpoint, options: Mapping[str, Any]) -> None:
    """Reject options of a network far larger than its file, as building it could exhaust memory or take an hour."""
    num_bytes = checkpoint.path.stat().st_size
    for key, value in options.items():
        numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, (int, float))]
        if sum(numbers) > max(4096, num_bytes // 64):
            raise CheckpointError(f'{checkpoint.path}: its metadata claim {key} {value}, too large for the file')
    with suppress(OptionError), torch.device('meta'):
        network = build_network(options)
        count = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
        if count > 2**26 + num_bytes:
            raise CheckpointError(f'{checkpoint.path}: its metadata claim {count:,} weights, too many for the file')


def input_channels(options: Mapping[str, Any], network: nn.Module | None = None) -> int:
    """Return the number of input channels stated by a network's options or attributes; 3 by default."""
    base = options.get('base')  # of a Mixed network
    options = options | base if isinstance(base, Mapping) else options
    stated = [*map(options.get, CHANNEL_KEYS), *(getattr(network, key, None) for key in CHANNEL_KEYS)]
    return next((channels for channels in stated if isinstance(channels, int)), 3)


class AnySize(nn.Module):
    """Wrapper that pads images of any size to multiples of `size_multiple` by reflection, and crops the result."""

    takes_any_size = True

    def __init__(self, network: nn.Module, size_multiple: int) -> None:
        super().__init__()
        self.network, self.size_multiple = network, size_multiple

    def forward(self, image: Tensor) -> Tensor:
        """Pad the image at the bottom and right, run the network, and crop its output."""
        height, width = image.shape[-2:]
        return run_padded(self.network, image, -height % self.size_multiple, -width % self.size_multiple)


def any_size(network: nn.Module, channels: int = 3) -> nn.Module:
    """Make a network, [B, channels, H, W] to [B, D, s·H, s·W], accept images of any size.

    Networks that accept any size, as found by trial or declared by a true attribute `takes_any_size`, are returned
    unchanged. So are networks that fail for all tried sizes; their error is raised on the image. All others are wrapped
    in `AnySize`.
    """
    if getattr(network, 'takes_any_size', False):
        return network
    try:
        multiple = _trial(network, channels).multiple
    except OptionError:
        return network
    return network if multiple == 1 else AnySize(network, multiple).train(network.training)


def required_multiple(network: nn.Module, channels: int = 3) -> int:
    """Return the number that height and width must be multiples of for a network, found by trial.

    Raises:
        OptionError: if the network fails for all tried sizes, or its output size differs from its input size.
    """
    stated = 1, getattr(network, 'scale', 1)
    multiple, scale = stated if getattr(network, 'takes_any_size', False) else _trial(network, channels)[1:3]
    if scale != 1:
        raise OptionError(f'expected an output of the size of the input, got scale {scale} of {type(network).__name__}')
    return multiple


def _trial(network: nn.Module, channels: int) -> 'Trial':
    if network not in _trials:
        _trials[network] = try_sizes(network, [channels], nominal=32)
    return _trials[network]


class Trial(NamedTuple):
    """Result of two trial runs of a network on images of different sizes."""

    channels: int  # number of input channels
    multiple: int  # number that H and W must be multiples of
    scale: int  # ratio of output size to input size
    sizes: tuple[tuple[int, int], tuple[int, int]]  # (H, W) of the two images
    records: tuple[Any, Any]  # values yielded by `record` for each run


Record = Callable[[nn.Module], AbstractContextManager[Any]]


def try_sizes(
    network: nn.Module,
    in_channels: Sequence[int],
    nominal: int,
    multiple: int | None = None,
    record: Record | None = None,
) -> Trial:
    """Find the smallest size multiple for which a network runs on two image sizes.

    A copy of the network runs on the meta device, where tensors have shapes but no values. Networks that do not support
    this run on their own device.

    Args:
        network: maps [B, C, H, W] to [B, D, s·H, s·W]; not modified.
        in_channels: values of C to try, the most likely first.
        nominal: typical side length of the network's images in pixels; the first trial image has about this size.
        multiple: known size multiple; None tries increasing values.
        record: context manager that is entered with the network around each run.
    Raises:
        OptionError: if the network fails for all sizes; includes its error.
    """
    windows = {side for module in network.modules() if (side := window_of(module))}
    halved = {side << number for side in windows for number in range(_HALVINGS)}
    multiples = [multiple] if multiple else sorted({*_MULTIPLES, *halved})
    failure = ''
    for device in _devices(network):
        copied = _copy_to(network, device)
        for channels in dict.fromkeys(in_channels):
            for candidate in multiples:
                # Consecutive multiples, so that the sides have no larger common divisor; different enough that padding
                # inside the network cannot make them equal.
                count = -(-nominal // candidate)
                counts = ((count, count + 1), (3 * count, 2 * count + 1))
                sizes = tuple((candidate * rows, candidate * columns) for rows, columns in counts)
                try:
                    runs = [_run(copied, channels, size, device, record) for size in sizes]
                    (scale, other), records = zip(*runs, strict=True)
                    if scale != other:
                        raise ShapeError(f'expected one output scale for all sizes, got {scale} and {other}')
                    return Trial(channels, candidate, scale, sizes, records)
                except Exception as error:  # third-party networks may raise anything for unsupported sizes
                    if channels == in_channels[0]:
                        failure = f'{type(error).__name__}: {first_line(error)}'
    raise OptionError(
        f'{type(network).__name__} does not run on images [1, {in_channels[0]}, H, W] with sides that are multiples '
        f'of {multiples[-1]}: {failure}'
    )


def check_runs(network: nn.Module, trial: Trial, record: Record | None = None) -> Any:
    """Run a network, modified after its trial, on the larger trial size; return the record, see `try_sizes`.

    Raises:
        Exception: any error of the network.
        ShapeError: if the output scale has changed.
    """
    (meta, own), size = _devices(network), trial.sizes[1]
    try:
        scale, recorded = _run(_copy_to(network, meta), trial.channels, size, meta, record)
    except Exception:  # may only be due to the meta device
        scale, recorded = _run(_copy_to(network, own), trial.channels, size, own, record)
    if scale != trial.scale:
        raise ShapeError(f'expected an output scale of {trial.scale}, as before, got {scale}')
    return recorded


def window_of(module: nn.Module) -> int | None:
    """Return the window size of a module if it is declared and square, else None."""
    return square_side(getattr(module, 'window_size', getattr(module, 'win_size', None))) or None


def square_side(stated: Any) -> int | None:
    """Return n for a value n or (n, n) with n >= 0, otherwise None."""
    if isinstance(stated, (tuple, list)) and len(stated) == 2 and stated[0] == stated[1]:
        stated = stated[0]
    return stated if type(stated) is int and stated >= 0 else None


def _devices(network: nn.Module) -> tuple[torch.device, torch.device]:
    own = next((parameter.device for parameter in network.parameters()), torch.device('cpu'))
    return torch.device('meta'), own


def _copy_to(network: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy in evaluation mode; on the meta device it needs no memory for weights."""
    memo = {}
    if device.type == 'meta':
        for tensor in (*network.parameters(), *network.buffers()):
            meta = torch.empty_like(tensor, device=device)
            memo[id(tensor)] = nn.Parameter(meta, False) if isinstance(tensor, nn.Parameter) else meta
    for module in network.modules():
        for tensor in vars(module).values():
            if isinstance(tensor, Tensor):  # computed, as by weight_norm: deepcopy fails for non-leaf tensors
                memo[id(tensor)] = tensor.detach().to(device, copy=True)
    return copy.deepcopy(network, memo).eval()


def _run(
    network: nn.Module, channels: int, size: tuple[int, int], device: torch.device, record: Record | None = None
) -> tuple[int, Any]:
    """Run a network on a blank image; return the output scale and the record."""
    image = torch.zeros(1, channels, *size, device=device)
    # Only plain operators support the meta device.
    with torch.no_grad(), use_backend('reference'), record(network) if record else nullcontext() as recorded:
        output = network(image)
    if not isinstance(output, Tensor) or output.ndim != 4:
        shown = list(output.shape) if isinstance(output, Tensor) else f'a {type(output).__name__}'
        raise ShapeError(f'expected output images [B, C, H, W], got {shown}')
    scale = output.shape[-2] // size[0]
    if scale < 1 or tuple(output.shape[-2:]) != (scale * size[0], scale * size[1]):
        raise ShapeError(
            f'expected an output size that is a multiple of the input size {size[0]}x{size[1]}, got {[*output.shape]}'
        )
    return scale, recorded
