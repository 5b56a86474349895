"""Synthesis of falling snow.

Distant flakes are many, small and sharp; near ones are few, large, out of focus and therefore faint. Each is a clump of
irregular outline with motion blur. Snow too fine to be visible as flakes adds a veil over the scene.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import cv2
import numpy as np
from numpy.random import Generator
from pydantic import Field

from ast_plugin.degradations.base import (
    Parameters,
    PositiveRange,
    Range,
    draw_log_uniform,
    fractal_noise,
    limited,
    strips,
    to_rgb,
)

CLUMPS, CLUMP_SIDE = 16, 64  # number of flake outlines, and their side in pixels
SPRITES = 24  # flakes rendered per layer and image; each is stamped many times
MIN_STAMPED = 2.5  # diameter in pixels below which a flake is a point distributed over four pixels
VEIL_CELL = 260  # distance in pixels of independent values of the veil at scale 1
MAX_OPACITY = 0.97
VEIL_LIGHT = 0.92  # brightness of the veil relative to the flakes
LIGHT = (0.93, 0.965, 1.0)  # colour of snow under an overcast sky, relative to its brightest channel
REACH = 240  # maximum margin in pixels at scale 1 around the image for flakes that extend into it


class FlakeLayer(Parameters):
    """Ranges of one layer of flakes. Lengths in pixels refer to images about 500 pixels high, see `scale`."""

    density: PositiveRange = Field(description='flakes per 10,000 pixels; per image, log-uniform')
    diameter: PositiveRange = limited(..., 0, 60, 'diameter in pixels; per flake, log-uniform')
    defocus: Range = limited(..., 0, 4, 'diameter of the circle of confusion relative to the flake')
    motion: Range = limited(..., 0, 4, 'length of the motion blur relative to the diameter of the flake')
    opacity: PositiveRange = limited(..., 0, 1, 'opacity at the centre; per flake')


FAR = FlakeLayer(density=(30, 150), diameter=(1.0, 2.4), defocus=(0, 0), motion=(0, 0), opacity=(0.3, 0.95))
MIDDLE = FlakeLayer(density=(5, 26), diameter=(2.6, 8), defocus=(0.0, 0.35), motion=(0.1, 0.9), opacity=(0.6, 1.0))
NEAR = FlakeLayer(density=(0.3, 1.6), diameter=(9, 34), defocus=(0.15, 0.7), motion=(0.1, 0.9), opacity=(0.45, 0.95))


class SnowParameters(Parameters):
    """Parameters of snow. Ranges [lowest, highest] are sampled uniformly, once per image unless stated otherwise."""

    type: Literal['snow'] = 'snow'
    amount: PositiveRange = Field((0.9, 3.0), description='factor of the density of every layer')
    angle: Range = limited((-40, 40), -80, 80, 'falling direction from the vertical in degrees')
    angle_spread: float = Field(9.0, ge=0, le=45, description='standard deviation of the angle of flakes in degrees')
    veil: Range = limited((0.0, 0.28), 0, 1, 'opacity of snow too fine to be visible as flakes')
    brightness: Range = limited((0.82, 1.0), 0, 1, 'brightness of the flakes')
    scale: float = Field(1.0, gt=0, le=20, description='factor of all diameters; 1 is for images 500 pixels high')
    layers: tuple[FlakeLayer, ...] = Field((FAR, MIDDLE, NEAR), min_length=1, description='layers, from far to near')


def add_snow(image: np.ndarray, generator: Generator, parameters: SnowParameters) -> tuple[np.ndarray, np.ndarray]:
    """Add snow to a clean image, see `Degradation.apply`; the mask is the opacity of the flakes alone.

    Snow in a patch has the same statistics as in a whole image.
    Source: Liu et al., "DesnowNet", TIP 2018, for translucent flakes; Chen et al., ICCV 2021, for the veil.
    """
    shape = image.shape[:2]
    angle = math.radians(generator.uniform(*parameters.angle))
    amount = generator.uniform(*parameters.amount)
    veil_opacity = generator.uniform(*parameters.veil)
    light = np.asarray(LIGHT) + generator.normal(0, 0.008, 3)
    light = np.clip(light * generator.uniform(*parameters.brightness), 0, 1).astype(np.float32)
    veil = fractal_noise(shape, generator, VEIL_CELL * parameters.scale)
    veil *= np.float32(0.65)
    veil += np.float32(0.35)
    veil *= np.float32(veil_opacity)
    clear = np.ones(shape, np.float32)  # transmittance of the flakes
    for layer in parameters.layers:
        _fall(clear, generator, layer, amount, angle, parameters)
    np.maximum(clear, 1 - MAX_OPACITY, out=clear)
    flakes = 1 - clear
    return _blend(image, veil, clear, light), flakes


def _blend(image: np.ndarray, veil: np.ndarray, clear: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Blend the image with the veil, which is slightly darker than the flakes, and then with the flakes."""
    result = np.empty_like(image)
    for rows in strips(image):
        haze, seen = veil[rows], clear[rows]
        added = (haze * seen) * np.float32(VEIL_LIGHT) + (1 - seen)
        strip = np.multiply(image[rows], to_rgb((1 - haze) * seen), out=result[rows])
        strip += to_rgb(added) * light
        np.minimum(strip, 1, out=strip)
    return result


