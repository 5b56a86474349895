"""Pictures side by side, each with a caption: what a reader looks at before any table."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ast_plugin.data.matching import printable
from ast_plugin.errors import ShapeError
from ast_plugin.files import write_file

if TYPE_CHECKING:
    from ast_plugin.evaluation.results import ValidationResults

PAPER, INK, FAINT = '#ffffff', '#1b1b1b', '#6b6b6b'
GAP = 16  # pixels between pictures and around them
HEADING, CAPTION = 24, 18  # font sizes in pixels


@dataclass(frozen=True)
class Cell:
    """A picture and what is said below it.

    Attributes:
        image: RGB, [H, W, 3], uint8.
        caption: one line.
    """

    image: np.ndarray
    caption: str = ''


def draw_contact_sheet(columns: Sequence[str], rows: Sequence[Sequence[Cell]], cell_width: int = 480) -> Image.Image:
    """Draw rows of pictures under headings, all scaled to one width.

    Args:
        columns: a heading for each column.
        rows: as many cells each; the pictures of a row have one size.
        cell_width: width of a picture on the sheet in pixels.
    Raises:
        ShapeError: if a row has other than one cell a column, or pictures of several sizes.
    """
    for row in rows:
        sizes = {cell.image.shape for cell in row}
        if len(row) != len(columns) or len(sizes) != 1:
            raise ShapeError(f'a row needs {len(columns)} pictures of one size, not {len(row)} of {sorted(sizes)}')
    heights = [round(cell_width * row[0].image.shape[0] / row[0].image.shape[1]) for row in rows]
    top, below = HEADING + 2 * GAP, CAPTION + 2 * GAP
    sheet = Image.new('RGB', (GAP + len(columns) * (cell_width + GAP), top + sum(h + below for h in heights)), PAPER)
    pen = ImageDraw.Draw(sheet)
    lefts = [GAP + column * (cell_width + GAP) for column in range(len(columns))]
    for left, heading in zip(lefts, columns, strict=True):
        _write(pen, heading, left, GAP, cell_width, HEADING, INK)
    for row, height in zip(rows, heights, strict=True):
        for left, cell in zip(lefts, row, strict=True):
            picture = Image.fromarray(cell.image).resize((cell_width, height), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left, top))
            _write(pen, cell.caption, left, top + height + GAP // 2, cell_width, CAPTION, FAINT)
        top += height + below
    return sheet


def draw_examples(results: ValidationResults) -> Image.Image | None:
    """Draw the worst images of a test and its best ones: input, result and clean picture, each with its scores.

    Returns:
        The sheet; None where nothing was measured.
    """
    names, ranks = results.examples(), results.ranks()
    if not names:
        return None
    rows = []
    for name in names:
        captions = [
            f'{printable(name)}: {_scores(results.degraded.get(name, {}))}'.removesuffix(': '),
            _scores(results.restored[name]),
            f'rank {ranks[name]} of {len(ranks)} by {results.ranking.metric}',
        ]
        rows.append([Cell(*pair) for pair in zip(results.thumbnails[name], captions, strict=True)])
    return draw_contact_sheet(('input', 'restored', 'ground truth'), rows)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG, in a folder that is made where it is not there.

    Raises:
        FileError: if that fails; no part of the file is left.
    """
    buffer = io.BytesIO()
    picture.save(buffer, format='PNG', optimize=True)
    write_file(path, buffer.getvalue(), make_folder=True)


def _scores(values: Mapping[str, float]) -> str:
    return ', '.join(f'{metric} {value:.{2 if abs(value) >= 2 else 4}f}' for metric, value in values.items())


def _write(pen: ImageDraw.ImageDraw, text: str, left: int, top: int, width: int, size: int, ink: str) -> None:
    """Write a line, smaller if it would leave its column."""
    font = ImageFont.load_default(size)
    while size > 8 and pen.textlength(text, font=font) > width:
        size -= 1
        font = ImageFont.load_default(size)
    pen.text((left, top), text, fill=ink, font=font)
