"""PSNR (in decibels) and SSIM, in the definitions of papers and in all common definitions at once.

The papers' definitions are functions of an image and its reference, see `check_pair`. For equal images PSNR is inf and
SSIM is 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from ast_plugin.errors import DataError, OptionError, ShapeError

LARGEST = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}
LUMA = np.array([65.481, 128.553, 24.966])
"""RGB in [0, 1] to BT.601 luma (black 16, white 235) without its offset of 16."""
GRAY = np.array([0.299, 0.587, 0.114])
TRAINING_LUMA = np.array([65.738, 129.057, 25.064], np.float32) / 256  # AST release

_ROUNDING = 1e-6  # tolerance for arithmetic after clamping


def check_pair(image: np.ndarray | Tensor, reference: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return both images as arrays [H, W, C] with unchanged values.

    Args:
        image, reference: arrays, gray [H, W] or [H, W, 1] or RGB [H, W, 3]; or tensors, [C, H, W] or [1, C, H, W], on
            any device. uint8, uint16, or floating point in [0, 1]; the two may have different dtypes.
    Raises:
        ShapeError: if one is not such an image, or their sizes differ.
        DataError: if floating-point values are not in [0, 1].
    """
    pair = as_array(image, 'the image'), as_array(reference, 'the reference')
    if pair[0].shape != pair[1].shape:
        sizes = (f'{W}x{H} with {C} channel{"s" if C > 1 else ""}' for H, W, C in (each.shape for each in pair))
        raise ShapeError(f'the image is {next(sizes)} and the reference {next(sizes)}: expected the same size')
    return pair


def as_array(image: np.ndarray | Tensor, name: str = 'the image') -> np.ndarray:
    """Return one image as in `check_pair`; `name` is used in messages."""
    if isinstance(image, Tensor):
        planes = image[0] if image.ndim == 4 and len(image) == 1 else image
        if planes.ndim != 3:
            raise ShapeError(f'{name} is a tensor {list(image.shape)}: expected [C, H, W] or [1, C, H, W]')
        planes = planes.float() if planes.dtype in (torch.float16, torch.bfloat16) else planes
        image = planes.detach().cpu().numpy().transpose(1, 2, 0)
    if not isinstance(image, np.ndarray):
        raise ShapeError(f'{name} is a {type(image).__name__}: expected an array or a tensor')
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise ShapeError(f'{name} is {list(image.shape)}: expected [H, W] or [H, W, 3], not empty')
    if image.dtype not in LARGEST:
        if not np.issubdtype(image.dtype, np.floating):
            raise ShapeError(f'{name} has dtype {image.dtype}: expected uint8, uint16 or floating point')
        low, high = float(image.min()), float(image.max())
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
            raise DataError(f'{name} has values from {low:g} to {high:g}: expected [0, 1] in floating point')
    return image


def fractions(image: np.ndarray) -> np.ndarray:
    """Return the values in [0, 1], in float64 for float64 images, else in float32, as in evaluation scripts."""
    dtype = np.result_type(image.dtype if image.dtype not in LARGEST else np.float32, np.float32)
    return np.divide(image, LARGEST.get(image.dtype, 1), dtype=dtype)


def to_integers(image: np.ndarray, bit_depth: int = 8) -> np.ndarray:
    """Return the values as 8-bit or 16-bit integers, rounded half to even."""
    dtype = np.dtype(f'uint{bit_depth}')
    if image.dtype == dtype:
        return image
    return np.rint(fractions(image).clip(0, 1) * np.float32(LARGEST[dtype])).astype(dtype)


def matlab_luma(image: np.ndarray, bit_depth: int = 8) -> np.ndarray:
    """Return the luma of MATLAB's `rgb2ycbcr` for an 8-bit or 16-bit image, float64 [H, W]; gray images are unchanged.

    White is 235 of 255, or 60395 of 65535. Halves are rounded away from zero, as in MATLAB.
    """
    image = to_integers(image, bit_depth)
    if image.shape[2] == 1:
        return image[..., 0].astype(np.float64)
    return np.floor(image.astype(np.float64) @ (LUMA / 255) + (16 * LARGEST[image.dtype] / 255 + 0.5))


def to_toolbox(image: np.ndarray) -> np.ndarray:
    """Convert RGB or gray [H, W, C] to the input of BasicSR's metrics: BGR, uint8 or floating point in [0, 255]."""
    image = image[..., ::-1]
    if image.dtype == np.uint16:  # in float64, to preserve 16-bit values
        return np.divide(image, 257, order='C')
    return np.ascontiguousarray(image if image.dtype == np.uint8 else image * image.dtype.type(255))


