"""Synthesis of cast shadows.

An object outside the image, or cut by its border, blocks the sun in a part of the scene. As the sun is a disc, the edge
of the shadow widens with the distance from the object. The shadow still receives bluish light from the sky and varying
light from the surroundings. Pixel values are light to the power of 1 / 2.2, so attenuation is a factor for both.
"""

# ruff: noqa: RUF005 (lists are added to arrays here, not to lists)
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import cv2
import numpy as np
from numpy.random import Generator
from pydantic import Field

from ast_plugin.degradations.base import (
    FRAME,
    GAMMA,
    Parameters,
    PositiveRange,
    Range,
    fractal_noise,
    lattice_noise,
    limited,
)

GRID_ROWS = 240  # rows of the grid on which shadows are drawn; their edges are softer than its resolution
TRIES = 10  # maximum number of drawings to reach the coverage
PENUMBRAS = 5  # number of edge widths rendered, between which is interpolated
SHIFT = 4  # fractional bits of coordinates in OpenCV's drawing functions

CasterName = Literal['wall', 'object', 'figure', 'foliage', 'bars']


class ShadowParameters(Parameters):
    """Parameters of shadows. Ranges [lowest, highest] are sampled uniformly, once per image."""

    type: Literal['shadow'] = 'shadow'
    casters: tuple[CasterName, ...] = Field(
        get_args(CasterName),
        min_length=1,
        description=f'types of objects, drawn with equal probability: {", ".join(get_args(CasterName))}',
    )
    coverage: PositiveRange = limited((0.12, 0.5), 0, 1, 'fraction of the image in shadow')
    ambient: PositiveRange = limited((0.16, 0.48), 0, 1, 'light in the shadow relative to the light in the sun')
    tint: Range = limited((0.02, 0.22), 0, 0.99, 'relative increase of blue and decrease of red in the shadow')
    penumbra: PositiveRange = limited((0.9, 2.2), 0, 40, 'standard deviation of the sharpest edge in pixels')
    widening: Range = limited((2.0, 12.0), 0, 80, 'increase of this width over one image height, in pixels')
    scale: float = Field(1.0, gt=0, le=20, description='size of the images that patches come from; 1 is for 480x720')


