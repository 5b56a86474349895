"""Synthesis of dense and uneven haze.

Koschmieder's law describes how a scene J fades into the airlight A over a depth d in haze of extinction beta:
I = J t + A (1 - t), with t = exp(-beta d). In dense haze, part of the scattered light still reaches the camera, close
to its original direction, and blurs the scene. Haze is also uneven, so beta varies over the image. Here the optical
depth is tau = beta d n, with n smooth multi-octave noise of mean 1, and::

    I = J exp(-tau) + (J * G) (exp(-k tau) - exp(-tau)) + A (1 - exp(-k tau))

where k < 1 is the fraction of the scattered light that does not reach the image, and G is a Gaussian that widens with
tau.

If haze is lit by lamps and windows, A varies over the image in brightness and colour, with a glow around bright areas.
The camera adapts: the denser the haze, the more its exposure and the white balance of A are corrected.

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

DENSEST = 2.5  # maximum mean optical depth; beyond it, too little of the image remains to be restored
NOISE_DEVIATION = 0.14  # standard deviation of `fractal_noise`
PROBE_SIDE = 48  # shorter side in pixels of the copy on which the extinction for a PSNR is searched
CONTRAST_THRESHOLD = 0.02  # contrast at which objects become invisible: the definition of visibility
FARTHEST_SHARE = 0.02  # minimum fraction of the image at the farthest depth to be regarded as lighting the haze
SKY_LIT = (0.7, 0.95)  # minimum brightness of haze relative to the sky that lights it
SCENE_LIT = 0.9  # minimum brightness of haze relative to the mean of the scene: droplets absorb less than objects
LIGHT_CELL = 480.0  # distance in pixels at scale 1 of areas lit by different lamps
GLOW_SPREAD = 45.0  # standard deviation of the glow around bright areas in pixels at scale 1
WHITE = 0.94  # gray value above which a light source exceeds the range of the image
SHOULDER = 0.85  # brightness above which airlight is compressed towards white
LATTICE_DEVIATION = 0.45  # standard deviation of `lattice_noise`

GUESS_SIDE = 160  # shorter side in pixels at which depth is estimated
SKY_COLOURS = 0.45  # maximum RGB distance of sky from the sky at the upper edge
SKY_ROUGHNESS = 0.035  # local contrast above which a region is not sky
OUTDOORS = 0.03  # mean of `_sky` above which an image is classified as outdoors


class HazeParameters(Parameters):
    """Parameters of haze. Ranges [lowest, highest] are sampled uniformly, once per image.

    Lengths in pixels refer to images about 500 pixels high, see `scale`.
    """

    type: Literal['haze'] = 'haze'
    psnr: PositiveRange = Field((9.5, 22.0), description='PSNR of the hazy image in dB')
    visibility: PositiveRange | None = Field(
        None, description='instead of psnr: distance at which contrast falls to 2 percent, in units of the given depth'
    )
    nearest: PositiveRange = limited((0.1, 0.7), 0, 0.99, 'estimated depth of the foreground relative to the farthest')
    room: float = Field(0.5, ge=0, le=1, description='probability that an image without sky gets the depth of a room')
    airlight: Range = limited((0.45, 0.95), 0, 1, 'mean brightness of the airlight')
    tint: float = Field(0.05, ge=0, le=0.2, description='standard deviation of the mean colour of the airlight')
    lamps: Range = limited((0, 0.25), 0, 1, 'standard deviation of ln(airlight) over the image, from local light')
    lamp_tint: Range = limited((0, 0.1), 0, 0.5, 'standard deviation of the warmth of the airlight over the image')
    glow: Range = limited((0, 0.6), 0, 1, 'fraction of the airlight that comes from nearby bright areas')
    glare: Range = limited((0, 3), 0, 10, 'brightness of light sources above white, relative to white')
    exposure: Range = limited((-0.5, 0.3), -3, 3, 'exposure of opaque haze relative to a clear scene, in stops')
    white_balance: Range = limited((0, 0.6), 0, 1, 'fraction of the tint of opaque haze removed by the camera')
    noise: Range = limited((0, 0.01), 0, 0.1, 'standard deviation of the camera noise')
    unevenness: Range = limited((0.0, 0.7), 0, 2, 'standard deviation of ln(extinction) over the image')
    cell: PositiveRange = Field((120.0, 400.0), description='size of density variations in pixels')
    forward: Range = limited((0.0, 0.35), 0, 0.9, 'fraction of the scattered light that blurs the image')
    spread: PositiveRange = Field(
        (3.0, 7.0), description='standard deviation of this blur in pixels at optical depth 1'
    )
    scale: float = Field(1.0, gt=0, description='factor of all lengths; 1 is for images 500 pixels high')


def add_haze(
    image: np.ndarray, generator: Generator, parameters: HazeParameters, depth: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Add haze to a clean image, see `Degradation.apply`; the mask is its opacity, 1 - exp(-k tau).

    Args:
        depth: distance of each pixel in any unit, [H, W]; inf for sky, 0 or NaN for unknown, which is interpolated. By
            default, depth is estimated by `guess_depth`.
    Raises:
        DataError: if `depth` has a different size, a negative value, or no finite value above 0; or if `visibility` is
            set without `depth`.
    Numerics: psnr is met within 0.5 dB, unless that requires a mean optical depth above 2.5, which would leave too
        little to restore: low-contrast images as bright as the airlight are degraded less.
    """
    if parameters.visibility is not None and depth is None:
        raise DataError('visibility is a distance and requires depth in the same unit; give depth, or use psnr')
    shape = image.shape[:2]
    forward = generator.uniform(*parameters.forward)
    spread = generator.uniform(*parameters.spread) * parameters.scale
    amount = generator.uniform(*(parameters.psnr if parameters.visibility is None else parameters.visibility))
    nearest = generator.uniform(*parameters.nearest)
    depth = guess_depth(image, generator, nearest, parameters.room) if depth is None else fill_depth(depth, shape)
    light = add_glare(image, WHITE, generator.uniform(*parameters.glare))
    ratio = min(shape) / PROBE_SIDE
    small, small_depth = shrink(light, ratio), shrink(depth, ratio)
    unit = min(small.shape[:2]) / min(shape) * parameters.scale  # pixels of `small` per pixel of the parameters
    airlight = _airlight(small, small_depth, unit, generator, parameters)
    # Log gain of each channel by which the camera corrects opaque haze.
    exposure = generator.uniform(*parameters.exposure) * math.log(2) / GAMMA
    colour = np.maximum(airlight.reshape(-1, 3).mean(axis=0), 1e-2)
    balance = generator.uniform(*parameters.white_balance) * np.log(colour.mean() / colour)
    adaptation = (exposure + balance).astype(np.float32)
    thickness = depth * _relative_extinction(shape, generator, parameters)
    if parameters.visibility is None:
        tau, error = shrink(thickness, ratio), 10 ** (-amount / 10)
        beta = _extinction(small, tau, airlight, adaptation, 1 - forward, error)
    else:
        beta = -math.log(CONTRAST_THRESHOLD) / amount
    thickness *= np.float32(beta)
    deviation = generator.uniform(*parameters.noise)
    hazy, opacity = _compose(light, thickness, airlight, adaptation, 1 - forward, spread)
    if deviation:  # uniform noise, which is fastest to generate
        noise = np.frombuffer(generator.bytes(hazy.size), np.uint8).reshape(hazy.shape).astype(np.float32)
        noise -= np.float32(127.5)
        noise *= np.float32(deviation / math.sqrt((256**2 - 1) / 12))
        hazy += noise
    return np.clip(hazy, 0, 1, out=hazy), opacity