def from_toolbox(image: np.ndarray, crop_border: int = 0, input_order: str = 'HWC') -> np.ndarray:
    """Convert BasicSR's BGR or gray images in [0, 255] to RGB or gray [H, W, C], uint8 or floating point in [0, 1].

    Raises:
        OptionError: if the input order is unknown or the border negative.
        ShapeError: if it is not such an image, or the border removes all of it.
        DataError: if values are outside [0, 255].
    """
    if input_order not in ('HWC', 'CHW'):
        raise OptionError(f'input_order is {input_order!r}: expected HWC or CHW')
    if crop_border < 0:
        raise OptionError(f'crop_border is {crop_border}: expected a number of pixels, 0 or more')
    if image.ndim == 2:
        image = image[..., None]
    elif input_order == 'CHW':
        image = image.transpose(1, 2, 0)
    height, width, _ = image.shape
    if min(height, width) <= 2 * crop_border:
        raise ShapeError(f'crop_border {crop_border} leaves nothing of an image of {width}x{height} pixels')
    image = image[crop_border : height - crop_border, crop_border : width - crop_border, ::-1]
    if image.dtype == np.uint8:
        return image
    low, high = float(image.min()), float(image.max())
    if not (low >= -1e-3 and high <= 255 + 1e-3):
        raise DataError(f'an image has values from {low:g} to {high:g}: expected [0, 255], as in BasicSR')
    return np.divide(image, 255, dtype=np.result_type(image.dtype, np.float32)).clip(0, 1)


class Window(NamedTuple):
    """Window over which SSIM computes local means."""

    side: int  # in pixels, odd
    means: Callable[[np.ndarray], np.ndarray]  # [H, W] to local means [H, W]
    correction: float = 1.0  # factor of variances; n / (n - 1) for sample variances


def _uniform_means(plane: np.ndarray) -> np.ndarray:
    # Separable, one axis after the other, so that float32 is rounded as in scikit-image.
    return cv2.boxFilter(cv2.boxFilter(plane, -1, (1, 7)), -1, (7, 1))


def _gaussian_means(plane: np.ndarray) -> np.ndarray:
    kernel = cv2.getGaussianKernel(11, 1.5, cv2.CV_64F)
    return cv2.sepFilter2D(plane, -1, kernel, kernel)


UNIFORM = Window(7, _uniform_means, correction=49 / 48)
GAUSSIAN = Window(11, _gaussian_means)


def decibels(mean_square: float, peak: float = 255) -> float:
    """Return the PSNR of a mean squared error; inf for 0."""
    return math.inf if mean_square == 0 else 20 * math.log10(peak) - 10 * math.log10(mean_square)


def psnr_rgb(image: np.ndarray | Tensor, reference: np.ndarray | Tensor) -> float:
    """Return the PSNR over all pixels and channels, without rounding; peak 1.

    Numerics: squares in float32, or in float64 if an image is float64; their mean in float64.
    Source: scikit-image, `peak_signal_noise_ratio`; the AST release's figures on AGAN-Data and Dense-Haze.
    """
    image, reference = check_pair(image, reference)
    return decibels(_mean_square(fractions(image) - fractions(reference)), peak=1)


def psnr_y_matlab(image: np.ndarray | Tensor, reference: np.ndarray | Tensor, bit_depth: int = 8) -> float:
    """Return the PSNR of the rounded luma of images rounded to 8 or 16 bits; peak 255 or 65535. Gray is luma.

    Numerics: float64.
    Source: MATLAB's `rgb2ycbcr` and `20 log10(255 / rmse)`, the usual deraining script; the AST release on SPAD.
    """
    image, reference = check_pair(image, reference)
    luma, other = (matlab_luma(each, bit_depth) for each in (image, reference))
    return decibels(_mean_square(luma - other), peak=2**bit_depth - 1)


def psnr_y_float(image: np.ndarray | Tensor, reference: np.ndarray | Tensor) -> float:
    """Return the PSNR of the luma of RGB images, without rounding; peak 1.

    Numerics: float32 (six digits), or float64 if an image is float64.
    Source: `batch_PSNR(…, 'y')`, with which Uformer and the AST release select the best weights during training.
    """
    image, reference = check_pair(image, reference)
    if image.shape[2] != 3:
        raise ShapeError(f'psnr_y_float expects RGB images with three channels; got {image.shape[2]}')
    difference = ((fractions(image) - fractions(reference)) * TRAINING_LUMA).sum(axis=2)
    root = np.sqrt(np.square(difference).mean())
    return math.inf if root == 0 else float(20 * np.log10(1 / root))


