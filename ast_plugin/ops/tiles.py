"""Running a function on an image in overlapping tiles, which bounds memory, or on a padded image."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ast_plugin.errors import OptionError, ShapeError
from ast_plugin.ops.windows import keep_shape_in_trace, pad_image

BLENDS = ('ramp', 'mean')


def check_tiling(tile: int, overlap: int, blend: str = 'ramp', batch: int = 1) -> None:
    """Raise OptionError if an argument of `run_tiled` is out of range."""
    if overlap < 0:
        raise OptionError(f'overlap is {overlap}: expected a number of pixels, 0 or more')
    if tile < 1:
        raise OptionError(f'tile is {tile}: expected the tile size in pixels, 1 or more')
    if overlap >= tile:
        raise OptionError(f'overlap is {overlap} and tile is {tile}: the overlap must be smaller than the tile')
    if blend not in BLENDS:
        raise OptionError(f'blend is {blend!r}: expected one of {", ".join(BLENDS)}')
    if batch < 1:
        raise OptionError(f'batch is {batch}: expected a number of tiles, 1 or more')


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Return the first pixel of every tile along one side, in steps of `tile - overlap`, the last at `size - tile`.

    If the side is not longer than a tile, the only start is 0.
    Source: official protocol for AGAN-Data and Dense-Haze.
    """
    check_tiling(tile, overlap)
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def _ramp(tile: int, overlap: int) -> Tensor:
    """Blending weights of a tile's pixels by distance from an edge shared with another tile, [tile].

    The weight is 0 in the outer third of the overlap, where the network lacks context, rises as a raised cosine over
    the middle third, and is 1 from there on.
    """
    if overlap == 0:
        return torch.ones(tile, dtype=torch.float64)
    margin = (overlap + 1) // 3 if overlap > 2 else 0
    width = overlap - 2 * margin
    position = torch.arange(tile, dtype=torch.float64) - margin + 0.5
    return 0.5 - 0.5 * torch.cos(math.pi * (position / width).clamp(0, 1))


def _place_tiles(size: int, tile: int, overlap: int, blend: str) -> list[tuple[int, Tensor]]:
    """First pixel and blending weights of each tile along one side, float64, which add up to 1 at every pixel.

    The weights of the tile grid are the outer product of two sides. Normalising each side therefore normalises the
    grid, without a weight image in memory.
    """
    length = min(size, tile)
    ramp, flat = _ramp(length, overlap if blend == 'ramp' else 0), torch.ones(length, dtype=torch.float64)
    total, tiles = torch.zeros(size, dtype=torch.float64), []
    for start in tile_starts(size, tile, overlap):
        weight = (ramp if start > 0 else flat) * (ramp.flip(0) if start + length < size else flat)
        total[start : start + length] += weight
        tiles.append((start, weight))
    return [(start, weight / total[start : start + length]) for start, weight in tiles]


def run_tiled(
    function: Callable[[Tensor], Tensor],
    image: Tensor,
    tile: int,
    overlap: int,
    blend: str = 'ramp',
    on_tile: Callable[[int, int], None] | None = None,
    batch: int = 1,
) -> Tensor:
    """Apply a function to an image tile by tile and blend the results where tiles overlap.

    `function` needs memory for `batch` tiles; in addition, only the result is held, on the device of the image.
    An image that fits in one tile is processed at once. A side shorter than the tile is not split.

    Args:
        function: maps [N, C, h, w] to [N, D, s·h, s·w] with a fixed integer s >= 1, on any device.
        image: [B, C, H, W], floating point.
        tile: side length of a tile in pixels of the image, at least 1.
        overlap: pixels shared by neighbouring tiles, in [0, tile).
        blend: 'ramp' weights tiles by smooth ramps over the overlap, with weight 0 in its outer third. The result
            equals that of the untiled image if `function` is translation-equivariant and its receptive field
            reaches at most `overlap // 3` pixels. 'mean' is the plain average of the official protocols.
        on_tile: called with (tiles done, total tiles) after each batch of tiles.
        batch: number of tiles processed together, N = batch·B; larger batches make better use of a GPU for small tiles.
    Returns:
        [B, D, s·H, s·W], with the dtype of the function's output, on the device of the image.
    Raises:
        OptionError: if tile, overlap, blend or batch is out of range.
        ShapeError: if the image is not [B, C, H, W] or the output size is not an integer multiple of the input size.
    Source: tile positions and 'mean': official protocol for AGAN-Data and Dense-Haze.
    """
    check_tiling(tile, overlap, blend, batch)
    if image.ndim != 4 or 0 in image.shape:
        raise ShapeError(f'run_tiled expects a non-empty image [B, C, H, W], got {list(image.shape)}')
    height, width = image.shape[-2:]
    if height <= tile and width <= tile:
        result = function(image)
        _scale_of(image, result)
        if on_tile is not None:
            on_tile(1, 1)
        return result.to(image.device)

    places = list(itertools.product(*(_place_tiles(side, tile, overlap, blend) for side in (height, width))))
    result, scale = None, 1
    for first in range(0, len(places), batch):
        group = places[first : first + batch]
        patches = torch.cat([image[..., top : top + tile, left : left + tile] for (top, _), (left, _) in group])
        restored = function(patches)
        found = _scale_of(patches, restored)
        if result is None:
            scale = found
            shape = (len(image), restored.shape[1], height * scale, width * scale)
            result = torch.zeros(shape, dtype=restored.dtype, device=image.device)
        elif found != scale:
            raise ShapeError(f'expected one scale for all tiles, got {scale} for one tile and {found} for another')
        for ((top, row), (left, column)), part in zip(group, restored.split(len(image)), strict=True):
            weight = torch.outer(row.repeat_interleave(scale), column.repeat_interleave(scale))
            bottom, right = top * scale + part.shape[-2], left * scale + part.shape[-1]
            place = result[..., top * scale : bottom, left * scale : right]
            place.addcmul_(part.to(result.device), weight.to(result))
        if on_tile is not None:
            on_tile(first + len(group), len(places))
    return result


def run_padded(function: Callable[[Tensor], Tensor], image: Tensor, bottom: int, right: int) -> Tensor:
    """Run a function on an image padded at the bottom and right, and crop the result.

    Args:
        function: maps [B, C, h, w] to [B, D, s·h, s·w].
        image: [B, C, H, W].
        bottom, right: number of pixels to add, see `pad_image`.
    Returns:
        [B, D, s·H, s·W].
    Raises:
        ShapeError: if the function returns anything else, as some networks do in training mode.
    """
    # Third-party networks may record values computed from the image size as constants of a trace.
    padded = pad_image(image, bottom, right)
    padded = keep_shape_in_trace(padded, padded.shape)
    output = function(padded)
    if not isinstance(output, Tensor):
        raise ShapeError(f'expected a single image tensor, got {type(output).__name__}')
    scale = _scale_of(padded, output)
    height, width = image.shape[-2:]
    return output[..., : scale * height, : scale * width].contiguous()


def _scale_of(patch: Tensor, restored: Tensor) -> int:
    """Return the scale factor between a function's input and output."""
    height, width = patch.shape[-2:]
    scale = restored.shape[-2] // height if restored.ndim == 4 else 0
    if scale < 1 or restored.shape[0] != patch.shape[0] or restored.shape[-2:] != (height * scale, width * scale):
        raise ShapeError(
            f'expected output [B, D, s*H, s*W] with an integer s >= 1 for input {list(patch.shape)}, '
            f'got {list(restored.shape)}'
        )
    return scale
