"""Synthesis of moiré: an image is displayed on a screen, and a camera takes a photo of the screen.

Each pixel of the screen consists of a red, a green and a blue stripe, and each pixel of the camera has a red, a green
or a blue filter. Stripes about as narrow as the spacing of camera pixels of one colour alias to broad bands. These are
coloured, as each colour is sampled at other positions, and curved by perspective and lens distortion. Here the stripes
are sampled through the filters of a sensor with `SENSOR` times the side length of the image, demosaiced and resized.

Pairs are aligned: only the pixel grid of the screen is rotated, scaled and distorted relative to the sensor, not the
image displayed. As the image is smooth compared with the grid, the light of the two is multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import cv2
import numpy as np
from numpy.random import Generator
from pydantic import Field

from ast_plugin.degradations.base import FRAME, GAMMA, Parameters, PositiveRange, Range, compress_jpeg, limited, strips

SENSOR = 2  # pixels of the sensor per pixel of the image, along each side
STRIPES = (1 / 6, 1 / 2, 5 / 6)  # centres of the red, green and blue stripe, in pixels of the screen
STRIPE_WIDTH, ROW_HEIGHT = 0.27, 0.76  # luminous area across and along the stripes, in pixels of the screen
HARMONICS = 4  # harmonics of the screen grid; the lens transmits no higher ones
BAYER = ((0, 1), (1, 2))  # colours of the sensor's filters, by the parity of row and column
PHASES = 256  # quantization of positions within a pixel of the screen
FULL = 16384  # sensor value of a white screen, with headroom for bright bands
STRIP = 64  # rows processed at a time


class MoireParameters(Parameters):
    """Parameters of screen and camera. Ranges [lowest, highest] are sampled uniformly, once per image."""

    type: Literal['moire'] = 'moire'
    pitch: PositiveRange = limited((1.9, 2.12), 1, 4, 'size of a screen pixel in sensor pixels')
    rotation: Range = limited((-5, 5), -45, 45, 'rotation of the screen relative to the camera in degrees')
    sideways: float = Field(0.3, ge=0, le=1, description='probability of a screen with horizontal stripes')
    perspective: Range = limited((0, 0.09), 0, 0.3, 'relative change of pitch across the image')
    distortion: Range = limited((-0.06, 0.06), -0.2, 0.2, 'lens distortion at the corners')
    blur: PositiveRange = limited((0.35, 0.58), 0, 4, 'standard deviation of the lens blur in sensor pixels')
    exposure: PositiveRange = limited((0.55, 1.1), 0.1, 4, 'light of the photo relative to the image displayed')
    balance: Range = limited((-0.08, 0.08), -0.5, 0.5, 'relative error of red and blue against green')
    glare: Range = limited((0, 0.03), 0, 0.5, 'ambient light on the screen relative to white')
    noise: Range = limited((0.002, 0.012), 0, 0.2, 'standard deviation of the noise at middle gray')
    quality: Range = limited((75, 96), 1, 100, 'JPEG quality of the photo')


def add_moire(image: np.ndarray, generator: Generator, parameters: MoireParameters) -> tuple[np.ndarray, None]:
    """Photograph a clean image on a screen, with 8 bits; see `Degradation.apply`.

    Patches are assumed to come from an image of `FRAME`. There is no mask, as every pixel is degraded.
    Source: Yuan et al., "AIM 2019 challenge on image demoiréing", for photos of a simulated screen.
    """
    bands = _bands(_Camera(generator, parameters, image.shape[:2]), image.shape[:2])
    photo = _expose(image, bands, generator, parameters)
    quality = round(generator.uniform(*parameters.quality))
    decoded = cv2.cvtColor(compress_jpeg(photo, quality), cv2.COLOR_BGR2RGB)
    return np.multiply(decoded, np.float32(1 / 255), dtype=np.float32), None


class _Camera:
    """A random position of the screen before the sensor; lengths in pixels of the sensor, pairs are (down, right)."""

    def __init__(self, generator: Generator, parameters: MoireParameters, shape: tuple[int, int]) -> None:
        frame = SENSOR * np.maximum(shape, FRAME)
        half = math.hypot(*frame) / 2
        # Radians between the sensor's rows and the direction across the stripes.
        self.angle = math.radians(generator.uniform(*parameters.rotation))
        if generator.random() < parameters.sideways:
            self.angle += math.pi / 2
        slope, direction = generator.uniform(*parameters.perspective) / (2 * half), generator.uniform(0, 2 * math.pi)
        self.tilt = slope * math.sin(direction), slope * math.cos(direction)  # relative change of pitch per pixel
        # Centre of the top-left pixel, relative to the centre of the frame.
        self.start = generator.uniform(0, frame - SENSOR * np.array(shape)) - frame / 2
        self.pitch = generator.uniform(*parameters.pitch)  # size of a screen pixel at the centre of the frame
        # Relative change of pitch per squared distance from the centre.
        self.bend = generator.uniform(*parameters.distortion) / half**2
        self.phase = generator.uniform(0, 1, 2)  # position of the centre within a screen pixel, (across, along stripes)
        self.blur = generator.uniform(*parameters.blur)  # standard deviation of the lens blur

    def on_screen(self, y: np.ndarray, x: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the positions of sensor pixels within screen pixels, across and along the stripes, uint8 each."""
        stretch = (y * y + x * x) * np.float32(self.bend)
        stretch += y * np.float32(self.tilt[0]) + x * np.float32(self.tilt[1])
        stretch += 1
        stretch *= np.float32(PHASES / self.pitch)
        cos, sin = np.float32(math.cos(self.angle)), np.float32(math.sin(self.angle))
        for place, phase in zip((x * cos + y * sin, y * cos - x * sin), self.phase, strict=True):
            yield (place * stretch + np.float32(phase * PHASES)).astype(np.int32).astype(np.uint8)

    def profile(self, middle: float, width: float) -> np.ndarray:
        """Return the light of stripes, after lens and sensor and relative to its mean, over a screen pixel, [PHASES].

        It is a Fourier series whose harmonics are attenuated by the lens, a Gaussian, and by the square sensor pixels.
        """
        place = (np.arange(PHASES) + 0.5) / PHASES
        light = np.ones(PHASES)
        for order in range(1, HARMONICS + 1):
            frequency = order / self.pitch  # cycles per sensor pixel
            passed = math.exp(-2 * (math.pi * self.blur * frequency) ** 2) * np.sinc(frequency)
            light += 2 * np.sinc(order * width) * passed * np.cos(2 * math.pi * order * (place - middle))
        return np.maximum(light, 0).astype(np.float32)