def ssim_rgb(image: np.ndarray | Tensor, reference: np.ndarray | Tensor) -> float:
    """Return the mean SSIM over the channels, without rounding; range 1.

    Windows are uniform 7x7 squares inside the image; variances are sample variances (49/48).

    Numerics: as in the source, float32 (error about 1e-7), or float64 if both images are; the mean in float64.
    Source: scikit-image, `structural_similarity(…, channel_axis=2, data_range=1)`; the AST release on AGAN-Data.
    """
    image, reference = check_pair(image, reference)
    planes = zip(cv2.split(fractions(image)), cv2.split(fractions(reference)), strict=True)
    return float(np.mean([_similarity(*pair, UNIFORM, peak=1) for pair in planes]))


def ssim_y_matlab(image: np.ndarray | Tensor, reference: np.ndarray | Tensor, bit_depth: int = 8) -> float:
    """Return the SSIM of the rounded luma of images rounded to 8 or 16 bits; range 255 or 65535. Gray is luma.

    Windows are 11x11 Gaussians with sigma 1.5 inside the image.

    Numerics: float64.
    Source: Wang et al., TIP 2004, after MATLAB's `rgb2ycbcr`: the usual deraining script; the AST release on SPAD.
    """
    image, reference = check_pair(image, reference)
    planes = (matlab_luma(each, bit_depth) for each in (image, reference))
    return float(_similarity(*planes, GAUSSIAN, peak=2**bit_depth - 1))


def _mean_square(difference: np.ndarray) -> float:
    return float(np.square(difference).mean(dtype=np.float64))


def similarity_map(x: np.ndarray, y: np.ndarray, window: Window, peak: float) -> np.ndarray:
    """Return the SSIM map [H - side + 1, W - side + 1] of two planes [H, W] in their dtype, without padding."""
    inside = slice(window.side // 2, -(window.side // 2))
    mean_x, mean_y, square_x, square_y, product = (
        window.means(plane)[inside, inside] for plane in (x, y, x * x, y * y, x * y)
    )
    variance_x = window.correction * (square_x - mean_x * mean_x)
    variance_y = window.correction * (square_y - mean_y * mean_y)
    covariance = window.correction * (product - mean_x * mean_y)
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return above / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))


def _similarity(x: np.ndarray, y: np.ndarray, window: Window, peak: float) -> np.floating:
    height, width = x.shape
    if min(height, width) < window.side:
        raise ShapeError(f'the images have {width}x{height} pixels: SSIM needs at least {window.side} per side')
    return similarity_map(x, y, window, peak).mean(dtype=np.float64).astype(x.dtype)


class _Channels(NamedTuple):
    text: str
    planes: Callable[[np.ndarray], np.ndarray]  # [H, W, 3] to [H, W, C], float64, range about 255


def _values(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float64) * (255 / LARGEST.get(image.dtype, 1))


CHANNELS = {
    'rgb': _Channels('RGB', _values),
    'luma_matlab': _Channels("luma rounded to 8 bits, MATLAB's rgb2ycbcr", lambda image: matlab_luma(image)[..., None]),
    'luma': _Channels('luma of BT.601, not rounded', lambda image: _values(image) @ LUMA[:, None] / 255 + 16),
    'luma_training': _Channels(
        "luma not rounded, Uformer's batch_PSNR", lambda image: _values(image) @ TRAINING_LUMA[:, None].astype(float)
    ),
    'gray': _Channels('gray rounded to 8 bits', lambda image: np.rint(to_integers(image) @ GRAY[:, None])),
}
WINDOWS = {
    'gaussian': ('Gaussian windows of 11', GAUSSIAN),
    'uniform': ('uniform windows of 7, variances of samples', UNIFORM),
    'gaussian_samples': ('Gaussian windows of 11, variances of samples', GAUSSIAN._replace(correction=121 / 120)),
}


