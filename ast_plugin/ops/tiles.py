"""Running a network on an image in overlapping tiles, so that memory is bounded by the tile, or on a padded image."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ast_plugin.errors import OptionError, ShapeError
from ast_plugin.ops.windows import keep_shape_in_trace, pad_image

BLENDS = ('ramp', 'mean')


def check_tiling(tile: int, overlap: int, blend: str = 'ramp', batch: int = 1) -> None:
    """Raise OptionError unless these make sense as arguments of `run_tiled`."""
    if overlap < 0:
        raise OptionError(f'overlap is {overlap}: expected a number of pixels, 0 or more')
    if tile < 1:
        raise OptionError(f'tile is {tile}: expected the side of a tile in pixels, 1 or more')
    if overlap >= tile:
        raise OptionError(f'overlap is {overlap} and tile is {tile}: the overlap must be smaller than the tile')
    if blend not in BLENDS:
        raise OptionError(f'blend is {blend!r}: expected one of {", ".join(BLENDS)}')
    if batch < 1:
        raise OptionError(f'batch is {batch}: expected a number of tiles, 1 or more')


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """First pixel of every tile along one side: 0, then steps of `tile - overlap`, the last at `size - tile`.

    A side no longer than a tile has the single start 0.
    Source: official protocol for AGAN-Data and Dense-Haze.
    """
    check_tiling(tile, overlap)
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def _ramp(tile: int, overlap: int) -> Tensor:
    """Weights of a tile's pixels by their distance from an edge that another tile continues, [tile].

    The outer third of the overlap counts nothing, as the network saw no surroundings there; a raised cosine
    over the middle third joins the tiles; from there on a pixel counts fully.
    """
    if overlap == 0:
        return torch.ones(tile, dtype=torch.float64)
    margin = (overlap + 1) // 3 if overlap > 2 else 0
    width = overlap - 2 * margin
    position = torch.arange(tile, dtype=torch.float64) - margin + 0.5
    return 0.5 - 0.5 * torch.cos(math.pi * (position / width).clamp(0, 1))


def _axis_weights(size: int, tile: int, overlap: int, blend: str) -> list[Tensor]:
    """Weights of each tile along one side, float64, which add up to 1 at every pixel.

    The grid of tiles is a product of two sides, and so are its weights: normalising each side alone normalises
    the grid, and no image of weights need be held.
    """
    starts = tile_starts(size, tile, overlap)
    length = min(size, tile)
    ramp, flat = _ramp(length, overlap if blend == 'ramp' else 0), torch.ones(length, dtype=torch.float64)
    weights = [(ramp if start > 0 else flat) * (ramp.flip(0) if start + length < size else flat) for start in starts]
    total = torch.zeros(size, dtype=torch.float64)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + length] += weight
    return [weight / total[start : start + length] for start, weight in zip(starts, weights, strict=True)]


def run_tiled(
    function: Callable[[Tensor], Tensor],
    image: Tensor,
    tile: int,
    overlap: int,
    blend: str = 'ramp',
    on_tile: Callable[[int, int], None] | None = None,
    batch: int = 1,
) -> Tensor:
    """Apply a function to an image tile by tile, and blend the results where tiles overlap.

    What `function` needs is bounded by `batch` tiles; beside it only the result is held, on the image's device.
    An image that fits in a tile goes through in one piece, and a side shorter than the tile is taken whole.

    Args:
        function: maps [N, C, h, w] to [N, D, s·h, s·w] with one integer s >= 1, on any device.
        image: [B, C, H, W], floating point.
        tile: side of a tile in pixels of the image, at least 1.
        overlap: pixels that neighbouring tiles share, in [0, tile).
        blend: 'ramp' weighs tiles by smooth ramps over the overlap and leaves out its outer third, so that the
            result is that of the whole image wherever `function` reaches at most `overlap // 3` pixels far and is
            the same at every position; 'mean' is the plain average of the official protocols.
        on_tile: called with (tiles done, tiles in all) after each batch of tiles.
        batch: tiles that go through together, N = batch·B, which small tiles on a GPU want.
    Returns:
        [B, D, s·H, s·W], dtype of the function's output, device of the image.
    Raises:
        OptionError: if tile, overlap, blend or batch are out of range.
        ShapeError: if the image is not [B, C, H, W] or the function's output is no integer multiple of its input.
    Source: starts of the tiles and 'mean': official protocol for AGAN-Data and Dense-Haze.
    """
    check_tiling(tile, overlap, blend, batch)
    if image.ndim != 4 or 0 in image.shape:
        raise ShapeError(f'run_tiled expects an image [B, C, H, W] that is not empty, got {list(image.shape)}')
    height, width = image.shape[-2:]
    if height <= tile and width <= tile:
        result = function(image)
        _scale_of(image, result)
        if on_tile is not None:
            on_tile(1, 1)
        return result.to(image.device)

    sides = (
        zip(tile_starts(side, tile, overlap), _axis_weights(side, tile, overlap, blend), strict=True)
        for side in (height, width)
    )
    places = list(itertools.product(*sides))
    result, scale = None, 1
    for first in range(0, len(places), batch):
        group = places[first : first + batch]
        patches = [image[..., top : top + tile, left : left + tile] for (top, _), (left, _) in group]
        patches = torch.cat(patches) if len(patches) > 1 else patches[0]
        restored = function(patches)
        found = _scale_of(patches, restored)
        if result is None:
            scale = found
            shape = (len(image), restored.shape[1], height * scale, width * scale)
            result = torch.zeros(shape, dtype=restored.dtype, device=image.device)
        elif found != scale:
            raise ShapeError(f'the function enlarged one tile {scale} times and another {found}: tiles need one scale')
        for ((top, row), (left, column)), part in zip(group, restored.split(len(image)), strict=True):
            weight = torch.outer(row.repeat_interleave(scale), column.repeat_interleave(scale))
            bottom, right = top * scale + part.shape[-2], left * scale + part.shape[-1]
            place = result[..., top * scale : bottom, left * scale : right]
            place.addcmul_(part.to(result.device), weight.to(result))
        if on_tile is not None:
            on_tile(first + len(group), len(places))
    return result


def run_padded(function: Callable[[Tensor], Tensor], image: Tensor, bottom: int, right: int) -> Tensor:
    """Run a function on an image that is padded at the bottom and the right, and crop its result.

    Args:
        function: maps [B, C, h, w] to [B, D, s·h, s·w].
        image: [B, C, H, W].
        bottom, right: pixels to add, see `pad_image`.
    Returns:
        [B, D, s·H, s·W].
    Raises:
        ShapeError: if the function returns anything else, as some networks do in training.
    """
    # What networks of others compute from the size of an image while they are traced would stay as it is.
    padded = pad_image(image, bottom, right)
    padded = keep_shape_in_trace(padded, padded.shape)
    output = function(padded)
    if not isinstance(output, Tensor):
        raise ShapeError(f'expected one tensor of images, got a {type(output).__name__}')
    scale = _scale_of(padded, output)
    height, width = image.shape[-2:]
    return output[..., : scale * height, : scale * width].contiguous()


def _scale_of(patch: Tensor, restored: Tensor) -> int:
    """How many times larger the function's output is than its input."""
    height, width = patch.shape[-2:]
    scale = restored.shape[-2] // height if restored.ndim == 4 else 0
    if scale < 1 or restored.shape[0] != patch.shape[0] or restored.shape[-2:] != (height * scale, width * scale):
        raise ShapeError(
            f'the function gave {list(restored.shape)} for {list(patch.shape)}: expected '
            '[B, D, s*H, s*W] with an integer s >= 1'
        )
    return scale
