"""Crops, flips and conversions of images, [H, W, C] of any dtype. Results may be views of the inputs.

All randomness comes from the generator passed in, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from ast_plugin.degradations.base import compress_jpeg

_GRAY = np.array([[0.299], [0.587], [0.114]], np.float32)  # BT.601, as in MATLAB's rgb2gray


def window(image: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    """Return a rectangle of `image`, padded by reflection (repeatedly if needed) where it exceeds the image.

    As in `reflect` padding, the border pixel is not repeated; a single row or column, however, is.
    """
    rows, columns = image.shape[:2]
    if top >= 0 and left >= 0 and top + height <= rows and left + width <= columns:
        return image[top : top + height, left : left + width]
    return image[_reflected(top, height, rows)[:, None], _reflected(left, width, columns)]


def _reflected(start: int, count: int, length: int) -> np.ndarray:
    """Return indices start, start + 1, … into a line of `length` pixels that is reflected at both ends."""
    if length == 1:
        return np.zeros(count, np.intp)
    period = 2 * (length - 1)
    index = np.arange(start, start + count) % period
    return np.minimum(index, period - index)


def random_offset(shape: Sequence[int], size: int, generator: np.random.Generator) -> tuple[int, int]:
    """Sample the top-left corner of a `size` × `size` crop, uniformly over all valid positions.

    Along a side shorter than `size` the offset is 0, so the crop extends beyond the bottom or right edge.
    """
    top, left = (int(generator.integers(0, max(length - size, 0), endpoint=True)) for length in shape[:2])
    return top, left


def random_crop(images: Sequence[np.ndarray], size: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Crop the same random square from images of equal size; images smaller than the crop are padded by reflection."""
    top, left = random_offset(images[0].shape, size, generator)
    return [window(image, top, left, size, size) for image in images]


def center_crop(images: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    """Crop the central square from images of equal size; a side shorter than `size` is not cropped."""
    height, width = images[0].shape[:2]
    high, wide = min(size, height), min(size, width)
    return [window(image, (height - high) // 2, (width - wide) // 2, high, wide) for image in images]


def random_flip(
    images: Sequence[np.ndarray], use_hflip: bool, use_rot: bool, generator: np.random.Generator
) -> list[np.ndarray]:
    """Apply the same random flips and transposition to square images.

    Args:
        images: [N, N, C] each; other shapes only without `use_rot`.
        use_hflip: flip horizontally with probability 1/2.
        use_rot: flip vertically and transpose, each with probability 1/2. With `use_hflip`, all eight symmetries.
        generator: source of randomness; exactly one number is drawn, whatever the switches are.
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


def add_camera_noise(
    images: Sequence[np.ndarray],
    generator: np.random.Generator,
    noise_range: tuple[float, float],
    jpeg_range: tuple[int, int],
) -> list[np.ndarray]:
    """Add the same Gaussian noise to all images, then compress each of them as JPEG of the same quality.

    What synthesis paints over an image has no noise of its own, which a network takes for the sign of a degradation,
    and does not find in photographs.

    Args:
        images: RGB, [H, W, 3] float32 in [0, 1], of equal size.
        generator: source of the strength, the quality and the noise, drawn in this order.
        noise_range: range of the standard deviation, relative to 255.
        jpeg_range: range of the quality, in [1, 100], limits included.
    Returns:
        [H, W, 3] float32 in [0, 1], multiples of 1/255.
    """
    sigma = generator.uniform(*noise_range) / 255
    quality = int(generator.integers(*jpeg_range, endpoint=True))
    noise = generator.standard_normal(images[0].shape, np.float32) * np.float32(sigma)
    noisy = (np.rint(255 * (image + noise)).clip(0, 255).astype(np.uint8) for image in images)
    return [to_float(compress_jpeg(image[..., ::-1], quality)[..., ::-1]) for image in noisy]


def to_channels(image: np.ndarray, count: int) -> np.ndarray:
    """Return RGB, [H, W, 3], unchanged, or for `count` 1 its gray, [H, W, 1], 0.299 R + 0.587 G + 0.114 B.

    Gray is rounded to the dtype of the image. Three equal integer channels keep their values.
    """
    if count == 3:
        return image
    gray = image.astype(np.float32) @ _GRAY
    return gray if image.dtype.kind == 'f' else np.rint(gray).astype(image.dtype)


def to_float(image: np.ndarray) -> np.ndarray:
    """Convert 8- or 16-bit integers to contiguous float32 in [0, 1]; float images are assumed to be in this range."""
    if np.issubdtype(image.dtype, np.integer):
        return np.divide(image, np.float32(np.iinfo(image.dtype).max), dtype=np.float32, order='C')
    return np.ascontiguousarray(image, dtype=np.float32)


def to_tensor(image: np.ndarray, keep_uint8: bool = False) -> torch.Tensor:
    """Convert [H, W, C], 8 bits, 16 bits or float, to a contiguous tensor [C, H, W], float32 in [0, 1]. Copies.

    With `keep_uint8`, 8-bit images stay uint8 in [0, 255], a quarter of the memory, until `to_unit_range`.
    """
    planes = image.transpose(2, 0, 1)
    if keep_uint8 and image.dtype == np.uint8:
        return torch.from_numpy(planes.copy(order='C'))
    return torch.from_numpy(to_float(planes))


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 to float32 in [0, 1], bit-identical to `to_float`; other tensors are returned unchanged."""
    if images.dtype != torch.uint8:
        return images
    # Divide by a tensor: for a Python number, CUDA multiplies by its reciprocal, which rounds differently.
    return images.float().div_(torch.tensor(255.0, device=images.device))


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate samples as torch does; if dtypes are mixed, uint8 images are converted by `to_unit_range` first."""
    for key in ('lq', 'gt'):
        if len({sample[key].dtype for sample in samples}) > 1:
            samples = [{**sample, key: to_unit_range(sample[key])} for sample in samples]
    return default_collate(samples)
