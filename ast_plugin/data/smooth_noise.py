"""Noise that varies smoothly over a picture, in several octaves."""

from __future__ import annotations

import numpy as np

from ast_plugin.data.lattice_noise import lattice_noise


def fractal_noise(
    shape: tuple[int, int], generator: np.random.Generator, cell: float, octaves: int = 4, persistence: float = 0.5
) -> np.ndarray:
    """Return values in [0, 1], of mean 0.5, whose coarsest octave varies over `cell` pixels, [H, W] float32."""
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        total += lattice_noise(shape, generator, cell / 2**octave) * np.float32(persistence**octave)
    weight = sum(persistence**octave for octave in range(octaves))
    return np.clip(0.5 + total / np.float32(2 * weight), 0, 1)