def fill_depth(depth: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return a depth map that is finite and positive everywhere, [H, W] float32.

    Infinite depth is replaced by twice the largest finite depth. Unknown depth (NaN, or 0 as written by depth cameras)
    is replaced by the mean of the nearest known values.

    Raises:
        DataError: if the map does not have the shape `shape`, has a negative value, or no finite value above 0.
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
    values = np.where(measured, depth, 2 * depth[measured].max())
    if known.all():
        return values
    levels = [(np.where(known, values, np.float32(0)), known.astype(np.float32))]
    while (side := levels[-1][0].shape) != (1, 1):
        size = (math.ceil(side[1] / 2), math.ceil(side[0] / 2))
        levels.append([cv2.resize(part, size, interpolation=cv2.INTER_AREA) for part in levels[-1]])
    filled = levels[-1][0]
    for values, weights in reversed(levels):
        filled = cv2.resize(filled, values.shape[::-1], interpolation=cv2.INTER_LINEAR)
        filled = np.where(weights > 0, values / np.maximum(weights, 1e-12), filled).astype(np.float32)
    return filled


def _airlight(
    small: np.ndarray, depth: np.ndarray, unit: float, generator: Generator, parameters: HazeParameters
) -> np.ndarray:
    """Draw the colour of the haze, [h, w, 3]: that of the scene or the sky that lights it, with lamps and glow.

    `unit` is the number of pixels of the image `small`, [h, w, 3], per pixel of the parameters.
    """
    highest = parameters.airlight[1]
    brightness = generator.uniform(*parameters.airlight)
    lit = generator.uniform(*SKY_LIT)
    brightness = max(brightness, min(SCENE_LIT * float(np.minimum(small, 1).mean()), highest))
    farthest = small[depth > 0.96 * depth.max()]
    if len(farthest) > FARTHEST_SHARE * depth.size:
        brightness = max(brightness, min(lit * float(np.minimum(farthest, 1).mean()), highest))
    warmth, green = generator.normal(0, parameters.tint, 2)
    mean = np.clip(brightness * (1 + np.array([warmth, 0.4 * green, -warmth])), 0, 1).astype(np.float32)

    brightness, warmth = (
        lattice_noise(depth.shape, generator, LIGHT_CELL * unit) * np.float32(deviation / LATTICE_DEVIATION)
        for deviation in (generator.uniform(*parameters.lamps), generator.uniform(*parameters.lamp_tint))
    )
    share = np.float32(generator.uniform(*parameters.glow))
    field = cv2.exp(cv2.merge([brightness + warmth, brightness, brightness - warmth]))
    # Half of the colour of bright areas is lost in the glow.
    bright = 0.5 * (small + to_rgb(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)))
    bright = cv2.GaussianBlur(bright, (0, 0), max(GLOW_SPREAD * unit, 0.3), borderType=cv2.BORDER_REPLICATE)
    if (level := float(bright.mean())) > 1e-3:
        field *= 1 + share * (np.clip(bright / np.float32(level), 0, 3) - 1)
    field *= mean
    over = np.maximum(field - np.float32(SHOULDER), 0) / np.float32(1 - SHOULDER)
    return np.minimum(field, np.float32(SHOULDER)) + np.float32(1 - SHOULDER) * (1 - np.exp(-over))


