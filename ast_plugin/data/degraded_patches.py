"""A patch of a clean photograph, degraded as the photograph would be."""

from __future__ import annotations

from typing import Any

import numpy as np

from ast_plugin.data import transforms
from ast_plugin.degradations import Degradation


def degraded_patch(
    image: np.ndarray,
    size: int,
    generator: np.random.Generator,
    degradation: Degradation,
    parameters: Any,
    *,
    use_hflip: bool = False,
    use_rot: bool = False,
    clean_share: float = 0.0,
    gamma: tuple[float, float] = (1.0, 1.0),
    depth: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Cut a patch with the margin that the degradation needs, turn it, degrade it, and cut the margin off.

    Args:
        image: RGB, [H, W, 3], of 8 or 16 bits or float in [0, 1]. What is smaller than the patch goes on reflected.
        size: side of the square patch in pixels.
        generator: source of the place, the turn, the exponent, whether to degrade, and the degradation, in this order.
        degradation: a row of `DEGRADATIONS`.
        parameters: ranges of its type.
        use_hflip: left and right may change places.
        use_rot: up and down may, and rows and columns may.
        clean_share: share of the patches, in [0, 1], that stay as they are.
        gamma: range of the exponent that the clean patch is raised to before all else; above 1 it gets darker. Its
            logarithm is uniform.
        depth: [H, W], for degradations that take it; cut and turned alike.
    Returns:
        The degraded and the clean patch, [size, size, 3] float32 in [0, 1], and the mask, [size, size], or None.
    """
    margin = degradation.margin
    top, left = transforms.random_offset(image.shape, size, generator)
    place = (top - margin, left - margin, size + 2 * margin, size + 2 * margin)
    whole = [image] if depth is None else [image, depth]
    parts = [transforms.window(array, *place) for array in whole]
    parts = transforms.random_flip(parts, use_hflip, use_rot, generator)
    clean = transforms.to_float(parts[0])
    if gamma != (1.0, 1.0):
        clean = clean ** np.float32(np.exp(generator.uniform(*np.log(gamma))))
    options = {} if depth is None else {'depth': parts[1]}
    if clean_share and generator.random() < clean_share:
        degraded, mask = clean, np.zeros(clean.shape[:2], np.float32)
    else:
        degraded, mask = degradation.apply(clean, generator, parameters, **options)
    inner = (slice(margin, margin + size), slice(margin, margin + size))
    return degraded[inner], clean[inner], None if mask is None else mask[inner]
