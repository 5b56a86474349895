"""PSNR and SSIM in all the usual definitions at once: to measure anybody's images, or to find how a figure was made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ast_plugin.metrics.images import LARGEST, LUMA, check_pair, matlab_luma, to_integers
from ast_plugin.metrics.psnr_ssim import GAUSSIAN, TRAINING_LUMA, UNIFORM, similarity_map

_GRAY = np.array([0.299, 0.587, 0.114])


class _Channels(NamedTuple):
    text: str
    planes: Callable[[np.ndarray], np.ndarray]  # [H, W, 3] to [H, W, C], float64, black and white 255 apart or nearly


def _values(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float64) * (255 / LARGEST.get(image.dtype, 1))


CHANNELS = {
    'rgb': _Channels('RGB', _values),
    'luma_matlab': _Channels("luma rounded to 8 bits, MATLAB's rgb2ycbcr", lambda image: matlab_luma(image)[..., None]),
    'luma': _Channels('luma of BT.601, not rounded', lambda image: _values(image) @ LUMA[:, None] / 255 + 16),
    'luma_training': _Channels(
        "luma not rounded, Uformer's batch_PSNR", lambda image: _values(image) @ TRAINING_LUMA[:, None].astype(float)
    ),
    'gray': _Channels('gray rounded to 8 bits', lambda image: np.rint(to_integers(image) @ _GRAY[:, None])),
}
WINDOWS = {
    'gaussian': ('Gaussian windows of 11', GAUSSIAN),
    'uniform': ('uniform windows of 7, variances of samples', UNIFORM),
    'gaussian_samples': ('Gaussian windows of 11, variances of samples', GAUSSIAN._replace(correction=121 / 120)),
}


class Definition(NamedTuple):
    """How a figure is computed.

    Attributes:
        metric: 'psnr' or 'ssim'.
        channels: a key of `CHANNELS`.
        window: of SSIM, a key of `WINDOWS`.
        border: pixels cut away at each side.
        is_pooled: PSNR of the mean squared error of all images, instead of the mean of their PSNR.
    """

    metric: str
    channels: str
    window: str = ''
    border: int = 0
    is_pooled: bool = False

    @property
    def name(self) -> str:
        """In one word, for a table."""
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
"""The definitions in use, and where."""


def all_definitions(metric: str, borders: Iterable[int] = range(13)) -> list[Definition]:
    """List the definitions of a metric, those in use first."""
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
    """Measure a pair of images in many definitions, each plane and map being computed once.

    Args:
        image, reference: see `ast_plugin.metrics.images.check_pair`. Gray images have one plane, which is their luma.
        definitions: `is_pooled` makes no difference for one pair.
    Returns:
        A value for each definition; NaN where the border or the window leaves nothing of the image.
    Raises:
        ShapeError, DataError: as `check_pair`.
    Numerics: float64.
    """
    pair = check_pair(image, reference)
    planes: dict[str, list[np.ndarray]] = {}
    maps: dict[tuple[str, str], np.ndarray] = {}

    def values(definition: Definition) -> np.ndarray | None:
        """Squared errors of a PSNR, similarities of an SSIM; None where there is nothing."""
        channels, window = definition.channels, definition.window
        if channels not in planes:
            read = CHANNELS[channels].planes if pair[0].shape[2] == 3 else _values
            planes[channels] = [read(each) for each in pair]
        if (channels, window) not in maps:
            x, y = planes[channels]
            if not window:
                computed = np.square(x - y)
            elif min(x.shape[:2]) < WINDOWS[window][1].side:
                computed = np.empty((0, 0, 1))
            else:
                both = zip(np.moveaxis(x, 2, 0), np.moveaxis(y, 2, 0), strict=True)
                similar = [similarity_map(*map(np.ascontiguousarray, two), WINDOWS[window][1], 255) for two in both]
                computed = np.stack(similar, axis=2)
            maps[channels, window] = computed
        whole, border = maps[channels, window], definition.border
        inner = whole[border : whole.shape[0] - border, border : whole.shape[1] - border]
        return inner if inner.size else None

    found = {}
    for definition in definitions:
        inner = values(definition)
        mean = math.nan if inner is None else float(inner.mean())
        found[definition] = decibels(mean) if definition.metric == 'psnr' else mean
    return found


def decibels(mean_square: float) -> float:
    """PSNR of a mean squared error of values in [0, 255]; inf for 0."""
    return math.inf if mean_square == 0 else 10 * math.log10(255**2 / mean_square)


def mean_over_images(values: Sequence[float], is_pooled: bool = False) -> float:
    """The figure of a set of images from one value an image; see `Definition` for `is_pooled`.

    Images that equal their reference, of PSNR inf, are left out of a mean, unless all do; pooled, they count.
    """
    if is_pooled:
        return decibels(float(np.mean([255**2 / 10 ** (value / 10) for value in values])))
    return float(np.mean([value for value in values if value != math.inf] or values))


def gives(figure: str, value: float) -> str | None:
    """How a value becomes a published figure within its digits: 'rounded', 'cut off', or None if it does not."""
    digits = len(figure.partition('.')[2])
    unit = 10.0**-digits
    if not math.isfinite(value):
        return None
    if abs(value - float(figure)) <= unit / 2 * (1 + 1e-9):
        return 'rounded'
    return 'cut off' if 0 <= value - float(figure) < unit else None
