"""Synthesis of rain streaks.

Each drop is rendered as the line along which it moves during the exposure: fading at its ends, uneven along its length,
and wider the nearer it is. Layers of such streaks, from fine distant rain to a few broad ones close to the lens, are
blended over an image faded by a thin, uneven veil. JPEG compression may blur the streaks. Streaks are a
Poisson process, so a patch has the same statistics as the whole image. The strength for a given PSNR follows from the
first two moments of that process (Campbell's theorem), without rendering twice.
"""

from __future__ import annotations

import math
from typing import Literal

import cv2
import numpy as np
from numpy.random import Generator
from pydantic import Field

from ast_plugin.degradations.base import (
    Parameters,
    PositiveRange,
    Range,
    compress_jpeg,
    draw_log_uniform,
    lattice_noise,
    limited,
    strips,
    to_rgb,
)

MIN_HEADROOM = 0.06  # lower limit of the mean of (1 - image)^2: in whiter images, rain cannot be made more visible
MAX_OPACITY = 0.95
MAX_BRIGHTNESS = 2.0  # of streaks before clipping to MAX_OPACITY; images that require more are degraded less
VEIL_SHARE = 0.25  # maximum fraction of the squared error caused by the veil instead of the streaks
VEIL_CELL = 160  # distance in pixels of independent values of the veil at scale 1
PROFILE_MEAN, PROFILE_SQUARE = 4 / 5, 32 / 45  # means over t in [-1, 1] of p = 1 - t^4 and of p^2
PROFILE_SLANTED = 32 / 231  # mean of t^2 p^2


class StreakLayer(Parameters):
    """Ranges of one layer of streaks. Lengths in pixels refer to images about 500 pixels high, see `scale`."""

    density: PositiveRange = Field(description='streaks per 10,000 pixels; per image, log-uniform')
    length: PositiveRange = Field(description='length in pixels; per streak')
    width: PositiveRange = Field(description='full width at half maximum in pixels; per image')
    brightness: PositiveRange = Field(description='brightness relative to the other layers; per streak')
    sharpness: PositiveRange = Field(
        (2.0, 2.0), description='exponent of the cross-section; 2: Gaussian, 8: almost rectangular, in focus; per image'
    )
    presence: float = Field(1.0, gt=0, le=1, description='fraction of images that have this layer')


FINE = StreakLayer(density=(8, 120), length=(5, 24), width=(0.9, 1.5), brightness=(0.10, 0.45), presence=0.75)
MIDDLE = StreakLayer(density=(0.8, 10), length=(22, 60), width=(1.3, 2.4), brightness=(0.25, 0.85), presence=0.8)
SHARP = StreakLayer(
    density=(0.25, 2.5), length=(25, 140), width=(1.5, 4.5), brightness=(0.2, 1.1), sharpness=(2, 8), presence=0.5
)
NEAR = StreakLayer(density=(0.12, 0.9), length=(60, 130), width=(3.0, 5.5), brightness=(0.15, 0.45), presence=0.6)
BLURRED = StreakLayer(
    density=(0.02, 0.12), length=(120, 400), width=(8, 36), brightness=(0.03, 0.16), sharpness=(2, 5), presence=0.3
)


class RainParameters(Parameters):
    """Parameters of rain. Ranges [lowest, highest] are sampled uniformly, once per image unless stated otherwise."""

    type: Literal['rain'] = 'rain'
    psnr: PositiveRange = Field((21.2, 25.0), description='expected PSNR of the rainy image in dB')
    angle: Range = limited((-28, 28), -60, 60, 'angle from the vertical in degrees')
    angle_spread: float = Field(3.0, ge=0, le=10, description='standard deviation of the angle of streaks in degrees')
    bend: Range = limited((0.0, 0.05), 0, 0.2, 'standard deviation of the sagitta of a streak relative to its length')
    unevenness: Range = limited((0.0, 0.8), 0, 1, 'variation of brightness along a streak')
    light: Range = limited((0.75, 1.0), 0, 1, 'brightness of opaque streaks')
    veil: Range = limited((0.0, 0.09), 0, 1, 'opacity of the haze caused by distant rain')
    jpeg_share: float = Field(0.5, ge=0, le=1, description='fraction of images whose streaks are JPEG-compressed')
    jpeg_quality: Range = limited((25, 90), 5, 100, 'JPEG quality of the streaks')
    scale: float = Field(1.0, gt=0, description='factor of all lengths and widths; 1 is for images 500 pixels high')
    layers: tuple[StreakLayer, ...] = Field(
        (FINE, MIDDLE, SHARP, NEAR, BLURRED), min_length=1, description='layers of streaks, from far to near'
    )


