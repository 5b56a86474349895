"""Synthesis of raindrops: as strong as asked, and optics of water to look through."""

import math

import cv2
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from ast_plugin.data.photos import packaged_photos
from ast_plugin.data.synthesis.drop_optics import ASIDE, DARKEST, LIGHT, SLOPES, Surroundings, refract, surroundings
from ast_plugin.data.synthesis.raindrops import RaindropParameters, add_raindrops
from ast_plugin.data.synthetic_dataset import SyntheticPairsDataset
from tests.data.degraded import photographs, psnr

DRY = {'film': (0, 0)}


def scene(height: int = 120, width: int = 160) -> np.ndarray:
    """Blotches of all brightnesses."""
    coarse = np.random.default_rng(9).random((6, 8, 3)).astype(np.float32)
    return np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)


@pytest.mark.parametrize(
    'extreme',
    [
        {'psnr': (1, 1)},
        {'psnr': (80, 80), 'coverage': (0, 0.5)},
        {'coverage': (0.5, 0.5), 'radius': (2, 2)},
        {'radius': (100, 100)},
        {'contact_angle': (5, 5)},
        {'contact_angle': (80, 80)},
        {'elongation': (0.25, 0.25)},
        {'elongation': (4, 4)},
        {'defocus': (1e-3, 1e-3)},
        {'defocus': (3, 3)},
        {'film': (1, 1), 'film_blur': (50, 50)},
        {'focal': (1e-3, 1e-3)},
        {'focal': (20000, 20000)},
        {'sky': (0, 0)},
        {'size_spread': (0, 0), 'irregularity': (0, 0)},
        {'size_spread': (1, 1), 'irregularity': (1, 1)},
        {'skyline': (1, 1), 'ground': (2, 2), 'glare': (10, 10)},
    ],
)
def test_extremes_stay_pictures(extreme):
    wet, opacity = add_raindrops(scene(), np.random.default_rng(1), RaindropParameters(**extreme))
    for result in (wet, opacity):
        assert np.isfinite(result).all() and result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize('photo', packaged_photos(), ids=lambda photo: photo.name)
def test_strength_on_photographs(photo):
    clean = photographs([photo.name])[0]
    levels, shares = [], []
    for seed in range(10):
        wet, _ = add_raindrops(clean, np.random.default_rng(seed), RaindropParameters())
        levels.append(psnr(wet, clean))
        shares.append((np.abs(np.round(wet * 255) - np.round(clean * 255)).max(axis=2) > 10).mean())
    assert min(levels) >= 14 and max(levels) <= 36
    assert max(levels) - min(levels) > 4
    assert min(shares) >= 0.01 and max(shares) <= 0.75


@pytest.mark.parametrize('target', [17.0, 20.0, 24.0])
def test_the_strength_that_is_asked_for(target):
    parameters = RaindropParameters(
        psnr=(target, target), coverage=(0.02, 0.5), radius=(3, 9), defocus=(0.15, 0.9), sky=(0.9, 1)
    )
    clean = photographs(['coffee'])[0]
    for seed in range(6):
        wet, _ = add_raindrops(clean, np.random.default_rng(seed), parameters)
        assert psnr(wet, clean) == pytest.approx(target, abs=0.9)


@pytest.mark.parametrize('coverage', [0.1, 0.25, 0.4])
def test_drops_cover_what_is_asked(coverage):
    parameters = RaindropParameters(coverage=(coverage, coverage), radius=(3, 12), **DRY)
    shares = [add_raindrops(scene(480, 720), np.random.default_rng(seed), parameters)[1].mean() for seed in range(8)]
    assert np.mean(shares) == pytest.approx(coverage, rel=0.15)


def test_the_mask_is_where_the_picture_changed():
    clean = photographs(['motorcycle_left'])[0]
    wet, opacity = add_raindrops(
        clean, np.random.default_rng(2), RaindropParameters(psnr=(18, 18), glare=(0, 0), **DRY)
    )
    change = np.abs(wet - clean).max(axis=2)
    dry = opacity == 0
    assert 0.1 < dry.mean() < 0.9
    assert change[dry].max() < 1e-6
    assert (np.abs(wet**2 - clean**2).max(axis=2) <= opacity + 1e-5).all()  # opacity is that of light
    assert change[opacity > 0.9].mean() > 0.1


def test_no_water_is_a_clean_pane():
    clean = scene()
    parameters = RaindropParameters(coverage=(0, 0), **DRY)
    wet, opacity = add_raindrops(clean, np.random.default_rng(3), parameters)
    assert not opacity.any() and np.array_equal(wet, clean)


