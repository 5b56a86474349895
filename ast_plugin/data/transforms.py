"""Cutting and turning images that belong together. Arrays [H, W, C] of any dtype in, views or copies of them out.

Everything that is random is drawn from the generator that is passed in, in one fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

_GRAY = np.array([[0.299], [0.587], [0.114]], np.float32)  # of BT.601, as of MATLAB's rgb2gray


def window(image: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    """Return a rectangle of `image`; outside of the image it goes on as its reflection, as often as needed.

    The border pixel is not repeated; a single row or column, which has no reflection, is.
    """
    rows, columns = image.shape[:2]
    if top >= 0 and left >= 0 and top + height <= rows and left + width <= columns:
        return image[top : top + height, left : left + width]
    return image[_reflected(top, height, rows)[:, None], _reflected(left, width, columns)]


def _reflected(start: int, count: int, length: int) -> np.ndarray:
    """Indices start, start + 1, … of a line of `length` pixels that is reflected at both of its ends."""
    if length == 1:
        return np.zeros(count, np.intp)
    period = 2 * (length - 1)
    index = np.arange(start, start + count) % period
    return np.minimum(index, period - index)


def random_offset(shape: Sequence[int], size: int, generator: np.random.Generator) -> tuple[int, int]:
    """Draw the upper left corner of a square of `size` from all that fit, the last included.

    Along a side shorter than `size` the offset is 0: the square sticks out below or to the right.
    """
    top, left = (int(generator.integers(0, max(length - size, 0), endpoint=True)) for length in shape[:2])
    return top, left


def random_crop(images: Sequence[np.ndarray], size: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Cut the same random square out of images of one size; what is smaller than the square is reflected."""
    top, left = random_offset(images[0].shape, size, generator)
    return [window(image, top, left, size, size) for image in images]


def center_crop(images: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    """Cut the central square out of images of one size; a side shorter than the square stays as it is."""
    height, width = images[0].shape[:2]
    high, wide = min(size, height), min(size, width)
    return [window(image, (height - high) // 2, (width - wide) // 2, high, wide) for image in images]


def random_flip(
    images: Sequence[np.ndarray], use_hflip: bool, use_rot: bool, generator: np.random.Generator
) -> list[np.ndarray]:
    """Flip and turn square images alike.

    Args:
        images: [N, N, C] each, if `use_rot`.
        use_hflip: left and right may change places.
        use_rot: up and down may, and rows and columns may; as BasicSR's key of that name. Both: all eight symmetries.
        generator: one number is drawn whatever the switches are.
    """
    bits = int(generator.integers(0, 8))
    mirror, upside_down, transpose = bits & 1, bits & 2, bits & 4
    if use_hflip and mirror:
        images = [image[:, ::-1] for image in images]
    if use_rot and upside_down:
        images = [image[::-1] for image in images]
    if use_rot and transpose:
        images = [image.swapaxes(0, 1) for image in images]
    return list(images)


def to_channels(image: np.ndarray, count: int) -> np.ndarray:
    """Return RGB [H, W, 3] as it is, or for one channel its gray, [H, W, 1], 0.299 R + 0.587 G + 0.114 B.

    Gray is rounded to the dtype of the image; that of three equal channels of integers is what they are.
    """
    if count == 3:
        return image
    gray = image.astype(np.float32) @ _GRAY
    return gray if image.dtype.kind == 'f' else np.rint(gray).astype(image.dtype)


def to_float(image: np.ndarray) -> np.ndarray:
    """Return integers of 8 or 16 bits as float32 in [0, 1], contiguous; float images are taken to be there already."""
    if np.issubdtype(image.dtype, np.integer):
        return np.divide(image, np.float32(np.iinfo(image.dtype).max), dtype=np.float32, order='C')
    return np.ascontiguousarray(image, dtype=np.float32)


def to_tensor(image: np.ndarray, keep_uint8: bool = False) -> torch.Tensor:
    """Return a copy of [H, W, C] of 8 bits, 16 bits or float as a contiguous tensor [C, H, W], float32 in [0, 1].

    With `keep_uint8` 8 bits stay as they are, uint8 in [0, 255]: a fourth of the bytes to move, until `to_unit_range`.
    """
    planes = image.transpose(2, 0, 1)
    if keep_uint8 and image.dtype == np.uint8:
        return torch.from_numpy(planes.copy(order='C'))
    return torch.from_numpy(to_float(planes))


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 as float32 in [0, 1], the very numbers that `to_float` gives; other tensors as they are."""
    if images.dtype != torch.uint8:
        return images
    # A tensor to divide by: by a plain number CUDA multiplies with its reciprocal, which rounds otherwise.
    return images.float().div_(torch.tensor(255.0, device=images.device))


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a batch of samples as torch does, of images of 8 bits beside others only after `to_unit_range`."""
    for key in ('lq', 'gt'):
        if len({sample[key].dtype for sample in samples}) > 1:
            samples = [{**sample, key: to_unit_range(sample[key])} for sample in samples]
    return default_collate(samples)
