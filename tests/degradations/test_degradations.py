"""The table of degradations: every row as an option, in a dataset, and as fast as it has to be."""

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from ast_plugin.data.synthesis import degraded_patch
from ast_plugin.data.synthetic_dataset import SyntheticPairsDataset
from ast_plugin.degradations import DEGRADATIONS, AnyParameters
from ast_plugin.errors import OptionError
from tests.data.degraded import degrade, gray

OPTION = TypeAdapter(AnyParameters)


@pytest.mark.parametrize('name', DEGRADATIONS)
def test_an_option_by_its_type(name):
    parameters = OPTION.validate_python({'type': name})
    assert type(parameters) is DEGRADATIONS[name].parameters
    assert OPTION.validate_python(parameters.model_dump(mode='json')) == parameters


def test_without_a_type_it_is_rain_and_others_are_refused():
    assert OPTION.validate_python({'scale': 2}).type == 'rain'
    with pytest.raises(ValidationError, match=r'fog.*rain.*moire'):
        OPTION.validate_python({'type': 'fog'})


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({'type': 'snow', 'amont': [1, 2]}, r'^datasets\.train\.degradation\.amont: unknown key'),
        ({'type': 'snow', 'amount': [2, 1]}, r'^datasets\.train\.degradation\.amount: .*lowest, highest'),
        ({'type': 'moire', 'pitch': 'wide'}, r'^datasets\.train\.degradation\.pitch: '),
        ({'type': 'shadow', 'coverage': [0.5, 2]}, r'^datasets\.train\.degradation\.coverage: must lie within'),
        ({'type': 'snwo'}, r'^datasets\.train\.degradation: .*snow'),
        ('snow', r'^datasets\.train\.degradation: '),
    ],
)
def test_bad_options_name_the_key_without_pydantics_tag(options, expected):
    with pytest.raises(OptionError, match=expected):
        SyntheticPairsDataset({'phase': 'train', 'gt_size': 32, 'degradation': options})


@pytest.mark.parametrize('name', DEGRADATIONS)
def test_samples_to_train_from(name):
    options = {'phase': 'train', 'gt_size': 40, 'seed': 3, 'degradation': {'type': name}}
    one, other = SyntheticPairsDataset(options)[0, 1], SyntheticPairsDataset(options)[0, 1]
    assert one['lq'].shape == one['gt'].shape == (3, 40, 40) and one['lq'].dtype == torch.float32
    assert torch.equal(one['lq'], other['lq']) and torch.equal(one['gt'], other['gt'])
    assert not torch.equal(one['lq'], one['gt']) and one['lq'].min() >= 0 and one['lq'].max() <= 1
    assert not torch.equal(one['lq'], SyntheticPairsDataset(options)[1, 1]['lq'])


def test_a_patch_keeps_its_depth_beside_it():
    image = np.zeros((60, 80, 3), np.uint8)
    image[..., 0] = np.arange(80)
    image[..., 1] = np.arange(60)[:, None]
    depth = image[..., 0] + 1000.0 * image[..., 1] + 1
    seen = []

    def apply(clean, generator, parameters, depth=None):
        seen.append((clean, depth))
        return clean, clean[..., 0]

    row = type(DEGRADATIONS['haze'])(DEGRADATIONS['haze'].parameters, apply, margin=3)
    for seed in range(12):
        generator = np.random.default_rng(seed)
        degraded, clean, mask = degraded_patch(
            image, 20, generator, row, None, use_hflip=True, use_rot=True, depth=depth
        )
        assert degraded.shape == clean.shape == (20, 20, 3) and mask.shape == (20, 20)
        whole, beside = seen[-1]
        assert whole.shape == (26, 26, 3)
        levels = whole.astype(np.float64) * 255
        np.testing.assert_allclose(levels[..., 0] + 1000 * levels[..., 1] + 1, beside, atol=0.1)


@pytest.mark.parametrize('name', DEGRADATIONS)
def test_bits_do_not_depend_on_what_lies_where_in_memory(name):
    sizes = np.random.default_rng(0).integers(1, 5000, 10)
    kept = []  # so that what is made after it lies elsewhere
    for side in (40, 64):
        image = np.random.default_rng(0).uniform(0, 1, (side, side, 3)).astype(np.float32)
        results = []
        for size in sizes:
            kept.append(np.empty(size, np.uint8))
            results.append(degrade(name, image)[0])
        assert all(np.array_equal(result, results[0]) for result in results)


@pytest.mark.parametrize('name', DEGRADATIONS)
def test_large_pictures(name):
    degraded, _ = degrade(name, gray(1300, 1900, 0.5))
    assert degraded.shape == (1300, 1900, 3) and np.isfinite(degraded).all()
