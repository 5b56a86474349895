"""Properties of every degradation: as an option, in a dataset, and for any image and seed."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from ast_plugin.data.pairs_dataset import SyntheticPairsDataset
from ast_plugin.data.synthesis import Augmentation, degraded_patch
from ast_plugin.degradations import DEGRADATIONS, AnyParameters, Degradation, snow
from ast_plugin.degradations.base import Limits
from ast_plugin.degradations.rain import FINE
from ast_plugin.degradations.shadow import CASTERS
from ast_plugin.errors import OptionError
from tests.degradations.helpers import degrade, gray, photo, psnr, scene

OPTION = TypeAdapter(AnyParameters)
RAIN_LAYER, SNOW_LAYER = FINE.model_dump(), snow.NEAR.model_dump()
EVERY = pytest.mark.parametrize('name', DEGRADATIONS)
LIMITED = [
    (name, key, field.json_schema_extra.least, field.json_schema_extra.most)
    for name, row in DEGRADATIONS.items()
    for key, field in row.parameters.model_fields.items()
    if isinstance(field.json_schema_extra, Limits)
]
PSNR = {  # of packaged photos: seeds per photo, minimum and maximum, range of the median, minimum spread per photo
    'rain': (6, 20, 60, (20, 26), 1),
    'raindrop': (6, 14, 36, (18, 26), 4),
    'haze': (6, 9, 23, (11, 19), 2),
    'snow': (3, 15, 33, (20, 25), 0),
    'shadow': (6, 12, 40, (18, 24), 0),
    'moire': (2, 14, 32, (19, 24), 0),
}


def test_an_option_by_its_type():
    for name, row in DEGRADATIONS.items():
        parameters = OPTION.validate_python({'type': name})
        assert type(parameters) is row.parameters
        assert OPTION.validate_python(parameters.model_dump(mode='json')) == parameters
    assert OPTION.validate_python({'scale': 2}).type == 'rain'
    with pytest.raises(ValidationError, match=r'fog.*rain.*moire'):
        OPTION.validate_python({'type': 'fog'})


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({'type': 'snow', 'amont': [1, 2]}, r'\.amont: unknown key'),
        ({'type': 'snow', 'amount': [2, 1]}, r'\.amount: .*lowest, highest'),
        ({'type': 'moire', 'pitch': 'wide'}, r'\.pitch: '),
        ({'type': 'shadow', 'coverage': [0.5, 2]}, r'\.coverage: must be within'),
        ({'type': 'snwo'}, '.*snow'),
        ('snow', ': '),
    ],
)
def test_bad_options_name_the_key(options, expected):
    with pytest.raises(OptionError, match=rf'^datasets\.train\.degradation{expected}'):
        SyntheticPairsDataset({'phase': 'train', 'gt_size': 32, 'degradation': options})


WRONG = [  # one row per rule of a parameter type
    ('rain', {'psnr': (float('nan'), 20)}),
    ('rain', {'veil': (-0.1, 0)}),
    ('rain', {'scale': 0}),
    ('rain', {'layers': []}),
    ('rain', {'layers': [{**RAIN_LAYER, 'presence': 0}]}),
    ('rain', {'layers': [{**RAIN_LAYER, 'density': (0, 1)}]}),
    ('raindrop', {'scale': 0.1}),
    ('raindrop', {'scale': float('nan')}),
    ('haze', {'visibility': (0, 10)}),
    ('haze', {'tint': -1}),
    ('haze', {'room': 2}),
    ('haze', {'cell': (float('inf'), float('inf'))}),
    ('snow', {'layers': [{**SNOW_LAYER, 'opacity': (0.5, 1.5)}]}),
    ('snow', {'layers': [{**SNOW_LAYER, 'motion': (-1, 1)}]}),
    ('shadow', {'casters': []}),
    ('shadow', {'casters': ['dragon']}),
]


def test_bad_parameters_are_rejected():
    for name, wrong in WRONG:
        with pytest.raises(ValidationError):
            DEGRADATIONS[name].parameters(**wrong)


@EVERY
def test_ranges_keep_to_their_limits(name):
    model = DEGRADATIONS[name].parameters
    schemas = model.model_json_schema()['properties']
    for _, key, least, most in (row for row in LIMITED if row[0] == name):
        for bounds in ((least - 1, most), (max(least, 1e-3), most + 1)):
            with pytest.raises(ValidationError, match=key):
                model(**{key: bounds})
        assert f'within [{least:g}, {most:g}]' in model.model_fields[key].description
        assert all((item['minimum'], item['maximum']) == (least, most) for item in schemas[key]['prefixItems'])


def check_images(name, image, results) -> None:
    degraded, mask = results
    assert degraded.shape == image.shape and degraded.dtype == np.float32 and degraded.flags.c_contiguous
    assert np.isfinite(degraded).all() and degraded.min() >= 0 and degraded.max() <= 1
    assert (mask is None) == (name == 'moire')
    if mask is not None:
        assert mask.shape == image.shape[:2] and mask.dtype == np.float32 and mask.min() >= 0 and mask.max() <= 1


EXTREMES = [  # both ends of every range, and combinations or values without range that change the image
    *((name, {key: (value, value)}) for name, key, *ends in LIMITED for value in (ends[0] or 1e-3, ends[1])),
    *((name, {'psnr': (psnr, psnr)}) for name in ('rain', 'raindrop', 'haze') for psnr in (1, 80)),
    *((name, {'scale': 3}) for name in ('rain', 'raindrop', 'haze', 'snow', 'shadow')),
    *(('rain', {'layers': [{**RAIN_LAYER, **change}]}) for change in ({}, {'sharpness': (8, 8)}, {'presence': 0.01})),
    ('rain', {'angle_spread': 10, 'jpeg_share': 0}),
    ('rain', {'jpeg_share': 1}),
    ('raindrop', {'psnr': (80, 80), 'coverage': (0, 0.5)}),
    ('raindrop', {'coverage': (0.5, 0.5), 'radius': (2, 2)}),
    ('raindrop', {'film': (1, 1), 'film_blur': (50, 50)}),
    ('raindrop', {'size_spread': (1, 1), 'irregularity': (1, 1)}),
    ('raindrop', {'skyline': (1, 1), 'ground': (2, 2), 'glare': (10, 10)}),
    ('haze', {'forward': (0.9, 0.9), 'spread': (60, 60)}),
    ('haze', {'airlight': (1, 1), 'tint': 0.2}),
    ('haze', {'cell': (1e-3, 1e-3)}),
    ('haze', {'cell': (1e6, 1e6)}),
    ('haze', {'room': 0}),
    ('haze', {'room': 1}),
    ('haze', {'lamps': (1, 1), 'lamp_tint': (0.5, 0.5), 'glow': (1, 1), 'glare': (10, 10)}),
    ('haze', {'exposure': (3, 3), 'white_balance': (1, 1), 'tint': 0.2}),
    ('haze', {'exposure': (-3, -3), 'noise': (0.1, 0.1)}),
    *(('snow', {'layers': [{**SNOW_LAYER, 'motion': (ratio, ratio), 'defocus': (ratio, ratio)}]}) for ratio in (0, 3)),
    ('snow', {'amount': (10, 10), 'angle_spread': 45}),
    *(('shadow', {'casters': [caster]}) for caster in CASTERS),
    ('moire', {'sideways': 1}),
]
RECORDED = Path(__file__).parents[1] / 'data/golden/degradations.jsonl'
"""Result of `measure` for each extreme, one per line; rewritten by `record`."""


def measure(name, extreme) -> list[float]:
    """Check an image and its mask; return thumbnails, and mean differences of horizontal and vertical neighbours."""
    check_images(name, scene(), results := degrade(name, scene(), 1, **extreme))
    parts = [part for part in results if part is not None]
    thumbnails = [cv2.resize(part, (3, 2), interpolation=cv2.INTER_AREA) for part in parts]
    steps = [np.abs(np.diff(part, axis=axis)).mean() for part in parts for axis in (0, 1)]
    return [round(float(number), 5) for number in (*np.concatenate(thumbnails, axis=None), *steps)]


def record() -> None:
    lines = [json.dumps([name, extreme, measure(name, extreme)]) for name, extreme in EXTREMES]
    RECORDED.write_text('\n'.join(lines) + '\n')


@pytest.mark.parametrize('number', range(len(EXTREMES)))
def test_extremes_are_what_they_were(number):
    """Recipes and bundled weights depend on the result for a given seed."""
    *recorded, expected = json.loads(RECORDED.read_text().splitlines()[number])
    assert recorded == json.loads(json.dumps(EXTREMES[number]))
    assert measure(*EXTREMES[number]) == pytest.approx(expected, abs=3e-4)


SCALES = {'haze': (1, 20, 0.05), 'raindrop': (1, 20, 0.3)}


@EVERY
def test_any_size_and_brightness(name):
    for scale in SCALES.get(name, (1,)):
        parameters = {} if scale == 1 else {'scale': scale}  # moiré has no scale
        for shape in ((1, 1), (1, 50), (50, 1), (7, 3), (65, 130), (600, 90)):
            for value in (0.0, 0.5, 1.0):
                image = gray(*shape, value)
                check_images(name, image, degrade(name, image, **parameters))
                assert np.array_equal(image, gray(*shape, value))
    check_images(name, gray(1300, 1900, 0.5), degrade(name, gray(1300, 1900, 0.5)))


@EVERY
def test_bits_depend_on_the_seed_alone(name):
    """Neither global generators nor the addresses of arrays in memory change a bit."""
    kept = []  # so that later arrays have other addresses
    for side in (40, 64):
        image = np.random.default_rng(1).uniform(0, 1, (side, side, 3)).astype(np.float32)
        before, (degraded, mask) = image.copy(), degrade(name, image, 5)
        for size in np.random.default_rng(0).integers(1, 5000, 9):
            np.random.seed(size)  # noqa: NPY002 (the global generator must not matter)
            cv2.setRNGSeed(int(size))
            kept.append(np.empty(size, np.uint8))
            again = degrade(name, image, 5)
            assert np.array_equal(again[0], degraded) and (mask is None or np.array_equal(again[1], mask))
        assert np.array_equal(image, before) and not np.array_equal(degrade(name, image, 6)[0], degraded)


@EVERY
def test_psnr_on_photos(name):
    seeds, least, most, (low, high), spread = PSNR[name]
    levels = []
    for clean in map(photo, ('coffee', 'rocket', 'china')):
        degraded = [degrade(name, clean, seed)[0] for seed in range(seeds)]
        levels.append([psnr(image, clean) for image in degraded])
        assert np.ptp(levels[-1]) > spread
        if name == 'rain':
            assert np.median(levels[-1]) <= 26
        if name == 'raindrop':  # fraction of pixels changed by drops
            shares = [(np.abs(np.round(image * 255) - np.round(clean * 255)).max(2) > 10).mean() for image in degraded]
            assert min(shares) >= 0.01 and max(shares) <= 0.75
    assert least <= np.min(levels) and np.max(levels) <= most
    assert low < np.median(levels) < high


DROPS = {'coverage': (0.02, 0.5), 'radius': (3, 9), 'defocus': (0.15, 0.9), 'sky': (0.9, 1)}


@pytest.mark.parametrize(
    ('name', 'ranges', 'tolerance', 'targets'),
    [('raindrop', DROPS, 0.9, (17, 20, 24)), ('haze', {'airlight': (0.75, 0.92)}, 0.5, (12, 16, 22))],
)
def test_strength_that_is_requested(name, ranges, tolerance, targets):
    clean = photo('coffee')
    for target in targets:
        for seed in range(3):
            degraded, _ = degrade(name, clean, seed, psnr=(target, target), **ranges)
            assert psnr(degraded, clean) == pytest.approx(target, abs=tolerance)


@EVERY
def test_samples_to_train_from(name):
    options = {'phase': 'train', 'gt_size': 40, 'seed': 3, 'degradation': {'type': name}}
    one, other = SyntheticPairsDataset(options)[0, 1], SyntheticPairsDataset(options)[0, 1]
    assert one['lq'].shape == one['gt'].shape == (3, 40, 40) and one['lq'].dtype == torch.float32
    assert torch.equal(one['lq'], other['lq']) and torch.equal(one['gt'], other['gt'])
    assert not torch.equal(one['lq'], one['gt']) and one['lq'].min() >= 0 and one['lq'].max() <= 1
    assert not torch.equal(one['lq'], SyntheticPairsDataset(options)[1, 1]['lq'])


@pytest.mark.parametrize(('name', 'low', 'high'), [('raindrop', 16, 25), ('haze', 10, 19)])
def test_patches_are_degraded_like_images(name, low, high):
    """Patches are cut from a degraded neighbourhood, so their mean strength equals that of whole images."""
    options = {'phase': 'train', 'gt_size': 64, 'seed': 3, 'photos': ['coffee', 'astronaut'], 'num_per_photo': 16}
    data = SyntheticPairsDataset({**options, 'degradation': {'type': name}})
    errors = [float(((sample['lq'] - sample['gt']) ** 2).mean()) for sample in data]
    assert len(errors) == 32 and min(errors) > 0
    assert low < -10 * np.log10(np.mean(errors)) < high


def test_a_patch_keeps_its_depth():
    image = np.zeros((60, 80, 3), np.uint8)
    image[..., 0] = np.arange(80)
    image[..., 1] = np.arange(60)[:, None]
    depth = image[..., 0] + 1000.0 * image[..., 1] + 1
    seen = []

    def apply(clean, generator, parameters, depth=None):
        seen.append((clean, depth))
        return clean, clean[..., 0]

    row = Degradation(DEGRADATIONS['haze'].parameters, apply, margin=3)
    for seed in range(12):
        generator = np.random.default_rng(seed)
        degraded, clean, mask = degraded_patch(image, 20, generator, row, None, Augmentation(True, True), depth)
        assert degraded.shape == clean.shape == (20, 20, 3) and mask.shape == (20, 20)
        whole, beside = seen[-1]
        assert whole.shape == (26, 26, 3)
        levels = whole.astype(np.float64) * 255
        np.testing.assert_allclose(levels[..., 0] + 1000 * levels[..., 1] + 1, beside, atol=0.1)
