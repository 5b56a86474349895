"""Synthesis of haze: requested density, increase with depth, and Koschmieder's law."""

import numpy as np
import pytest

from ast_plugin.degradations.haze import fill_depth, guess_depth
from ast_plugin.errors import DataError
from tests.degradations.helpers import degrade, photo, scene

OUTDOORS = {'lamps': (0, 0), 'lamp_tint': (0, 0), 'glow': (0, 0), 'room': 0}
RAW = {'glare': (0, 0), 'exposure': (0, 0), 'white_balance': (0, 0), 'noise': (0, 0)}
EVEN = {'unevenness': (0, 0), 'forward': (0, 0), 'tint': 0, 'airlight': (0.8, 0.8), **OUTDOORS, **RAW}


def test_even_haze_is_koschmieders_law():
    depth = np.linspace(1, 40, 160, dtype=np.float32) + np.zeros((120, 1), np.float32)
    hazy, opacity = degrade('haze', scene(), 2, depth, visibility=(50, 50), **EVEN)
    transmission = np.exp(np.log(0.02) / 50 * depth)
    np.testing.assert_allclose(opacity, 1 - transmission, atol=1e-5)
    expected = scene() * transmission[..., None] + 0.8 * (1 - transmission[..., None])
    np.testing.assert_allclose(hazy, expected, atol=1e-5)
    noisy, _ = degrade('haze', scene(), 2, depth, visibility=(50, 50), **{**EVEN, 'noise': (0.02, 0.02)})
    assert (noisy - hazy).std() == pytest.approx(0.02, rel=0.05)


def test_haze_is_uneven_as_requested():
    depth = np.ones((480, 720), np.float32)

    def spread(unevenness: float) -> float:
        ranges = {'unevenness': (unevenness, unevenness), 'cell': (180, 360), 'psnr': (22, 22), **RAW}
        opacities = [degrade('haze', scene(480, 720), seed, depth, **ranges)[1] for seed in range(4)]
        return float(np.mean([np.log(-np.log1p(-opacity)).std() for opacity in opacities]))

    assert spread(0) < 1e-3
    assert spread(0.4) == pytest.approx(0.4, rel=0.35)
    assert spread(0.8) == pytest.approx(2 * spread(0.4), rel=0.05)


def test_unknown_depth_is_filled_from_around():
    depth = np.full((40, 60), 2.0, np.float32)
    depth[:, 30:] = 8
    depth[10:14, 5:9] = np.nan
    depth[10:14, 50:54] = 0
    depth[:4] = np.inf
    filled = fill_depth(depth, depth.shape)
    assert np.isfinite(filled).all()
    np.testing.assert_allclose(filled[10:14, 5:9], 2)
    np.testing.assert_allclose(filled[10:14, 50:54], 8)
    np.testing.assert_allclose(filled[:4], 16)
    np.testing.assert_array_equal(filled[20:], depth[20:])

    meters = np.arange(1, 13, dtype=np.uint16).reshape(3, 4)
    np.testing.assert_array_equal(fill_depth(meters, (3, 4)), meters.astype(np.float32))


def test_guessed_depth_is_far_in_the_sky():
    image = photo('china')
    for seed in range(3):
        depth = guess_depth(image, np.random.default_rng(seed), 0.2)
        assert depth.shape == (480, 720) and depth.min() >= 0.1 and depth.max() <= 1
        sky, pagoda, trees = depth[20:80, 450:650], depth[130:230, 150:330], depth[430:, 100:600]
        assert sky.mean() > 0.95
        assert sky.mean() > 1.3 * pagoda.mean() and pagoda.mean() > 1.2 * trees.mean()
        again = guess_depth(image, np.random.default_rng(seed), 0.2, room=1.0)
        assert np.array_equal(depth, again)  # an image with sky is never a room


def test_a_room_is_far_at_its_back_wall():
    image = np.full((120, 160, 3), 0.2, np.float32)
    depth = sum(guess_depth(image, np.random.default_rng(seed), 0.2, room=1.0) for seed in range(40))
    border = np.ones((120, 160), bool)
    border[10:-10, 10:-10] = False
    assert depth[50:70, 70:90].mean() > 1.3 * depth[border].mean()


@pytest.mark.parametrize(
    ('depth', 'expected'),
    [
        (np.ones((3, 4)), r'size of the image, \[120, 160\]; got \[3, 4\]'),
        (np.full((120, 160), -1.0), 'negative'),
        (np.zeros((120, 160)), 'finite value above 0'),
    ],
)
def test_bad_depth_is_rejected(depth, expected):
    with pytest.raises(DataError, match=expected):
        degrade('haze', scene(), 0, depth)
    with pytest.raises(DataError, match='requires depth'):
        degrade('haze', scene(), 0, visibility=(10, 20))