def test_the_film_blurs_and_pales():
    clean = photographs(['china'])[0]
    parameters = RaindropParameters(psnr=(10, 10), coverage=(0, 0), film=(1, 1))
    wet, opacity = add_raindrops(clean, np.random.default_rng(3), parameters)

    def sharpness(image: np.ndarray, where: np.ndarray) -> float:
        return float(np.abs(cv2.Laplacian(image, cv2.CV_32F))[where].mean())

    thick, none = opacity > 0.9, opacity < 0.02
    assert thick.mean() > 0.02 and none.mean() > 0.02
    assert sharpness(wet, thick) < 0.3 * sharpness(clean, thick)
    assert sharpness(wet, none) > 0.95 * sharpness(clean, none)
    assert wet[thick].std() < clean[thick].std()


def test_defocus_softens_drops():
    def steepest(defocus: float) -> float:
        parameters = RaindropParameters(psnr=(18, 18), radius=(9, 9), defocus=(defocus, defocus), **DRY)
        opacity = add_raindrops(scene(240, 320), np.random.default_rng(4), parameters)[1]
        return float(np.percentile(np.abs(cv2.Sobel(opacity, cv2.CV_32F, 1, 0)), 99))

    assert steepest(0.1) > 1.5 * steepest(0.6) > 1.5 * steepest(1.5)


def test_drops_are_of_many_sizes_and_shapes():
    areas, roundness = drops(size_spread=(0.5, 0.5), irregularity=(1, 1))
    assert len(areas) > 60 and np.percentile(areas, 95) > 10 * np.percentile(areas[areas > 4], 20)
    assert min(roundness) < 0.55 and max(roundness) > 0.8


def test_drops_may_be_round_and_of_one_size():
    areas, roundness = drops(size_spread=(0, 0), irregularity=(0, 0), elongation=(1, 1), coverage=(0.05, 0.05))
    assert np.median(roundness) > 0.85
    assert np.percentile(areas, 80) < 1.5 * np.percentile(areas, 30)


