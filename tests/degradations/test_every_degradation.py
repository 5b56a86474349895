"""What holds for every degradation: the same seed gives the same bits, and any picture becomes one of its size."""

import pytest

from ast_plugin.degradations import DEGRADATIONS
from tests.data.degraded import check_any_image, check_purity, shapes, values

EXTREME_SCALES = [('haze', 20), ('haze', 0.05), ('raindrop', 20), ('raindrop', 0.3)]


@pytest.mark.parametrize('name', DEGRADATIONS)
def test_the_same_seed_gives_the_same_bits(name):
    check_purity(name)


@shapes
@values
@pytest.mark.parametrize('name', DEGRADATIONS)
def test_any_size_and_brightness(name, shape, value):
    check_any_image(name, shape, value)


@shapes
@values
@pytest.mark.parametrize(('name', 'scale'), EXTREME_SCALES)
def test_any_size_at_extreme_scales(name, scale, shape, value):
    check_any_image(name, shape, value, scale=scale)
