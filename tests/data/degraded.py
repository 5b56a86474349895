"""What the tests of every degradation ask of it."""

import cv2
import numpy as np
import pytest

from ast_plugin.data.image_files import read_rgb
from ast_plugin.data.synthesis import packaged_photos
from ast_plugin.degradations import DEGRADATIONS


def degrade(name, image, seed=0, **parameters):
    row = DEGRADATIONS[name]
    return row.apply(image, np.random.default_rng(seed), row.parameters(**parameters))


def psnr(a, b) -> float:
    return float(-10 * np.log10(max(np.mean((a.astype(np.float64) - b) ** 2), 1e-12)))


def gray(height=120, width=160, value=0.4) -> np.ndarray:
    return np.full((height, width, 3), value, np.float32)


def photographs(names: list[str] | None = None) -> list[np.ndarray]:
    """The packaged photographs, 480 x 720."""
    return [
        cv2.resize(read_rgb(photo.path), (720, 480), interpolation=cv2.INTER_AREA) / np.float32(255)
        for photo in packaged_photos(names=names)
    ]


def check_purity(name) -> None:
    """The same state of the generator gives the same bits, another gives others, and the image stays as it was."""
    image = np.random.default_rng(1).uniform(0, 1, (90, 130, 3)).astype(np.float32)
    before = image.copy()
    results = []
    for seed in (5, 5, 6):
        np.random.seed(seed + len(results))  # noqa: NPY002 (the global generator must not matter)
        cv2.setRNGSeed(len(results))
        results.append(degrade(name, image, seed))
    assert np.array_equal(image, before)
    assert np.array_equal(results[0][0], results[1][0]) and not np.array_equal(results[0][0], results[2][0])
    if results[0][1] is not None:
        assert np.array_equal(results[0][1], results[1][1])


def check_any_image(name, shape, value, **parameters) -> None:
    """A picture of any size and brightness becomes another in range, and stays as it was."""
    image = gray(*shape, value)
    degraded, mask = degrade(name, image, **parameters)
    assert np.array_equal(image, gray(*shape, value))
    assert degraded.shape == image.shape and degraded.dtype == np.float32 and degraded.flags.c_contiguous
    assert np.isfinite(degraded).all() and degraded.min() >= 0 and degraded.max() <= 1
    if mask is not None:
        assert mask.shape == shape and mask.dtype == np.float32 and mask.min() >= 0 and mask.max() <= 1


shapes = pytest.mark.parametrize('shape', [(1, 1), (1, 50), (50, 1), (7, 3), (65, 130), (600, 90)])
values = pytest.mark.parametrize('value', [0.0, 0.5, 1.0])
