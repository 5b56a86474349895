"""Contact sheets: images side by side with headings and captions."""

import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ast_plugin.data.image_files import read_rgb
from ast_plugin.degradations import DEGRADATIONS
from ast_plugin.errors import ShapeError
from ast_plugin.files import write_file
from ast_plugin.names import drawable

PAPER, INK, FAINT = '#ffffff', '#1b1b1b', '#6b6b6b'
GAP = 16  # margin around images in pixels
HEADING, CAPTION = 24, 18  # font sizes in pixels
_STRIP_GAP = 8
_THUMBNAIL_SIDE = 512  # longest side in pixels
_DEGRADED_SIZE = (480, 720)  # (height, width) of the images in `draw_degradations`
_DEGRADED_WIDTH = 300  # width of their cells in pixels
_DETAIL = 3  # magnification of the detail shown in place of a mask
# Packaged photo that best shows each degradation.
_FITTING = {'rain': 'rocket', 'raindrop': 'motorcycle_left', 'haze': 'china'}
_FITTING |= {'snow': 'flower', 'shadow': 'coffee', 'moire': 'astronaut'}


class Cell(NamedTuple):
    """An image, RGB [H, W, 3] uint8, and its single-line caption."""

    image: np.ndarray
    caption: str = ''


def draw_contact_sheet(columns: Sequence[str], rows: Sequence[Sequence[Cell]], cell_width: int = 480) -> Image.Image:
    """Draw rows of images under column headings, all scaled to the same width.

    Args:
        columns: heading of each column.
        rows: rows with one cell per column; the images of a row have equal sizes.
        cell_width: width of an image on the sheet in pixels.
    Raises:
        ShapeError: if the number of cells of a row is not the number of columns, or image sizes in a row differ.
    """
    for row in rows:
        sizes = {cell.image.shape for cell in row}
        if len(row) != len(columns) or len(sizes) != 1:
            raise ShapeError(
                f'expected {len(columns)} images of equal size in a row, got {len(row)} of {sorted(sizes)}'
            )
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


def draw_degradations(images: Mapping[str, Path], tasks: Sequence[str] | None = None, seed: int = 0) -> Image.Image:
    """Draw one row per degradation: clean image, degraded image and mask.

    Args:
        images: files by name; each degradation uses its preferred packaged photo if present, else the next image.
        tasks: names of degradations, or None for all.
        seed: random seed.
    """
    names = list(images)
    rows = []
    for number, task in enumerate(tasks or DEGRADATIONS):
        name = _FITTING.get(task)
        name = name if name in images else names[number % len(names)]
        clean = _crop(read_rgb(images[name]))
        row = DEGRADATIONS[task]
        degraded, mask = row.apply(clean, np.random.default_rng([seed, number]), row.parameters())
        psnr = -10 * np.log10(max(float(np.mean((degraded - clean) ** 2)), 1e-12))
        if mask is None:
            third = Cell(_detail(_to_uint8(degraded)), f'detail, enlarged {_DETAIL} times (no mask)')
        else:
            third = Cell(np.repeat(_to_uint8(mask)[..., None], 3, axis=2), f'mean {mask.mean():.2f}')
        rows.append([Cell(_to_uint8(clean), name), Cell(_to_uint8(degraded), f'{task}, {psnr:.1f} dB'), third])
    return draw_contact_sheet(['clean', 'degraded', 'mask'], rows, _DEGRADED_WIDTH)


def _crop(image: np.ndarray) -> np.ndarray:
    """Return the largest crop of the aspect ratio shown, off-centre upwards, resized, float32 in [0, 1]."""
    whole = Image.fromarray(_to_uint8(image / np.float32(np.iinfo(image.dtype).max)))
    part = ImageOps.fit(whole, _DEGRADED_SIZE[::-1], Image.Resampling.BICUBIC, centering=(0.5, 0.2))
    return np.asarray(part) / np.float32(255)


def _detail(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[0] // _DETAIL, image.shape[1] // _DETAIL
    top, left = (image.shape[0] - height) // 4, (image.shape[1] - width) // 2
    part = image[top : top + height, left : left + width]
    return cv2.resize(part, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_NEAREST)


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return np.rint(image * 255).astype(np.uint8)


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet as PNG atomically, and create its folder if necessary; raise FileError if that fails."""
    content = io.BytesIO()
    sheet.save(content, format='PNG', optimize=True)
    write_file(path, content.getvalue(), make_folder=True)


def make_thumbnails(images: Sequence[np.ndarray], longest: int = _THUMBNAIL_SIDE) -> tuple[np.ndarray, ...]:
    """Resize images of one scene to the size of the last one, or smaller.

    Args:
        images: RGB or gray, [H, W, 3], [H, W, 1] or [H, W], uint8.
        longest: maximum length of the longer side in pixels.
    Returns:
        RGB, [h, w, 3], uint8.
    """
    if not images:
        return ()
    height, width = images[-1].shape[:2]
    factor = min(1.0, longest / max(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    thumbnails = []
    for image in images:
        is_smaller = image.shape[0] < size[1]
        scaled = cv2.resize(image, size, interpolation=cv2.INTER_NEAREST if is_smaller else cv2.INTER_AREA)
        thumbnails.append(cv2.cvtColor(scaled, cv2.COLOR_GRAY2RGB) if scaled.ndim == 2 else scaled)
    return tuple(thumbnails)


def join_images(images: Sequence[np.ndarray]) -> np.ndarray:
    """Join images of equal size into a horizontal strip, RGB, [h, w, 3], uint8."""
    gap = np.full((len(images[0]), _STRIP_GAP, 3), 255, np.uint8)
    return np.concatenate([part for image in images for part in (gap, image)][1:], axis=1)


def _write_text(pen: ImageDraw.ImageDraw, text: str, left: int, top: int, width: int, size: int, ink: str) -> None:
    """Write a line of text, reducing the font size until it fits into the column."""
    text, file = drawable(text, width // 4)  # approximately the number of characters that fit at the smallest size
    load = ImageFont.load_default if file is None else partial(ImageFont.truetype, file)
    while size > 8 and pen.textlength(text, font=load(size)) > width:
        size -= 1
    pen.text((left, top), text, fill=ink, font=load(size))
