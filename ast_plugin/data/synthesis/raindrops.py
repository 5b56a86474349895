"""Synthesis of raindrops that stick to a pane of glass in front of the lens.

The pane is close and the camera looks past it, so a drop is a small, strongly bent lens out of focus: through its
upper part one sees the ground and through its lower part the sky, all of a wide view turned over and squeezed into it,
dark where the surface is too steep for light to leave the water, and smeared into the image around it by the circle
of confusion, which is anything from a few pixels to more than the drop. A drop is round or a union of rounded lobes
whose contour wavers, fuller below than above; drops keep clear of one another, the large ones first, with small ones
beside them. Some ran down and left a trail. Between them water lies as a film that blurs and pales.

Everything on the pane is out of focus, so it is made at half the resolution or less: lobes of all drops as one list
of pixels, a field of surface slopes, one look-up of the refracted view, one blur.

Lenses, defocus and opacity mix light, not the values of an image: what is bright outweighs what is dark, and a drop out
of focus is pale. Light is taken for the square of the value here.

Two things that pairs of wet and dry images differ by are left out, for a network cannot know them: how far the second
image is displaced and how much brighter it was exposed.

Source: Gu et al., "Removing image artifacts due to dirty camera lenses and thin occluders", TOG 2009, for the
layer out of focus; Qian et al., CVPR 2018, and Jin et al., "Raindrop Clarity", ECCV 2024, for sizes, from spray to
drops a fifth of the image across, for day and dusk, and for drops more and less in focus.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import cv2
import numpy as np
from pydantic import Field

from ast_plugin.data.synthesis.drop_optics import Surroundings, expected_error, refract, surroundings
from ast_plugin.data.synthesis.noise import lattice_noise
from ast_plugin.data.synthesis.ranges import Parameters, PositiveRange, Range

MERGING = 4.0  # how sharply lobes join: h = log(sum(exp(MERGING * h_i))) / MERGING
FLOOR = -0.8  # height of the bare pane, where a drop's rim is at 0 and its middle at 1
BEADS = 9  # lobes of a trail
LARGEST = 4.0  # radius of the largest drop by the median
CHUNK = 2**19  # pixels of lobes rendered at a time
OFFERED = 5.0  # area of the drops offered a place, by that of the drops that may be wanted
LOBES_PER_BODY = 0.12  # area of the lobes of an irregular drop that stick out, by that of its body
FAR_OUT = 10.0  # circle of confusion in pixels from which on the pane is made at a quarter of the resolution
FILM_SHARE = 0.5  # at most this share of the squared error comes from the film


class RaindropParameters(Parameters):
    """What drops may look like; each [lowest, highest] is drawn from uniformly, once an image unless said otherwise.

    Pixels are those of an image about 500 pixels high, see `scale`.
    """

    type: Literal['raindrop'] = 'raindrop'
    psnr: PositiveRange = Field((16.5, 29.0), description='dB of the wet image against the clean one')
    coverage: Range = Field((0.01, 0.45), description='limits of the share of the pane under drops, within [0, 0.5]')
    radius: PositiveRange = Field(
        (2.5, 26.0), description="pixels, in [2, 100]; median of the image's drops, its logarithm uniform"
    )
    size_spread: Range = Field(
        (0.2, 0.75), description='standard deviation of the logarithm of the radius over an image, within [0, 1]'
    )
    contact_angle: Range = Field((25, 70), description='degrees between water and glass at the rim, within [5, 80]')
    elongation: PositiveRange = Field((0.85, 1.5), description='height over width, in [0.25, 4]; one value a lobe')
    irregularity: Range = Field((0, 1), description='from round drops (0) to lobed ones with satellites (1)')
    trails: Range = Field((0, 0.08), description='share of the drops that ran down and left a trail, within [0, 1]')
    defocus: PositiveRange = Field(
        (0.15, 1.6),
        description='radius of the circle of confusion by the median radius, up to 3; its logarithm uniform',
    )
    film: Range = Field((0, 0.7), description='opacity of the film of water where it is thickest, within [0, 1]')
    film_blur: PositiveRange = Field(
        (1.5, 6.0), description='pixels; standard deviation of the blur through the film, up to 50'
    )
    sky: Range = Field((0.6, 1.0), description='brightness, in [0, 1], of the sky that drops see above the image')
    skyline: PositiveRange = Field(
        (1.0, 20.0), description='degrees above the image where that sky is open, in [1, 45]'
    )
    ground: Range = Field(
        (0.2, 0.8), description='brightness, by that of the image, of the ground below, within [0, 2]'
    )
    glare: Range = Field(
        (0, 6), description='how much brighter what is white is than an image can show, in white, within [0, 10]'
    )
    focal: PositiveRange = Field(
        (700.0, 2500.0), description='pixels, up to 1e5; focal length, which says how far aside a drop looks'
    )
    scale: float = Field(
        1.0, ge=0.3, le=20, description='in [0.3, 20]; multiplies every length; 1 suits images 500 pixels high'
    )

    LIMITS = {
        'coverage': (0, 0.5),
        'radius': (2, 100),
        'contact_angle': (5, 80),
        'elongation': (0.25, 4),
        'defocus': (0, 3),
        'size_spread': (0, 1),
        'irregularity': (0, 1),
        'trails': (0, 1),
        'film': (0, 1),
        'film_blur': (0, 50),
        'sky': (0, 1),
        'skyline': (1, 45),
        'ground': (0, 2),
        'glare': (0, 10),
        'focal': (0, 1e5),
    }


@dataclass(frozen=True)
class _Lobes:
    """Rounded parts of drops, arrays of one value a lobe, in pixels of the pane."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray  # half the width
    above: np.ndarray  # extent from the widest row upwards
    below: np.ndarray  # and downwards: less, for water sags
    arrival: np.ndarray  # share of the pane under drops when this one has come

    def at(self, coverage: float) -> _Lobes:
        """Return those that are there when the drops cover this share of the pane."""
        there = self.arrival <= coverage
        return _Lobes(*(getattr(self, field.name)[there] for field in fields(self)))


