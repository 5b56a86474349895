"""Synthesis of moiré: bands where sampling predicts them, aligned with the clean image."""

import cv2
import numpy as np
import pytest

from ast_plugin.degradations.moire import SENSOR
from tests.degradations.helpers import degrade, gray

PLAIN = {  # an ideal camera in front of an upright screen
    'rotation': (0, 0),
    'sideways': 0,
    'perspective': (0, 0),
    'distortion': (0, 0),
    'exposure': (0.8, 0.8),
    'balance': (0, 0),
    'glare': (0, 0),
    'noise': (0, 0),
    'quality': (100, 100),
}


def bands(pitch: float, **parameters) -> np.ndarray:
    """Return red minus blue along a row of a gray image on a screen with vertical stripes, [512]."""
    shot, _ = degrade('moire', gray(64, 512, 0.5), 3, pitch=(pitch, pitch), **{**PLAIN, **parameters})
    return (shot[..., 0] - shot[..., 2]).mean(axis=0)


@pytest.mark.parametrize('pitch', [1.9, 2.05])
def test_bands_are_where_sampling_puts_them(pitch):
    # Filters of one colour have a spacing of two sensor pixels: stripes at 1 / pitch alias to |1 / pitch - 1 / 2|.
    expected = abs(1 / pitch - 0.5) * SENSOR
    row = bands(pitch)
    power = np.abs(np.fft.rfft((row - row.mean()) * np.hanning(len(row))))
    assert power.argmax() / len(row) == pytest.approx(expected, abs=1.5 / len(row))
    assert np.ptp(row[8:-8]) > 0.1
    # Stripes in phase with the filters produce no bands.
    assert np.ptp(bands(2.0)[8:-8]) < 0.03


def test_the_image_stays_in_place():
    image = np.zeros((240, 240, 3), np.float32)
    image[60:180, 60:180] = 0.9
    shot, _ = degrade('moire', image, 2)
    shift, response = cv2.phaseCorrelate(
        cv2.GaussianBlur(image.mean(axis=2), (0, 0), 3), cv2.GaussianBlur(shot.mean(axis=2), (0, 0), 3)
    )
    assert max(map(abs, shift)) < 0.15 and response > 0.25


def test_light_is_kept_on_average():
    shot, mask = degrade('moire', gray(240, 240, 0.5), 1, **PLAIN)
    assert mask is None
    assert np.mean(shot.astype(float) ** 2.2) == pytest.approx(0.8 * 0.5**2.2, rel=0.03)
