"""Tiled inference: run a network on images of any size, in tiles if the image does not fit in memory."""

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
from ast_plugin.ops import frozen_weights, requested_backend
from ast_plugin.ops.cuda_graphs import release_graphs, run_graphed
from ast_plugin.ops.tiles import check_tiling, run_tiled

AUTO = 'auto'

# Automatic tile sizes are multiples of this, to which AST pads.
_TILE_STEP = 128
# Upper bound for all known networks (AST-B needs 11 KB): with this much memory, measuring is unnecessary.
_AMPLE_BYTES_PER_PIXEL = 64 * 1024
# Leaves room for temporary buffers of kernels and for other processes.
_USABLE_SHARE = 0.5
# Measured, by device, dtype, backend and whether autocast is enabled.
_bytes_per_pixel: weakref.WeakKeyDictionary[nn.Module, dict[tuple, float]] = weakref.WeakKeyDictionary()

OnTile = Callable[[int, int], None]
OnNote = Callable[[str], None]


@dataclass(frozen=True)
class Tiling:
    """Settings of tiled inference.

    Args:
        tile: tile size in pixels; 'auto' processes the whole image if it fits in the available memory, else the largest
            tiles that fit; None always processes the whole image.
        overlap: overlap of neighbouring tiles in pixels; None for a quarter of the tile size.
        blend: blending of overlapping tiles, see `ast_plugin.ops.tiles.run_tiled`.
        batch: number of tiles processed together.
    Raises:
        OptionError: if a value is invalid.
    """

    tile: int | str | None = AUTO
    overlap: int | None = None
    blend: str = 'ramp'
    batch: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.tile, str) and self.tile != AUTO:
            raise OptionError(f'tile is {self.tile!r}: expected the tile size in pixels, or {AUTO}')
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
            network: maps [N, C, h, w] to [N, D, s·h, s·w]. Inputs of a module are moved to its device and padded to
                sizes that it supports, see `any_size`.
            image: [B, C, H, W], floating point, on any device.
            on_tile: called with (tiles done, total number of tiles).
            on_note: called with a message when the tile size or the number of tiles per batch is reduced.
        Returns:
            [B, D, s·H, s·W] on the device of the image; float64 for a float64 image (computed in float32 on MPS), else
            float32.
        Raises:
            MemoryShortage: if the image does not fit in memory with the requested tiles.
            ShapeError: if the network fails on these sizes.
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
                    note(f'{shown} in batches of {batch} does not fit in memory, trying batches of {batch // 2}')
                    batch //= 2
                    continue
                smaller = min(tile, whole) // 2 // _TILE_STEP * _TILE_STEP
                if self.tile != AUTO or smaller == 0:
                    # Tiles smaller than the padding multiple of the network need the same memory.
                    can_help = is_in_network and min(tile, whole) > getattr(run, 'size_multiple', 1)
                    advice = (
                        f'choose a tile size below {min(tile, whole)} (--tile, or in an option file '
                        'val.protocol: {type: tiled, tile: N})'
                        if can_help
                        else 'smaller tiles would not help: close other programs, raise `ulimit -v`, or split the image'
                    )
                    raise MemoryShortage(f'{shown} does not fit in the memory of {device}; {advice}') from error
                note(f'{shown} does not fit in memory, trying tiles of {smaller}')
                tile = smaller

    def _choose_tile(self, network: Callable, run: Callable, image: Tensor, device: torch.device, note: OnNote) -> int:
        """Return a tile size that covers the image if it fits in memory, else the largest one that fits."""
        height, width = image.shape[-2:]
        whole = max(height, width)
        free = available_bytes(device)
        if device.type == 'cpu':
            result = image.nelement() * 4
            if free < 2 * result:  # independent of the tile size
                raise MemoryShortage(
                    f'{width}x{height} does not fit in memory: its result needs {2 * result / 2**30:.2f} GiB, but '
                    f'{free / 2**30:.2f} GiB are available; close other programs, raise `ulimit -v`, or split the image'
                )
            free -= 4 * result  # includes copies made when the result is converted and encoded
        usable = max(0, free) * _USABLE_SHARE / len(image)
        pixels = math.prod(-(-side // _TILE_STEP) * _TILE_STEP for side in (height, width))
        if pixels * _AMPLE_BYTES_PER_PIXEL <= usable:
            return whole
        known = _bytes_per_pixel.setdefault(network, {}) if isinstance(network, nn.Module) else {}
        key = device, image.dtype, requested_backend(), torch.is_autocast_enabled(device.type)
        if key not in known:
            size, dtype = (1, image.shape[1], _TILE_STEP, _TILE_STEP), widest_dtype(image.dtype, device)
            probe = torch.zeros(size, dtype=dtype, device=device)
            with _explain_failures(probe):
                known[key] = max(1, peak_bytes(lambda: run(probe), device)) / _TILE_STEP**2
        needed = pixels * known[key]
        if needed <= usable:
            return whole
        side = math.isqrt(int(usable / self.batch / known[key]))
        tile = max(_TILE_STEP, side // _TILE_STEP * _TILE_STEP)
        if self.overlap is not None and self.overlap >= tile:
            raise MemoryShortage(
                f'only tiles of {tile} fit in memory, but the overlap is {self.overlap}: choose an overlap below {tile}'
            )
        note(
            f'{width}x{height} needs about {needed / 2**30:.1f} GiB, but '
            f'{usable / 2**30:.1f} GiB are usable: restored in tiles of {tile}'
        )
        return tile


@contextmanager
def evaluating(network: nn.Module | Callable) -> Iterator[None]:
    """Context for inference: evaluation mode, no gradients, frozen weights, and convolutions without TF32."""
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
    cudnn = torch.backends.cudnn  # the other flags are passed on, as `flags` would reset them
    return cudnn.flags(cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False)


@contextmanager
def _explain_failures(patch: Tensor) -> Iterator[None]:
    """Convert errors of a network, except for out of memory, to ShapeError with the image size."""
    try:
        yield
    except Exception as error:  # third-party networks raise any type
        if isinstance(error, PluginError) or out_of_memory(error):
            raise
        raise ShapeError(f'the network failed on {patch.shape[-1]}x{patch.shape[-2]}: {one_line(error)}') from error