def _bands(camera: _Camera, shape: tuple[int, int]) -> np.ndarray:
    """Return the camera's view of a white screen, light relative to its mean, [H, W, 3] float32."""
    rows, columns = SENSOR * shape[0], SENSOR * shape[1]
    border = 4  # pixels of the sensor, for demosaicing
    mosaic = np.empty((rows + 2 * border, columns + 2 * border), np.uint16)
    across = [camera.profile(middle, STRIPE_WIDTH) for middle in STRIPES]
    along = camera.profile(0.5, ROW_HEIGHT)
    for i, j in np.ndindex(2, 2):
        y = np.arange(i - border, rows + border, 2, dtype=np.float32)[:, None] + np.float32(camera.start[0])
        x = np.arange(j - border, columns + border, 2, dtype=np.float32) + np.float32(camera.start[1])
        for part in strips(y, STRIP):
            s, t = camera.on_screen(y[part], x)
            light = cv2.multiply(cv2.LUT(s, across[BAYER[i][j]]), cv2.LUT(t, along), scale=FULL)
            mosaic[i::2, j::2][part] = light
    # OpenCV names Bayer patterns by the second row and column.
    colors = cv2.demosaicing(mosaic, cv2.COLOR_BayerBG2RGB)
    colors = colors[border:-border, border:-border]
    bands = cv2.resize(colors, shape[::-1], interpolation=cv2.INTER_AREA)
    return np.multiply(bands, np.float32(1 / FULL), dtype=np.float32)


def _expose(image: np.ndarray, bands: np.ndarray, generator: Generator, parameters: MoireParameters) -> np.ndarray:
    """Return the photo as BGR, [H, W, 3] uint8: the light of the image times the bands, exposed, with noise."""
    exposure = generator.uniform(*parameters.exposure)
    red, blue = 1 + generator.uniform(*parameters.balance, 2)
    gain = (exposure * np.array([red, 1, blue])).astype(np.float32)
    glare = np.float32(generator.uniform(*parameters.glare))
    noise = np.float32(generator.uniform(*parameters.noise))
    # The screen's pixels and the lens soften the image.
    soft = cv2.GaussianBlur(image, (5, 5), 0.55)
    result = np.empty(image.shape, np.uint8)
    for rows in strips(image, STRIP):
        light = cv2.pow(soft[rows], GAMMA)
        light *= bands[rows]
        light += glare
        light *= gain
        np.minimum(light, 1, out=light)
        levels = cv2.pow(light, 1 / GAMMA)
        levels += generator.standard_normal(levels.shape, np.float32) * noise
        levels *= 255
        levels += np.float32(0.5)
        np.clip(levels, 0, 255, out=levels)
        result[rows] = levels[..., ::-1]
    return result
