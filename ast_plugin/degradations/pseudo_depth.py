"""Depth for an image that has none: not the true one, but one that haze may follow without looking wrong."""

from __future__ import annotations

import math

import cv2
import numpy as np

from ast_plugin.degradations.noise import lattice_noise

GUESS_SIDE = 160  # pixels of the shorter side at which depth is guessed
SKY_COLOURS = 0.45  # distance in RGB from the sky at the upper edge beyond which nothing is sky
SKY_ROUGHNESS = 0.035  # local contrast above which a place is no sky
SKY_SHARE = 0.03  # mean of what `_sky` gives above which an image was taken outdoors


def guess_depth(image: np.ndarray, generator: np.random.Generator, nearest: float, room: float = 0.0) -> np.ndarray:
    """Guess how far off everything in an image is.

    Up to a horizon drawn at random lies a ground plane, whose depth is inverse to the distance below the horizon, as
    in perspective. What rises from it is as far as where it might stand. Smooth regions, bright or blue, that reach
    down from the upper edge are sky. Darker and more colourful places are taken for nearer (far ones would have been
    paled already), noise puts in what none of these cues tells, and edges are those of the image. Where there is no
    sky, the planes may instead be the walls, the floor and the ceiling of a room that one looks into.

    Args:
        image: RGB, [H, W, 3], float32 in [0, 1].
        generator: source of randomness.
        nearest: depth of the ground at the lower edge of the image, in (0, 1).
        room: chance that an image without sky is a room.
    Returns:
        Relative depth, [H, W] float32 in (0, 1], 1 the farthest.
    Source: Tan, CVPR 2008, and He et al., CVPR 2009, for the cues; He & Sun, "Fast guided filter", 2015.
    """
    height, width = image.shape[:2]
    shrink = max(1.0, min(height, width) / GUESS_SIDE)
    size = (max(1, round(width / shrink)), max(1, round(height / shrink)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    gray = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    shape = gray.shape
    sky = _sky(gray, small)
    outdoors = float(sky.mean()) > SKY_SHARE
    depth = (_ground if generator.random() >= room or outdoors else _room)(shape, generator, nearest)
    # Objects and noise, by the logarithm, for near things vary as much by it as far ones.
    relief = 0.30 * lattice_noise(shape, generator, shape[0] / 2) + 0.18 * lattice_noise(shape, generator, shape[0] / 5)
    haziness = cv2.blur(small.min(axis=2), (5, 5))
    relief += 0.7 * (haziness - float(haziness.mean()))
    depth *= np.exp(relief)
    depth += (1 - depth) * sky
    return np.clip(_align(np.clip(depth, nearest, 1), gray, image), nearest / 2, 1)


def _ground(shape: tuple[int, int], generator: np.random.Generator, nearest: float) -> np.ndarray:
    """Return the depth of a ground plane up to a horizon, and of what stands on it above, [h, w]."""
    row = ((np.arange(shape[0], dtype=np.float32) + 0.5) / shape[0])[:, None]
    horizon = generator.uniform(0.1, 0.5)
    ground = nearest * (1 - horizon) / np.maximum(row - horizon, nearest * (1 - horizon))
    standing = nearest + generator.uniform(0.2, 0.7) * (1 - nearest)
    return np.minimum(ground, standing) + np.zeros(shape, np.float32)


def _room(shape: tuple[int, int], generator: np.random.Generator, nearest: float) -> np.ndarray:
    """Return the depth of a box that is open towards the camera, its back wall at 1, [h, w]."""
    y, x = ((np.arange(size, dtype=np.float32) + 0.5) / size for size in shape)
    x -= np.float32(generator.uniform(0.3, 0.7))
    y -= np.float32(generator.uniform(0.3, 0.7))
    left, right, up, down = generator.uniform(0.12, 0.5, 4).astype(np.float32)
    across = np.abs(x) / np.where(x < 0, left, right)
    along = np.abs(y) / np.where(y < 0, up, down)
    return np.maximum(1 / np.maximum(np.maximum(across, along[:, None]), 1), np.float32(nearest))


def _sky(gray: np.ndarray, small: np.ndarray) -> np.ndarray:
    """Return how much each place is sky, [h, w] in [0, 1].

    It is smooth, bright or blue, and so all the way up, and not of quite another colour than at the upper edge.
    """
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
