"""Restoring pictures with a trained network: weights, device, memory and tiles behind one class."""

import math
import os
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ast_plugin.checkpoints import infer_network, read_checkpoint
from ast_plugin.errors import CheckpointError, DataError, OptionError, PluginError, ShapeError
from ast_plugin.models.memory import available_bytes, peak_bytes
from ast_plugin.ops.tiles import check_tiling, run_tiled
from ast_plugin.suggest import did_you_mean

_LARGEST = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}
_CHANNEL_KEYS = ('in_chans', 'num_in_ch', 'in_channels', 'in_ch')
# Tiles that are chosen have sides of so many pixels, and no fewer: AST pads to this multiple.
_TILE_STEP = 128
# No network we know takes so much (AST-B takes 11 KB): with room for this, nothing needs to be measured.
_AMPLE_BYTES_PER_PIXEL = 64 * 1024
# Half of what is free, as kernels allocate more than their results and others live on the machine.
_USABLE_SHARE = 0.5


class Restorer:
    """A network ready to restore pictures.

        restorer = Restorer.from_weights('AST_derain.safetensors')
        restored = restorer.restore(photograph)     # RGB [H, W, 3], uint8, as is `photograph`

    Pictures that do not fit in memory are restored in tiles. The network runs in float32, in evaluation mode.

    Args:
        network: maps [1, C, H, W] in [0, 1] to [1, D, s·H, s·W], C and D being 1 or 3.
        in_channels: C.
        device: 'cpu', 'cuda', 'cuda:1' …; None takes a GPU where there is one.
        tile: side of a tile in pixels; None chooses by the free memory, and takes the whole where it fits.
        overlap: pixels that neighbouring tiles share; None takes a quarter of the tile.
    Attributes:
        notes: lines on what was assumed about the network.
    Raises:
        OptionError: if the device is not there, or tile and overlap make no sense.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        in_channels: int = 3,
        device: str | torch.device | None = None,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> None:
        check_tile_options(tile, overlap)
        if in_channels not in (1, 3):
            raise OptionError(f'the network takes {in_channels} channels: expected 1 (gray) or 3 (RGB)')
        self.device = find_device(device)
        self.network = network.to(self.device, torch.float32).eval().requires_grad_(False)
        self.in_channels = in_channels
        self.tile, self.overlap = tile, overlap
        self.notes: tuple[str, ...] = ()
        self._bytes_per_pixel: float | None = None

    @classmethod
    def from_weights(
        cls,
        path: str | os.PathLike,
        *,
        network: Mapping[str, Any] | None = None,
        param_key: str | None = None,
        device: str | torch.device | None = None,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> 'Restorer':
        """Build the network that a weights file is of, and load it.

        Args:
            path: safetensors or .pth, ours, BasicSR's or official.
            network: its options, as under `network_g` of an option file. None takes those in the file's metadata,
                else what names and shapes of an AST's weights tell; what they do not tell is said in `notes`.
            param_key: where the weights lie in a .pth file, such as 'params_ema'; None looks in the usual places.
            device, tile, overlap: see `Restorer`.
        Raises:
            CheckpointError: if the file cannot be used, or is not of this network.
            OptionError: if the network's options, the device or the tiles are wrong.
        """
        check_tile_options(tile, overlap)
        found_device = find_device(device)
        checkpoint = read_checkpoint(path, param_key)
        notes: list[str] = []
        options = network or checkpoint.network
        if options is None:
            try:
                options, notes = infer_network(checkpoint.state)
            except CheckpointError as error:
                raise CheckpointError(
                    f'{path} does not say which network it is of, and {error}; name the network '
                    'with an option file (-opt)'
                ) from error
        built = build_network(options)
        try:
            built.load_state_dict(checkpoint.state, strict=True)
        except CheckpointError as error:
            raise CheckpointError(f'{path}: {error}') from error
        except RuntimeError as error:
            raise CheckpointError(
                f'{path} is not of the network {options["type"]} with these options: {_one_line(error)}'
            ) from error
        in_channels = next((options[key] for key in _CHANNEL_KEYS if key in options), 3)
        restorer = cls(built, in_channels=in_channels, device=found_device, tile=tile, overlap=overlap)
        restorer.notes = tuple(notes)
        return restorer

    @property
    def num_parameters(self) -> int:
        """Number of values that the network has learned."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def restore(
        self,
        image: np.ndarray,
        *,
        on_tile: Callable[[int, int], None] | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> np.ndarray:
        """Restore one picture.

        A gray picture goes through a network of RGB as three equal channels, whose mean comes back.

        Args:
            image: gray [H, W] or RGB [H, W, 3]; uint8, uint16, or floating point in [0, 1].
            on_tile: called with (tiles done, tiles in all).
            on_note: called with a line when tiles are chosen because memory is short.
        Returns:
            The restored picture, [s·H, s·W] or [s·H, s·W, 3], clamped to the range of its dtype and rounded to the
            nearest value: the input's dtype, float32 for floating point.
        Raises:
            ShapeError: if the array is no such picture, or the network does not take its size.
            DataError: if colours are given to a network for gray, or the network's result is not finite.
            OptionError: if the picture does not fit in memory with the tiles asked for.
        """
        largest = _LARGEST.get(image.dtype, 1)
        if largest == 1 and not np.issubdtype(image.dtype, np.floating):
            raise ShapeError(f'a picture has uint8, uint16 or floating point values, not {image.dtype}')
        is_gray = image.ndim == 2
        if not (is_gray or (image.ndim == 3 and image.shape[2] == 3)) or 0 in image.shape:
            raise ShapeError(f'a picture is [H, W] or [H, W, 3], not {list(image.shape)}')
        if self.in_channels == 1 and not is_gray:
            raise DataError('the picture has colours, the network takes gray pictures only')
        values = torch.from_numpy(image.astype(np.float32)).div_(largest)
        batch = values[None, None].expand(1, self.in_channels, -1, -1) if is_gray else values.permute(2, 0, 1)[None]
        with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
            result = self._run(batch, on_tile, on_note)[0]
            if is_gray and len(result) == 3:
                result = result.mean(0, keepdim=True)
            if not torch.isfinite(result).all():
                raise DataError('the network gave values that are not finite; its weights or the picture are at fault')
            result = result.clamp_(0, 1).mul_(largest)
            result = result.round_() if largest > 1 else result
            array = result.movedim(0, -1).numpy().astype(image.dtype if largest > 1 else np.float32)
        return np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array)

    def _run(self, batch: Tensor, on_tile: Callable | None, on_note: Callable | None) -> Tensor:
        """Restore in one piece or in tiles, smaller ones where memory turns out shorter than was thought."""
        height, width = batch.shape[-2:]
        tile = self.tile or self._choose_tile(batch, on_note)
        while True:
            overlap = tile // 4 if self.overlap is None else min(self.overlap, tile - 1)
            try:
                return run_tiled(self._apply, batch, tile, overlap, on_tile=on_tile)
            except (torch.cuda.OutOfMemoryError, MemoryError) as error:
                shown = f'{width}x{height} in tiles of {tile}' if tile < max(height, width) else f'{width}x{height}'
                smaller = min(tile, max(height, width)) // 2 // _TILE_STEP * _TILE_STEP
                if self.tile is not None or smaller == 0:
                    raise OptionError(
                        f'{shown} does not fit in the memory of {self.device}; '
                        f'choose tiles smaller than {tile} (--tile)'
                    ) from error
                _tell(on_note, f'{shown} does not fit in memory, trying tiles of {smaller}')
                tile = smaller

    def _apply(self, patch: Tensor) -> Tensor:
        with _named_failures(patch):
            return self.network(patch.to(self.device)).to('cpu', torch.float32)

    def _choose_tile(self, batch: Tensor, on_note: Callable | None) -> int:
        """A tile that covers the picture if it fits in memory, else the largest that does."""
        height, width = batch.shape[-2:]
        whole = max(height, width)
        free = available_bytes(self.device)
        if self.device.type == 'cpu':
            free -= 4 * batch.nelement() * 4  # the result, and what becomes of it
        usable = max(0, free) * _USABLE_SHARE
        pixels = _round_up(height) * _round_up(width)
        if pixels * _AMPLE_BYTES_PER_PIXEL <= usable:
            return whole
        if self._bytes_per_pixel is None:
            probe = torch.zeros(1, self.in_channels, _TILE_STEP, _TILE_STEP, device=self.device)
            with _named_failures(probe):
                self._bytes_per_pixel = peak_bytes(self.network, probe) / _TILE_STEP**2
        if pixels * self._bytes_per_pixel <= usable:
            return whole
        side = math.isqrt(int(usable / self._bytes_per_pixel))
        tile = max(_TILE_STEP, side // _TILE_STEP * _TILE_STEP)
        if self.overlap is not None and self.overlap >= tile:
            raise OptionError(
                f'memory allows tiles of {tile}, no larger than the overlap of {self.overlap}: '
                'choose a smaller --overlap'
            )
        _tell(
            on_note,
            f'{width}x{height} needs about {pixels * self._bytes_per_pixel / 2**30:.1f} GiB, '
            f'{usable / 2**30:.1f} GiB can be used: restored in tiles of {tile}',
        )
        return tile


def check_tile_options(tile: int | None, overlap: int | None) -> None:
    """Check what is asked for; None leaves the choice to us.

    Raises:
        OptionError: if it makes no sense.
    """
    if tile is not None:
        check_tiling(tile, 0 if overlap is None else overlap)
    elif overlap is not None and overlap < 0:
        raise OptionError(f'overlap is {overlap}: expected a number of pixels, 0 or more')


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of that name; None takes the first GPU, or the CPU where there is none.

    Raises:
        OptionError: if there is no such device here.
    """
    if name is None:
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        count = torch.cuda.device_count()
        have = f'cpu, cuda:0 to cuda:{count - 1}' if count > 1 else 'cpu, cuda' if count else 'cpu'
        raise OptionError(f'device {name!s} cannot be used here, there is: {have} ({_one_line(error)})') from error
    return device


def build_network(options: Mapping[str, Any]) -> nn.Module:
    """Build a registered network, without the toolbox's log lines.

    Args:
        options: `type`, the registered name, and the network's arguments.
    Raises:
        OptionError: if no such network is registered, or it does not take these arguments.
    """
    import basicsr.archs  # noqa: F401 - registers the toolbox's networks
    from basicsr.utils.registry import ARCH_REGISTRY

    arguments = dict(options)
    name = arguments.pop('type', None)
    registered = next((key for key in (name, f'{name}_basicsr') if key in ARCH_REGISTRY), None)
    if registered is None:
        known = [key.removesuffix('_basicsr') for key in ARCH_REGISTRY.keys()]  # noqa: SIM118 - not a dictionary
        raise OptionError(
            f'no network is registered as {name}{did_you_mean(str(name), known)} '
            '(is its plugin installed? `basicsr list arch` shows what there is)'
        )
    try:
        return ARCH_REGISTRY.get(registered)(**arguments)
    except PluginError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AssertionError, RuntimeError) as error:
        # Networks of others check their arguments each in their own way.
        raise OptionError(f'the network {name} cannot be built with {arguments}: {_one_line(error)}') from error


@contextmanager
def _named_failures(patch: Tensor):
    """Give what a network raises the size it was given, and memory that ran out on a CPU its name."""
    try:
        yield
    except (torch.cuda.OutOfMemoryError, PluginError):
        raise
    except RuntimeError as error:
        if 'allocate memory' in str(error) or 'not enough memory' in str(error):
            raise MemoryError(str(error)) from error
        raise ShapeError(f'the network failed on {patch.shape[-1]}x{patch.shape[-2]}: {_one_line(error)}') from error


def _tell(on_note: Callable[[str], None] | None, note: str) -> None:
    if on_note is not None:
        on_note(note)


def _round_up(size: int) -> int:
    return -(-size // _TILE_STEP) * _TILE_STEP


def _one_line(error: BaseException) -> str:
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f'{text[:300]}…'
