"""Synthesis of raindrops on a glass pane in front of the lens.

The pane is close and the camera focuses on the scene, so a drop acts as a small, strong lens out of focus: it shows a
wide view, inverted and compressed, dark where the surface is too steep to transmit light, and blurred by a circle of
confusion from a few pixels to more than its own size. A drop is round or a union of rounded lobes with an irregular
contour. Drops do not overlap; large ones are placed first. Some have run down and left a trail. Between them, a film of
water blurs and fades the image.

As everything on the pane is out of focus, it is rendered at half the resolution or less: the lobes of all drops as one
list of pixels, a field of surface slopes, one lookup of the refracted view, one blur. Lenses, defocus and opacity mix
light, which is approximated by squared pixel values, so bright areas outweigh dark ones.

Source: Gu et al., "Removing image artifacts due to dirty camera lenses and thin occluders", TOG 2009, for the
defocused layer; Qian et al., CVPR 2018, and Jin et al., "Raindrop Clarity", ECCV 2024, for sizes (from spray to drops
of a fifth of the image width), for day and dusk, and for the range of focus.
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
    add_glare,
    draw_log_uniform,
    lattice_noise,
    limited,
    to_rgb,
)

MERGING = 4.0  # sharpness of merging lobes: h = log(sum(exp(MERGING * h_i))) / MERGING
FLOOR = -0.8  # height of the dry pane; the rim of a drop is at 0, its centre at 1
BEADS = 9  # lobes per trail
LARGEST = 4.0  # maximum radius of a drop relative to the median
CHUNK = 2**19  # pixels of lobes rendered at a time
OFFERED = 5.0  # area of candidate drops relative to the area that may be required
LOBES_PER_BODY = 0.12  # area of protruding lobes of an irregular drop relative to its body
FAR_OUT = 10.0  # circle of confusion in pixels above which the pane is rendered at a quarter of the resolution
FILM_SHARE = 0.5  # maximum fraction of the squared error caused by the film

WATER = 1.333  # refractive index
STEEPEST = 0.98  # sine of the steepest slope: a surface seen edge-on
DARKEST = 0.12  # light from beyond the critical angle, by internal reflection
REACH = 128  # size in pixels of the stored view up to 45 degrees; most drops compress it to less
WHITE = 0.7  # gray value above which a light source exceeds the range of the image
SLOPES = 512  # table entries over the sine of the slope
DIRECTIONS = 24  # slopes of a drop over which its expected error is averaged
SHARP = 0.85  # squared error of a drop in focus relative to its whole surface, as opacity decreases at the rim
SMEARING = 0.6  # decrease of ln(squared error) per radius of the circle of confusion relative to the drop


class RaindropParameters(Parameters):
    """Parameters of raindrops. Ranges [lowest, highest] are sampled uniformly, once per image unless stated otherwise.

    Lengths in pixels refer to images about 500 pixels high, see `scale`.
    """

    type: Literal['raindrop'] = 'raindrop'
    psnr: PositiveRange = Field((16.5, 29.0), description='PSNR of the wet image in dB')
    coverage: Range = limited((0.01, 0.45), 0, 0.5, 'limits of the fraction of the pane covered by drops')
    radius: PositiveRange = limited((2.5, 26.0), 2, 100, 'median radius of the drops in pixels; log-uniform')
    size_spread: Range = limited((0.2, 0.75), 0, 1, 'standard deviation of ln(radius) over the drops of an image')
    contact_angle: Range = limited((25, 70), 5, 80, 'angle between water and glass at the rim in degrees')
    elongation: PositiveRange = limited((0.85, 1.5), 0.25, 4, 'ratio of height to width; per lobe')
    irregularity: Range = limited((0, 1), 0, 1, 'shape of drops, from round (0) to lobed with satellites (1)')
    trails: Range = limited((0, 0.08), 0, 1, 'fraction of drops with a trail')
    defocus: PositiveRange = limited(
        (0.15, 1.6), 0, 3, 'radius of the circle of confusion relative to `radius`; log-uniform'
    )
    film: Range = limited((0, 0.7), 0, 1, 'maximum opacity of the film of water')
    film_blur: PositiveRange = limited((1.5, 6.0), 0, 50, 'standard deviation of the blur by the film in pixels')
    sky: Range = limited((0.6, 1.0), 0, 1, 'brightness of the sky above the image, as seen in drops')
    skyline: PositiveRange = limited(
        (1.0, 20.0), 1, 45, 'degrees above the image at which this sky is open; log-uniform'
    )
    ground: Range = limited((0.2, 0.8), 0, 2, 'brightness of the ground below the image, relative to the image')
    glare: Range = limited((0, 6), 0, 10, 'brightness of light sources above white, relative to white')
    focal: PositiveRange = limited((700.0, 2500.0), 0, 1e5, 'focal length in pixels; sets the field of view of drops')
    scale: float = Field(1.0, ge=0.3, le=20, description='factor of all lengths; 1 is for images 500 pixels high')


def add_raindrops(
    image: np.ndarray, generator: Generator, parameters: RaindropParameters
) -> tuple[np.ndarray, np.ndarray]:
    """Add wet glass in front of a clean image, see `Degradation.apply`; where the mask is 0, the image is unchanged.

    Drops show the image and, beyond its border, its mirror image below a sky and above dark ground. Patches should
    therefore be degraded with a margin.
    Numerics: psnr is met within about 0.5 dB by the number of drops, if there are many. The limits of `coverage` take
        precedence, so low-contrast scenes may be degraded less, and high-contrast scenes more.
    """
    height, width = image.shape[:2]
    error = 10 ** (-generator.uniform(*parameters.psnr) / 10)
    radius = draw_log_uniform(generator, parameters.radius)
    defocus = draw_log_uniform(generator, parameters.defocus)
    confusion = defocus * radius
    zoom = (2 if confusion < FAR_OUT else 4) * max(1.0, parameters.scale)
    unit = parameters.scale / zoom  # pixels of the pane per pixel of the parameters
    pane = (math.ceil(height / zoom), math.ceil(width / zoom))
    sine = math.sin(math.radians(generator.uniform(*parameters.contact_angle)))
    light = image * image
    small = cv2.resize(light, pane[::-1], interpolation=cv2.INTER_AREA)
    film, spoilt = _film(small, generator, unit, parameters, FILM_SHARE * error)
    focal = generator.uniform(*parameters.focal) * parameters.scale
    sky, ground, glare = (generator.uniform(*span) for span in (parameters.sky, parameters.ground, parameters.glare))
    skyline = draw_log_uniform(generator, parameters.skyline)
    scene = Surroundings(light, focal, sky**2, skyline=skyline, ground=ground**2, glare=glare)
    irregularity = generator.uniform(*parameters.irregularity)

    # Choose the number of drops by the expected error, then correct it once by the actual error.
    wanted = max(error - spoilt, 0.0)
    coverage = float(np.clip(wanted / max(_expected_error(scene, sine, defocus), 1e-9), *parameters.coverage))
    offered = OFFERED * min(2 * coverage, parameters.coverage[1])
    lobes = _draw_lobes(pane, generator, radius * unit, offered, irregularity, parameters)
    unrest = lattice_noise(pane, generator, 10 * unit) * np.float32(irregularity)

    def layer_at(coverage: float) -> np.ndarray:
        opacity, steepness = _render(lobes[:5, lobes[5] <= coverage], unrest)
        drops = _defocus(refract(scene, opacity, steepness * np.float32(sine), zoom), confusion * unit)
        return film * cv2.merge([1 - drops[..., 3]] * 4) + drops

    layer = layer_at(coverage)
    made = _error(small, layer) - spoilt
    better = float(np.clip(coverage * wanted / max(made, wanted / 4, 1e-9), *parameters.coverage))
    if abs(better - coverage) > 0.08 * coverage:
        layer = layer_at(better)
    layer = cv2.resize(layer, (width, height), interpolation=cv2.INTER_LINEAR)
    opacity = np.clip(layer[..., 3], 0, 1)
    light *= to_rgb(1 - opacity)
    light += layer[..., :3]
    return np.sqrt(np.clip(light, 0, 1, out=light), out=light), opacity


def _error(small: np.ndarray, layer: np.ndarray) -> float:
    """Return the mean squared error caused by a layer, [h, w, 4], over light, [h, w, 3]."""
    wet = small * to_rgb(1 - layer[..., 3])
    wet += layer[..., :3]
    return cv2.norm(np.sqrt(np.clip(wet, 0, 1, out=wet), out=wet), np.sqrt(small), cv2.NORM_L2SQR) / small.size


def _draw_lobes(
    pane: tuple[int, int],
    generator: Generator,
    typical: float,
    offered: float,
    irregularity: float,
    parameters: RaindropParameters,
) -> np.ndarray:
    """Place drops of median radius `typical` on the pane and around it, and give each its lobes.

    There are more than required: their total area is `offered` times that of the pane. Returns one column per lobe,
    [6, n], in pixels of the pane: x, y, half width, extents above and below the widest row, and the fraction of the
    pane covered by drops up to and including this one.
    """
    spread = generator.uniform(*parameters.size_spread)
    border = 3 * typical
    height, width = pane[0] + 2 * border, pane[1] + 2 * border
    count = generator.poisson(offered * height * width / (math.pi * typical**2 * math.exp(2 * spread**2)))
    radius = typical * np.exp(spread * generator.normal(0, 1, count).clip(-2.5, 2.5))
    radius = np.sort(np.minimum(radius, LARGEST * typical))[::-1]
    drops = np.stack([generator.uniform(0, width, count), generator.uniform(0, height, count), radius])
    drops = drops[:, _apart(drops, (height, width))]
    # Spray is uneven: in denser areas, drops are placed earlier.
    spray = 1 + lattice_noise((math.ceil(height / 8), math.ceil(width / 8)), generator, 10 * typical / 8 + 4)
    column, row = (drops[:2] / 8).astype(np.int64)
    x, y, radius = drops[:, np.argsort(generator.random(len(row)) / np.maximum(spray[row, column], 1e-3))]
    areas = (1 + LOBES_PER_BODY * irregularity) * math.pi * radius**2 / (height * width)
    # Random fraction of its own area, so that the mean coverage is correct even for few large drops.
    arrival = np.cumsum(areas) - areas * generator.random(len(areas))
    return _shape(np.stack([x - border, y - border, radius, arrival]), generator, irregularity, parameters)


def _apart(drops: np.ndarray, size: tuple[float, float]) -> list[int]:
    """Return the indices of drops (x, y, radius), from large to small, that do not overlap an earlier drop."""
    taken = np.zeros((math.ceil(size[0]) + 1, math.ceil(size[1]) + 1), np.uint8)
    kept = []
    columns, rows, reach = np.stack([drops[0], drops[1], np.ceil(1.3 * drops[2])]).astype(int).tolist()
    for drop, (column, row) in enumerate(zip(columns, rows, strict=True)):
        if not taken[row, column]:
            kept.append(drop)
            cv2.circle(taken, (column, row), reach[drop], 1, -1)
    return kept


def _shape(drops: np.ndarray, generator: Generator, irregularity: float, parameters: RaindropParameters) -> np.ndarray:
    """Build each drop from a body and, depending on irregularity, up to two bulges and two separate satellites."""
    x, y, radius, arrival = drops
    count = len(x)
    lobes = [drops, _trails(drops, generator, parameters)]
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
        place = x + np.cos(direction) * distance, y + np.sin(direction) * distance
        lobes.append(np.stack([*place, size, arrival])[:, has])
    x, y, radius, arrival = np.concatenate(lobes, axis=1)
    tall = np.sqrt(generator.uniform(*parameters.elongation, len(x)))
    sag = generator.uniform(0, 0.3, len(x))  # gravity shortens the lower part
    return np.stack([x, y, radius / tall, radius * tall * (1 + sag), radius * tall * (1 - sag), arrival])


def _trails(drops: np.ndarray, generator: Generator, parameters: RaindropParameters) -> np.ndarray:
    """Return beads above some drops, [4, n] like `drops`: a tapering, wavy, broken tail."""
    ran = generator.random(drops.shape[1]) < generator.uniform(*parameters.trails)
    x, y, radius, arrival = drops[:, ran, None]
    shape = (len(x), BEADS)
    way = np.cumsum(generator.uniform(0.4, 1.0, shape), axis=1)
    aside = np.cumsum(generator.normal(0, 0.1, shape), axis=1)
    size = np.linspace(0.75, 0.25, BEADS) * generator.uniform(0.6, 1.0, shape)
    beads = (x + aside * radius, y - way * radius, size * radius, np.broadcast_to(arrival, shape))
    return np.stack(beads).reshape(4, -1)


def _render(lobes: np.ndarray, unrest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the opacity of drops, [h, w] in [0, 1], and their outward slope, [2, h, w], of length 1 at the rim.

    Each lobe is a dome 1 - |p|^2, with p the position relative to its extents. Heights and slopes are blended smoothly.
    """
    height, width = pane = unrest.shape
    weight, across, down = np.zeros((3, height * width), np.float32)
    x, y, radius, above, below = lobes
    reach = math.sqrt(1 - FLOOR)
    first = np.clip(np.ceil(lobes[:2] - reach * lobes[[2, 3]]), 0, [[width], [height]]).astype(np.int64)
    beyond = np.clip(np.floor(lobes[:2] + reach * lobes[[2, 4]]) + 1, 0, [[width], [height]]).astype(np.int64)
    (left, top), (columns, rows) = first, np.maximum(beyond - first, 0)
    area = columns * rows
    for group in np.split(np.arange(len(area)), np.searchsorted(np.cumsum(area), np.arange(CHUNK, area.sum(), CHUNK))):
        lobe = np.repeat(group, area[group])
        within = np.arange(len(lobe)) - np.repeat(np.cumsum(area[group]) - area[group], area[group])
        row, column = np.divmod(within, columns[lobe])
        row += top[lobe]
        column += left[lobe]
        u = ((column - x[lobe]) / radius[lobe]).astype(np.float32)
        v = (row - y[lobe]).astype(np.float32)
        v /= np.where(v < 0, above[lobe], below[lobe]).astype(np.float32)
        share = np.exp(np.float32(MERGING) * np.maximum(1 - u * u - v * v, 2 * FLOOR))
        place = row * width + column
        np.add.at(weight, place, share)
        np.add.at(across, place, share * u)
        np.add.at(down, place, share * v)
    level = np.log(weight + np.float32(math.exp(MERGING * FLOOR))).reshape(pane) / np.float32(MERGING)
    level += 0.2 * unrest  # irregular contours
    opacity = np.clip(level * 6 + 0.5, 0, 1)
    steepness = np.stack([across, down]).reshape(2, *pane) / np.maximum(weight, 1e-6).reshape(pane)
    return opacity, steepness