class _Shower:
    """A layer of streaks with its values for one image, in pixels of that image."""

    def __init__(
        self, layer: StreakLayer, generator: Generator, parameters: RainParameters, shared: list[float]
    ) -> None:
        angle, self.bend, self.unevenness = shared  # by all layers of the image
        scale, self.brightness = parameters.scale, layer.brightness
        self.spread = math.radians(parameters.angle_spread)
        self.density = draw_log_uniform(generator, layer.density) / 1e4 / scale**2  # streaks per pixel
        self.angle = float(np.clip(math.radians(angle) + generator.normal(0, self.spread), -math.pi / 3, math.pi / 3))
        self.length = layer.length[0] * scale, layer.length[1] * scale
        self.row_width = generator.uniform(*layer.width) * scale / math.cos(self.angle)  # along a row of pixels
        self.sharpness = generator.uniform(*layer.sharpness)

    def area(self, power: int = 1) -> float:
        """Return the integral along a row of the `power` of the profile exp(-ln 2 |2x / row_width|^sharpness)."""
        p = self.sharpness
        return self.row_width * math.gamma(1 + 1 / p) / (power * math.log(2)) ** (1 / p)

    def moments(self) -> tuple[float, float]:
        """Return mean and variance of the layer per pixel, as rendered by `render`."""
        mean_rows = math.cos(self.angle) * (self.length[0] + self.length[1]) / 2
        low, high = self.brightness
        mean = (low + high) / 2 * self.area() * PROFILE_MEAN
        # Profile along the streak: 1 + a t + c cos(...), with a and c uniform in [-u/2, u/2] and u the unevenness.
        along = PROFILE_SQUARE * (1 + self.unevenness**2 / 24) + PROFILE_SLANTED * self.unevenness**2 / 12
        square = (low * low + low * high + high * high) / 3 * self.area(2) * along
        return self.density * mean_rows * mean, self.density * mean_rows * square

    def render(self, shape: tuple[int, int], generator: Generator) -> np.ndarray:
        """Render one layer of streaks, [H, W] float32.

        Streaks are inclined by less than 60 degrees, so each is one point on every row that it crosses, split between
        two pixels by linear interpolation. A filter along rows then adds its width.
        """
        height, width = shape
        border = self.length[1] / 2  # streaks centred outside may extend into the image
        # Distance at which the brightness falls to 1/2000, in pixels along a row.
        pad = math.ceil(self.row_width / 2 * 11 ** (1 / self.sharpness) + 1) + 1
        reach = border * (math.sin(abs(self.angle)) + 4 * self.bend) + pad
        count = generator.poisson(self.density * (height + 2 * border) * (width + 2 * reach))
        centre_y = generator.uniform(-border, height + border, count)
        centre_x = generator.uniform(-reach, width + reach, count)
        half = generator.uniform(*self.length, count) * (math.cos(self.angle) / 2)
        brightness = generator.uniform(*self.brightness, count)
        slope = np.tan(self.angle + generator.normal(0, self.spread, count).clip(-0.3, 0.3))
        bend = 2 * generator.normal(0, self.bend, count)
        slant, wave = generator.uniform(-self.unevenness / 2, self.unevenness / 2, (2, count))
        phase, waves = generator.uniform(0, 2 * math.pi, count), generator.uniform(2, 14, count)

        first = np.maximum(np.ceil(centre_y - half), 0).astype(np.int64)
        last = np.minimum(np.floor(centre_y + half), height - 1).astype(np.int64)
        rows = np.maximum(last - first + 1, 0)
        streak = np.repeat(np.arange(count), rows)
        row = np.arange(len(streak)) - np.repeat(np.cumsum(rows) - rows, rows) + first[streak]
        offset = row - centre_y[streak]
        along = offset / half[streak]  # from -1 to 1
        uneven = 1 + slant[streak] * along + wave[streak] * np.cos(phase[streak] + waves[streak] * along)
        mass = brightness[streak] * (1 - along**4) * uneven
        x = centre_x[streak] + (slope[streak] + bend[streak] * along) * offset

        # The canvas is wider than the image by the filter radius, so that rain extends across the border.
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
        canvas = cv2.sepFilter2D(canvas, -1, self._profile(pad), np.ones(1, np.float32), borderType=cv2.BORDER_CONSTANT)
        return canvas[:, pad : pad + width] * np.float32(self.area())

    def _profile(self, pad: int) -> np.ndarray:
        """Return the cross-section of a streak as a normalized filter of 2 pad + 1 weights."""
        # Splitting between two pixels adds a variance of 1/6, which is 0.92 of the squared width of a Gaussian.
        width = math.sqrt(max(self.row_width**2 - 0.92, 0.05))
        fine = (np.arange(-8 * pad - 4, 8 * pad + 4) + 0.5) / 8  # eight samples per pixel
        weights = np.exp(-math.log(2) * np.abs(2 * fine / width) ** self.sharpness).reshape(-1, 8).sum(axis=1)
        return (weights / weights.sum()).astype(np.float32)


