"""Synthesis of dense and uneven haze.

Koschmieder's law says how a scene J fades into the airlight A over a depth d through haze of extinction beta:
I = J t + A (1 - t), with t = exp(-beta d). Dense haze does more. Part of the light that particles turn aside goes on
nearly straight and reaches the camera beside its point, so the scene is seen smeared, and the wider the thicker the
haze; and haze from a source nearby drifts in swathes, so beta varies from place to place. Here the optical depth
tau = beta d n, with n smooth noise of several octaves and of mean 1, and

    I = J exp(-tau) + (J * G) (exp(-k tau) - exp(-tau)) + A (1 - exp(-k tau))

where k < 1 is the share of the scattered light that is lost for the picture and G a Gaussian that widens with tau.
"""

from __future__ import annotations

import math
from typing import Literal

import cv2
import numpy as np
from pydantic import Field

from ast_plugin.degradations.noise import fractal_noise
from ast_plugin.degradations.pseudo_depth import guess_depth
from ast_plugin.degradations.ranges import Parameters, PositiveRange, Range
from ast_plugin.errors import DataError

DENSEST = 2.5  # mean optical depth beyond which too little of the picture would be left to be restored
NOISE_DEVIATION = 0.14  # standard deviation of `fractal_noise`
PROBE_SIDE = 48  # pixels of the shorter side at which the thickness for a wished PSNR is sought
CONTRAST_THRESHOLD = 0.02  # contrast at which an object is held to vanish: the definition of visibility
SKY_SHARE = 0.02  # of the picture that the farthest things must fill to be taken for what lights the haze
SKY_LIT = 0.95  # brightness of haze by that of the sky that lights it
STRIP = 32  # rows composed at a time


class HazeParameters(Parameters):
    """What haze may look like; each [lowest, highest] is drawn from uniformly, once an image.

    Pixels are those of a photograph about 500 pixels high, see `scale`.
    """

    type: Literal['haze'] = 'haze'
    psnr: PositiveRange = Field((10.8, 16.0), description='dB of the hazy image against the clean one')
    visibility: PositiveRange | None = Field(
        None, description='instead of psnr, in units of the given depth: where contrast has sunk to 2 percent'
    )
    nearest: PositiveRange = Field(
        (0.1, 0.5), description='depth of the foreground by that of the sky where depth is guessed, below 1'
    )
    airlight: Range = Field((0.62, 0.92), description='brightness of the haze itself, within [0, 1]')
    tint: float = Field(0.025, ge=0, le=0.2, description='standard deviation of the colours of the airlight')
    unevenness: Range = Field((0.15, 0.7), description='standard deviation of ln(extinction) over the image, in [0, 2]')
    cell: PositiveRange = Field((180.0, 360.0), description='pixels between independent swathes')
    forward: Range = Field((0.1, 0.35), description='share of the scattered light that only smears, within [0, 0.9]')
    spread: PositiveRange = Field((3.0, 7.0), description='pixels; smear where the optical depth is 1')
    scale: float = Field(1.0, gt=0, description='multiplies every length; 1 suits pictures 500 pixels high')

    LIMITS = {'nearest': (0, 0.99), 'airlight': (0, 1), 'unevenness': (0, 2), 'forward': (0, 0.9)}


