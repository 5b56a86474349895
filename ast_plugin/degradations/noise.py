"""Noise that varies smoothly over an image, and noise that differs from pixel to pixel."""

from __future__ import annotations

import math

import cv2
import numpy as np


def lattice_noise(shape: tuple[int, int], generator: np.random.Generator, cell: float) -> np.ndarray:
    """Return values in about [-1, 1], of mean 0, that are independent `cell` pixels apart, [H, W] float32.

    They are uniform at the nodes of a lattice and cubic between them. `cell` below a pixel is taken for a pixel.
    """
    height, width = shape
    cell = max(float(cell), 1.0)
    grid = generator.uniform(-1, 1, (math.ceil(height / cell) + 4, math.ceil(width / cell) + 4)).astype(np.float32)
    top, left = generator.uniform(1, 2, 2)
    return cv2.warpAffine(
        grid,
        np.array([[1 / cell, 0, left], [0, 1 / cell, top]]),
        (width, height),
        flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )


def fractal_noise(
    shape: tuple[int, int], generator: np.random.Generator, cell: float, octaves: int = 4, persistence: float = 0.5
) -> np.ndarray:
    """Return values in [0, 1], of mean 0.5, whose coarsest octave varies over `cell` pixels, [H, W] float32."""
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        total += lattice_noise(shape, generator, cell / 2**octave) * np.float32(persistence**octave)
    weight = sum(persistence**octave for octave in range(octaves))
    return np.clip(0.5 + total / np.float32(2 * weight), 0, 1)


def uniform_noise(shape: tuple[int, ...], generator: np.random.Generator, deviation: float) -> np.ndarray:
    """Return independent values of mean 0 and a standard deviation, float32; uniform, for that is quickly drawn."""
    values = np.frombuffer(generator.bytes(math.prod(shape)), np.uint8).reshape(shape).astype(np.float32)
    values -= np.float32(127.5)
    values *= np.float32(deviation / math.sqrt((256**2 - 1) / 12))
    return values
