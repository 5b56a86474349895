"""Running a network on an image of any size: in one piece where it fits in memory, else in tiles."""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ast_plugin.archs.networks import any_size
from ast_plugin.devices import widest_dtype
from ast_plugin.errors import MemoryShortage, OptionError, PluginError, ShapeError, one_line, out_of_memory
from ast_plugin.evaluation.cost import available_bytes, peak_bytes
from ast_plugin.ops import frozen_weights
from ast_plugin.ops.cuda_graphs import release_graphs, run_graphed
from ast_plugin.ops.tiles import check_tiling, run_tiled

AUTO = 'auto'

# Tiles that are chosen have sides of so many pixels, and no fewer: AST pads to this multiple.
_TILE_STEP = 128
# No network we know takes so much (AST-B takes 11 KB): with room for this, nothing needs to be measured.
_AMPLE_BYTES_PER_PIXEL = 64 * 1024
# Half of what is free, as kernels allocate more than their results and others live on the machine.
_USABLE_SHARE = 0.5
_bytes_per_pixel: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()  # as measured

OnTile = Callable[[int, int], None]
OnNote = Callable[[str], None]


@dataclass(frozen=True)
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

    tile: int | str | None = AUTO
    overlap: int | None = None
    blend: str = 'ramp'
    batch: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.tile, str) and self.tile != AUTO:
            raise OptionError(f'tile is {self.tile!r}: expected the side of a tile in pixels, or {AUTO}')
        overlap = self.overlap or 0
        check_tiling(self.tile if isinstance(self.tile, int) else overlap + 1, overlap, self.blend, self.batch)

    def run(
        self,
        network: nn.Module | Callable[[Tensor], Tensor],
        image: Tensor,
        on_tile: OnTile | None = None,
        on_note: OnNote | None = None,
    ) -> Tensor:
        """Run a network on an image.

        Args:
            network: maps [N, C, h, w] to [N, D, s·h, s·w]; a module gets its tiles on its own device, and padded where
                it does not take every size, see `any_size`.
            image: [B, C, H, W], floating point, on any device.
            on_tile: called with (tiles done, tiles in all).
            on_note: called with a line when memory is short and tiles or fewer tiles at once are chosen.
        Returns:
            [B, D, s·H, s·W], float32 or float64 as the image (computed in float32 on MPS), on the image's device.
        Raises:
            MemoryShortage: if the image does not fit in memory as asked for.
            ShapeError: if the network does not take these sizes.
        """
        parameters = network.parameters() if isinstance(network, nn.Module) else iter(())
        device = next((parameter.device for parameter in parameters), image.device)
        dtype = image.dtype if image.dtype == torch.float64 else torch.float32
        note = on_note or (lambda line: None)
        run = any_size(network, image.shape[1]) if isinstance(network, nn.Module) else network

        is_in_network = False

        def apply(patches: Tensor) -> Tensor:
            nonlocal is_in_network
            is_in_network = True
            with _explain_failures(patches):
                own = patches.to(widest_dtype(patches.dtype, device)).to(device)
                result = run_graphed(network, run, own).to(image.device).to(dtype)
            is_in_network = False
            return result

        height, width = image.shape[-2:]
        whole, batch = max(height, width), self.batch
        tile = self._choose_tile(network, run, image, device, note) if self.tile == AUTO else self.tile or whole
        while True:
            overlap = tile // 4 if self.overlap is None else min(self.overlap, tile - 1)
            try:
                return run_tiled(apply, image, tile, overlap, self.blend, on_tile, batch)
            except Exception as error:
                if isinstance(error, PluginError) or not out_of_memory(error):
                    raise
                if release_graphs():
                    continue
                shown = f'{width}x{height} in tiles of {tile}' if tile < whole else f'{width}x{height}'
                if tile < whole and batch > 1:
                    note(f'{shown}, {batch} at once, does not fit in memory, trying {batch // 2}')
                    batch //= 2
                    continue
                smaller = min(tile, whole) // 2 // _TILE_STEP * _TILE_STEP
                if self.tile != AUTO or smaller == 0:
                    # Below the multiple that a network pads to, tiles take as much.
                    can_help = is_in_network and min(tile, whole) > getattr(run, 'size_multiple', 1)
                    advice = (
                        f'choose tiles smaller than {min(tile, whole)} (--tile, or in an option file '
                        'val.protocol: {type: tiled, tile: N})'
                        if can_help
                        else 'smaller tiles would not help: end other programs, raise `ulimit -v`, or cut the image up'
                    )
                    raise MemoryShortage(f'{shown} does not fit in the memory of {device}; {advice}') from error
                note(f'{shown} does not fit in memory, trying tiles of {smaller}')
                tile = smaller

    def _choose_tile(self, network: Callable, run: Callable, image: Tensor, device: torch.device, note: OnNote) -> int:
        """A tile that covers the image if it fits in memory, else the largest that does; `run` runs the network."""
        height, width = image.shape[-2:]
        whole = max(height, width)
        free = available_bytes(device)
        if device.type == 'cpu':
            result = image.nelement() * 4
            if free < 2 * result:  # which tiles would find out at their end
                raise MemoryShortage(
                    f'{width}x{height} does not fit in memory: its result takes {2 * result / 2**30:.2f} GiB, and '
                    f'{free / 2**30:.2f} GiB are free; end other programs, raise `ulimit -v`, or cut the image up'
                )
            free -= 4 * result  # with what becomes of it
        usable = max(0, free) * _USABLE_SHARE / len(image)
        pixels = math.prod(-(-side // _TILE_STEP) * _TILE_STEP for side in (height, width))
        if pixels * _AMPLE_BYTES_PER_PIXEL <= usable:
            return whole
        known = _bytes_per_pixel if isinstance(network, nn.Module) else {}
        if network not in known:
            size, dtype = (1, image.shape[1], _TILE_STEP, _TILE_STEP), widest_dtype(image.dtype, device)
            probe = torch.zeros(size, dtype=dtype, device=device)
            with _explain_failures(probe):
                known[network] = max(1, peak_bytes(lambda: run(probe), device)) / _TILE_STEP**2
        needed = pixels * known[network]
        if needed <= usable:
            return whole
        side = math.isqrt(int(usable / self.batch / known[network]))
        tile = max(_TILE_STEP, side // _TILE_STEP * _TILE_STEP)
        if self.overlap is not None and self.overlap >= tile:
            raise MemoryShortage(
                f'memory allows tiles of {tile}, no larger than the overlap of {self.overlap}: choose a smaller overlap'
            )
        note(
            f'{width}x{height} needs about {needed / 2**30:.1f} GiB, '
            f'{usable / 2**30:.1f} GiB can be used: restored in tiles of {tile}'
        )
        return tile


@contextmanager
def evaluating(network: nn.Module | Callable) -> Iterator[None]:
    """Put a module into evaluation mode, and compute what is measured in float32, without gradients, weights frozen."""
    was_training = isinstance(network, nn.Module) and network.training
    if was_training:
        network.eval()
    try:
        with torch.inference_mode(), frozen_weights(), _without_tf32():
            yield
    finally:
        if was_training:
            network.train()


def _without_tf32() -> AbstractContextManager:
    cudnn = torch.backends.cudnn  # whose other flags have defaults that switch it off
    return cudnn.flags(cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False)


@contextmanager
def _explain_failures(patch: Tensor) -> Iterator[None]:
    """Add the size to what a network raises, but where that is memory that ran out."""
    try:
        yield
    except Exception as error:  # networks of others raise what they like
        if isinstance(error, PluginError) or out_of_memory(error):
            raise
        raise ShapeError(f'the network failed on {patch.shape[-1]}x{patch.shape[-2]}: {one_line(error)}') from error
