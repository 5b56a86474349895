"""Outlines of what casts shadows: walls, things, people, trees, bars. Sharp ones; shadow.py softens them.

Each draws into [rows, columns] whatever its ratio is; lengths are shares of the grid's height.
"""

# ruff: noqa: RUF005 (lists are added to arrays here, not to lists)
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from ast_plugin.degradations.noise import fractal_noise, lattice_noise

_SHIFT = 4  # binary digits behind the point of coordinates that OpenCV draws


@dataclass(frozen=True)
class Caster:
    """What casts a shadow.

    Attributes:
        opacity: [rows, columns] uint8, 255 where the sun is hidden.
        foot: where it stands, (row, column) in pixels of the grid, which may lie outside: there the edge is sharpest.
    """

    opacity: np.ndarray
    foot: tuple[float, float]


def wall(shape: tuple[int, int], generator: np.random.Generator) -> Caster:
    """A wall or roof line that comes in from a side, straight with a few steps and gables."""
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
    points = _turned(np.array(line), generator.uniform(0, 2 * math.pi))
    centre = generator.uniform(0.15, 0.85, 2) * [columns, rows]
    foot = _turned(np.array([[generator.uniform(-0.4, 0.4) * reach, -0.7 * reach]]), 0)
    return Caster(_filled(shape, [points + centre]), (float(centre[1] + foot[0, 1]), float(centre[0] + foot[0, 0])))


def thing(shape: tuple[int, int], generator: np.random.Generator) -> Caster:
    """Something of a smooth or a cornered outline, half of the time held on a stick or an arm from the border."""
    rows, columns = shape
    radius = generator.uniform(0.16, 0.46) * rows
    angles = np.linspace(0, 2 * math.pi, 96, endpoint=False)
    if generator.random() < 0.5:
        outline = np.ones_like(angles)
        for order in range(2, 7):
            outline += generator.normal(0, 0.35 / order) * np.cos(order * angles + generator.uniform(0, 2 * math.pi))
        points = np.stack([np.cos(angles), np.sin(angles)], 1) * np.maximum(outline, 0.25)[:, None]
    else:
        corners = np.sort(generator.uniform(0, 2 * math.pi, int(generator.integers(4, 8))))
        points = np.stack([np.cos(corners), np.sin(corners)], 1) * generator.uniform(0.75, 1.1, (len(corners), 1))
    points = _turned(points * [1, generator.uniform(0.45, 1)] * radius, generator.uniform(0, 2 * math.pi))
    centre = generator.uniform(0.1, 0.9, 2) * [columns, rows]
    opacity = _filled(shape, [points + centre])
    foot = _outside(shape, generator)
    if generator.random() < 0.5:
        thickness = generator.uniform(0.02, 0.11) * rows
        opacity = np.maximum(opacity, _filled(shape, [_limb(centre, foot, thickness, thickness * 1.5)]))
    return Caster(opacity, (float(foot[1]), float(foot[0])))


def figure(shape: tuple[int, int], generator: np.random.Generator) -> Caster:
    """A person or two, feet near or beyond the border, drawn long by a low sun."""
    rows, columns = shape
    opacity = np.zeros(shape, np.uint8)
    lean = generator.uniform(-0.9, 0.9)  # radians from upwards
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
            opacity = np.maximum(opacity, _filled(shape, [_turned(scaled, lean) + place]))
    return Caster(opacity, (float(base[1]), float(base[0])))


def foliage(shape: tuple[int, int], generator: np.random.Generator) -> Caster:
    """The crown of a tree: leaves in clusters, with sun between them, and a few branches."""
    rows, columns = shape
    crown = fractal_noise(shape, generator, 0.9 * rows, octaves=3)
    side = _turned(np.array([[1.0, 0.0]]), generator.uniform(0, 2 * math.pi))[0]
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
        opacity = np.maximum(opacity, _filled(shape, limbs))
    return Caster(opacity, (float(foot[1]), float(foot[0])))


def bars(shape: tuple[int, int], generator: np.random.Generator) -> Caster:
    """A pole with an arm, or the bars of a fence or window, spread as a near lamp or perspective spreads them."""
    rows, columns = shape
    reach = math.hypot(rows, columns)
    if generator.random() < 0.35:
        foot = _outside(shape, generator)
        head = generator.uniform(0.2, 0.8, 2) * [columns, rows]
        thick = generator.uniform(0.03, 0.12) * rows
        sign = head + generator.normal(0, 0.22, 2) * rows
        limbs = [_limb(foot, head, thick * 1.4, thick), _limb(head, sign, thick * 0.7, thick * 0.6)]
        plate = _turned(np.array([[-1, -0.6], [1, -0.6], [1, 0.6], [-1, 0.6]]), generator.uniform(0, 3))
        return Caster(
            _filled(shape, [*limbs, plate * generator.uniform(0.06, 0.2) * rows + sign]),
            (float(foot[1]), float(foot[0])),
        )
    pitch = generator.uniform(0.1, 0.3) * rows
    share = generator.uniform(0.18, 0.5)
    fan = generator.uniform(-0.25, 0.25)
    opacity = np.zeros(shape, np.uint8)
    turn = generator.uniform(0, math.pi)
    centre = np.array([columns, rows]) * generator.uniform(0.3, 0.7, 2)
    count = math.ceil(reach / pitch)
    upright = []
    for number in range(-count, count + 1):
        near, far = (number * pitch * (1 + sign * fan) for sign in (-1, 1))
        half = share * pitch / 2
        upright.append(
            np.array([[near - half, -reach], [near + half, -reach], [far + half, reach], [far - half, reach]])
        )
    across = [
        np.array([[-reach, place - share * pitch / 2], [reach, place - share * pitch / 2]])
        for place in generator.uniform(-0.5, 0.5, int(generator.integers(0, 4))) * rows
    ]
    across = [np.concatenate([edge, edge[::-1] + [0, share * pitch]]) for edge in across]
    for part in upright + across:
        opacity = np.maximum(opacity, _filled(shape, [_turned(part, turn) + centre]))
    # A fence ends somewhere: its bars cover one side of a line.
    edge = np.array([[-2 * reach, 0], [2 * reach, 0], [2 * reach, 3 * reach], [-2 * reach, 3 * reach]])
    end = _filled(shape, [_turned(edge, turn + generator.normal(0, 0.15)) + generator.uniform(0, 0.5, 2) * [0, rows]])
    foot = _outside(shape, generator)
    return Caster(np.minimum(opacity, end), (float(foot[1]), float(foot[0])))