def add_rain(image: np.ndarray, generator: Generator, parameters: RainParameters) -> tuple[np.ndarray, np.ndarray]:
    """Add rain to a clean image, see `Degradation.apply`; the mask is the opacity of the streaks alone.

    Rain in a patch has the same statistics as in a whole image.
    Numerics: psnr is an expectation over streaks. A rendering of 480 x 720 pixels is within about 1 dB of it; patches
        vary more. Below 20 dB streaks saturate, and in almost white images they are invisible: both are degraded less.
    """
    error = 10 ** (-generator.uniform(*parameters.psnr) / 10)
    shape = image.shape[:2]
    shared = [generator.uniform(*span) for span in (parameters.angle, parameters.bend, parameters.unevenness)]
    luck = generator.random(len(parameters.layers)) / [layer.presence for layer in parameters.layers]
    showers = [
        _Shower(layer, generator, parameters, shared)
        for layer, value in zip(parameters.layers, luck, strict=True)
        if value < 1 or value == luck.min()  # at least one layer per image
    ]
    shine = np.clip(generator.uniform(*parameters.light) + generator.normal(0, 0.015, 3), 0, 1)
    light = np.clip(0.5 + 0.45 * float(image.mean()) + generator.normal(0, 0.01, 3), 0, 1)
    veil = generator.uniform(*parameters.veil) * lattice_noise(
        shape, generator, VEIL_CELL * parameters.scale, 0.3, 1, cv2.INTER_LINEAR
    )
    gain, thinning = _strengths(image, veil, light, shine, showers, error)
    gain = min(gain, MAX_BRIGHTNESS / max(shower.brightness[1] for shower in showers))
    veil *= thinning
    streaks = np.zeros(shape, np.float32)
    for shower in showers:
        streaks += shower.render(shape, generator)
    streaks *= gain
    rainy = _blend(image, veil, light, shine, np.clip(streaks, 0, MAX_OPACITY, out=streaks))
    if generator.random() < parameters.jpeg_share:
        rainy = _compress_change(image, rainy, round(generator.uniform(*parameters.jpeg_quality)), generator)
    return rainy, streaks


def _strengths(
    image: np.ndarray, veil: np.ndarray, light: np.ndarray, shine: np.ndarray, showers: list[_Shower], error: float
) -> tuple[float, float]:
    """Return the factors of streaks and veil for which the expected squared error is `error`.

    With R the streaks, d the change by the veil and h the remaining headroom, shine - image - d, the mean of
    (d + gR h)^2 is d^2 + 2 g E[R] dh + g^2 E[R^2] h^2.
    """
    step = max(1, min(image.shape[:2]) // 128)
    sample = image[::step, ::step].astype(np.float64)
    change = (light - sample) * veil[::step, ::step, None]
    thinning = min(1.0, math.sqrt(VEIL_SHARE * error / max(np.mean(change**2), 1e-12)))
    change *= thinning
    headroom = shine - sample - change
    mean, variance = map(sum, zip(*(shower.moments() for shower in showers), strict=True))
    a = (variance + mean * mean) * max(np.mean(headroom**2), MIN_HEADROOM)
    b = mean * np.mean(change * headroom)
    c = np.mean(change**2) - error
    return float((-b + math.sqrt(b * b - a * c)) / a), thinning


def _blend(
    image: np.ndarray, veil: np.ndarray, light: np.ndarray, shine: np.ndarray, streaks: np.ndarray
) -> np.ndarray:
    """Blend the image with `light` by the veil, then with the colour `shine` by the streaks."""
    result = np.empty_like(image)
    for rows in strips(image):
        headroom = cv2.subtract((*shine, 0), image[rows], dst=result[rows])
        change = cv2.add(headroom, (*(light - shine), 0))  # light - image
        change *= to_rgb(veil[rows])
        headroom -= change
        headroom *= to_rgb(1 - streaks[rows])
        cv2.subtract((*shine, 0), headroom, dst=headroom)
    return result


def _compress_change(image: np.ndarray, rainy: np.ndarray, quality: int, generator: Generator) -> np.ndarray:
    """Return the image plus the compressed change caused by the rain; areas without rain are unchanged."""
    top, left = (int(value) for value in generator.integers(0, 16, 2))  # random block offset
    kept = []
    for levels in (cv2.convertScaleAbs(one, alpha=255) for one in (rainy, image)):
        bordered = cv2.copyMakeBorder(levels, top, 0, left, 0, cv2.BORDER_REPLICATE)
        kept.append(compress_jpeg(bordered, quality)[top:, left:])
    change = cv2.subtract(*kept, dtype=cv2.CV_32F)
    change *= np.float32(1 / 255)
    change += image
    return np.clip(change, 0, 1, out=change)
