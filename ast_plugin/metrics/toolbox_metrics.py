"""The measures under the names and with the arguments of BasicSR's own: `type: calculate_psnr_matlab` and so on.

Images come as BasicSR gives them: BGR or gray, [H, W, 3], [H, W, 1] or [H, W], in [0, 255]. Its own model rounds them
to uint8; values of floating point are measured as they are, which BasicSR's `calculate_psnr` and `calculate_ssim` do
as well.
"""

from collections.abc import Callable

import numpy as np

from ast_plugin.errors import DataError, OptionError, ShapeError
from ast_plugin.metrics.psnr import psnr_rgb, psnr_y_float, psnr_y_matlab
from ast_plugin.metrics.ssim import ssim_rgb, ssim_y_matlab

_ORDERS = ('HWC', 'CHW')


def _metric(name: str, measure: Callable[[np.ndarray, np.ndarray], float], what: str) -> Callable[..., float]:
    """`measure` as a metric of BasicSR's, which finds its arguments by these names and passes others on."""

    def calculate(img: np.ndarray, img2: np.ndarray, crop_border: int = 0, input_order: str = 'HWC', **kwargs) -> float:
        return measure(*(from_toolbox(image, crop_border, input_order) for image in (img, img2)))

    calculate.__name__ = calculate.__qualname__ = name
    calculate.__doc__ = f'{what}: see `{measure.__name__}`.'
    return calculate


calculate_psnr_matlab = _metric('calculate_psnr_matlab', psnr_y_matlab, 'PSNR of the luma of 8 bits, as MATLAB has it')
calculate_ssim_matlab = _metric('calculate_ssim_matlab', ssim_y_matlab, 'SSIM of the luma of 8 bits, as MATLAB has it')
calculate_psnr_skimage = _metric(
    'calculate_psnr_skimage', psnr_rgb, 'PSNR of RGB that is not rounded, as scikit-image has it'
)
calculate_ssim_skimage = _metric(
    'calculate_ssim_skimage', ssim_rgb, 'SSIM of RGB that is not rounded, as scikit-image has it'
)
calculate_psnr_y_float = _metric(
    'calculate_psnr_y_float',
    psnr_y_float,
    'PSNR of luma that is not rounded, by which the authors pick weights',
)


def to_toolbox(image: np.ndarray) -> np.ndarray:
    """RGB or gray, [H, W, C], uint8 or floating point in [0, 1], as BasicSR's metrics take it: BGR in [0, 255]."""
    image = image[..., ::-1]
    return np.ascontiguousarray(image if image.dtype == np.uint8 else image * image.dtype.type(255))


def from_toolbox(image: np.ndarray, crop_border: int = 0, input_order: str = 'HWC') -> np.ndarray:
    """BGR or gray in [0, 255], as BasicSR gives it, as RGB or gray, uint8 or floating point in [0, 1], [H, W, C].

    Raises:
        OptionError: for an order that BasicSR has not, or a border below 0.
        ShapeError: if it is no such image, or the border leaves nothing of it.
        DataError: if there are values outside of [0, 255].
    """
    if input_order not in _ORDERS:
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
