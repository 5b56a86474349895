"""Synthesis of shadows: only attenuation, soft edges, several outlines."""

import numpy as np
import pytest

from ast_plugin.degradations.shadow import CASTERS, GAMMA
from tests.degradations.helpers import degrade, gray


@pytest.mark.parametrize('caster', CASTERS)
def test_every_caster_covers_about_what_is_asked(caster):
    ranges = {'casters': [caster], 'coverage': (0.3, 0.3)}
    shares = [degrade('shadow', gray(480, 720), seed, **ranges)[1].mean() for seed in range(8)]
    assert 0.15 < np.mean(shares) < 0.4
    assert len({round(float(share), 6) for share in shares}) == 8


def test_the_sun_stays_and_the_shadow_loses_light():
    image = gray(480, 720, 0.8)
    shadowed, mask = degrade('shadow', image, 3, ambient=(0.3, 0.3), tint=(0.1, 0.1))
    assert np.allclose(shadowed[mask < 1e-5], 0.8, atol=1e-5)
    left = (shadowed[mask > 0.999] / 0.8) ** GAMMA
    assert len(left) > 1000
    assert left[:, 1].mean() == pytest.approx(0.3, rel=0.25)
    assert left[:, 2].mean() / left[:, 0].mean() == pytest.approx(1.1 / 0.9, rel=0.01)
    assert (shadowed <= image + 1e-6).all()
    bright, _ = degrade('shadow', gray(value=0.8), 4)
    dark, _ = degrade('shadow', gray(value=0.2), 4)
    np.testing.assert_allclose(bright, 4 * dark, atol=1e-5)


def test_edges_widen():
    def steepest(sigma: float) -> float:
        ranges = {'penumbra': (sigma, sigma), 'widening': (0, 0), 'casters': ['wall']}
        masks = [degrade('shadow', gray(480, 720), seed, **ranges)[1] for seed in range(4)]
        return float(np.mean([max(np.abs(np.diff(mask, axis=axis)).max() for axis in (0, 1)) for mask in masks]))

    # The maximum slope of a Gaussian edge is 1 / (sqrt(2 pi) sigma) per pixel.
    for sigma in (4.0, 10.0):
        assert steepest(sigma) == pytest.approx(1 / (np.sqrt(2 * np.pi) * sigma), rel=0.3)
    _, mask = degrade('shadow', gray(480, 720), 1, penumbra=(1, 1), widening=(25, 25), casters=['bars'])
    steps = np.abs(np.diff(mask, axis=1))
    thirds = [part.max() for part in np.array_split(steps, 3, axis=1) + np.array_split(steps, 3, axis=0)]
    assert max(thirds) > 1.5 * min(thirds)


def test_a_patch_has_some_of_the_shadow():
    masks = [degrade('shadow', gray(64, 64), seed)[1] for seed in range(40)]
    assert all(mask.max() > 0.2 for mask in masks)
    shares = [mask.mean() for mask in masks]
    assert min(shares) < 0.4 and max(shares) > 0.9  # edges and interiors
    nothing = {'casters': ['bars'], 'coverage': (1e-3, 1e-3), 'penumbra': (40, 40)}  # no shadow to place a patch near
    assert degrade('shadow', gray(64, 64), 2, **nothing)[1].max() < 0.25
    # Edges are as wide as in a whole image, not scaled down with the patch.
    assert np.median([max(np.abs(np.diff(mask, axis=axis)).max() for axis in (0, 1)) for mask in masks]) < 0.25
