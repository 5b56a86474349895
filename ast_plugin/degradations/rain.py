"""Synthesis of rain streaks.

A falling drop is drawn as the line that it leaves during the exposure: bright in the middle, fading at its ends, as
wide as it is near. Layers of such streaks, from fine distant rain to a few broad ones close to the lens, are
screen-blended over a photograph that a thin, uneven veil has already paled. Streaks are a Poisson process, so a patch
of a photograph has rain of the same kind as the whole of it, and the strength that gives a wished PSNR follows from
the first two moments of that process (Campbell's theorem) without rendering twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from pydantic import Field

from ast_plugin.degradations.ranges import Parameters, PositiveRange, Range

MIN_HEADROOM = 0.06  # mean of (1 - image)^2 below which a picture is too white for rain to be made stronger
MAX_OPACITY = 0.95
VEIL_SHARE = 0.25  # at most this share of the squared error comes from the veil, the rest from streaks
VEIL_CELL = 160  # pixels between two independent values of the veil at scale 1
STRIP = 32  # rows blended at a time
PROFILE_MEAN, PROFILE_SQUARE = 4 / 5, 32 / 45  # integrals over a streak of 1 - t^4, t in [-1, 1], and of its square


class StreakLayer(Parameters):
    """Ranges of one layer of streaks. Pixels are those of a photograph about 500 pixels high, see `scale`."""

    density: PositiveRange = Field(description='streaks per 10,000 pixels; one value an image, its logarithm uniform')
    length: PositiveRange = Field(description='pixels; one value a streak')
    width: PositiveRange = Field(description='pixels across at half the brightness; one value an image')
    brightness: PositiveRange = Field(description='relative to the other layers; one value a streak')


FINE = StreakLayer(density=(8, 120), length=(8, 24), width=(0.9, 1.5), brightness=(0.10, 0.45))
MIDDLE = StreakLayer(density=(0.8, 10), length=(22, 60), width=(1.3, 2.4), brightness=(0.25, 0.85))
NEAR = StreakLayer(density=(0.12, 0.9), length=(60, 130), width=(3.0, 5.5), brightness=(0.15, 0.45))


class RainParameters(Parameters):
    """What rain may look like; each [lowest, highest] is drawn from uniformly, once an image unless said otherwise."""

    type: Literal['rain'] = 'rain'
    psnr: PositiveRange = Field((21.2, 25.0), description='dB of the rainy image against the clean one, expected')
    angle: Range = Field((-28, 28), description='degrees from the vertical, within [-60, 60]')
    angle_spread: float = Field(2.0, ge=0, le=10, description='standard deviation in degrees from streak to streak')
    veil: Range = Field((0.0, 0.09), description='opacity of the haze that rain in the distance makes, within [0, 1]')
    scale: float = Field(1.0, gt=0, description='multiplies every length and width; 1 suits pictures 500 pixels high')
    layers: tuple[StreakLayer, ...] = Field((FINE, MIDDLE, NEAR), min_length=1, description='from far to near')

    LIMITS = {'angle': (-60, 60), 'veil': (0, 1)}


@dataclass(frozen=True)
class _Shower:
    """A layer with its once-an-image values drawn, in pixels of the image at hand."""

    density: float  # streaks per pixel
    length: tuple[float, float]
    sigma: float  # across the streak
    brightness: tuple[float, float]
    angle: float  # radians

    @property
    def row_sigma(self) -> float:
        """Width of the streak along a row of pixels."""
        return self.sigma / math.cos(self.angle)

    def moments(self) -> tuple[float, float]:
        """Return the mean of the layer and its variance, both per pixel, as rendered by `_render`."""
        mean_rows = math.cos(self.angle) * (self.length[0] + self.length[1]) / 2
        low, high = self.brightness
        mean = (low + high) / 2 * math.sqrt(2 * math.pi) * self.row_sigma * PROFILE_MEAN
        square = (low * low + low * high + high * high) / 3 * math.sqrt(math.pi) * self.row_sigma * PROFILE_SQUARE
        return self.density * mean_rows * mean, self.density * mean_rows * square


def add_rain(
    image: np.ndarray, generator: np.random.Generator, parameters: RainParameters
) -> tuple[np.ndarray, np.ndarray]:
    """Put rain over a clean photograph.

    Args:
        image: RGB, [H, W, 3], float32 in [0, 1], any size; a patch gets the rain that its photograph would get.
        generator: source of all randomness; the same state gives the same result, bit for bit.
        parameters: ranges to draw from.
    Returns:
        The rainy image, [H, W, 3] float32 in [0, 1], and the opacity of the streaks alone, [H, W] float32 in [0, 1].
    Numerics: PSNR is an expectation over streaks. One rendering of 480 x 720 lies within about 1 dB of it and a
    patch scatters more. Below 20 dB streaks saturate, and in a nearly white picture nothing shows: both stay cleaner.
    """
    error = 10 ** (-generator.uniform(*parameters.psnr) / 10)
    shape = image.shape[:2]
    showers = _draw_showers(generator, parameters)
    light = np.clip(0.5 + 0.45 * float(image.mean()) + generator.normal(0, 0.01, 3), 0, 1)
    veil = generator.uniform(*parameters.veil) * _smooth_noise(shape, generator, VEIL_CELL * parameters.scale)
    gain, thinning = _strengths(image, veil, light, showers, error)
    veil *= thinning
    streaks = np.zeros(shape, np.float32)
    for shower in showers:
        streaks += _render(shape, generator, shower, parameters.angle_spread)
    streaks *= gain
    return _blend(image, veil, light, np.clip(streaks, 0, MAX_OPACITY, out=streaks)), streaks


def _draw_showers(generator: np.random.Generator, parameters: RainParameters) -> list[_Shower]:
    scale = parameters.scale
    angle = math.radians(generator.uniform(*parameters.angle))
    showers = []
    for layer in parameters.layers:
        density = math.exp(generator.uniform(*np.log(layer.density))) / 1e4 / scale**2
        width = generator.uniform(*layer.width) * scale
        lean = math.radians(generator.normal(0, parameters.angle_spread))
        showers.append(
            _Shower(
                density=density,
                length=(layer.length[0] * scale, layer.length[1] * scale),
                sigma=width / math.sqrt(8 * math.log(2)),
                brightness=layer.brightness,
                angle=float(np.clip(angle + lean, -math.pi / 3, math.pi / 3)),
            )
        )
    return showers


def _smooth_noise(shape: tuple[int, int], generator: np.random.Generator, cell: float) -> np.ndarray:
    """Return values in [0.3, 1] that vary over `cell` pixels, [H, W] float32."""
    height, width = shape
    grid = generator.uniform(0.3, 1.0, (math.ceil(height / cell) + 2, math.ceil(width / cell) + 2))
    top, left = generator.uniform(0, 1, 2)
    return cv2.warpAffine(
        grid.astype(np.float32),
        np.array([[1 / cell, 0, left], [0, 1 / cell, top]]),
        (width, height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )


def _strengths(
    image: np.ndarray, veil: np.ndarray, light: np.ndarray, showers: list[_Shower], error: float
) -> tuple[float, float]:
    """Return the factors of the streaks' and the veil's opacity at which the expected squared error is `error`.

    With R the streaks, d the veil's change and h the headroom that it leaves, 1 - image - d, the mean of (d + gR h)^2
    is d^2 + 2 g E[R] dh + g^2 E[R^2] h^2. Means over the image are taken on a grid of at least 128 pixels a side.
    """
    step = max(1, min(image.shape[:2]) // 128)
    sample = image[::step, ::step].astype(np.float64)
    change = (light - sample) * veil[::step, ::step, None]
    thinning = min(1.0, math.sqrt(VEIL_SHARE * error / max(np.mean(change**2), 1e-12)))
    change *= thinning
    headroom = 1 - sample - change
    mean = sum(shower.moments()[0] for shower in showers)
    variance = sum(shower.moments()[1] for shower in showers)
    a = (variance + mean * mean) * max(np.mean(headroom**2), MIN_HEADROOM)
    b = mean * np.mean(change * headroom)
    c = np.mean(change**2) - error
    return float((-b + math.sqrt(b * b - a * c)) / a), thinning


def _blend(image: np.ndarray, veil: np.ndarray, light: np.ndarray, streaks: np.ndarray) -> np.ndarray:
    """Pale the image towards `light` by the veil, then screen it with the streaks.

    In strips and in place: at whole images, touching new memory costs several times the arithmetic.
    """
    result = np.empty_like(image)
    for top in range(0, len(image), STRIP):
        rows = slice(top, top + STRIP)
        headroom = np.subtract(1, image[rows], out=result[rows])
        change = cv2.add(headroom, (*(light - 1), 0))  # light - image
        change *= cv2.cvtColor(veil[rows], cv2.COLOR_GRAY2RGB)
        headroom -= change
        headroom *= cv2.cvtColor(1 - streaks[rows], cv2.COLOR_GRAY2RGB)
        np.subtract(1, headroom, out=headroom)
    return result


def _render(shape: tuple[int, int], generator: np.random.Generator, shower: _Shower, spread: float) -> np.ndarray:
    """Draw one layer of streaks with the brightness of `shower`, [H, W] float32.

    A streak leans less than 60 degrees, so it is one point on each row that it crosses, shared between two pixels in
    proportion; a blur along rows then gives it its width.
    """
    height, width = shape
    border = shower.length[1] / 2  # streaks whose centre lies outside still reach in
    reach = border * math.sin(abs(shower.angle)) + 4 * shower.row_sigma + 2
    count = generator.poisson(shower.density * (height + 2 * border) * (width + 2 * reach))
    centre_y = generator.uniform(-border, height + border, count)
    centre_x = generator.uniform(-reach, width + reach, count)
    half = generator.uniform(*shower.length, count) * (math.cos(shower.angle) / 2)
    brightness = generator.uniform(*shower.brightness, count)
    slope = np.tan(shower.angle + np.radians(generator.normal(0, spread, count)).clip(-0.3, 0.3))

    first = np.maximum(np.ceil(centre_y - half), 0).astype(np.int64)
    last = np.minimum(np.floor(centre_y + half), height - 1).astype(np.int64)
    rows = np.maximum(last - first + 1, 0)
    streak = np.repeat(np.arange(count), rows)
    row = np.arange(len(streak)) - np.repeat(np.cumsum(rows) - rows, rows) + first[streak]
    offset = row - centre_y[streak]
    mass = brightness[streak] * (1 - (offset / half[streak]) ** 4)
    x = centre_x[streak] + slope[streak] * offset

    # The canvas is wider than the image by what the blur reaches, so that rain enters from beyond the border too.
    pad = math.ceil(4 * shower.row_sigma) + 1
    left = np.floor(x).astype(np.int64)
    share = x - left
    left += pad
    inside = (left >= 0) & (left < width + 2 * pad - 1)
    place = (row * (width + 2 * pad) + left)[inside]
    mass, share = mass[inside], share[inside]
    canvas = np.zeros(height * (width + 2 * pad), np.float32)
    np.add.at(canvas, place, (mass * (1 - share)).astype(np.float32))
    np.add.at(canvas, place + 1, (mass * share).astype(np.float32))
    canvas = canvas.reshape(height, width + 2 * pad)
    # Sharing between two pixels has blurred by a variance of 1/6 already.
    sigma = math.sqrt(max(shower.row_sigma**2 - 1 / 6, 0.01))
    canvas = cv2.GaussianBlur(canvas, (2 * pad + 1, 1), sigmaX=sigma, sigmaY=1, borderType=cv2.BORDER_CONSTANT)
    return canvas[:, pad : pad + width] * np.float32(math.sqrt(2 * math.pi) * shower.row_sigma)
