"""Lights that are brighter than an image shows them."""

from __future__ import annotations

import cv2
import numpy as np


def unclip(image: np.ndarray, white: float, glare: float) -> np.ndarray:
    """Return an image whose lights are brighter than an image can show.

    Args:
        image: RGB, [H, W, 3], float32 in [0, 1].
        white: gray value above which a place is a light.
        glare: what is added where the gray value is 1, and in proportion below.
    """
    if not glare:
        return image
    light = np.maximum(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.float32(white))
    times = glare / (1 - white)
    return cv2.addWeighted(image, 1, cv2.cvtColor(light, cv2.COLOR_GRAY2RGB), times, -times * white)
