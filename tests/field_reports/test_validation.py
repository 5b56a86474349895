"""Kind C in validation: failed images are reported with the reason and excluded from the means."""

import logging
import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ast_plugin.data.pairs_dataset import PairsDataset
from ast_plugin.errors import DataError, FileError, MemoryShortage, OptionError
from ast_plugin.evaluation.protocols import PROTOCOLS
from ast_plugin.evaluation.validator import Validator
from tests import tiny_run
from tests.data.images import noise, save

BASICSR = {'psnr': {'type': 'calculate_psnr', 'crop_border': 0}, 'ssim': {'type': 'calculate_ssim', 'crop_border': 0}}


class Images(Dataset):
    """Images of given sizes; an exception instead of a size is raised."""

    opt = {'name': 'some'}

    def __init__(self, *sides):
        self.sides = sides

    def __len__(self):
        return len(self.sides)

    def __getitem__(self, number):
        side = self.sides[number]
        if isinstance(side, Exception):
            raise side
        image = torch.rand(3, side, side, generator=torch.Generator().manual_seed(number))
        return {'lq': image, 'gt': image * 0.9, 'lq_path': f'/data/{number}.png'}


def measure(dataset, protocol='basicsr', error=None, num_workers=0, **options):
    def restore(sample):
        if error and sample['lq'].shape[-1] == 20:
            raise error
        return {**sample, 'result': sample['lq']}

    metrics = BASICSR if protocol == 'basicsr' else PROTOCOLS[protocol].metrics
    validator = Validator(metrics, lambda *_: None, protocol=PROTOCOLS[protocol], **options)
    return validator.measure(restore, DataLoader(dataset, num_workers=num_workers))


@pytest.mark.parametrize('protocol', ['basicsr', 'whole'])
def test_tiny_image_spoils_no_mean(protocol):
    side = 6 if protocol == 'whole' else 8
    results = measure(Images(64, 64, side, 64), protocol, num_examples=2)
    mean, ssim = results.mean(), results.restored['2']['ssim']
    assert math.isnan(ssim) and all(map(math.isfinite, mean.values()))
    assert mean['ssim'] == pytest.approx(np.mean([results.restored[name]['ssim'] for name in '013']))
    assert list(results.failures) == ['2'] and results.failures['2'].startswith('metric: ssim')
    assert 'ssim: 1 of 4 are nan and excluded from the mean' in results.to_markdown()
    assert f'failed: 2: {results.failures["2"]}' in results.notes()


@pytest.mark.parametrize(
    ('error', 'kind', 'num_workers'),
    [(DataError('a.png: damaged'), 'unreadable', 1), (MemoryError(), 'memory', 0), (KeyError('x'), 'unreadable', 0)],
)
def test_image_that_cannot_be_read(error, kind, num_workers):
    results = measure(Images(30, error, 30), num_workers=num_workers)
    assert list(results.failures) == ['image_2'] and results.failures['image_2'].startswith(f'{kind}: ')
    assert list(results.restored) == ['0', 'image_2', '2'] and math.isfinite(results.mean()['psnr'])
    assert [row[0] for row in results.rows()] == ['image', '0', 'image_2', '2', 'mean']


@pytest.mark.parametrize(
    ('error', 'kind'),
    [(AssertionError(), 'network'), (MemoryShortage('large'), 'memory'), (ValueError('x'), 'network')],
)
def test_network_fails_on_an_image(error, kind):
    results = measure(Images(30, 20, 30), error=error)
    assert list(results.failures) == ['1'] and results.failures['1'].startswith(f'{kind}: ')


@pytest.mark.parametrize('error', [OptionError('no backend'), FileError('full')])
def test_faults_of_no_image_end_validation(error):
    with pytest.raises(type(error), match=str(error)):
        measure(Images(30, 20), error=error)


@pytest.mark.parametrize('sides', [(20,), (20, 20), (DataError('gone'), 20)])
def test_nothing_to_measure_is_an_error(sides):
    with pytest.raises(DataError, match='some: no image can be restored and measured'):
        measure(Images(*sides), error=AssertionError())


def test_failures_are_counted_for_the_status():
    before = Validator.num_failed
    measure(Images(30, 20, 8), error=AssertionError())
    assert Validator.num_failed == before + 2


def test_empty_file_of_basicsr_is_named(tmp_path, caplog):
    from basicsr.data.paired_image_dataset import PairedImageDataset

    tiny_run.write(tmp_path)
    (tmp_path / 'data' / 'gt' / '2.png').write_bytes(b'')
    options = {f'dataroot_{side}': str(tmp_path / 'data' / side) for side in ('lq', 'gt')}
    options |= {'name': 'mine', 'phase': 'val', 'scale': 1, 'io_backend': {'type': 'disk'}}
    logging.getLogger('basicsr').propagate = True
    results = measure(PairedImageDataset(options))
    assert list(results.failures) == ['2'] and '1 of 4 images failed' in caplog.text and '2: unreadable' in caplog.text


def test_cut_file_among_pairs(tmp_path):
    for side in ('lq', 'gt'):
        (tmp_path / side).mkdir()
        for name in 'ab':
            save(tmp_path / side / f'{name}.png', noise(30, 30, 3))
    cut = tmp_path / 'gt' / 'b.png'
    cut.write_bytes(cut.read_bytes()[:500])
    options = {'name': 'mine', 'phase': 'val', 'dataroot_lq': str(tmp_path / 'lq'), 'dataroot_gt': str(tmp_path / 'gt')}
    results = measure(PairsDataset({**options, 'type': 'PairsDataset', 'scale': 1}))
    assert list(results.failures) == ['b'] and str(cut) in results.failures['b']
