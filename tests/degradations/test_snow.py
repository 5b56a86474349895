"""Synthesis of snow: white and soft, of many sizes, falling as asked."""

import cv2
import numpy as np
import pytest

from ast_plugin.degradations.snow import FAR, MIDDLE, NEAR
from tests.degradations.helpers import degrade, direction, gray


def test_flakes_have_the_light_of_the_sky():
    image = gray(300, 400, 0.1)
    snowy, flakes = degrade('snow', image, veil=(0, 0), brightness=(0.9, 0.9))
    untouched = flakes < 1e-6
    assert untouched.mean() > 0.2 and np.allclose(snowy[untouched], 0.1, atol=1e-5)
    light = (snowy - 0.1 * (1 - flakes[..., None]))[flakes > 0.5] / flakes[flakes > 0.5][:, None]
    assert light.std(axis=0).max() < 1e-3
    assert light.mean(axis=0).max() == pytest.approx(0.9, abs=0.04) and light[:, 0].mean() < light[:, 2].mean()


def test_flakes_of_many_sizes_and_opacities():
    _, flakes = degrade('snow', gray(480, 720), 3)
    count, _, stats, _ = cv2.connectedComponentsWithStats((flakes > 0.15).astype(np.uint8))
    areas = stats[1:, cv2.CC_STAT_AREA]
    assert count > 400
    assert (areas <= 4).sum() > 50 and ((areas > 15) & (areas < 120)).sum() > 50 and (areas > 250).sum() > 2
    assert (np.histogram(flakes, bins=9, range=(0.05, 0.95))[0] > 0).all()


def test_near_flakes_are_softer_than_far_ones():
    def sharpness(layer) -> float:
        _, flakes = degrade('snow', gray(480, 720), 1, layers=[layer.model_dump()])
        return float(np.abs(np.diff(flakes, axis=1)).max() / flakes.max())

    assert sharpness(FAR) > 1.5 * sharpness(NEAR)


def test_flakes_are_not_discs():
    layer = NEAR.model_copy(update={'density': (0.4, 0.4), 'diameter': (30, 30), 'defocus': (0, 0), 'motion': (0, 0)})
    _, flakes = degrade('snow', gray(480, 720), 2, layers=[layer.model_dump()], amount=(1, 1))
    outlines, _ = cv2.findContours((flakes > 0.2).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    large = [outline for outline in outlines if cv2.contourArea(outline) > 150]
    roundness = [4 * np.pi * cv2.contourArea(outline) / cv2.arcLength(outline, True) ** 2 for outline in large]
    assert len(large) >= 8
    assert np.median(roundness) < 0.85 and max(roundness) - min(roundness) > 0.08


@pytest.mark.parametrize('angle', [-60, 0, 40])
def test_it_is_drawn_out_along_its_way(angle):
    layer = {**MIDDLE.model_dump(), 'motion': (3, 3), 'defocus': (0, 0)}
    _, flakes = degrade('snow', gray(300, 300), 2, layers=[layer], angle=(angle, angle), angle_spread=0)
    assert direction(flakes)[0] == pytest.approx(angle, abs=6)


def test_the_veil_pales_unevenly():
    layer = {**FAR.model_dump(), 'density': (1e-6, 1e-6)}
    snowy, _ = degrade('snow', gray(480, 720, 0.1), 1, veil=(0.2, 0.2), layers=[layer])
    change = snowy.mean(axis=2) - 0.1
    assert change.min() > 0.03 and change.max() < 0.2 and change.std() > 0.005


def test_patches_get_the_snow_of_the_whole():
    even = {'layers': [{**MIDDLE.model_dump(), 'density': (15, 15)}], 'amount': (1, 1)}

    def share(side: int, count: int) -> float:
        return np.mean([degrade('snow', gray(side, side), seed, **even)[1].mean() for seed in range(count)])

    assert share(96, 60) == pytest.approx(share(480, 6), rel=0.1)