def add_haze(
    image: np.ndarray, generator: np.random.Generator, parameters: HazeParameters, depth: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Put haze into a clean photograph.

    Args:
        image: RGB, [H, W, 3], float32 in [0, 1], any size.
        generator: source of all randomness; the same state gives the same result, bit for bit.
        parameters: ranges to draw from.
        depth: [H, W], distance of each pixel in any unit, such as metres; infinite is sky; 0 and NaN are unknown, and
            filled in from around. Without it depth is guessed, see `guess_depth`.
    Returns:
        The hazy image, [H, W, 3] float32 in [0, 1], and the opacity of the haze, 1 - exp(-k tau), [H, W] float32.
    Raises:
        DataError: if `depth` has another size, a negative value, or no finite one above 0; or if visibility is asked
            for without depth.
    Numerics: psnr is met within 0.5 dB, unless that takes a mean optical depth above 2.5, which would leave too little
        to restore: a picture of little contrast, as bright as the airlight, stays cleaner.
    """
    if parameters.visibility is not None and depth is None:
        raise DataError('visibility is a distance, so it needs depth in the same unit; give depth, or psnr instead')
    shape = image.shape[:2]
    forward = generator.uniform(*parameters.forward)
    spread = generator.uniform(*parameters.spread) * parameters.scale
    amount = generator.uniform(*(parameters.psnr if parameters.visibility is None else parameters.visibility))
    nearest = generator.uniform(*parameters.nearest)
    depth = guess_depth(image, generator, nearest) if depth is None else fill_depth(depth, shape)
    airlight = _airlight(image, depth, generator, parameters)
    thickness = depth * _swathes(shape, generator, parameters)
    if parameters.visibility is None:
        beta = _extinction(image, thickness, airlight, 1 - forward, 10 ** (-amount / 10))
    else:
        beta = -math.log(CONTRAST_THRESHOLD) / amount
    thickness *= np.float32(beta)
    return _compose(image, thickness, airlight, 1 - forward, spread)


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
        halves = [cv2.resize(part, size, interpolation=cv2.INTER_AREA) for part in levels[-1]]
        values = halves[0]
        levels.append((halves[0], halves[1]))
    filled = levels[-1][0]
    for values, weights in reversed(levels):
        filled = cv2.resize(filled, values.shape[::-1], interpolation=cv2.INTER_LINEAR)
        filled = np.where(weights > 0, values / np.maximum(weights, 1e-12), filled).astype(np.float32)
    return filled


def _airlight(
    image: np.ndarray, depth: np.ndarray, generator: np.random.Generator, parameters: HazeParameters
) -> np.ndarray:
    """Draw the colour of the haze, [3]: grey, slightly warm or cold.

    Haze is lit by the sky, so where a bright sky is seen it is nearly as bright, for grey smoke before it looks wrong.
    """
    brightness = generator.uniform(*parameters.airlight)
    size = (max(1, min(64, image.shape[1])), max(1, min(48, image.shape[0])))
    small, depth = (cv2.resize(part, size, interpolation=cv2.INTER_AREA) for part in (image, depth))
    farthest = small[depth > 0.96 * depth.max()]
    if len(farthest) > SKY_SHARE * depth.size:
        brightness = max(brightness, min(SKY_LIT * float(farthest.mean()), parameters.airlight[1]))
    warmth, green = generator.normal(0, parameters.tint, 2)
    return np.clip(brightness * (1 + np.array([warmth, 0.4 * green, -warmth])), 0, 1).astype(np.float32)


def _swathes(shape: tuple[int, int], generator: np.random.Generator, parameters: HazeParameters) -> np.ndarray:
    """Return the extinction relative to its mean, [H, W]: lognormal noise, made at a quarter of the size."""
    strength = generator.uniform(*parameters.unevenness)
    cell = generator.uniform(*parameters.cell) * parameters.scale / 4
    noise = fractal_noise((-(-shape[0] // 4), -(-shape[1] // 4)), generator, cell)
    noise -= np.float32(0.5)
    noise *= np.float32(strength / NOISE_DEVIATION)
    noise -= np.float32(strength**2 / 2)  # for a mean of 1
    return cv2.resize(cv2.exp(noise), shape[::-1], interpolation=cv2.INTER_LINEAR)


def _extinction(image: np.ndarray, thickness: np.ndarray, airlight: np.ndarray, lost: float, error: float) -> float:
    """Return the beta at which the squared error is `error`, by bisection on a small copy of the picture."""
    shrink = max(1.0, min(image.shape[:2]) / PROBE_SIDE)
    size = (max(1, round(image.shape[1] / shrink)), max(1, round(image.shape[0] / shrink)))
    small, thickness = (cv2.resize(part, size, interpolation=cv2.INTER_AREA) for part in (image, thickness))
    squared = np.mean((small - airlight) ** 2, axis=2).ravel()
    tau = thickness.ravel()
    low, high = math.log(1e-3 / float(tau.mean())), math.log(DENSEST / float(tau.mean()))
    for _ in range(14):
        middle = (low + high) / 2
        opacity = 1 - np.exp(np.float32(-lost * math.exp(middle)) * tau)
        if float(np.dot(opacity * opacity, squared)) / len(tau) < error:
            low = middle
        else:
            high = middle
    return math.exp(high)


def _compose(
    image: np.ndarray, tau: np.ndarray, airlight: np.ndarray, lost: float, spread: float
) -> tuple[np.ndarray, np.ndarray]:
    """Fade the picture, add what is smeared, and the airlight; see the formula above.

    The smear G at tau is a mixture, by tau, of a narrow and a wide Gaussian, both made at a fraction of the size.
    """
    smears = []
    for sigma in (spread, 2.5 * spread):
        shrink = max(1.0, sigma / 2)
        size = (max(1, round(image.shape[1] / shrink)), max(1, round(image.shape[0] / shrink)))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        small = cv2.GaussianBlur(small, (0, 0), sigma / shrink, borderType=cv2.BORDER_REFLECT)
        smears.append(cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_LINEAR))
    narrow, wide = smears
    direct = cv2.exp(-tau)
    seen = cv2.exp(tau * np.float32(-lost))
    result = np.empty_like(image)
    for top in range(0, len(image), STRIP):
        rows = slice(top, top + STRIP)
        widening = 1 - np.exp(-0.5 * tau[rows])
        scattered = seen[rows] - direct[rows]
        strip = np.multiply(image[rows], cv2.cvtColor(direct[rows], cv2.COLOR_GRAY2RGB), out=result[rows])
        strip += narrow[rows] * cv2.cvtColor(scattered * (1 - widening), cv2.COLOR_GRAY2RGB)
        strip += wide[rows] * cv2.cvtColor(scattered * widening, cv2.COLOR_GRAY2RGB)
        strip += (1 - seen[rows])[..., None] * airlight
    return np.clip(result, 0, 1, out=result), 1 - seen
