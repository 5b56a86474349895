"""Rows of a shifted map where they lie, and the masks at its edges, for `fused_cpu_assa`: no rolled copies of maps."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from ast_plugin.ops.fused_cpu_kernels import Strip
from ast_plugin.ops.windows import MASKED


@lru_cache(maxsize=32)
def edge_masks(window: int, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """Masks of a shifted map's last row of windows, last column, and the corner between: [window**2, window**2].

    They are those of `windows.shift_mask`, of which all other windows have zeros. Shared, not to be written to.
    """
    with torch.inference_mode(False), torch.no_grad():
        came_over = (
            (torch.arange(window, device='cpu') >= window - shift).repeat_interleave(window).reshape(window, window)
        )
        rows, columns = came_over.flatten(), came_over.t().flatten()
        differ = [part[:, None] != part[None, :] for part in (rows, columns)]
        return tuple(MASKED * where.float() for where in (*differ, differ[0] | differ[1]))


def rolled(x: Tensor, group: Strip, shift: int) -> Tensor:
    """Rows of the map as it would be when rolled by `shift` up and left, [b, rows, W, C]."""
    images = group.images_of(x)
    rows = _segments(group.first, group.last, x.shape[1], shift)
    columns = _segments(0, x.shape[2], x.shape[2], shift)
    if len(rows) == len(columns) == 1:
        return images[:, rows[0]]
    bands = [torch.cat([images[:, row, column] for column in columns], dim=2) for row in rows]
    return bands[0] if len(bands) == 1 else torch.cat(bands, dim=1)


def pieces(out: Tensor, own: Tensor, x: Tensor, group: Strip, shift: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Views of a map to write to, of the rolled rows that belong there, and of another map at the same place."""
    target, source, top = group.images_of(out), group.images_of(x), 0
    for rows in _segments(group.first, group.last, x.shape[1], shift):
        left, bottom = 0, top + rows.stop - rows.start
        for columns in _segments(0, x.shape[2], x.shape[2], shift):
            right = left + columns.stop - columns.start
            yield target[:, rows, columns], own[:, top:bottom, left:right], source[:, rows, columns]
            left = right
        top = bottom


def _segments(first: int, last: int, size: int, shift: int) -> list[slice]:
    """Where [first, last) of a side that was rolled back by `shift` lies in the side as it was: one piece or two."""
    start, end = first + shift, last + shift
    if end <= size or start >= size:
        return [slice(start % size, (end - 1) % size + 1)]
    return [slice(start, size), slice(0, end - size)]
