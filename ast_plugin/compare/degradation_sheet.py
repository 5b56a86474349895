"""One picture that shows every degradation: the clean photograph, the degraded one, and the mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ast_plugin.data.image_files import ImageFile, read_rgb, write_image
from ast_plugin.degradations import DEGRADATIONS
from ast_plugin.evaluation.contact_sheet import Cell, draw_contact_sheet

SHOWN_SIZE = (480, 720)  # height and width of the photographs that are degraded
CELL_WIDTH = 300  # pixels of each on the sheet
DETAIL = 3  # magnification of what is shown where there is no mask
QUALITY = 74
# Which photograph shows a degradation well, of those that come with packages.
_FITTING = {
    'rain': 'rocket',
    'raindrop': 'motorcycle_left',
    'haze': 'china',
    'snow': 'flower',
    'shadow': 'coffee',
    'moire': 'astronaut',
}


def draw_degradations(
    photographs: Mapping[str, Path], tasks: Sequence[str] | None = None, seed: int = 0
) -> Image.Image:
    """Draw a row of pictures for each degradation.

    Args:
        photographs: by name; the row of a degradation takes one that suits it, else one after the other.
        tasks: names of degradations, or None for all.
        seed: another seed draws others.
    Raises:
        DataError: if a photograph cannot be read.
    """
    names = list(photographs)
    rows = []
    for number, task in enumerate(tasks or DEGRADATIONS):
        name = _FITTING.get(task)
        name = name if name in photographs else names[number % len(names)]
        clean = _cropped(read_rgb(photographs[name]))
        rows.append(_row(task, name, clean, np.random.default_rng([seed, number])))
    return draw_contact_sheet(['clean', 'degraded', 'mask'], rows, CELL_WIDTH)


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write the sheet in the format that the name ends with, JPEG with a quality that suits a web page.

    Raises:
        DataError: if the file cannot be written.
    """
    write_image(path, ImageFile(np.asarray(sheet.convert('RGB'))), quality=QUALITY)


def _row(task: str, name: str, clean: np.ndarray, generator: np.random.Generator) -> list[Cell]:
    row = DEGRADATIONS[task]
    degraded, mask = row.apply(clean, generator, row.parameters())
    psnr = -10 * np.log10(max(float(np.mean((degraded - clean) ** 2)), 1e-12))
    if mask is None:
        third = Cell(_detail(_to_bytes(degraded)), f'a detail, {DETAIL} times enlarged (no mask)')
    else:
        third = Cell(np.repeat(_to_bytes(mask)[..., None], 3, axis=2), f'mean {mask.mean():.2f}')
    return [Cell(_to_bytes(clean), name), Cell(_to_bytes(degraded), f'{task}, {psnr:.1f} dB'), third]


def _cropped(image: np.ndarray) -> np.ndarray:
    """The largest part of the ratio that is shown, in the size that is shown, float32; rather the upper part."""
    height, width = image.shape[:2]
    scale = min(height / SHOWN_SIZE[0], width / SHOWN_SIZE[1])
    high, wide = max(1, int(SHOWN_SIZE[0] * scale)), max(1, int(SHOWN_SIZE[1] * scale))
    top, left = (height - high) // 5, (width - wide) // 2
    method = cv2.INTER_AREA if scale > 1 else cv2.INTER_CUBIC
    part = cv2.resize(image[top : top + high, left : left + wide], SHOWN_SIZE[::-1], interpolation=method)
    return part / np.float32(np.iinfo(image.dtype).max)


def _detail(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[0] // DETAIL, image.shape[1] // DETAIL
    top, left = (image.shape[0] - height) // 4, (image.shape[1] - width) // 2
    part = image[top : top + height, left : left + width]
    return cv2.resize(part, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_NEAREST)


def _to_bytes(image: np.ndarray) -> np.ndarray:
    return np.rint(image * 255).astype(np.uint8)