def test_drops_that_ran_down_are_tall():
    ranges = {'irregularity': (0, 0), 'elongation': (1, 1), 'coverage': (0.05, 0.05), 'radius': (10, 10), **DRY}

    def heights(share: float) -> np.ndarray:
        parameters = RaindropParameters(**ranges, defocus=(0.2, 0.2), trails=(share, share))
        _, opacity = add_raindrops(scene(480, 720), np.random.default_rng(5), parameters)
        contours, _ = cv2.findContours((opacity > 0.5).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        _, _, width, height = np.array([cv2.boundingRect(c) for c in contours if cv2.contourArea(c) > 100]).T
        return height / width

    assert np.median(heights(0)) < 1.3 and np.median(heights(1)) > 1.7


def drops(**parameters) -> tuple[np.ndarray, list[float]]:
    """Return the areas of drops that hardly are out of focus, in pixels, and how round the larger ones are."""
    ranges = {'radius': (8, 8), 'defocus': (0.3, 0.3), 'coverage': (0.2, 0.2), **DRY, **parameters}
    _, opacity = add_raindrops(scene(480, 720), np.random.default_rng(5), RaindropParameters(**ranges))
    contours, _ = cv2.findContours((opacity > 0.5).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    areas = np.array([cv2.contourArea(contour) for contour in contours])
    whole = [contour for contour, area in zip(contours, areas, strict=True) if area > 60]
    return areas, [4 * math.pi * cv2.contourArea(c) / cv2.arcLength(c, True) ** 2 for c in whole]


def test_few_large_drops_are_as_wet_on_the_average():
    parameters = RaindropParameters(coverage=(0.1, 0.1), radius=(26, 26), defocus=(0.2, 0.2), **DRY)
    shares = [add_raindrops(scene(240, 240), np.random.default_rng(seed), parameters)[1].mean() for seed in range(60)]
    assert np.mean(shares) == pytest.approx(0.1, rel=0.25)


def test_light_rain_hardly_changes_the_image():
    clean = photographs(['china'])[0]
    for seed in range(6):
        wet, _ = add_raindrops(clean, np.random.default_rng(seed), RaindropParameters(psnr=(34, 34), coverage=(0, 0.5)))
        assert psnr(wet, clean) > 25


def test_glare_keeps_drops_white_out_of_focus():
    clean = np.full((160, 240, 3), 0.2, np.float32)

    def brightest(glare: float) -> float:
        ranges = {'radius': (6, 6), 'defocus': (1, 1), 'skyline': (1, 1), 'sky': (1, 1), 'coverage': (0.2, 0.2), **DRY}
        parameters = RaindropParameters(**ranges, glare=(glare, glare))
        return float(np.percentile(add_raindrops(clean, np.random.default_rng(1), parameters)[0], 99))

    assert brightest(4) > brightest(0) + 0.1


def test_scale_enlarges_drops():
    def correlation(scale: float) -> float:
        parameters = RaindropParameters(psnr=(18, 18), radius=(4, 9), defocus=(0.5, 0.9), scale=scale, **DRY)
        opacity = add_raindrops(scene(400, 400), np.random.default_rng(6), parameters)[1]
        opacity = opacity - opacity.mean()
        return float((opacity[:-10] * opacity[10:]).mean() / (opacity**2).mean())

    assert correlation(3) > correlation(1) + 0.1


def test_rays_bend_by_snell_and_light_is_lost_by_fresnel():
    half = round(0.5 * (SLOPES - 1))
    assert ASIDE[half] == pytest.approx(math.tan(math.asin(0.6665) - math.radians(30)), rel=5e-3)
    assert ASIDE[0] == 0 and LIGHT[0] == pytest.approx(1 - (1 - DARKEST) * (0.333 / 2.333) ** 2, rel=1e-4)
    critical = 1 / 1.333
    assert LIGHT[math.ceil(critical * (SLOPES - 1)) + 1] == pytest.approx(DARKEST)
    assert (np.diff(LIGHT[: int(critical * SLOPES)]) <= 1e-6).all()


def test_a_drop_shows_the_view_upside_down_and_mirrored():
    height, width = 240, 320
    y, x = np.mgrid[:height, :width].astype(np.float32)
    image = cv2.merge([x / width, y / height, np.zeros_like(x)])
    v, u = np.mgrid[-60:60, -80:80].astype(np.float32) / 12  # a drop in the middle, on the pane at half resolution
    slope = np.stack([u, v]) * np.float32(0.5)
    drop = refract(surroundings(image, 600.0, 1.0), np.ones((120, 160), np.float32), slope, 2)
    middle, right, below = drop[60, 80], drop[60, 88], drop[68, 80]
    assert middle[0] == pytest.approx(0.5, abs=0.03) and middle[1] == pytest.approx(0.5, abs=0.03)
    assert right[0] < middle[0] - 0.03  # to the right one sees the left
    assert below[1] < middle[1] - 0.03  # below one sees what is above
    assert np.allclose(drop[..., 3], 1)


def test_drops_see_a_sky_above_the_picture_and_dark_ground_below():
    around = surroundings(np.full((160, 160, 3), 0.5, np.float32), 400.0, 0.95)
    assert isinstance(around, Surroundings) and around.picture.shape == (52, 52, 3)
    np.testing.assert_allclose(around.picture, 0.5, atol=1e-6)
    assert around.view[0].mean() > 0.85 and around.view[-1].mean() < 0.35


@pytest.mark.parametrize(
    'wrong',
    [
        {'psnr': (22, 15)},
        {'coverage': (0.1, 0.9)},
        {'coverage': (-0.1, 0.2)},
        {'radius': (0, 4)},
        {'radius': (4, 400)},
        {'contact_angle': (0, 40)},
        {'contact_angle': (40, 95)},
        {'elongation': (1, 9)},
        {'defocus': (1, 4)},
        {'film': (0, 2)},
        {'film_blur': (1, 500)},
        {'sky': (0, 1.5)},
        {'focal': (0, 100)},
        {'size_spread': (0, 2)},
        {'irregularity': (0, 2)},
        {'trails': (0, 2)},
        {'skyline': (0.1, 10)},
        {'ground': (0, 3)},
        {'glare': (-1, 2)},
        {'scale': 0.1},
        {'scale': float('nan')},
        {'radii': (3, 4)},
    ],
)
def test_bad_parameters_are_refused(wrong):
    with pytest.raises(ValidationError):
        RaindropParameters(**wrong)


@pytest.mark.parametrize('kind', ['raindrop', 'haze'])
def test_patches_are_degraded_like_photographs(kind):
    """Patches are cut from a degraded neighbourhood: as strong on the average as whole photographs, and seeded."""
    options = {'phase': 'train', 'gt_size': 64, 'seed': 3, 'photos': ['coffee', 'astronaut'], 'num_per_photo': 16}
    data = SyntheticPairsDataset({**options, 'degradation': {'type': kind}})
    errors = [float(((sample['lq'] - sample['gt']) ** 2).mean()) for sample in data]
    assert len(errors) == 32 and min(errors) > 0
    assert (16, 10)[kind == 'haze'] < -10 * np.log10(np.mean(errors)) < (25, 19)[kind == 'haze']
    assert torch.equal(data[7]['lq'], SyntheticPairsDataset(data.opt)[7]['lq'])
