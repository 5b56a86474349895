"""Images as metrics take them: checked pairs of one size; pixels as 8 bits, fractions, luma, or as BasicSR has them."""

import numpy as np
from torch import Tensor

from ast_plugin.errors import DataError, OptionError, ShapeError

LARGEST = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}
LUMA = np.array([65.481, 128.553, 24.966])
"""RGB in [0, 1] to the Y of BT.601, which goes from 16 (black) to 235 (white)."""

_ROUNDING = 1e-6  # what arithmetic may add to a value that was clamped


def check_pair(image: np.ndarray | Tensor, reference: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return both images as arrays [H, W, C], their values as they are.

    Args:
        image, reference: arrays, gray [H, W] or [H, W, 1] or RGB [H, W, 3]; or tensors, [C, H, W] or [1, C, H, W], on
            any device. uint8, uint16, or floating point in [0, 1]; the two may differ in that.
    Raises:
        ShapeError: if one is no such image, or they differ in size.
        DataError: if values of floating point are not in [0, 1].
    """
    pair = as_array(image, 'the image'), as_array(reference, 'the reference')
    if pair[0].shape != pair[1].shape:
        raise ShapeError(
            f'the image is {_shown(pair[0])} and the reference {_shown(pair[1])}: expected two images of one size'
        )
    return pair


def as_array(image: np.ndarray | Tensor, name: str = 'the image') -> np.ndarray:
    """One image as `check_pair` returns it; `name` is what messages call it."""
    if isinstance(image, Tensor):
        if image.ndim == 4 and len(image) == 1:
            image = image[0]
        if image.ndim != 3:
            raise ShapeError(f'{name} is a tensor {list(image.shape)}: expected [C, H, W] or [1, C, H, W]')
        image = image.detach().cpu()
        image = (image if image.element_size() > 2 or not image.is_floating_point() else image.float()).numpy()
        image = image.transpose(1, 2, 0)
    if not isinstance(image, np.ndarray):
        raise ShapeError(f'{name} is a {type(image).__name__}: expected an array or a tensor')
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise ShapeError(f'{name} is {list(image.shape)}: expected [H, W] or [H, W, 3], not empty')
    if image.dtype not in LARGEST:
        if not np.issubdtype(image.dtype, np.floating):
            raise ShapeError(f'{name} is of {image.dtype}: expected uint8, uint16 or floating point')
        low, high = float(image.min()), float(image.max())
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
            raise DataError(f'{name} has values from {low:g} to {high:g}: expected [0, 1] in floating point')
    return image


def fractions(image: np.ndarray) -> np.ndarray:
    """The values in [0, 1], as float64 if they are that, else as float32: what evaluation scripts compute with."""
    dtype = np.result_type(image.dtype if image.dtype not in LARGEST else np.float32, np.float32)
    return np.divide(image, LARGEST.get(image.dtype, 1), dtype=dtype)


def to_integers(image: np.ndarray, bit_depth: int = 8) -> np.ndarray:
    """The values as a file of 8 or 16 bits holds them, rounded to the nearest, of two to the even one."""
    dtype = np.dtype(f'uint{bit_depth}')
    if image.dtype == dtype:
        return image
    return np.rint(fractions(image).clip(0, 1) * np.float32(LARGEST[dtype])).astype(dtype)


def matlab_luma(image: np.ndarray, bit_depth: int = 8) -> np.ndarray:
    """The first plane of MATLAB's `rgb2ycbcr` of an image of 8 or 16 bits, as float64, [H, W]; gray images as they are.

    White is 235 of 255, or 60395 of 65535. Halves are rounded away from zero, as MATLAB's integers are.
    """
    image = to_integers(image, bit_depth)
    if image.shape[2] == 1:
        return image[..., 0].astype(np.float64)
    return np.floor(image.astype(np.float64) @ (LUMA / 255) + (16 * LARGEST[image.dtype] / 255 + 0.5))


def to_toolbox(image: np.ndarray) -> np.ndarray:
    """RGB or gray, [H, W, C], as BasicSR's metrics take it: BGR, uint8, or floating point in [0, 255].

    Args:
        image: uint8; uint16, of which float64 up to 255.0 is made, so that no value is lost; or float in [0, 1].
    """
    image = image[..., ::-1]
    if image.dtype == np.uint16:
        return np.divide(image, 257, order='C')
    return np.ascontiguousarray(image if image.dtype == np.uint8 else image * image.dtype.type(255))


def from_toolbox(image: np.ndarray, crop_border: int = 0, input_order: str = 'HWC') -> np.ndarray:
    """BGR or gray in [0, 255], as BasicSR gives it, as RGB or gray, uint8 or floating point in [0, 1], [H, W, C].

    Raises:
        OptionError: for an order that BasicSR has not, or a border below 0.
        ShapeError: if it is no such image, or the border leaves nothing of it.
        DataError: if there are values outside of [0, 255].
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
        raise DataError(f'an image has values from {low:g} to {high:g}: expected [0, 255], as BasicSR gives them')
    return np.divide(image, 255, dtype=np.result_type(image.dtype, np.float32)).clip(0, 1)


def _shown(image: np.ndarray) -> str:
    height, width, channels = image.shape
    return f'{width}x{height} with {channels} channel{"s" if channels > 1 else ""}'