def _fall(
    clear: np.ndarray, generator: Generator, layer: FlakeLayer, amount: float, angle: float, parameters: SnowParameters
) -> None:
    """Multiply the transmittance `clear` by that of one layer."""
    scale = parameters.scale
    height, width = clear.shape
    density = draw_log_uniform(generator, layer.density) * amount / 1e4 / scale**2
    border = min(REACH, layer.diameter[1] * (1 + layer.defocus[1] + layer.motion[1])) * scale / 2 + 2
    count = generator.poisson(density * (height + 2 * border) * (width + 2 * border))
    y = generator.uniform(-border, height + border, count)
    x = generator.uniform(-border, width + border, count)
    opacity = generator.uniform(*layer.opacity, count)
    diameters = np.exp(generator.uniform(*np.log(layer.diameter), SPRITES)) * scale
    chosen = generator.integers(0, SPRITES, count)
    if layer.diameter[1] * scale < MIN_STAMPED:
        _scatter(clear, y, x, opacity * np.minimum((diameters / 2) ** 2, 1)[chosen])
        return
    sprites = [_sprite(generator, diameter, layer, angle, parameters.angle_spread) for diameter in diameters]
    places = zip(chosen, np.round(y).astype(int), np.round(x).astype(int), opacity.astype(np.float32), strict=True)
    for number, row, column, strength in places:
        sprite = sprites[number]
        top, left = row - sprite.shape[0] // 2, column - sprite.shape[1] // 2
        seen = clear[max(top, 0) : max(top + sprite.shape[0], 0), max(left, 0) : max(left + sprite.shape[1], 0)]
        seen *= 1 - sprite[max(-top, 0) :, max(-left, 0) :][: seen.shape[0], : seen.shape[1]] * strength


def _scatter(clear: np.ndarray, y: np.ndarray, x: np.ndarray, opacity: np.ndarray) -> None:
    """Add flakes of about one pixel, each distributed over four pixels by bilinear weights."""
    height, width = clear.shape
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    y, x = y - top, x - left
    canvas = np.zeros((height + 2) * (width + 2), np.float32)
    inside = (top >= -1) & (top < height) & (left >= -1) & (left < width)
    place = ((top + 1) * (width + 2) + left + 1)[inside]
    for row, column, share in ((0, 0, (1 - y) * (1 - x)), (0, 1, (1 - y) * x), (1, 0, y * (1 - x)), (1, 1, y * x)):
        np.add.at(canvas, place + row * (width + 2) + column, (opacity * share)[inside].astype(np.float32))
    canvas = cv2.GaussianBlur(canvas.reshape(height + 2, width + 2), (3, 3), 0.5, borderType=cv2.BORDER_CONSTANT)
    clear *= 1 - np.minimum(canvas[1:-1, 1:-1] * np.float32(1.3), MAX_OPACITY)