class Definition(NamedTuple):
    """Definition of a metric: channels, window, border and averaging."""

    metric: str  # 'psnr' or 'ssim'
    channels: str  # a key of `CHANNELS`
    window: str = ''  # a key of `WINDOWS`, for SSIM
    border: int = 0  # pixels cropped at each side
    is_pooled: bool = False  # PSNR of the mean squared error over all images instead of mean PSNR

    @property
    def name(self) -> str:
        """Short name for tables."""
        return '_'.join(filter(None, [self.metric, self.channels, self.window]))

    def __str__(self) -> str:
        parts = [self.metric.upper(), CHANNELS[self.channels].text, self.window and WINDOWS[self.window][0]]
        parts.append(f'a border of {self.border} cut away' if self.border else 'no border cut away')
        if self.metric == 'psnr':
            parts.append('of the mean squared error' if self.is_pooled else 'mean over the images')
        return ', '.join(filter(None, parts))


KNOWN = {
    Definition('psnr', 'rgb'): 'scikit-image, BasicSR',
    Definition('ssim', 'rgb', 'uniform'): 'scikit-image',
    Definition('psnr', 'luma_matlab'): 'MATLAB scripts for deraining',
    Definition('ssim', 'luma_matlab', 'gaussian'): 'MATLAB scripts for deraining',
    Definition('psnr', 'luma'): 'BasicSR, test_y_channel',
    Definition('ssim', 'luma', 'gaussian'): 'BasicSR, test_y_channel',
    Definition('ssim', 'rgb', 'gaussian'): 'BasicSR',
    Definition('psnr', 'luma_training'): 'Uformer and AST, in training',
}
"""Definitions in common use, and their users."""


def all_definitions(metric: str, borders: Iterable[int] = range(13)) -> list[Definition]:
    """Return the definitions of a metric, those in common use first."""
    windows = WINDOWS if metric == 'ssim' else ('',)
    pooled = (False, True) if metric == 'psnr' else (False,)
    found = [
        Definition(metric, channels, window, border, is_pooled)
        for border in borders
        for is_pooled in pooled
        for channels in CHANNELS
        for window in windows
    ]
    return sorted(found, key=lambda definition: definition not in KNOWN)


def measure(
    image: np.ndarray | Tensor, reference: np.ndarray | Tensor, definitions: Sequence[Definition]
) -> dict[Definition, float]:
    """Measure a pair of images by many definitions; each plane and map is computed once.

    Args:
        image, reference: see `check_pair`. The single plane of gray images is their luma.
        definitions: the definitions; `is_pooled` has no effect for one pair.
    Returns:
        A value for each definition; NaN if the image is too small for the border or the window.
    Raises:
        ShapeError, DataError: as `check_pair`.
    Numerics: float64.
    """
    pair = check_pair(image, reference)

    @functools.cache
    def planes(channels: str) -> list[np.ndarray]:
        read = CHANNELS[channels].planes if pair[0].shape[2] == 3 else _values
        return [read(each) for each in pair]

    @functools.cache
    def values(channels: str, window: str) -> np.ndarray:
        """Return squared errors, or SSIM maps if there is a window, [H, W, C]."""
        x, y = planes(channels)
        if not window:
            return np.square(x - y)
        if min(x.shape[:2]) < WINDOWS[window][1].side:
            return np.empty((0, 0, 1))
        both = zip(np.moveaxis(x, 2, 0), np.moveaxis(y, 2, 0), strict=True)
        similar = [similarity_map(*map(np.ascontiguousarray, two), WINDOWS[window][1], 255) for two in both]
        return np.stack(similar, axis=2)

    measured = {}
    for definition in definitions:
        whole, border = values(definition.channels, definition.window), definition.border
        inner = whole[border : whole.shape[0] - border, border : whole.shape[1] - border]
        mean = float(inner.mean()) if inner.size else math.nan
        measured[definition] = decibels(mean) if definition.metric == 'psnr' else mean
    return measured


def mean_over_images(values: Sequence[float], is_pooled: bool = False) -> float:
    """Return the value of a set of images from the values of the images; see `Definition` for `is_pooled`.

    Images equal to their reference (PSNR inf) are excluded from a mean unless all are; pooled, they are included.
    """
    if is_pooled:
        return decibels(float(np.mean([255**2 / 10 ** (value / 10) for value in values])))
    return float(np.mean([value for value in values if value != math.inf] or values))


def gives(figure: str, value: float) -> str | None:
    """Return how a value matches a published figure to its digits: 'rounded', 'cut off' (truncated), or None."""
    digits = len(figure.partition('.')[2])
    unit = 10.0**-digits
    if not math.isfinite(value):
        return None
    if abs(value - float(figure)) <= unit / 2 * (1 + 1e-9):
        return 'rounded'
    return 'cut off' if 0 <= value - float(figure) < unit else None
