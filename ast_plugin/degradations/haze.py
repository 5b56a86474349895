"""Synthesis of dense and uneven haze.

Koschmieder's law says how a scene J fades into the airlight A over a depth d through haze of extinction beta:
I = J t + A (1 - t), with t = exp(-beta d). In dense haze, part of the light that particles turn aside reaches the
camera beside its point, so the scene is smeared; and haze drifts in swathes, so beta varies from place to place. Here
the optical depth is tau = beta d n, with n smooth noise of several octaves and of mean 1, and::

    I = J exp(-tau) + (J * G) (exp(-k tau) - exp(-tau)) + A (1 - exp(-k tau))

where k < 1 is the share of the scattered light that is lost for the image and G a Gaussian that widens with tau.

Where haze is lit by lamps and windows, A differs from place to place in brightness and in colour, and glows around
what is bright. The camera adapts: the more haze there is, the more I is darkened and the colour of A turned to grey.

Source: Koschmieder 1924, for the law; Narasimhan & Nayar, "Shedding light on the weather", CVPR 2003, for the glow;
Li et al., "Nighttime haze removal with glow and multiple light colors", ICCV 2015, for airlight that varies.
"""

from __future__ import annotations

import math
from typing import Literal

import cv2
import numpy as np
from numpy.random import Generator
from pydantic import Field

from ast_plugin.degradations.base import (
    GAMMA,
    Parameters,
    PositiveRange,
    Range,
    add_glare,
    fractal_noise,
    lattice_noise,
    limited,
    shrink,
    strips,
    to_rgb,
)
from ast_plugin.errors import DataError

DENSEST = 2.5  # mean optical depth beyond which too little of the image would be left to be restored
NOISE_DEVIATION = 0.14  # standard deviation of `fractal_noise`
PROBE_SIDE = 48  # pixels of the shorter side at which the thickness for a wished PSNR is sought
CONTRAST_THRESHOLD = 0.02  # contrast at which an object is held to vanish: the definition of visibility
FARTHEST_SHARE = 0.02  # of the image that the farthest things must fill to be taken for what lights the haze
SKY_LIT = (0.7, 0.95)  # least brightness of haze by that of the sky that lights it
SCENE_LIT = 0.9  # and by the mean of the scene, for droplets swallow less of the light than things do
LIGHT_CELL = 480.0  # pixels at scale 1 between places that different lamps light
GLOW_SPREAD = 45.0  # pixels at scale 1; standard deviation of the glow around what is bright
WHITE = 0.94  # gray value above which a light is brighter than an image can show
SHOULDER = 0.85  # brightness above which airlight approaches white ever more slowly
LATTICE_DEVIATION = 0.45  # standard deviation of `lattice_noise`

GUESS_SIDE = 160  # pixels of the shorter side at which depth is guessed
SKY_COLOURS = 0.45  # distance in RGB from the sky at the upper edge beyond which nothing is sky
SKY_ROUGHNESS = 0.035  # local contrast above which a place is no sky
OUTDOORS = 0.03  # mean of what `_sky` gives above which an image was taken outdoors


class HazeParameters(Parameters):
    """What haze may look like; each [lowest, highest] is drawn from uniformly, once an image.

    Pixels are those of an image about 500 pixels high, see `scale`.
    """

    type: Literal['haze'] = 'haze'
    psnr: PositiveRange = Field((9.5, 22.0), description='dB of the hazy image against the clean one')
    visibility: PositiveRange | None = Field(
        None, description='instead of psnr, in units of the given depth: where contrast has sunk to 2 percent'
    )
    nearest: PositiveRange = limited((0.1, 0.7), 0, 0.99, 'guessed depth of the foreground by that of the farthest')
    room: float = Field(0.5, ge=0, le=1, description='chance that the guessed depth without sky is that of a room')
    airlight: Range = limited((0.45, 0.95), 0, 1, 'mean brightness of the haze itself')
    tint: float = Field(0.05, ge=0, le=0.2, description='standard deviation of the mean colour of the airlight')
    lamps: Range = limited((0, 0.25), 0, 1, 'standard deviation over the image of ln(airlight), lit from the side')
    lamp_tint: Range = limited((0, 0.1), 0, 0.5, 'standard deviation over the image of its colour from cold to warm')
    glow: Range = limited((0, 0.6), 0, 1, 'share of the airlight that is light of the scene nearby')
    glare: Range = limited((0, 3), 0, 10, 'how much brighter lamps and windows are than an image can show, in white')
    exposure: Range = limited((-0.5, 0.3), -3, 3, 'stops by which opaque haze is rendered brighter than a clear scene')
    white_balance: Range = limited((0, 0.6), 0, 1, 'share of the tint of opaque haze that the camera removes')
    noise: Range = limited((0, 0.01), 0, 0.1, 'standard deviation of the noise of the camera')
    unevenness: Range = limited((0.0, 0.7), 0, 2, 'standard deviation of ln(extinction) over the image')
    cell: PositiveRange = Field((120.0, 400.0), description='pixels between independent swathes')
    forward: Range = limited((0.0, 0.35), 0, 0.9, 'share of the scattered light that only smears')
    spread: PositiveRange = Field((3.0, 7.0), description='pixels; smear where the optical depth is 1')
    scale: float = Field(1.0, gt=0, description='multiplies every length; 1 suits images 500 pixels high')


