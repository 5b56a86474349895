"""The peak signal-to-noise ratio in decibels, in the definitions that papers use. Equal images have inf."""

import math

import numpy as np
from torch import Tensor

from ast_plugin.errors import ShapeError
from ast_plugin.metrics.images import check_pair, fractions, matlab_luma

_TRAINING_LUMA = np.array([65.738, 129.057, 25.064], np.float32) / 256


def psnr_rgb(image: np.ndarray | Tensor, reference: np.ndarray | Tensor) -> float:
    """PSNR over all pixels and channels, of values that are not rounded; peak 1.

    Args:
        image, reference: see `ast_plugin.metrics.images.check_pair`.
    Returns:
        Decibels; inf for equal images.
    Numerics: squares in float32, or float64 where an image is that; their mean in float64.
    Source: scikit-image, `peak_signal_noise_ratio`; the AST release's figures on AGAN-Data and Dense-Haze.
    """
    image, reference = check_pair(image, reference)
    return _decibels(fractions(image) - fractions(reference), peak=1)


def psnr_y_matlab(image: np.ndarray | Tensor, reference: np.ndarray | Tensor) -> float:
    """PSNR of the luma of images of 8 bits, the luma rounded to 8 bits too; peak 255.

    Args:
        image, reference: see `ast_plugin.metrics.images.check_pair`; rounded to 8 bits first, as the files are that
            MATLAB reads. Gray images count as luma.
    Returns:
        Decibels; inf for images whose luma is equal.
    Numerics: float64.
    Source: MATLAB's `rgb2ycbcr` and `20 log10(255 / rmse)`, the usual script for deraining; the AST release's on SPAD.
    """
    image, reference = check_pair(image, reference)
    return _decibels(matlab_luma(image) - matlab_luma(reference), peak=255)


def psnr_y_float(image: np.ndarray | Tensor, reference: np.ndarray | Tensor) -> float:
    """PSNR of the luma of values that are not rounded; peak 1.

    Args:
        image, reference: see `ast_plugin.metrics.images.check_pair`; RGB.
    Returns:
        Decibels; inf for images whose luma is equal.
    Raises:
        ShapeError: if the images are not RGB.
    Numerics: float32, or float64 where an image is that: six digits.
    Source: `batch_PSNR(…, 'y')` by which Uformer and the AST release pick the best weights while they train. Its
        coefficients, 65.738, 129.057 and 25.064 out of 256, are BT.601's to three digits.
    """
    image, reference = check_pair(image, reference)
    if image.shape[2] != 3:
        raise ShapeError(f'psnr_y_float expects RGB, three channels; got {image.shape[2]}')
    difference = ((fractions(image) - fractions(reference)) * _TRAINING_LUMA).sum(axis=2)
    root = np.sqrt(np.square(difference).mean())
    return math.inf if root == 0 else float(20 * np.log10(1 / root))


def _decibels(difference: np.ndarray, peak: float) -> float:
    mean_square = float(np.square(difference).mean(dtype=np.float64))
    return math.inf if mean_square == 0 else 20 * math.log10(peak) - 10 * math.log10(mean_square)