def _defocus(layer: np.ndarray, radius: float) -> np.ndarray:
    """Blur a layer with a disc of `radius` pixels with antialiased edge."""
    reach = math.ceil(radius)
    offset = np.arange(-reach, reach + 1, dtype=np.float32)
    disc = np.clip(radius + 0.5 - np.hypot(offset, offset[:, None]), 0, 1)
    return cv2.filter2D(layer, -1, disc / disc.sum(), borderType=cv2.BORDER_REPLICATE)


def _film(
    small: np.ndarray, generator: Generator, unit: float, parameters: RaindropParameters, most: float
) -> tuple[np.ndarray, float]:
    """Return a film that blurs, fades and displaces `small`, [h, w, 4], and its error, limited to `most`."""
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
    layer = _make_layer(seen, opacity)
    spoilt = _error(small, layer)
    if spoilt > most:
        layer *= np.float32(math.sqrt(most / spoilt))
        spoilt = _error(small, layer)
    return layer, spoilt


def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Return deflection per focal length and transmitted light, tabulated over the sine s of the slope.

    Rays hit the surface at asin(s) from its normal and leave at asin(n s), by Snell's law. Light is lost by Fresnel
    reflection.
    """
    s = np.linspace(0, 1, SLOPES)
    out = np.minimum(WATER * s, 1)
    inner, outer = np.sqrt(1 - s * s), np.sqrt(1 - out * out)
    aside = np.tan(np.arcsin(out) - np.arcsin(s))
    across = ((WATER * inner - outer) / np.maximum(WATER * inner + outer, 1e-9)) ** 2
    along = ((inner - WATER * outer) / np.maximum(inner + WATER * outer, 1e-9)) ** 2
    light = np.where(WATER * s < 1, 1 - (across + along) / 2, 0)
    return aside.astype(np.float32), (DARKEST + (1 - DARKEST) * light).astype(np.float32)


ASIDE, LIGHT = _tables()


class Surroundings:
    """The scene within the field of view of drops: an image, its mirror image, sky above it and dark ground below.

    Args:
        image: light of the image, [H, W, 3] float32 in [0, 1].
        focal: focal length in pixels of the image.
        sky, ground: light of the sky, and light of distant ground relative to the mean of the image.
        skyline: angle above the image, in degrees, where the sky is fully visible.
        glare: brightness of white above the range of the image, so that it remains white out of focus.
    """

    def __init__(
        self, image: np.ndarray, focal: float, sky: float, *, skyline: float, ground: float, glare: float
    ) -> None:
        self.shrink = max(1.0, focal / REACH)  # pixels of the image per pixel of the view
        self.focal = focal / self.shrink  # focal length in pixels of the view
        self.border = border = max(1, math.ceil(self.focal))  # pixels of the view beyond each edge of the image
        size = [math.ceil(side / self.shrink) for side in image.shape[1::-1]]
        view = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        rows = len(view)
        dark = np.float32(ground) * view.reshape(-1, 3).mean(axis=0)
        view = cv2.copyMakeBorder(view, border, border, border, border, cv2.BORDER_REFLECT)
        tangent = np.arange(border, border - len(view), -1, dtype=np.float32)[:, None, None] / border  # above the image
        above, below = slice(0, border), slice(border + rows, None)
        blue = np.array([0.93, 0.98, 1.04], np.float32) * np.float32(sky)
        view[above] += (blue - view[above]) * np.clip(tangent[above] / math.tan(math.radians(skyline)), 0, 0.95)
        view[below] += (dark - view[below]) * np.clip(-(tangent[below] + np.float32(rows / border)) * 2, 0, 0.8)
        self.view = add_glare(view, WHITE, glare)  # RGB, [h + 2 border, w + 2 border, 3]

    @property
    def image(self) -> np.ndarray:
        """The part of the view covered by the image, [h, w, 3]."""
        inner = slice(self.border, -self.border)
        return self.view[inner, inner]

    def look(self, x: np.ndarray, y: np.ndarray, across: np.ndarray, down: np.ndarray) -> np.ndarray:
        """Return the view through slopes of water, [n, m, 3], at positions in pixels of `view` from the image corner.

        `across` and `down` are the outward components of the sine of the slope, [n, m] float32; x and y broadcast.
        """
        # Not cv2.magnitude, whose last digit depends on the memory alignment of its arguments.
        size = np.minimum(np.sqrt(across * across + down * down), STEEPEST)
        entry = (size * (SLOPES - 1)).astype(np.int32)
        # Rays bend towards the thick part of the drop, against the outward slope.
        pull = ASIDE[entry] * np.float32(-self.focal) / np.maximum(size, 1e-6)
        x = across * pull + (x + np.float32(self.border))
        y = down * pull + (y + np.float32(self.border))
        seen = cv2.remap(self.view, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        seen *= to_rgb(LIGHT[entry])
        return seen


def refract(scene: Surroundings, opacity: np.ndarray, slope: np.ndarray, zoom: float) -> np.ndarray:
    """Return the view through drops of `opacity`, [h, w], as a layer.

    `slope` is the outward sine of the slope (across, down), [2, h, w]; `zoom` is the scale of the image relative to it.
    """
    ratio = np.float32(zoom / scene.shrink)
    y, x = (np.arange(size, dtype=np.float32) * ratio for size in opacity.shape)
    return _make_layer(scene.look(x, y[:, None], *slope), opacity)


def _make_layer(colour: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Return a layer with premultiplied colour and opacity, [h, w, 4] float32."""
    return cv2.merge([*cv2.split(colour * to_rgb(opacity)), opacity])


def _expected_error(scene: Surroundings, rim: float, defocus: float) -> float:
    """Return the expected mean squared error of pixel values in drops, before any is placed.

    It is averaged over positions in the image and over the surface of a round drop, whose slope increases to the sine
    `rim`.
    """
    image = scene.image
    step = max(1, int(math.sqrt(image.shape[0] * image.shape[1] / 700)))
    clean = image[::step, ::step]
    y, x = np.divmod(np.arange(clean.size // 3, dtype=np.float32), np.float32(clean.shape[1]))
    number = np.arange(DIRECTIONS)[:, None]
    radius, angle = rim * np.sqrt((number + 0.5) / DIRECTIONS), number * math.pi * (3 - math.sqrt(5))
    across, down = ((radius * turn(angle) * np.ones(len(x))).astype(np.float32) for turn in (np.cos, np.sin))
    seen = scene.look(x * step, y * step, across, down)
    change = np.sqrt(np.clip(seen, 0, 1)) - np.sqrt(np.clip(clean.reshape(1, -1, 3), 0, 1))
    return SHARP * math.exp(-SMEARING * defocus) * float(np.mean(change**2))
