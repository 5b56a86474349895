"""Helpers of the degradation tests."""

import cv2
import numpy as np

from ast_plugin.data.image_files import read_rgb
from ast_plugin.data.synthesis import packaged_photos
from ast_plugin.degradations import DEGRADATIONS


def degrade(name, image, seed=0, depth=None, **parameters):
    row = DEGRADATIONS[name]
    options = {} if depth is None else {'depth': depth}
    return row.apply(image, np.random.default_rng(seed), row.parameters(**parameters), **options)


def psnr(a, b) -> float:
    return float(-10 * np.log10(max(np.mean((a.astype(np.float64) - b) ** 2), 1e-12)))


def gray(height=120, width=160, value=0.4) -> np.ndarray:
    return np.full((height, width, 3), value, np.float32)


def photo(name: str) -> np.ndarray:
    """A packaged photo, 480 x 720."""
    (found,) = packaged_photos(names=[name])
    return cv2.resize(read_rgb(found.path), (720, 480), interpolation=cv2.INTER_AREA) / np.float32(255)


def scene(height: int = 120, width: int = 160) -> np.ndarray:
    """Return an image of smooth noise of all brightnesses."""
    coarse = np.random.default_rng(9).random((6, 8, 3)).astype(np.float32)
    return np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)


def direction(field: np.ndarray) -> tuple[float, float]:
    """Return the direction of least change of a field, in degrees from the vertical, and its anisotropy in [0, 1].

    Both come from the structure tensor; the anisotropy is the ratio of its eigenvalues, least to most.
    """
    dx, dy = cv2.Sobel(field, cv2.CV_32F, 1, 0), cv2.Sobel(field, cv2.CV_32F, 0, 1)
    values, vectors = np.linalg.eigh([[float((a * b).mean()) for b in (dx, dy)] for a in (dx, dy)])
    x, y = vectors[:, 0] * np.sign(vectors[1, 0])
    return float(np.degrees(np.arctan2(x, y))), float(values[0] / values[1])
