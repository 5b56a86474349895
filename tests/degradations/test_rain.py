"""Synthesis of rain: requested strength, and properties of streaks."""

import cv2
import numpy as np
import pytest

from ast_plugin.degradations.rain import FINE, MIDDLE, NEAR
from tests.degradations.helpers import degrade, direction, gray, psnr

DENSE = {
    'layers': [{**layer.model_dump(), 'presence': 1} for layer in (FINE, MIDDLE, NEAR)],
    'light': (1, 1),
    'jpeg_share': 0,
}
"""Dense rain, whose statistics can be estimated from few pixels."""


@pytest.mark.parametrize(
    ('target', 'size', 'count'), [*((t, (480, 720), 8) for t in (23, 26, 30)), (23, (64, 64), 150)]
)
def test_strength_that_is_requested(target, size, count):
    """A patch has the rain of a whole image, on average."""
    rainy = [degrade('rain', gray(*size), seed, psnr=(target, target), **DENSE)[0] for seed in range(count)]
    assert psnr(np.stack(rainy), 0.4) == pytest.approx(target, abs=0.6)
    assert count > 8 or max(abs(psnr(image, 0.4) - target) for image in rainy) < 1.6


def test_rain_without_a_veil_only_brightens():
    rainy, streaks = degrade('rain', gray(), 0, veil=(0, 0), light=(1, 1), jpeg_share=0)
    assert (rainy >= gray() - 1e-6).all()
    np.testing.assert_allclose(rainy, gray() + streaks[..., None] * 0.6, atol=0.02)  # the light has a tint


@pytest.mark.parametrize('angle', [-40, 0, 50])
def test_streaks_lean_as_requested(angle):
    _, streaks = degrade('rain', gray(300, 300), 2, angle=(angle, angle), angle_spread=0, bend=(0, 0), **DENSE)
    along, ratio = direction(streaks)
    assert along == pytest.approx(angle, abs=4) and ratio < 0.25


def test_rain_is_sparse_and_bright_or_fine():
    """At equal PSNR, fewer streaks are brighter."""
    layers = [degrade('rain', gray(480, 720), seed)[1] for seed in range(24)]
    assert (np.histogram(layers[3], bins=10, range=(0.02, 0.5))[0] > 0).all()
    covered = np.array([(streaks > 0.1).mean() for streaks in layers])
    brightest = np.array([np.percentile(streaks[streaks > 0.1], 90) for streaks in layers])
    assert covered.min() < 0.07 and covered.max() > 0.16
    assert np.corrcoef(covered, brightest)[0, 1] < -0.4
    assert brightest[covered.argmin()] > 1.4 * brightest[covered.argmax()]


def test_compression_leaves_what_is_dry():
    image = np.random.default_rng(0).uniform(0, 1, (256, 256, 3)).astype(np.float32)
    rainy, streaks = degrade(
        'rain', image, 6, jpeg_share=1, jpeg_quality=(30, 30), veil=(0, 0), psnr=(30, 30), layers=[NEAR]
    )
    near = cv2.dilate(streaks, np.ones((35, 35))) > 0
    assert not near.all() and (rainy == image)[~near].all()
    assert not np.allclose(rainy[near], image[near], atol=0.05)