def add_raindrops(
    image: np.ndarray, generator: np.random.Generator, parameters: RaindropParameters
) -> tuple[np.ndarray, np.ndarray]:
    """Put wet glass before a clean image.

    Args:
        image: RGB, [H, W, 3], float32 in [0, 1], any size. Drops see what it shows and, beyond its border, its mirror
            image under a sky and over a dark ground; so a patch is best degraded with a margin of its image.
        generator: source of all randomness; the same state gives the same result, bit for bit.
        parameters: ranges to draw from.
    Returns:
        The image through the glass, [H, W, 3] float32 in [0, 1], and the opacity of the water before each pixel,
        [H, W] float32 in [0, 1]; where it is 0 the image is the clean one.
    Numerics: psnr is met within about 0.5 dB by how many drops there are, where they are many; the limits of
        `coverage` come first, so that a scene of little contrast stays cleaner, and one of very much may be worse.
    """
    height, width = image.shape[:2]
    error = 10 ** (-generator.uniform(*parameters.psnr) / 10)
    radius = math.exp(generator.uniform(*np.log(parameters.radius)))
    defocus = math.exp(generator.uniform(*np.log(parameters.defocus)))
    confusion = defocus * radius
    zoom = (2 if confusion < FAR_OUT else 4) * max(1.0, parameters.scale)
    unit = parameters.scale / zoom  # pixels of the pane to one of the parameters
    pane = (math.ceil(height / zoom), math.ceil(width / zoom))
    sine = math.sin(math.radians(generator.uniform(*parameters.contact_angle)))
    light = image * image
    small = cv2.resize(light, pane[::-1], interpolation=cv2.INTER_AREA)
    film, spoilt = _film(small, generator, unit, parameters, FILM_SHARE * error)
    scene = _look_around(light, generator, parameters)
    irregularity = generator.uniform(*parameters.irregularity)

    # As many drops as are expected to make the error that is still wanted, then once more by the error they made.
    wanted = max(error - spoilt, 0.0)
    coverage = float(np.clip(wanted / max(expected_error(scene, sine, defocus), 1e-9), *parameters.coverage))
    offered = OFFERED * min(2 * coverage, parameters.coverage[1])
    lobes = _draw_lobes(pane, generator, radius * unit, offered, irregularity, parameters)
    unrest = lattice_noise(pane, generator, 10 * unit) * np.float32(irregularity)

    def layer_at(coverage: float) -> np.ndarray:
        opacity, steepness = _render(lobes.at(coverage), unrest)
        drops = _defocus(refract(scene, opacity, steepness * np.float32(sine), zoom), confusion * unit)
        return film * cv2.merge([1 - drops[..., 3]] * 4) + drops

    layer = layer_at(coverage)
    made = _error(small, layer) - spoilt
    better = float(np.clip(coverage * wanted / max(made, wanted / 4, 1e-9), *parameters.coverage))
    if abs(better - coverage) > 0.08 * coverage:
        layer = layer_at(better)
    layer = cv2.resize(layer, (width, height), interpolation=cv2.INTER_LINEAR)
    opacity = np.clip(layer[..., 3], 0, 1)
    light *= cv2.cvtColor(1 - opacity, cv2.COLOR_GRAY2RGB)
    light += layer[..., :3]
    return np.sqrt(np.clip(light, 0, 1, out=light), out=light), opacity