def _relative_extinction(shape: tuple[int, int], generator: Generator, parameters: HazeParameters) -> np.ndarray:
    """Return the extinction relative to its mean, [H, W]: log-normal noise, generated at a quarter of the size."""
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
    """Attenuate the image, add its blur (two Gaussians mixed by tau) and the airlight, and apply the exposure."""
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
    """Estimate a plausible depth map of an image.

    This is not the true depth, but one along which haze looks plausible. The base is a ground plane up to a random
    horizon, with upright objects above it. Smooth, bright or blue regions connected to the upper edge are sky. Darker
    and more colourful regions are nearer, noise is added, and edges are aligned with the image. Without sky, the base
    may be a room seen from one side instead.

    Args:
        image: RGB, [H, W, 3], float32 in [0, 1].
        generator: source of randomness.
        nearest: depth of the ground at the lower edge of the image, in (0, 1).
        room: probability that an image without sky gets the depth of a room.
    Returns:
        Relative depth, [H, W] float32 in (0, 1], with 1 the farthest.
    Source: Tan, CVPR 2008, and He et al., CVPR 2009, for the cues; He & Sun, "Fast guided filter", 2015.
    """
    small = shrink(image, min(image.shape[:2]) / GUESS_SIDE)
    gray = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    shape = gray.shape
    sky = _sky(gray, small)
    outdoors = float(sky.mean()) > OUTDOORS
    depth = (_ground if generator.random() >= room or outdoors else _room)(shape, generator, nearest)
    # Relief of objects and noise, multiplicative, since its size relative to depth is the same near and far.
    relief = 0.30 * lattice_noise(shape, generator, shape[0] / 2) + 0.18 * lattice_noise(shape, generator, shape[0] / 5)
    haziness = cv2.blur(small.min(axis=2), (5, 5))
    relief += 0.7 * (haziness - float(haziness.mean()))
    depth *= np.exp(relief)
    depth += (1 - depth) * sky
    return np.clip(_align(np.clip(depth, nearest, 1), gray, image), nearest / 2, 1)


def _ground(shape: tuple[int, int], generator: Generator, nearest: float) -> np.ndarray:
    """Return the depth of a ground plane up to a horizon, and of objects standing on it above that, [h, w]."""
    row = ((np.arange(shape[0], dtype=np.float32) + 0.5) / shape[0])[:, None]
    horizon = generator.uniform(0.1, 0.5)
    ground = nearest * (1 - horizon) / np.maximum(row - horizon, nearest * (1 - horizon))
    standing = nearest + generator.uniform(0.2, 0.7) * (1 - nearest)
    return np.minimum(ground, standing) + np.zeros(shape, np.float32)


def _room(shape: tuple[int, int], generator: Generator, nearest: float) -> np.ndarray:
    """Return the depth of a box that is open towards the camera, with its back wall at 1, [h, w]."""
    y, x = ((np.arange(size, dtype=np.float32) + 0.5) / size for size in shape)
    x -= np.float32(generator.uniform(0.3, 0.7))
    y -= np.float32(generator.uniform(0.3, 0.7))
    left, right, up, down = generator.uniform(0.12, 0.5, 4).astype(np.float32)
    across = np.abs(x) / np.where(x < 0, left, right)
    along = np.abs(y) / np.where(y < 0, up, down)
    return np.maximum(1 / np.maximum(np.maximum(across, along[:, None]), 1), np.float32(nearest))


def _sky(gray: np.ndarray, small: np.ndarray) -> np.ndarray:
    """Return the likelihood of sky, [h, w]: smooth, bright or blue up to the upper edge, and of its colour."""
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
    """Upsample a small depth map, aligning its edges with the image by a fast guided filter, [H, W]."""
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
