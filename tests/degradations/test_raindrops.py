"""Synthesis of raindrops: coverage, and refraction by water."""

import math

import cv2
import numpy as np
import pytest

from ast_plugin.degradations.raindrops import ASIDE, DARKEST, LIGHT, SLOPES, Surroundings, refract
from tests.degradations.helpers import degrade, photo, scene

DRY = {'film': (0, 0)}
DAY = {'skyline': 5.6, 'ground': 0.3, 'glare': 0.0}


@pytest.mark.parametrize(
    ('coverage', 'size', 'ranges', 'count'),
    [
        (0.1, (480, 720), {'radius': (3, 12)}, 8),
        (0.4, (480, 720), {'radius': (3, 12)}, 8),
        (0.1, (240, 240), {'radius': (26, 26), 'defocus': (0.2, 0.2)}, 60),
    ],
    ids=['few', 'many', 'few large ones'],
)
def test_drops_cover_what_is_requested(coverage, size, ranges, count):
    ranges = {'coverage': (coverage, coverage), **ranges, **DRY}
    shares = [degrade('raindrop', scene(*size), seed, **ranges)[1].mean() for seed in range(count)]
    assert np.mean(shares) == pytest.approx(coverage, rel=0.15 if count == 8 else 0.25)


def test_the_mask_is_where_the_image_changed():
    clean = photo('motorcycle_left')
    wet, opacity = degrade('raindrop', clean, 2, psnr=(18, 18), glare=(0, 0), **DRY)
    change = np.abs(wet - clean).max(axis=2)
    dry = opacity == 0
    assert 0.1 < dry.mean() < 0.9
    assert change[dry].max() < 1e-6
    assert (np.abs(wet**2 - clean**2).max(axis=2) <= opacity + 1e-5).all()  # opacity applies to light
    assert change[opacity > 0.9].mean() > 0.1


def test_no_water_is_a_clean_pane():
    clean = scene()
    wet, opacity = degrade('raindrop', clean, 3, coverage=(0, 0), **DRY)
    assert not opacity.any() and np.array_equal(wet, clean)


def test_rays_bend_and_light_is_lost():
    half = round(0.5 * (SLOPES - 1))
    assert ASIDE[half] == pytest.approx(math.tan(math.asin(0.6665) - math.radians(30)), rel=5e-3)
    assert ASIDE[0] == 0 and LIGHT[0] == pytest.approx(1 - (1 - DARKEST) * (0.333 / 2.333) ** 2, rel=1e-4)
    critical = 1 / 1.333
    assert LIGHT[math.ceil(critical * (SLOPES - 1)) + 1] == pytest.approx(DARKEST)
    assert (np.diff(LIGHT[: int(critical * SLOPES)]) <= 1e-6).all()


def test_a_drop_turns_the_view_over():
    height, width = 240, 320
    y, x = np.mgrid[:height, :width].astype(np.float32)
    image = cv2.merge([x / width, y / height, np.zeros_like(x)])
    v, u = np.mgrid[-60:60, -80:80].astype(np.float32) / 12  # a centred drop on the pane at half resolution
    slope = np.stack([u, v]) * np.float32(0.5)
    drop = refract(Surroundings(image, 600.0, 1.0, **DAY), np.ones((120, 160), np.float32), slope, 2)
    middle, right, below = drop[60, 80], drop[60, 88], drop[68, 80]
    assert middle[0] == pytest.approx(0.5, abs=0.03) and middle[1] == pytest.approx(0.5, abs=0.03)
    assert right[0] < middle[0] - 0.03  # the right side shows the left
    assert below[1] < middle[1] - 0.03  # the lower side shows the upper
    assert np.allclose(drop[..., 3], 1)


def test_drops_see_sky_above_and_ground_below():
    around = Surroundings(np.full((160, 160, 3), 0.5, np.float32), 400.0, 0.95, **DAY)
    assert around.image.shape == (52, 52, 3)
    np.testing.assert_allclose(around.image, 0.5, atol=1e-6)
    assert around.view[0].mean() > 0.85 and around.view[-1].mean() < 0.35
