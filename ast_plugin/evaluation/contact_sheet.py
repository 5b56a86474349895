"""Images side by side, each with a caption: what a reader looks at before any table."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ast_plugin.errors import ShapeError
from ast_plugin.files import write_file

PAPER, INK, FAINT = '#ffffff', '#1b1b1b', '#6b6b6b'
GAP = 16  # pixels between images and around them
HEADING, CAPTION = 24, 18  # font sizes in pixels
_STRIP_GAP = 8
_THUMBNAIL_SIDE = 512  # longest side in pixels


@dataclass(frozen=True)
class Cell:
    """An image and its caption.

    Attributes:
        image: RGB, [H, W, 3], uint8.
        caption: one line.
    """

    image: np.ndarray
    caption: str = ''


def draw_contact_sheet(columns: Sequence[str], rows: Sequence[Sequence[Cell]], cell_width: int = 480) -> Image.Image:
    """Draw rows of images under headings, all scaled to one width.

    Args:
        columns: a heading for each column.
        rows: as many cells each; the images of a row have one size.
        cell_width: width of an image on the sheet in pixels.
    Raises:
        ShapeError: if a row has other than one cell a column, or images of several sizes.
    """
    for row in rows:
        sizes = {cell.image.shape for cell in row}
        if len(row) != len(columns) or len(sizes) != 1:
            raise ShapeError(f'a row needs {len(columns)} images of one size, not {len(row)} of {sorted(sizes)}')
    heights = [round(cell_width * row[0].image.shape[0] / row[0].image.shape[1]) for row in rows]
    top, below = HEADING + 2 * GAP, CAPTION + 2 * GAP
    sheet = Image.new('RGB', (GAP + len(columns) * (cell_width + GAP), top + sum(h + below for h in heights)), PAPER)
    pen = ImageDraw.Draw(sheet)
    lefts = [GAP + column * (cell_width + GAP) for column in range(len(columns))]
    for left, heading in zip(lefts, columns, strict=True):
        _write_text(pen, heading, left, GAP, cell_width, HEADING, INK)
    for row, height in zip(rows, heights, strict=True):
        for left, cell in zip(lefts, row, strict=True):
            image = Image.fromarray(cell.image).resize((cell_width, height), Image.Resampling.LANCZOS)
            sheet.paste(image, (left, top))
            _write_text(pen, cell.caption, left, top + height + GAP // 2, cell_width, CAPTION, FAINT)
        top += height + below
    return sheet


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet as PNG, whole or not at all; its folder is made.

    Raises:
        FileError: if that fails.
    """
    content = io.BytesIO()
    sheet.save(content, format='PNG', optimize=True)
    write_file(path, content.getvalue(), make_folder=True)


def make_thumbnails(images: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Scale images of one scene to the size of the last one, or less.

    Args:
        images: RGB or gray, [H, W, 3] or [H, W, 1], uint8.
    Returns:
        RGB, [h, w, 3], uint8, none longer than 512 pixels.
    """
    if not images:
        return ()
    height, width = images[-1].shape[:2]
    factor = min(1.0, _THUMBNAIL_SIDE / max(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    thumbnails = []
    for image in images:
        is_smaller = image.shape[0] < size[1]
        scaled = cv2.resize(image, size, interpolation=cv2.INTER_NEAREST if is_smaller else cv2.INTER_AREA)
        thumbnails.append(cv2.cvtColor(scaled, cv2.COLOR_GRAY2RGB) if scaled.ndim == 2 else scaled)
    return tuple(thumbnails)


def join_images(images: Sequence[np.ndarray]) -> np.ndarray:
    """Join images of one size to a strip, RGB, [h, w, 3], uint8."""
    gap = np.full((len(images[0]), _STRIP_GAP, 3), 255, np.uint8)
    return np.concatenate([part for image in images for part in (gap, image)][1:], axis=1)


def _write_text(pen: ImageDraw.ImageDraw, text: str, left: int, top: int, width: int, size: int, ink: str) -> None:
    """Write a line, smaller if it would leave its column."""
    font = ImageFont.load_default(size)
    while size > 8 and pen.textlength(text, font=font) > width:
        size -= 1
        font = ImageFont.load_default(size)
    pen.text((left, top), text, fill=ink, font=font)