def add_haze(
    image: np.ndarray, generator: Generator, parameters: HazeParameters, depth: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Put haze into a clean image, see `Degradation.apply`; the mask is its opacity, 1 - exp(-k tau).

    Args:
        depth: [H, W], distance of each pixel in any unit, such as metres; infinite is sky; 0 and NaN are unknown, and
            filled in from around. Without it depth is guessed, see `guess_depth`.
    Raises:
        DataError: if `depth` has another size, a negative value, or no finite one above 0; or if visibility is asked
            for without depth.
    Numerics: psnr is met within 0.5 dB, unless that takes a mean optical depth above 2.5, which would leave too little
        to restore: an image of little contrast, as bright as the airlight, stays cleaner.
    """
    if parameters.visibility is not None and depth is None:
        raise DataError('visibility is a distance, so it needs depth in the same unit; give depth, or psnr instead')
    shape = image.shape[:2]
    forward = generator.uniform(*parameters.forward)
    spread = generator.uniform(*parameters.spread) * parameters.scale
    amount = generator.uniform(*(parameters.psnr if parameters.visibility is None else parameters.visibility))
    nearest = generator.uniform(*parameters.nearest)
    depth = guess_depth(image, generator, nearest, parameters.room) if depth is None else fill_depth(depth, shape)
    light = add_glare(image, WHITE, generator.uniform(*parameters.glare))
    ratio = min(shape) / PROBE_SIDE
    small, small_depth = shrink(light, ratio), shrink(depth, ratio)
    airlight = _airlight(small, small_depth, generator, parameters)
    unit = min(small.shape[:2]) / min(shape) * parameters.scale  # pixels of `small` to one of the parameters
    airlight = _light(small, airlight, unit, generator, parameters)
    adaptation = _adaptation(airlight, generator, parameters)
    thickness = depth * _swathes(shape, generator, parameters)
    if parameters.visibility is None:
        tau, error = shrink(thickness, ratio), 10 ** (-amount / 10)
        beta = _extinction(small, tau, airlight, adaptation, 1 - forward, error)
    else:
        beta = -math.log(CONTRAST_THRESHOLD) / amount
    thickness *= np.float32(beta)
    deviation = generator.uniform(*parameters.noise)
    hazy, opacity = _compose(light, thickness, airlight, adaptation, 1 - forward, spread)
    if deviation:  # uniform noise, as that is drawn fastest
        noise = np.frombuffer(generator.bytes(hazy.size), np.uint8).reshape(hazy.shape).astype(np.float32)
        noise -= np.float32(127.5)
        noise *= np.float32(deviation / math.sqrt((256**2 - 1) / 12))
        hazy += noise
    return np.clip(hazy, 0, 1, out=hazy), opacity


def fill_depth(depth: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return a depth map that is finite and positive everywhere, [H, W] float32.

    Infinite depth becomes twice the farthest one measured. Unknown depth (NaN, or 0 as depth cameras write it) is the
    mean of what is known around, as near as there is any.

    Raises:
        DataError: if it is no map of the size `shape`, has a negative value, or no finite one above 0.
    """
    depth = np.asarray(depth, np.float32)
    if depth.shape != shape:
        raise DataError(f'expected depth of the size of the image, {list(shape)}; got {list(depth.shape)}')
    if np.nanmin(depth, initial=0) < 0:
        raise DataError('expected depth of 0 or more, in any unit; got a negative value. Give distances, not heights')
    measured = np.isfinite(depth) & (depth > 0)
    if not measured.any():
        raise DataError('expected a depth map with at least one finite value above 0; got none')
    known = measured | np.isinf(depth)
    if known.all():
        return np.where(measured, depth, 2 * depth[measured].max())
    values = np.where(measured, depth, np.where(known, 2 * depth[measured].max(), 0)).astype(np.float32)
    levels = [(values, known.astype(np.float32))]
    while max(values.shape) > 1:
        size = (-(-values.shape[1] // 2), -(-values.shape[0] // 2))
        values, weights = (cv2.resize(part, size, interpolation=cv2.INTER_AREA) for part in levels[-1])
        levels.append((values, weights))
    filled = levels[-1][0]
    for values, weights in reversed(levels):
        filled = cv2.resize(filled, values.shape[::-1], interpolation=cv2.INTER_LINEAR)
        filled = np.where(weights > 0, values / np.maximum(weights, 1e-12), filled).astype(np.float32)
    return filled


def _airlight(small: np.ndarray, depth: np.ndarray, generator: Generator, parameters: HazeParameters) -> np.ndarray:
    """Draw the mean colour of the haze, [3]: about as bright as what lights it, the scene or its bright sky."""
    highest = parameters.airlight[1]
    brightness = generator.uniform(*parameters.airlight)
    lit = generator.uniform(*SKY_LIT)
    brightness = max(brightness, min(SCENE_LIT * float(np.minimum(small, 1).mean()), highest))
    farthest = small[depth > 0.96 * depth.max()]
    if len(farthest) > FARTHEST_SHARE * depth.size:
        brightness = max(brightness, min(lit * float(np.minimum(farthest, 1).mean()), highest))
    warmth, green = generator.normal(0, parameters.tint, 2)
    return np.clip(brightness * (1 + np.array([warmth, 0.4 * green, -warmth])), 0, 1).astype(np.float32)


def _light(
    small: np.ndarray, airlight: np.ndarray, unit: float, generator: Generator, parameters: HazeParameters
) -> np.ndarray:
    """Spread airlight, [3], over [h, w, 3] as `small`: lit by lamps outside of it and by what is bright in it."""
    shape = small.shape[:2]
    brightness, warmth = (
        lattice_noise(shape, generator, LIGHT_CELL * unit) * np.float32(deviation / LATTICE_DEVIATION)
        for deviation in (generator.uniform(*parameters.lamps), generator.uniform(*parameters.lamp_tint))
    )
    share = np.float32(generator.uniform(*parameters.glow))
    field = cv2.exp(cv2.merge([brightness + warmth, brightness, brightness - warmth]))
    # Half of the colour of what is lit gets lost on the way.
    bright = 0.5 * (small + to_rgb(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)))
    bright = cv2.GaussianBlur(bright, (0, 0), max(GLOW_SPREAD * unit, 0.3), borderType=cv2.BORDER_REPLICATE)
    if (mean := float(bright.mean())) > 1e-3:
        field *= 1 + share * (np.clip(bright / np.float32(mean), 0, 3) - 1)
    field *= airlight
    over = np.maximum(field - np.float32(SHOULDER), 0) / np.float32(1 - SHOULDER)
    return np.minimum(field, np.float32(SHOULDER)) + np.float32(1 - SHOULDER) * (1 - np.exp(-over))


def _adaptation(airlight: np.ndarray, generator: Generator, parameters: HazeParameters) -> np.ndarray:
    """Draw the logarithm of what the camera multiplies the channels of an opaque haze by, [3]."""
    exposure = generator.uniform(*parameters.exposure) * math.log(2) / GAMMA
    colour = np.maximum(airlight.reshape(-1, 3).mean(axis=0), 1e-2)
    balance = generator.uniform(*parameters.white_balance) * np.log(colour.mean() / colour)
    return (exposure + balance).astype(np.float32)


def _swathes(shape: tuple[int, int], generator: Generator, parameters: HazeParameters) -> np.ndarray:
    """Return the extinction relative to its mean, [H, W]: lognormal noise, made at a quarter of the size."""
    strength = generator.uniform(*parameters.unevenness)
    cell = generator.uniform(*parameters.cell) * parameters.scale / 4
    noise = fractal_noise((-(-shape[0] // 4), -(-shape[1] // 4)), generator, cell)
    noise -= np.float32(0.5)
    noise *= np.float32(strength / NOISE_DEVIATION)
    noise -= np.float32(strength**2 / 2)  # for a mean of 1
    return cv2.resize(cv2.exp(noise), shape[::-1], interpolation=cv2.INTER_LINEAR)


def _extinction(
    small: np.ndarray, thickness: np.ndarray, airlight: np.ndarray, adaptation: np.ndarray, lost: float, error: float
) -> float:
    """Return the beta at which the squared error is `error`, by bisection on a small copy of the image."""
    scene, light = small.reshape(-1, 3), airlight.reshape(-1, 3)
    clean = np.minimum(scene, 1)
    tau = thickness.reshape(-1, 1)
    low, high = math.log(1e-3 / float(tau.mean())), math.log(DENSEST / float(tau.mean()))
    for _ in range(12):
        middle = (low + high) / 2
        opacity = 1 - np.exp(np.float32(-lost * math.exp(middle)) * tau)
        hazy = (scene + (light - scene) * opacity) * np.exp(adaptation * opacity.mean())
        change = np.minimum(hazy, 1) - clean
        if float(np.dot(change.ravel(), change.ravel())) / change.size < error:
            low = middle
        else:
            high = middle
    return math.exp(high)


def _compose(
    image: np.ndarray, tau: np.ndarray, airlight: np.ndarray, adaptation: np.ndarray, lost: float, spread: float
) -> tuple[np.ndarray, np.ndarray]:
    """Fade the image, add what is smeared, a mixture by tau of two Gaussians, and the airlight, and expose."""
    whole = image.shape[1::-1]
    direct = cv2.exp(-tau)
    seen = cv2.exp(tau * np.float32(-lost))
    gain = np.exp(adaptation * np.float32(1 - cv2.mean(seen)[0]))
    ratio = max(1.0, spread / 2)
    small, widening = shrink(image, ratio), 1 - cv2.exp(-0.5 * shrink(tau, ratio))
    narrow, wide = (
        cv2.GaussianBlur(small, (0, 0), sigma / ratio, borderType=cv2.BORDER_REFLECT)
        for sigma in (spread, 2.5 * spread)
    )
    smeared = (narrow + (wide - narrow) * to_rgb(widening)) * gain
    smeared = cv2.resize(smeared, whole, interpolation=cv2.INTER_LINEAR)
    airlight = cv2.resize(airlight * gain, whole, interpolation=cv2.INTER_LINEAR)
    gains = np.diag(gain.astype(np.float64))
    result = np.empty_like(image)
    for rows in strips(image):
        strip = cv2.transform(image[rows], gains, dst=result[rows])
        strip -= smeared[rows]
        strip *= to_rgb(direct[rows])
        strip += airlight[rows]
        strip += (smeared[rows] - airlight[rows]) * to_rgb(seen[rows])
    return result, 1 - seen


def guess_depth(image: np.ndarray, generator: Generator, nearest: float, room: float = 0.0) -> np.ndarray:
    """Guess how far off everything in an image is.

    Not true depth, but one that haze may follow without looking wrong. Up to a horizon drawn at random lies a ground
    plane; what rises from it is as far as where it might stand. Smooth regions, bright or blue, that reach down from
    the upper edge are sky. Darker and more colourful places are taken for nearer, noise adds what these cues do not
    tell, and edges are those of the image. Without sky, the planes may instead be those of a room one looks into.

    Args:
        image: RGB, [H, W, 3], float32 in [0, 1].
        generator: source of randomness.
        nearest: depth of the ground at the lower edge of the image, in (0, 1).
        room: chance that an image without sky is a room.
    Returns:
        Relative depth, [H, W] float32 in (0, 1], 1 the farthest.
    Source: Tan, CVPR 2008, and He et al., CVPR 2009, for the cues; He & Sun, "Fast guided filter", 2015.
    """
    small = shrink(image, min(image.shape[:2]) / GUESS_SIDE)
    gray = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    shape = gray.shape
    sky = _sky(gray, small)
    outdoors = float(sky.mean()) > OUTDOORS
    depth = (_ground if generator.random() >= room or outdoors else _room)(shape, generator, nearest)
    # Objects and noise, by the logarithm, for near things vary as much by it as far ones.
    relief = 0.30 * lattice_noise(shape, generator, shape[0] / 2) + 0.18 * lattice_noise(shape, generator, shape[0] / 5)
    haziness = cv2.blur(small.min(axis=2), (5, 5))
    relief += 0.7 * (haziness - float(haziness.mean()))
    depth *= np.exp(relief)
    depth += (1 - depth) * sky
    return np.clip(_align(np.clip(depth, nearest, 1), gray, image), nearest / 2, 1)


def _ground(shape: tuple[int, int], generator: Generator, nearest: float) -> np.ndarray:
    """Return the depth of a ground plane up to a horizon, and of what stands on it above, [h, w]."""
    row = ((np.arange(shape[0], dtype=np.float32) + 0.5) / shape[0])[:, None]
    horizon = generator.uniform(0.1, 0.5)
    ground = nearest * (1 - horizon) / np.maximum(row - horizon, nearest * (1 - horizon))
    standing = nearest + generator.uniform(0.2, 0.7) * (1 - nearest)
    return np.minimum(ground, standing) + np.zeros(shape, np.float32)


def _room(shape: tuple[int, int], generator: Generator, nearest: float) -> np.ndarray:
    """Return the depth of a box that is open towards the camera, its back wall at 1, [h, w]."""
    y, x = ((np.arange(size, dtype=np.float32) + 0.5) / size for size in shape)
    x -= np.float32(generator.uniform(0.3, 0.7))
    y -= np.float32(generator.uniform(0.3, 0.7))
    left, right, up, down = generator.uniform(0.12, 0.5, 4).astype(np.float32)
    across = np.abs(x) / np.where(x < 0, left, right)
    along = np.abs(y) / np.where(y < 0, up, down)
    return np.maximum(1 / np.maximum(np.maximum(across, along[:, None]), 1), np.float32(nearest))


def _sky(gray: np.ndarray, small: np.ndarray) -> np.ndarray:
    """Return how much each place is sky, [h, w]: smooth, bright or blue all the way up, and of its colour up there."""
    mean = cv2.blur(gray, (5, 5))
    roughness = np.sqrt(np.maximum(cv2.blur(gray * gray, (5, 5)) - mean * mean, 0))
    smooth = np.clip(2 - roughness / SKY_ROUGHNESS, 0, 1)
    blueness = small[..., 2] - small[..., 0]
    bright = np.clip((mean - 0.45) / 0.2, 0, 1) * np.clip(1 + blueness / 0.12, 0, 1)
    blue = np.clip(blueness / 0.1, 0, 1)
    likely = np.minimum.accumulate(cv2.blur(smooth * np.maximum(bright, blue), (3, 3)), axis=0)
    top = slice(0, math.ceil(len(gray) / 8))
    weight = likely[top, :, None]
    zenith = (small[top] * weight).sum(axis=(0, 1)) / max(float(weight.sum()), 1e-6)
    alike = np.clip((SKY_COLOURS - np.linalg.norm(small - zenith, axis=2)) / 0.12, 0, 1)
    return np.minimum.accumulate(likely * cv2.blur(alike, (3, 3)), axis=0)


def _align(depth: np.ndarray, gray: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Enlarge a small depth map so that its edges fall on those of the image: fast guided filter, [H, W]."""
    side = 2 * math.ceil(min(gray.shape) / 24) + 1
    box = (side, side)
    mean_gray, mean_depth = cv2.blur(gray, box), cv2.blur(depth, box)
    variance = cv2.blur(gray * gray, box) - mean_gray * mean_gray
    slope = (cv2.blur(gray * depth, box) - mean_gray * mean_depth) / (variance + 3e-3)
    offset = mean_depth - slope * mean_gray
    size = (image.shape[1], image.shape[0])
    slope, offset = (cv2.resize(cv2.blur(part, box), size, interpolation=cv2.INTER_LINEAR) for part in (slope, offset))
    slope *= cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    slope += offset
    return slope