def _look_around(light: np.ndarray, generator: np.random.Generator, parameters: RaindropParameters) -> Surroundings:
    """Draw what lies around the image, whose light is given."""
    focal = generator.uniform(*parameters.focal) * parameters.scale
    sky, ground, glare = (generator.uniform(*span) for span in (parameters.sky, parameters.ground, parameters.glare))
    skyline = math.exp(generator.uniform(*np.log(parameters.skyline)))
    return surroundings(light, focal, sky**2, skyline=skyline, ground=ground**2, glare=glare)


def _error(small: np.ndarray, layer: np.ndarray) -> float:
    """Return the mean squared error that a layer, colour times opacity and opacity, makes before light, [h, w, 3]."""
    wet = small * cv2.cvtColor(1 - layer[..., 3], cv2.COLOR_GRAY2RGB)
    wet += layer[..., :3]
    return cv2.norm(np.sqrt(np.clip(wet, 0, 1, out=wet), out=wet), np.sqrt(small), cv2.NORM_L2SQR) / small.size


def _draw_lobes(
    pane: tuple[int, int],
    generator: np.random.Generator,
    typical: float,
    offered: float,
    irregularity: float,
    parameters: RaindropParameters,
) -> _Lobes:
    """Scatter drops over the pane and beyond its border, and give each its lobes.

    There are more than are wanted; they have an order in which they come.

    Args:
        pane: (height, width) in pixels.
        generator: source of randomness.
        typical: median radius in pixels of the pane.
        offered: area of the drops that are offered a place, by that of the pane.
        irregularity: how many of them have several lobes, in [0, 1].
        parameters: ranges to draw from.
    """
    spread = generator.uniform(*parameters.size_spread)
    border = 3 * typical
    height, width = pane[0] + 2 * border, pane[1] + 2 * border
    count = generator.poisson(offered * height * width / (math.pi * typical**2 * math.exp(2 * spread**2)))
    radius = typical * np.exp(spread * generator.normal(0, 1, count).clip(-2.5, 2.5))
    radius = np.sort(np.minimum(radius, LARGEST * typical))[::-1]
    x, y = generator.uniform(0, width, count), generator.uniform(0, height, count)
    apart = _apart(x, y, radius, (height, width))
    x, y, radius = x[apart], y[apart], radius[apart]
    # Spray is uneven: where it falls thicker, drops come earlier.
    spray = 1 + lattice_noise((math.ceil(height / 8), math.ceil(width / 8)), generator, 10 * typical / 8 + 4)
    thickness = spray[(y / 8).astype(np.int64), (x / 8).astype(np.int64)]
    order = np.argsort(generator.random(len(x)) / np.maximum(thickness, 1e-3))
    x, y, radius = x[order], y[order], radius[order]
    areas = (1 + LOBES_PER_BODY * irregularity) * math.pi * radius**2 / (height * width)
    # A share of its own area, so that a pane of few large drops is as wet on the average.
    arrival = np.cumsum(areas) - areas * generator.random(len(areas))
    return _shape(x - border, y - border, radius, arrival, generator, irregularity, parameters)