def add_shadow(image: np.ndarray, generator: Generator, parameters: ShadowParameters) -> tuple[np.ndarray, np.ndarray]:
    """Cast a shadow on a clean image, see `Degradation.apply`; the mask is the blocked fraction of sunlight.

    A patch smaller than `FRAME` gets a part of the shadow of an image of that size, chosen near the shadow.
    """
    height, width = image.shape[:2]
    frame = [max(length, side * parameters.scale) for length, side in zip(image.shape, FRAME, strict=False)]
    rows, columns = GRID_ROWS, min(8 * GRID_ROWS, max(GRID_ROWS // 8, round(GRID_ROWS * frame[1] / frame[0])))
    shadow = _draw(generator, parameters, (rows, columns))
    light = _light(generator, parameters, shadow)
    down, right = rows / frame[0], columns / frame[1]
    top, left = _offset(generator, shadow, (height * rows / frame[0], width * columns / frame[1]))
    matrix = np.array([[right, 0, left + right / 2 - 0.5], [0, down, top + down / 2 - 0.5]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    shadow, gain = (
        cv2.warpAffine(field, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
        for field in (shadow, light)
    )
    return np.multiply(image, gain, out=gain), shadow


def _draw(generator: Generator, parameters: ShadowParameters, shape: tuple[int, int]) -> np.ndarray:
    """Draw casters until one matches the coverage, and soften the best; [rows, columns] float32 in [0, 1]."""
    wanted = generator.uniform(*parameters.coverage)
    best, best_error = None, math.inf
    for _ in range(TRIES):
        name = parameters.casters[generator.integers(len(parameters.casters))]
        opacity, foot = CASTERS[name](shape, generator)
        share = float(opacity.mean()) / 255
        error = abs(math.log(max(share, 1e-6) / wanted))
        if error < best_error:
            best, best_error = (opacity, foot), error
        if error < 0.25:
            break
    penumbra, widening = generator.uniform(*parameters.penumbra), generator.uniform(*parameters.widening)
    unit = shape[0] / FRAME[0]
    return _soften(*best, penumbra * unit, widening * unit)


def _soften(opacity: np.ndarray, foot: np.ndarray, sharpest: float, widening: float) -> np.ndarray:
    """Blur the outline by `sharpest` at the foot of the caster, plus `widening` per grid height of distance."""
    opacity = opacity.astype(np.float32) / 255
    rows, columns = opacity.shape
    y, x = np.arange(rows, dtype=np.float32)[:, None], np.arange(columns, dtype=np.float32)
    distance = np.sqrt((y - np.float32(foot[1])) ** 2 + (x - np.float32(foot[0])) ** 2) / rows
    widest = sharpest + widening * float(distance.max())
    sigmas = np.geomspace(max(sharpest, 0.3), max(widest, sharpest + 0.1, 0.4), PENUMBRAS)
    sigma = (sharpest + widening * distance).clip(sigmas[0], sigmas[-1])
    level = np.log(sigma / sigmas[0]) / np.log(sigmas[1] / sigmas[0])
    soft = np.zeros_like(opacity)
    for number, sigma in enumerate(sigmas):
        weight = np.maximum(1 - np.abs(level - number), 0).astype(np.float32)
        soft += weight * cv2.GaussianBlur(opacity, (0, 0), float(sigma), borderType=cv2.BORDER_REPLICATE)
    return np.clip(soft, 0, 1, out=soft)


def _light(generator: Generator, parameters: ShadowParameters, shadow: np.ndarray) -> np.ndarray:
    """Return the gain of pixel values, [rows, columns, 3] float32 in [0, 1]."""
    ambient, tint = generator.uniform(*parameters.ambient), generator.uniform(*parameters.tint)
    sky = ambient * np.array([1 - tint, 1 + generator.normal(0, 0.01), 1 + tint], np.float32)
    uneven = lattice_noise(shadow.shape, generator, 0.8 * shadow.shape[0])
    uneven *= np.float32(0.25)
    uneven += 1
    left = np.minimum(uneven[..., None] * np.clip(sky, 0, 1).astype(np.float32), 1)
    return cv2.pow(1 - shadow[..., None] * (1 - left), 1 / GAMMA)


def _offset(generator: Generator, shadow: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Return where a window begins on the grid, (down, right), random around a random point of the shadow."""
    chance = generator.random(3)
    places = np.flatnonzero(shadow > 0.25)
    if not len(places):
        places = np.arange(shadow.size)
    centre = np.unravel_index(places[int(chance[0] * len(places))], shadow.shape)
    return np.clip(centre - chance[1:] * window, 0, np.maximum(np.subtract(shadow.shape, window), 0))


# The functions below draw a caster on a grid of any aspect ratio; lengths are fractions of the grid height. They return
# where it blocks the sun, [rows, columns] uint8, and where it stands, (x, y) in grid pixels, possibly outside: the edge
# of the shadow is sharpest there.


def draw_wall(shape: tuple[int, int], generator: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw the roof line of a wall from one side, straight with a few steps and gables."""
    rows, columns = shape
    reach = math.hypot(rows, columns)
    steps = int(generator.integers(1, 6))
    along = np.sort(generator.uniform(-0.5, 0.5, steps)) * reach
    line, level = [(-reach, 0.0)], 0.0
    for place in along:
        rise = generator.normal(0, 0.14) * rows
        if generator.random() < 0.6:
            line += [(place, level), (place + generator.normal(0, 0.01) * rows, level + rise)]
            level += rise
        else:
            half = generator.uniform(0.05, 0.25) * rows
            line += [(place - half, level), (place, level + abs(rise) + 0.05 * rows), (place + half, level)]
    line += [(reach, level), (reach, -3 * reach), (-reach, -3 * reach)]
    points = _rotate(line, generator.uniform(0, 2 * math.pi))
    centre = generator.uniform(0.15, 0.85, 2) * [columns, rows]
    foot = centre + [generator.uniform(-0.4, 0.4) * reach, -0.7 * reach]
    return _fill(shape, points + centre), foot


def draw_object(shape: tuple[int, int], generator: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw an object of smooth or polygonal outline, half of them held by a stick or arm from the border."""
    rows, columns = shape
    radius = generator.uniform(0.16, 0.46) * rows
    angles = np.linspace(0, 2 * math.pi, 96, endpoint=False)
    if generator.random() < 0.5:
        outline = np.ones_like(angles)
        for order in range(2, 7):
            outline += generator.normal(0, 0.35 / order) * np.cos(order * angles + generator.uniform(0, 2 * math.pi))
        points = _circle(angles) * np.maximum(outline, 0.25)[:, None]
    else:
        corners = np.sort(generator.uniform(0, 2 * math.pi, int(generator.integers(4, 8))))
        points = _circle(corners) * generator.uniform(0.75, 1.1, (len(corners), 1))
    points = _rotate(points * [1, generator.uniform(0.45, 1)] * radius, generator.uniform(0, 2 * math.pi))
    centre = generator.uniform(0.1, 0.9, 2) * [columns, rows]
    opacity = _fill(shape, points + centre)
    foot = _outside(shape, generator)
    if generator.random() < 0.5:
        thickness = generator.uniform(0.02, 0.11) * rows
        opacity = np.maximum(opacity, _fill(shape, _limb(centre, foot, thickness, thickness * 1.5)))
    return opacity, foot


def draw_figure(shape: tuple[int, int], generator: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw one or two persons, feet near or beyond the border, elongated by a low sun."""
    rows, columns = shape
    opacity = np.zeros(shape, np.uint8)
    lean = generator.uniform(-0.9, 0.9)  # radians from the vertical
    length = generator.uniform(0.8, 1.5) * rows
    if generator.random() < 0.3:
        lean += math.pi
    base = np.array([generator.uniform(0.2, 0.8) * columns, (rows if abs(lean) < 1 else 0.0)])
    base[1] += math.copysign(generator.uniform(-0.1, 0.4) * rows, base[1] - 1)
    for number in range(1 + int(generator.random() < 0.35)):
        parts = _person(generator)
        wide = generator.uniform(0.7, 1.15)
        place = base + [number * generator.choice([-1, 1]) * generator.uniform(0.25, 0.5) * rows, 0]
        for part in parts:
            scaled = part * [wide * length * 0.75, length]
            opacity = np.maximum(opacity, _fill(shape, _rotate(scaled, lean) + place))
    return opacity, base


def draw_foliage(shape: tuple[int, int], generator: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw the crown of a tree: clusters of leaves with gaps, and a few branches."""
    rows, columns = shape
    crown = fractal_noise(shape, generator, 0.9 * rows, octaves=3)
    side = _rotate([[1.0, 0.0]], generator.uniform(0, 2 * math.pi))[0]
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32)
    slope = ((x / columns - 0.5) * np.float32(side[0]) + (y / rows - 0.5) * np.float32(side[1])).astype(np.float32)
    crown = np.clip((crown - 0.5) * 2.2 + slope * np.float32(1.8) + np.float32(generator.uniform(-0.25, 0.35)), 0, 1)
    leaf = generator.uniform(0.012, 0.035) * rows
    count = int(min(5200, rows * columns / leaf**2 * 0.9))
    centres = generator.uniform(0, 1, (count, 2)) * [columns, rows]
    kept = crown[np.minimum(centres[:, 1].astype(int), rows - 1), np.minimum(centres[:, 0].astype(int), columns - 1)]
    centres = centres[generator.random(count) < kept * 1.3]
    opacity = _leaves(shape, centres, leaf, generator)
    foot = np.array([columns, rows]) * (0.5 + 0.75 * side)
    for _ in range(int(generator.integers(2, 6))):
        start = foot + generator.normal(0, 0.15, 2) * rows
        way = (np.array([columns, rows]) * generator.uniform(0.15, 0.85, 2) - start) * generator.uniform(0.5, 1)
        bend = start + way / 2 + generator.normal(0, 0.06, 2) * rows
        thick = generator.uniform(0.006, 0.02) * rows
        limbs = [_limb(start, bend, thick * 1.6, thick), _limb(bend, start + way, thick, thick * 0.4)]
        opacity = np.maximum(opacity, _fill(shape, *limbs))
    return opacity, foot


def draw_bars(shape: tuple[int, int], generator: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a pole with an arm, or the bars of a fence or window, spread by perspective or a nearby lamp."""
    rows, columns = shape
    reach = math.hypot(rows, columns)
    if generator.random() < 0.35:
        foot = _outside(shape, generator)
        head = generator.uniform(0.2, 0.8, 2) * [columns, rows]
        thick = generator.uniform(0.03, 0.12) * rows
        sign = head + generator.normal(0, 0.22, 2) * rows
        limbs = [_limb(foot, head, thick * 1.4, thick), _limb(head, sign, thick * 0.7, thick * 0.6)]
        plate = _rotate([[-1, -0.6], [1, -0.6], [1, 0.6], [-1, 0.6]], generator.uniform(0, 3))
        return _fill(shape, *limbs, plate * generator.uniform(0.06, 0.2) * rows + sign), foot
    pitch = generator.uniform(0.1, 0.3) * rows
    share = generator.uniform(0.18, 0.5)
    fan = generator.uniform(-0.25, 0.25)
    opacity = np.zeros(shape, np.uint8)
    turn = generator.uniform(0, math.pi)
    centre = np.array([columns, rows]) * generator.uniform(0.3, 0.7, 2)
    count = math.ceil(reach / pitch)
    half = share * pitch / 2
    parts = []
    for number in range(-count, count + 1):
        near, far = (number * pitch * (1 + sign * fan) for sign in (-1, 1))
        parts.append([[near - half, -reach], [near + half, -reach], [far + half, reach], [far - half, reach]])
    for place in generator.uniform(-0.5, 0.5, int(generator.integers(0, 4))) * rows:
        first, last = place - half, place - half + share * pitch
        parts.append([[-reach, first], [reach, first], [reach, last], [-reach, last]])
    for part in parts:
        opacity = np.maximum(opacity, _fill(shape, _rotate(part, turn) + centre))
    # The fence ends at a line: its bars cover one side of it.
    edge = [[-2 * reach, 0], [2 * reach, 0], [2 * reach, 3 * reach], [-2 * reach, 3 * reach]]
    end = _rotate(edge, turn + generator.normal(0, 0.15)) + generator.uniform(0, 0.5, 2) * [0, rows]
    return np.minimum(opacity, _fill(shape, end)), _outside(shape, generator)


CASTERS: dict[CasterName, Callable[[tuple[int, int], Generator], tuple[np.ndarray, np.ndarray]]] = {
    'wall': draw_wall,
    'object': draw_object,
    'figure': draw_figure,
    'foliage': draw_foliage,
    'bars': draw_bars,
}


def _person(generator: Generator) -> list[np.ndarray]:
    """Return polygons of a standing or walking person, (right, down), with feet at 0 and the top of the head at -1."""
    stride, sway = generator.uniform(0.02, 0.16), generator.normal(0, 0.03)
    hip, chest, neck = np.array([sway, -0.5]), np.array([sway * 1.5, -0.72]), np.array([sway * 1.6, -0.84])
    head = [sway * 1.7, -0.925] + _circle(np.linspace(0, 2 * math.pi, 24, endpoint=False)) * [0.062, 0.075]
    parts = [head, _limb(neck + [0, 0.04], neck - [0, 0.05], 0.06, 0.05)]
    shoulder, waist = generator.uniform(0.12, 0.16), generator.uniform(0.085, 0.12)
    sides = [(-shoulder, -0.80), (-shoulder * 0.6, -0.845), (shoulder * 0.6, -0.845), (shoulder, -0.80)]
    sides += [(waist, -0.62), (waist * 1.2, -0.46), (-waist * 1.2, -0.46), (-waist, -0.62)]
    parts.append(np.array(sides) + [[sway * 1.5, 0]])
    if generator.random() < 0.3:  # coat or skirt
        flare = generator.uniform(0.13, 0.2)
        parts.append(np.array([[-waist, -0.55], [waist, -0.55], [flare, -0.22], [-flare, -0.22]]) + [[sway, 0]])
    for sign in (-1, 1):
        ankle = np.array([sign * stride, -0.02])
        knee = (hip + ankle) / 2 + [sign * 0.015 + generator.normal(0, 0.012), 0]
        parts += [_limb(hip + [sign * 0.045, 0], knee, 0.115, 0.08), _limb(knee, ankle, 0.08, 0.05)]
        parts.append(_limb(ankle, ankle + [0.07 * generator.choice([-1, 1]), 0.01], 0.045, 0.035))
        elbow = chest + [sign * (shoulder + generator.uniform(0.0, 0.1)), generator.uniform(-0.02, 0.16)]
        hand = elbow + [sign * generator.uniform(-0.1, 0.1), generator.uniform(-0.12, 0.17)]
        parts += [_limb(chest + [sign * shoulder * 0.85, -0.06], elbow, 0.065, 0.055), _limb(elbow, hand, 0.055, 0.04)]
    return parts


def _leaves(shape: tuple[int, int], centres: np.ndarray, size: float, generator: Generator) -> np.ndarray:
    """Draw leaves of about `size` at `centres` as small ellipses, with gaps by noise."""
    opacity = np.zeros(shape, np.uint8)
    count = len(centres)
    lengths = generator.uniform(0.6, 1.5, count) * size
    angles = generator.uniform(0, math.pi, count)
    t = np.linspace(0, 2 * math.pi, 10, endpoint=False)
    unit = _circle(t) * [1, 0.5]
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    outlines = np.stack([unit[:, 0] * cos - unit[:, 1] * sin, unit[:, 0] * sin + unit[:, 1] * cos], 2)
    outlines = outlines * lengths[:, None, None] + centres[:, None]
    for outline in np.round(outlines * 2**SHIFT).astype(np.int32):
        cv2.fillConvexPoly(opacity, outline, 255, cv2.LINE_8, SHIFT)
    gaps = lattice_noise(shape, generator, 4 * size)
    return np.where(gaps > -0.55, opacity, 0).astype(np.uint8)


def _limb(start: np.ndarray, end: np.ndarray, width: float, end_width: float) -> np.ndarray:
    """Return a tapering stroke as a polygon, [8, 2]."""
    start, end = np.asarray(start, float), np.asarray(end, float)
    way = end - start
    along = way / max(float(np.hypot(*way)), 1e-9)
    across = np.array([-along[1], along[0]])
    outline = []
    for point, half, sign in ((start, width / 2, -1), (end, end_width / 2, 1)):
        for turn in (-1, -0.4, 0.4, 1):
            outline.append(point + half * (sign * along * (1 - abs(turn)) + sign * -turn * across))
    return np.array(outline)


def _circle(angles: np.ndarray) -> np.ndarray:
    """Return points on the unit circle, [n, 2]."""
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def _rotate(points: np.typing.ArrayLike, angle: float) -> np.ndarray:
    """Rotate points (x, y) about the origin, [n, 2]."""
    cos, sin = math.cos(angle), math.sin(angle)
    return np.asarray(points, float) @ np.array([[cos, sin], [-sin, cos]])


def _outside(shape: tuple[int, int], generator: Generator) -> np.ndarray:
    """Return a random point beyond the border, (x, y)."""
    rows, columns = shape
    angle = generator.uniform(0, 2 * math.pi)
    return np.array([columns / 2, rows / 2]) + np.array([math.cos(angle), math.sin(angle)]) * math.hypot(*shape) * 0.6


def _fill(shape: tuple[int, int], *polygons: np.ndarray) -> np.ndarray:
    """Fill polygons of (x, y) separately, with antialiased edges; [rows, columns] uint8."""
    canvas = np.zeros(shape, np.uint8)
    for polygon in polygons:
        inside = np.clip(polygon, -8 * max(shape), 8 * max(shape))
        cv2.fillPoly(canvas, [np.round(inside * 2**SHIFT).astype(np.int32)], 255, cv2.LINE_AA, SHIFT)
    return canvas