CASTERS: dict[str, Callable[[tuple[int, int], np.random.Generator], Caster]] = {
    'wall': wall,
    'object': thing,
    'figure': figure,
    'foliage': foliage,
    'bars': bars,
}
"""What casts shadows, by the name that the option `casters` calls it."""


def _person(generator: np.random.Generator) -> list[np.ndarray]:
    """Polygons of someone who stands or walks, (right, up as negative) with feet at 0 and the head's top at -1."""
    stride, sway = generator.uniform(0.02, 0.16), generator.normal(0, 0.03)
    hip, chest, neck = np.array([sway, -0.5]), np.array([sway * 1.5, -0.72]), np.array([sway * 1.6, -0.84])
    angles = np.linspace(0, 2 * math.pi, 24, endpoint=False)
    head = np.array([sway * 1.7, -0.925]) + np.stack([0.062 * np.cos(angles), 0.075 * np.sin(angles)], 1)
    parts = [head, _limb(neck + [0, 0.04], neck - [0, 0.05], 0.06, 0.05)]
    shoulder, waist = generator.uniform(0.12, 0.16), generator.uniform(0.085, 0.12)
    sides = [(-shoulder, -0.80), (-shoulder * 0.6, -0.845), (shoulder * 0.6, -0.845), (shoulder, -0.80)]
    sides += [(waist, -0.62), (waist * 1.2, -0.46), (-waist * 1.2, -0.46), (-waist, -0.62)]
    parts.append(np.array(sides) + [[sway * 1.5, 0]])
    if generator.random() < 0.3:  # a coat or a skirt
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


def _leaves(shape: tuple[int, int], centres: np.ndarray, size: float, generator: np.random.Generator) -> np.ndarray:
    """Put leaves of about `size` at `centres`: noise with gaps where leaves are few, drawn as small ellipses."""
    opacity = np.zeros(shape, np.uint8)
    count = len(centres)
    lengths = generator.uniform(0.6, 1.5, count) * size
    angles = generator.uniform(0, math.pi, count)
    t = np.linspace(0, 2 * math.pi, 10, endpoint=False)
    unit = np.stack([np.cos(t), 0.5 * np.sin(t)], 1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    outlines = np.stack([unit[:, 0] * cos - unit[:, 1] * sin, unit[:, 0] * sin + unit[:, 1] * cos], 2)
    outlines = outlines * lengths[:, None, None] + centres[:, None]
    for outline in np.round(outlines * 2**_SHIFT).astype(np.int32):
        cv2.fillConvexPoly(opacity, outline, 255, cv2.LINE_8, _SHIFT)
    gaps = lattice_noise(shape, generator, 4 * size)
    return np.where(gaps > -0.55, opacity, 0).astype(np.uint8)


def _limb(start: np.ndarray, end: np.ndarray, width: float, end_width: float) -> np.ndarray:
    """A tapering stroke as a polygon, [8, 2]."""
    start, end = np.asarray(start, float), np.asarray(end, float)
    way = end - start
    along = way / max(float(np.hypot(*way)), 1e-9)
    across = np.array([-along[1], along[0]])
    outline = []
    for point, half, sign in ((start, width / 2, -1), (end, end_width / 2, 1)):
        for turn in (-1, -0.4, 0.4, 1):
            outline.append(point + half * (sign * along * (1 - abs(turn)) + sign * -turn * across))
    return np.array(outline)


def _turned(points: np.ndarray, angle: float) -> np.ndarray:
    cos, sin = math.cos(angle), math.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


def _outside(shape: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """A point beyond the border, (x, y)."""
    rows, columns = shape
    angle = generator.uniform(0, 2 * math.pi)
    return np.array([columns / 2, rows / 2]) + np.array([math.cos(angle), math.sin(angle)]) * math.hypot(*shape) * 0.6


def _filled(shape: tuple[int, int], polygons: list[np.ndarray]) -> np.ndarray:
    """Fill polygons of (x, y), each by itself, with smooth edges; [rows, columns] uint8."""
    canvas = np.zeros(shape, np.uint8)
    for polygon in polygons:
        limited = np.clip(polygon, -8 * max(shape), 8 * max(shape))
        cv2.fillPoly(canvas, [np.round(limited * 2**_SHIFT).astype(np.int32)], 255, cv2.LINE_AA, _SHIFT)
    return canvas