def _apart(x: np.ndarray, y: np.ndarray, radius: np.ndarray, size: tuple[float, float]) -> list[int]:
    """Return which drops, given from large to small, do not have their middle in or close to an earlier one."""
    taken = np.zeros((math.ceil(size[0]) + 1, math.ceil(size[1]) + 1), np.uint8)
    kept = []
    columns, rows, reach = x.astype(int).tolist(), y.astype(int).tolist(), np.ceil(1.3 * radius).astype(int).tolist()
    for drop, (column, row) in enumerate(zip(columns, rows, strict=True)):
        if not taken[row, column]:
            kept.append(drop)
            cv2.circle(taken, (column, row), reach[drop], 1, -1)
    return kept


def _shape(
    x: np.ndarray,
    y: np.ndarray,
    radius: np.ndarray,
    arrival: np.ndarray,
    generator: np.random.Generator,
    irregularity: float,
    parameters: RaindropParameters,
) -> _Lobes:
    """Build each drop of a body and, if irregular, up to two bulges on it and up to two satellites beside it."""
    count = len(x)
    lobes = [(x, y, radius, arrival), _trails(x, y, radius, arrival, generator, parameters)]
    for chance, distances, sizes in (
        (0.7, (0.3, 0.8), (0.5, 0.85)),
        (0.4, (0.3, 0.9), (0.4, 0.75)),
        (0.5, (1.3, 2.2), (0.15, 0.45)),
        (0.3, (1.3, 2.6), (0.15, 0.40)),
    ):
        direction = generator.uniform(0, 2 * math.pi, count)
        distance = generator.uniform(*distances, count) * radius
        size = generator.uniform(*sizes, count) * radius
        has = generator.random(count) < chance * irregularity
        place = (x + np.cos(direction) * distance, y + np.sin(direction) * distance)
        lobes.append(tuple(values[has] for values in (*place, size, arrival)))
    x, y, radius, arrival = (np.concatenate(values) for values in zip(*lobes, strict=True))
    tall = np.sqrt(generator.uniform(*parameters.elongation, len(x)))
    sag = generator.uniform(0, 0.3, len(x))
    return _Lobes(x, y, radius / tall, radius * tall * (1 + sag), radius * tall * (1 - sag), arrival)


def _trails(
    x: np.ndarray,
    y: np.ndarray,
    radius: np.ndarray,
    arrival: np.ndarray,
    generator: np.random.Generator,
    parameters: RaindropParameters,
) -> tuple[np.ndarray, ...]:
    """Return place, radius and arrival of beads above some drops: a tail that tapers, wavers and breaks up."""
    ran = generator.random(len(x)) < generator.uniform(*parameters.trails)
    shape = (np.count_nonzero(ran), BEADS)
    x, y, radius, arrival = (values[ran, None] for values in (x, y, radius, arrival))
    way = np.cumsum(generator.uniform(0.4, 1.0, shape), axis=1)
    aside = np.cumsum(generator.normal(0, 0.1, shape), axis=1)
    size = np.linspace(0.75, 0.25, BEADS) * generator.uniform(0.6, 1.0, shape)
    beads = (x + aside * radius, y - way * radius, size * radius, arrival + np.zeros(shape))
    return tuple(values.ravel() for values in beads)


