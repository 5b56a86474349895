"""Running a network on an image of any size: in one piece where it fits in memory, else in tiles."""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ast_plugin.errors import OptionError, PluginError, ShapeError, one_line
from ast_plugin.evaluation.cost import available_bytes, peak_bytes
from ast_plugin.ops import frozen_weights
from ast_plugin.ops.tiles import BLENDS, check_tiling, run_tiled

AUTO = 'auto'

# Tiles that are chosen have sides of so many pixels, and no fewer: AST pads to this multiple.
_TILE_STEP = 128
# No network we know takes so much (AST-B takes 11 KB): with room for this, nothing needs to be measured.
_AMPLE_BYTES_PER_PIXEL = 64 * 1024
# Half of what is free, as kernels allocate more than their results and others live on the machine.
_USABLE_SHARE = 0.5

OnTile = Callable[[int, int], None]
OnNote = Callable[[str], None]


class MemoryShortage(OptionError):
    """An image does not fit in memory in the way that was asked for."""


class Tiling:
    """How a network is run on images that may be too large for it.

    Args:
        tile: side of a tile in pixels; 'auto' takes the whole image where it fits in the free memory and the largest
            tile that does elsewhere; None takes the whole image, come what may.
        overlap: pixels that neighbouring tiles share; None for a quarter of the tile.
        blend: how tiles are joined, see `ast_plugin.ops.tiles.run_tiled`.
        batch: tiles of one size that go through together.
    Raises:
        OptionError: if these make no sense.
    """

    def __init__(
        self, tile: int | str | None = AUTO, overlap: int | None = None, blend: str = 'ramp', batch: int = 1
    ) -> None:
        check_tile_options(tile, overlap, blend, batch)
        self.tile, self.overlap, self.blend, self.batch = tile, overlap, blend, batch
        self._bytes_per_pixel: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()

    def run(
        self,
        network: nn.Module | Callable[[Tensor], Tensor],
        image: Tensor,
        on_tile: OnTile | None = None,
        on_note: OnNote | None = None,
    ) -> Tensor:
        """Run a network on an image.

        Args:
            network: maps [N, C, h, w] to [N, D, s·h, s·w]; a module gets its tiles on its own device.
            image: [B, C, H, W], floating point, on any device.
            on_tile: called with (tiles done, tiles in all).
            on_note: called with a line when tiles or fewer tiles at once are chosen because memory is short.
        Returns:
            [B, D, s·H, s·W], float32 or float64 as the image, on the image's device.
        Raises:
            MemoryShortage: if the image does not fit in memory as asked for.
            ShapeError: if the network does not take these sizes.
        """
        device = _device_of(network, image)
        dtype = image.dtype if image.dtype == torch.float64 else torch.float32

        def apply(patches: Tensor) -> Tensor:
            with _named_failures(patches):
                return network(patches.to(device)).to(image.device, dtype)

        height, width = image.shape[-2:]
        whole, batch = max(height, width), self.batch
        tile = self.tile or whole
        if tile == AUTO:
            tile = self._choose_tile(network, image, device, on_note)
        while True:
            overlap = tile // 4 if self.overlap is None else min(self.overlap, tile - 1)
            try:
                return run_tiled(apply, image, tile, overlap, self.blend, on_tile, batch)
            except (torch.cuda.OutOfMemoryError, MemoryError) as error:
                shown = f'{width}x{height} in tiles of {tile}' if tile < whole else f'{width}x{height}'
                if tile < whole and batch > 1:
                    _tell(on_note, f'{shown}, {batch} at once, does not fit in memory, trying {batch // 2}')
                    batch //= 2
                    continue
                smaller = min(tile, whole) // 2 // _TILE_STEP * _TILE_STEP
                if self.tile != AUTO or smaller == 0:
                    raise MemoryShortage(
                        f'{shown} does not fit in the memory of {device}; choose tiles smaller than {min(tile, whole)} '
                        '(--tile, or in an option file val.protocol: {type: tiled, tile: N})'
                    ) from error
                _tell(on_note, f'{shown} does not fit in memory, trying tiles of {smaller}')
                tile = smaller

    def _choose_tile(self, network: Callable, image: Tensor, device: torch.device, on_note: OnNote | None) -> int:
        """A tile that covers the image if it fits in memory, else the largest that does."""
        height, width = image.shape[-2:]
        whole = max(height, width)
        free = available_bytes(device)
        if device.type == 'cpu':
            free -= 4 * image.nelement() * 4  # the result, and what becomes of it
        usable = max(0, free) * _USABLE_SHARE / len(image)
        pixels = _round_up(height) * _round_up(width)
        if pixels * _AMPLE_BYTES_PER_PIXEL <= usable:
            return whole
        bytes_per_pixel = self._measure(network, image, device)
        if pixels * bytes_per_pixel <= usable:
            return whole
        side = math.isqrt(int(usable / self.batch / bytes_per_pixel))
        tile = max(_TILE_STEP, side // _TILE_STEP * _TILE_STEP)
        if self.overlap is not None and self.overlap >= tile:
            raise MemoryShortage(
                f'memory allows tiles of {tile}, no larger than the overlap of {self.overlap}: choose a smaller overlap'
            )
        _tell(
            on_note,
            f'{width}x{height} needs about {pixels * bytes_per_pixel / 2**30:.1f} GiB, '
            f'{usable / 2**30:.1f} GiB can be used: restored in tiles of {tile}',
        )
        return tile

    def _measure(self, network: Callable, image: Tensor, device: torch.device) -> float:
        """Bytes that the network needs for each pixel of an image, measured once on a small one."""
        known = self._bytes_per_pixel if isinstance(network, nn.Module) else {}
        if network not in known:
            probe = torch.zeros(1, image.shape[1], _TILE_STEP, _TILE_STEP, dtype=image.dtype, device=device)
            with _named_failures(probe):
                known[network] = max(1, peak_bytes(network, probe)) / _TILE_STEP**2
        return known[network]


def check_tile_options(tile: int | str | None, overlap: int | None, blend: str = 'ramp', batch: int = 1) -> None:
    """Check what `Tiling` is given.

    Raises:
        OptionError: if it makes no sense.
    """
    if isinstance(tile, str) and tile != AUTO:
        raise OptionError(f'tile is {tile!r}: expected the side of a tile in pixels, or {AUTO}')
    if isinstance(tile, int):
        check_tiling(tile, 0 if overlap is None else overlap)
    elif overlap is not None and overlap < 0:
        raise OptionError(f'overlap is {overlap}: expected a number of pixels, 0 or more')
    if blend not in BLENDS:
        raise OptionError(f'blend is {blend!r}: expected one of {", ".join(BLENDS)}')
    if batch < 1:
        raise OptionError(f'batch is {batch}: expected a number of tiles, 1 or more')


@contextmanager
def evaluating(network: nn.Module | Callable) -> Iterator[None]:
    """Put a module into evaluation mode, and compute what is measured in float32, without gradients, weights frozen."""
    was_training = isinstance(network, nn.Module) and network.training
    if was_training:
        network.eval()
    try:
        with torch.inference_mode(), frozen_weights(), torch.backends.cudnn.flags(allow_tf32=False):
            yield
    finally:
        if was_training:
            network.train()


def _device_of(network: Callable, image: Tensor) -> torch.device:
    parameters = network.parameters() if isinstance(network, nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), image.device)


@contextmanager
def _named_failures(patch: Tensor) -> Iterator[None]:
    """Give what a network raises the size it was given, and memory that ran out on a CPU its name."""
    try:
        yield
    except (torch.cuda.OutOfMemoryError, PluginError):
        raise
    except RuntimeError as error:
        if 'allocate memory' in str(error) or 'not enough memory' in str(error):
            raise MemoryError(str(error)) from error
        raise ShapeError(f'the network failed on {patch.shape[-1]}x{patch.shape[-2]}: {one_line(error)}') from error


def _tell(on_note: OnNote | None, note: str) -> None:
    if on_note is not None:
        on_note(note)


def _round_up(size: int) -> int:
    return -(-size // _TILE_STEP) * _TILE_STEP