def _sprite(generator: Generator, diameter: float, layer: FlakeLayer, angle: float, spread: float) -> np.ndarray:
    """Render one flake, [n, n] opacity float32 in [0, 1]: a clump, rotated, scaled, defocused and motion-blurred."""
    clump = _clumps()[generator.integers(CLUMPS)]
    disc = diameter * generator.uniform(*layer.defocus)
    way = diameter * generator.uniform(*layer.motion)
    turn = generator.uniform(0, 360)
    aspect = generator.uniform(0.7, 1.0)
    lean = angle + math.radians(generator.normal(0, spread))
    reach = math.ceil((1.3 * diameter + disc + way) / 2) + 2
    side = 2 * reach + 1
    # A clump fills about two thirds of its tile. Downsampling requires a blur of half the scale to prevent aliasing.
    zoom = diameter / (CLUMP_SIDE * 0.62)
    soft = cv2.GaussianBlur(clump, (0, 0), 0.45 / zoom) if zoom < 1 else clump
    matrix = cv2.getRotationMatrix2D((CLUMP_SIDE / 2 - 0.5, CLUMP_SIDE / 2 - 0.5), turn, zoom)
    matrix[0] *= aspect
    matrix[:, 2] = reach - matrix[:, :2] @ [CLUMP_SIDE / 2 - 0.5, CLUMP_SIDE / 2 - 0.5]
    sprite = cv2.warpAffine(soft, matrix, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    kernel = _blur_kernel(disc, way, lean)
    return cv2.filter2D(sprite, cv2.CV_32F, kernel, borderType=cv2.BORDER_CONSTANT)


def _blur_kernel(disc: float, way: float, lean: float) -> np.ndarray:
    """Return the circle of confusion convolved with the motion, normalized to sum 1."""
    reach = math.ceil((disc + way) / 2) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1), np.float32)
    step = way / 2 * np.array([math.sin(lean), math.cos(lean)])
    start, end = (np.round((reach + step * sign) * 16).astype(int).tolist() for sign in (-1, 1))
    cv2.line(kernel, start, end, 1.0, max(1, round(disc)), cv2.LINE_8, shift=4)
    kernel = cv2.GaussianBlur(kernel, (3, 3), 0.6, borderType=cv2.BORDER_CONSTANT)
    return kernel / kernel.sum()


@lru_cache(maxsize=1)
def _clumps() -> np.ndarray:
    """Return the opacity of flake outlines, equal in every run: overlapping ellipses, [CLUMPS, side, side] float32."""
    generator = np.random.default_rng(20180412)
    clumps = np.zeros((CLUMPS, CLUMP_SIDE * 2, CLUMP_SIDE * 2), np.uint8)
    middle = CLUMP_SIDE
    for clump in clumps:
        for _ in range(generator.integers(5, 11)):
            distance, direction = generator.uniform(0, 22), generator.uniform(0, 2 * math.pi)
            centre = [round(middle + distance * turn(direction)) for turn in (math.cos, math.sin)]
            axes = generator.uniform(7, 20, 2).round().astype(int).tolist()
            cv2.ellipse(clump, centre, axes, generator.uniform(0, 180), 0, 360, 255, cv2.FILLED)
    smooth = [cv2.GaussianBlur(clump.astype(np.float32) / 255, (0, 0), 3.0) for clump in clumps]
    rough = [fractal_noise((CLUMP_SIDE * 2, CLUMP_SIDE * 2), generator, 24, octaves=3) for _ in clumps]
    # Noise roughens the outline and thins the interior.
    frayed = [np.clip((s + 0.7 * (r - 0.5) - 0.25) / 0.5, 0, 1) * s for s, r in zip(smooth, rough, strict=True)]
    return np.stack([cv2.resize(flake, (CLUMP_SIDE, CLUMP_SIDE), interpolation=cv2.INTER_AREA) for flake in frayed])
