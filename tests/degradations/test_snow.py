"""Synthesis of snow: white, soft flakes of many sizes, in the requested direction."""

import numpy as np
import pytest

from ast_plugin.degradations.snow import MIDDLE
from tests.degradations.helpers import degrade, direction, gray


def test_flakes_have_the_light_of_the_sky():
    image = gray(300, 400, 0.1)
    snowy, flakes = degrade('snow', image, veil=(0, 0), brightness=(0.9, 0.9))
    untouched = flakes < 1e-6
    assert untouched.mean() > 0.2 and np.allclose(snowy[untouched], 0.1, atol=1e-5)
    light = (snowy - 0.1 * (1 - flakes[..., None]))[flakes > 0.5] / flakes[flakes > 0.5][:, None]
    assert light.std(axis=0).max() < 1e-3
    assert light.mean(axis=0).max() == pytest.approx(0.9, abs=0.04) and light[:, 0].mean() < light[:, 2].mean()


@pytest.mark.parametrize('angle', [-60, 0, 40])
def test_it_is_drawn_out_along_its_way(angle):
    layer = {**MIDDLE.model_dump(), 'motion': (3, 3), 'defocus': (0, 0)}
    _, flakes = degrade('snow', gray(300, 300), 2, layers=[layer], angle=(angle, angle), angle_spread=0)
    assert direction(flakes)[0] == pytest.approx(angle, abs=6)


def test_patches_get_the_snow_of_the_whole():
    even = {'layers': [{**MIDDLE.model_dump(), 'density': (15, 15)}], 'amount': (1, 1)}

    def share(side: int, count: int) -> float:
        return np.mean([degrade('snow', gray(side, side), seed, **even)[1].mean() for seed in range(count)])

    assert share(96, 60) == pytest.approx(share(480, 6), rel=0.1)