def _render(lobes: _Lobes, unrest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where there are drops, [h, w] in [0, 1], and their outward steepness, [2, h, w], of length 1 at a rim.

    Each lobe is a dome 1 - |p|^2, p the place in it relative to its extent. Heights of lobes join softly, slopes in
    the same proportion, so that drops which touch become one.
    """
    height, width = pane = unrest.shape
    weight, across, down = np.zeros((3, height * width), np.float32)
    reach = math.sqrt(1 - FLOOR)
    left, right = _covered(lobes.x - reach * lobes.radius, lobes.x + reach * lobes.radius, width)
    top, bottom = _covered(lobes.y - reach * lobes.above, lobes.y + reach * lobes.below, height)
    columns, area = right - left, (right - left) * (bottom - top)
    for group in np.split(np.arange(len(area)), np.searchsorted(np.cumsum(area), np.arange(CHUNK, area.sum(), CHUNK))):
        lobe = np.repeat(group, area[group])
        within = np.arange(len(lobe)) - np.repeat(np.cumsum(area[group]) - area[group], area[group])
        row, column = np.divmod(within, columns[lobe])
        row += top[lobe]
        column += left[lobe]
        u = ((column - lobes.x[lobe]) / lobes.radius[lobe]).astype(np.float32)
        v = (row - lobes.y[lobe]).astype(np.float32)
        v /= np.where(v < 0, lobes.above[lobe], lobes.below[lobe]).astype(np.float32)
        share = np.exp(np.float32(MERGING) * np.maximum(1 - u * u - v * v, 2 * FLOOR))
        place = row * width + column
        np.add.at(weight, place, share)
        np.add.at(across, place, share * u)
        np.add.at(down, place, share * v)
    level = np.log(weight + np.float32(math.exp(MERGING * FLOOR))).reshape(pane) / np.float32(MERGING)
    level += 0.2 * unrest  # contours waver
    opacity = np.clip(level * 6 + 0.5, 0, 1)
    steepness = np.stack([across, down]).reshape(2, *pane) / np.maximum(weight, 1e-6).reshape(pane)
    return opacity, steepness


def _covered(low: np.ndarray, high: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return first pixel and one past the last between `low` and `high`, within [0, size)."""
    first = np.clip(np.ceil(low), 0, size).astype(np.int64)
    return first, np.maximum(np.clip(np.floor(high) + 1, 0, size).astype(np.int64), first)


def _defocus(layer: np.ndarray, radius: float) -> np.ndarray:
    """Blur a layer of the pane with a disc of `radius` pixels, softened at its edge."""
    reach = math.ceil(radius)
    offset = np.arange(-reach, reach + 1, dtype=np.float32)
    disc = np.clip(radius + 0.5 - np.hypot(offset, offset[:, None]), 0, 1)
    return cv2.filter2D(layer, -1, disc / disc.sum(), borderType=cv2.BORDER_REPLICATE)


def _film(
    small: np.ndarray, generator: np.random.Generator, unit: float, parameters: RaindropParameters, most: float
) -> tuple[np.ndarray, float]:
    """Make the film of water: the scene blurred, paled and displaced.

    Args:
        small: light of the image at the resolution of the pane, [h, w, 3].
        generator: source of randomness.
        unit: pixels of the pane to one of the parameters.
        parameters: ranges to draw from.
        most: mean squared error that the film may make; it is made thinner where it would make more.
    Returns:
        Colour times opacity and opacity, [h, w, 4], and the mean squared error that the film alone makes.
    """
    shape = small.shape[:2]
    sigma = generator.uniform(*parameters.film_blur) * unit
    thickness = lattice_noise(shape, generator, 120 * unit) + 0.5 * lattice_noise(shape, generator, 36 * unit)
    opacity = np.clip(0.5 + thickness, 0, 1) * np.float32(generator.uniform(*parameters.film))
    wavering = [lattice_noise(shape, generator, 28 * unit) * np.float32(8 * unit) for _ in range(2)]
    x = np.arange(shape[1], dtype=np.float32) + wavering[0]
    y = np.arange(shape[0], dtype=np.float32)[:, None] + wavering[1]
    seen = cv2.GaussianBlur(small, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
    seen = cv2.remap(seen, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    glow = np.float32(generator.uniform(0.04, 0.14))
    seen += (np.float32(0.2) + np.float32(0.65) * small.reshape(-1, 3).mean(axis=0) - seen) * glow
    opacities = cv2.cvtColor(opacity, cv2.COLOR_GRAY2RGB)
    layer = cv2.merge([*cv2.split(seen * opacities), opacity])
    spoilt = _error(small, layer)
    if spoilt > most:
        layer *= np.float32(math.sqrt(most / spoilt))
        spoilt = _error(small, layer)
    return layer, spoilt
