"""PSNR (in decibels) and SSIM in the definitions that papers use. Of equal images PSNR is inf and SSIM 1.

All take an image and its reference as `ast_plugin.metrics.images.check_pair` does, and raise what it raises.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from torch import Tensor

from ast_plugin.errors import ShapeError
from ast_plugin.metrics.images import check_pair, fractions, matlab_luma

TRAINING_LUMA = np.array([65.738, 129.057, 25.064], np.float32) / 256  # of the release: BT.601's to three digits
_GAUSSIAN_SIDE, _GAUSSIAN_SIGMA = 11, 1.5
_UNIFORM_SIDE = 7


def _uniform_means(plane: np.ndarray) -> np.ndarray:
    """Means over squares; along one side and then the other, so that float32 is rounded where scikit-image rounds."""
    columns = cv2.boxFilter(plane, -1, (1, _UNIFORM_SIDE))
    return cv2.boxFilter(columns, -1, (_UNIFORM_SIDE, 1))


def _gaussian_means(plane: np.ndarray) -> np.ndarray:
    kernel = cv2.getGaussianKernel(_GAUSSIAN_SIDE, _GAUSSIAN_SIGMA, cv2.CV_64F)
    return cv2.sepFilter2D(plane, -1, kernel, kernel)


class Window(NamedTuple):
    """What SSIM takes its local means over.

    Attributes:
        side: in pixels, odd.
        means: [H, W] to the means around each pixel, [H, W].
        correction: of variances; n / (n - 1) makes them those of samples.
    """

    side: int
    means: Callable[[np.ndarray], np.ndarray]
    correction: float = 1.0


UNIFORM = Window(_UNIFORM_SIDE, _uniform_means, _UNIFORM_SIDE**2 / (_UNIFORM_SIDE**2 - 1))
GAUSSIAN = Window(_GAUSSIAN_SIDE, _gaussian_means)


def psnr_rgb(image: np.ndarray | Tensor, reference: np.ndarray | Tensor) -> float:
    """PSNR over all pixels and channels, of values that are not rounded; peak 1.

    Numerics: squares in float32, or float64 where an image is that; their mean in float64.
    Source: scikit-image, `peak_signal_noise_ratio`; the AST release's figures on AGAN-Data and Dense-Haze.
    """
    image, reference = check_pair(image, reference)
    return _decibels(fractions(image) - fractions(reference), peak=1)


def psnr_y_matlab(image: np.ndarray | Tensor, reference: np.ndarray | Tensor, bit_depth: int = 8) -> float:
    """PSNR of the luma of images rounded to 8 or 16 bits, the luma rounded too; peak 255 or 65535. Gray is luma.

    Numerics: float64.
    Source: MATLAB's `rgb2ycbcr` and `20 log10(255 / rmse)`, the usual script for deraining; the AST release's on SPAD.
    """
    image, reference = check_pair(image, reference)
    luma, other = (matlab_luma(each, bit_depth) for each in (image, reference))
    return _decibels(luma - other, peak=2**bit_depth - 1)


def psnr_y_float(image: np.ndarray | Tensor, reference: np.ndarray | Tensor) -> float:
    """PSNR of the luma of RGB values that are not rounded; peak 1.

    Numerics: float32, or float64 where an image is that: six digits.
    Source: `batch_PSNR(…, 'y')` by which Uformer and the AST release pick the best weights while they train.
    """
    image, reference = check_pair(image, reference)
    if image.shape[2] != 3:
        raise ShapeError(f'psnr_y_float expects RGB, three channels; got {image.shape[2]}')
    difference = ((fractions(image) - fractions(reference)) * TRAINING_LUMA).sum(axis=2)
    root = np.sqrt(np.square(difference).mean())
    return math.inf if root == 0 else float(20 * np.log10(1 / root))


def ssim_rgb(image: np.ndarray | Tensor, reference: np.ndarray | Tensor) -> float:
    """SSIM of each channel, of values that are not rounded, and the mean over the channels; range 1.

    Windows are uniform squares of 7 pixels that lie inside of the image; variances are those of samples (49/48).

    Numerics: as there: float32 (some 1e-7 off), or float64 where both images are that; the mean in float64.
    Source: scikit-image, `structural_similarity(…, channel_axis=2, data_range=1)`; the AST release on AGAN-Data.
    """
    image, reference = check_pair(image, reference)
    _check_size(image, _UNIFORM_SIDE)

    pairs = zip(cv2.split(fractions(image)), cv2.split(fractions(reference)), strict=True)
    return float(np.mean([_similarity(*pair, UNIFORM, peak=1) for pair in pairs]))


def ssim_y_matlab(image: np.ndarray | Tensor, reference: np.ndarray | Tensor, bit_depth: int = 8) -> float:
    """SSIM of the luma of images rounded to 8 or 16 bits, the luma rounded too; range 255 or 65535. Gray is luma.

    Windows are Gaussian, of 11 pixels and sigma 1.5, and lie inside of the image.

    Numerics: float64.
    Source: Wang et al., TIP 2004, after MATLAB's `rgb2ycbcr`: the usual script for deraining, the AST release on SPAD.
    """
    image, reference = check_pair(image, reference)
    _check_size(image, _GAUSSIAN_SIDE)
    planes = (matlab_luma(each, bit_depth) for each in (image, reference))
    return float(_similarity(*planes, GAUSSIAN, peak=2**bit_depth - 1))


def _decibels(difference: np.ndarray, peak: float) -> float:
    mean_square = float(np.square(difference).mean(dtype=np.float64))
    return math.inf if mean_square == 0 else 20 * math.log10(peak) - 10 * math.log10(mean_square)


def similarity_map(x: np.ndarray, y: np.ndarray, window: Window, peak: float) -> np.ndarray:
    """SSIM of two planes [H, W] where windows lie inside, [H - side + 1, W - side + 1], in the dtype of the planes."""
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
    return similarity_map(x, y, window, peak).mean(dtype=np.float64).astype(x.dtype)


def _check_size(image: np.ndarray, least: int) -> None:
    height, width = image.shape[:2]
    if min(height, width) < least:
        raise ShapeError(f'the images have {width}x{height} pixels: SSIM needs at least {least} a side')
