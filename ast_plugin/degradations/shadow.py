"""Synthesis of cast shadows.

Something outside the picture, or cut by its border, keeps the sun from a part of the scene: see shadow_casters.py. The
sun is a disc, so the edge of the shadow widens with the way from what casts it. In the shadow remains the light of the
sky, bluish, and what the surroundings throw back, which varies. Encoded values are taken as a power of 1 / 2.2 of
light, in which the loss is a factor of encoded values as well: what lies in the sun stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
from pydantic import Field

from ast_plugin.degradations.noise import lattice_noise
from ast_plugin.degradations.ranges import Parameters, PositiveRange, Range
from ast_plugin.degradations.shadow_casters import CASTERS, Caster

FRAME = (
    480,
    720,
)  # height and width in pixels at scale 1 of the photograph that a smaller patch is taken to be cut from
GRID_ROWS = 240  # rows on which shadows are drawn; their edges are softer than that
GAMMA = 2.2
TRIES = 10  # drawings, of which the first with the coverage that was drawn is taken
PENUMBRAS = 5  # widths of the edge that are rendered; between them is interpolated

CasterName = Literal['wall', 'object', 'figure', 'foliage', 'bars']


class ShadowParameters(Parameters):
    """What a shadow may be like; each [lowest, highest] is drawn from uniformly, once an image."""

    type: Literal['shadow'] = 'shadow'
    casters: tuple[CasterName, ...] = Field(
        tuple(CASTERS), min_length=1, description=f'what casts it, each as likely: {", ".join(CASTERS)}'
    )
    coverage: PositiveRange = Field((0.12, 0.5), description='share of the photograph in the shadow, within (0, 1]')
    ambient: PositiveRange = Field(
        (0.16, 0.48), description='light left in the shadow, of that in the sun, within (0, 1]'
    )
    tint: Range = Field((0.02, 0.22), description='excess of blue and lack of red in that light, within [0, 1)')
    penumbra: PositiveRange = Field(
        (0.9, 2.2), description='pixels, standard deviation of the edge where it is sharpest'
    )
    widening: Range = Field((2.0, 12.0), description='pixels by which it grows across the height of the photograph')
    scale: float = Field(1.0, gt=0, le=20, description='size of photographs that patches come from: 1 for 480x720')

    LIMITS = {'coverage': (0, 1), 'ambient': (0, 1), 'tint': (0, 0.99), 'penumbra': (0, 40), 'widening': (0, 80)}


def add_shadow(
    image: np.ndarray, generator: np.random.Generator, parameters: ShadowParameters
) -> tuple[np.ndarray, np.ndarray]:
    """Cast a shadow on a clean photograph.

    Args:
        image: RGB, [H, W, 3], float32 in [0, 1], any size. A patch smaller than `FRAME` gets a part of the shadow that
            a photograph of that size would get, with some of the shadow in it.
        generator: source of all randomness; the same state gives the same result, bit for bit.
        parameters: ranges to draw from.
    Returns:
        The shadowed image, [H, W, 3] float32 in [0, 1], and how much of the sun is kept away, [H, W] float32 in [0, 1].
    """
    height, width = image.shape[:2]
    frame = [max(length, side * parameters.scale) for length, side in zip(image.shape, FRAME, strict=False)]
    rows, columns = GRID_ROWS, min(8 * GRID_ROWS, max(GRID_ROWS // 8, round(GRID_ROWS * frame[1] / frame[0])))
    shadow = _draw(generator, parameters, (rows, columns))
    light = _light(generator, parameters, shadow)
    offset = _offset(generator, shadow, (height * rows / frame[0], width * columns / frame[1]))
    shadow, gain = (_enlarge(field, (height, width), frame, offset) for field in (shadow, light))
    return np.multiply(image, gain, out=gain), shadow


def _draw(generator: np.random.Generator, parameters: ShadowParameters, shape: tuple[int, int]) -> np.ndarray:
    """Draw casters until the coverage that was drawn is met, and soften the best; [rows, columns] float32 in [0, 1]."""
    wanted = generator.uniform(*parameters.coverage)
    best, best_error = None, math.inf
    for _ in range(TRIES):
        names: Sequence[CasterName] = parameters.casters
        caster = CASTERS[names[generator.integers(len(names))]](shape, generator)
        share = float(caster.opacity.mean()) / 255
        error = abs(math.log(max(share, 1e-6) / wanted))
        if error < best_error:
            best, best_error = caster, error
        if error < 0.25:
            break
    penumbra, widening = generator.uniform(*parameters.penumbra), generator.uniform(*parameters.widening)
    unit = shape[0] / FRAME[0]
    return _soften(best, penumbra * unit, widening * unit)


def _soften(caster: Caster, sharpest: float, widening: float) -> np.ndarray:
    """Blur the outline, ever more with the distance from where the caster stands.

    Args:
        caster: the outline, and the point from which distance counts.
        sharpest: standard deviation of the edge at that point, in pixels of the grid.
        widening: by how much it grows over a distance of the grid's height.
    """
    opacity = caster.opacity.astype(np.float32) / 255
    rows, columns = opacity.shape
    y, x = np.arange(rows, dtype=np.float32)[:, None], np.arange(columns, dtype=np.float32)
    distance = np.sqrt((y - np.float32(caster.foot[0])) ** 2 + (x - np.float32(caster.foot[1])) ** 2) / rows
    widest = sharpest + widening * float(distance.max())
    sigmas = np.geomspace(max(sharpest, 0.3), max(widest, sharpest + 0.1, 0.4), PENUMBRAS)
    level = np.log((sharpest + widening * distance).clip(sigmas[0], sigmas[-1]) / sigmas[0]) / np.log(
        sigmas[1] / sigmas[0]
    )
    soft = np.zeros_like(opacity)
    for number, sigma in enumerate(sigmas):
        weight = np.maximum(1 - np.abs(level - number), 0).astype(np.float32)
        soft += weight * cv2.GaussianBlur(opacity, (0, 0), float(sigma), borderType=cv2.BORDER_REPLICATE)
    return np.clip(soft, 0, 1, out=soft)


def _light(generator: np.random.Generator, parameters: ShadowParameters, shadow: np.ndarray) -> np.ndarray:
    """Return the factor of encoded values, [rows, columns, 3] float32 in [0, 1]."""
    ambient, tint = generator.uniform(*parameters.ambient), generator.uniform(*parameters.tint)
    sky = ambient * np.array([1 - tint, 1 + generator.normal(0, 0.01), 1 + tint], np.float32)
    uneven = lattice_noise(shadow.shape, generator, 0.8 * shadow.shape[0])
    uneven *= np.float32(0.25)
    uneven += 1
    left = np.minimum(uneven[..., None] * np.clip(sky, 0, 1).astype(np.float32), 1)
    return cv2.pow(1 - shadow[..., None] * (1 - left), 1 / GAMMA)


def _offset(generator: np.random.Generator, shadow: np.ndarray, window: tuple[float, float]) -> tuple[float, float]:
    """Return where on the grid a window lies: anywhere around a random place in the shadow, within the grid."""
    chance = generator.random(3)
    places = np.flatnonzero(shadow > 0.25)
    place = places[int(chance[0] * len(places))] if len(places) else int(chance[0] * shadow.size)
    centre = divmod(int(place), shadow.shape[1])
    return tuple(
        min(max(middle - share * side, 0.0), max(length - side, 0.0))
        for middle, share, side, length in zip(centre, chance[1:], window, shadow.shape, strict=True)
    )


def _enlarge(
    field: np.ndarray, shape: tuple[int, int], frame: Sequence[float], offset: tuple[float, float]
) -> np.ndarray:
    """Return the window of `shape` pixels that begins at `offset` on the grid."""
    steps = [field.shape[0] / frame[0], field.shape[1] / frame[1]]
    matrix = np.array(
        [[steps[1], 0, offset[1] + steps[1] / 2 - 0.5], [0, steps[0], offset[0] + steps[0] / 2 - 0.5]], np.float64
    )
    return cv2.warpAffine(
        field,
        matrix,
        shape[::-1],
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
