"""Kind C in validation: failed images are reported with the reason and excluded from the means."""

import logging
import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ast_plugin.errors import DataError, FileError, MemoryShortage, OptionError
from ast_plugin.evaluation.protocols import PROTOCOLS
from ast_plugin.evaluation.validator import Validator
from tests import tiny_run

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
    ('sides', 'error', 'num_workers', 'kind'),
    [
        ((30, DataError('a.png: damaged'), 30), None, 1, 'unreadable'),
        ((30, KeyError('x'), 30), None, 0, 'unreadable'),
        ((30, MemoryError(), 30), None, 0, 'memory'),
        ((30, 20, 30), MemoryShortage('large'), 0, 'memory'),
        ((30, 20, 30), AssertionError(), 0, 'network'),
    ],
)
def test_one_image_fails(sides, error, num_workers, kind):
    before = Validator.num_failed
    results = measure(Images(*sides), error=error, num_workers=num_workers)
    name = '1' if error else 'image_2'
    assert list(results.failures) == [name] and results.failures[name].startswith(f'{kind}: ')
    assert list(results.restored) == ['0', name, '2'] and math.isfinite(results.mean()['psnr'])
    assert [row[0] for row in results.rows()] == ['image', '0', name, '2', 'mean']
    assert Validator.num_failed == before + 1  # for the status of the command


@pytest.mark.parametrize('error', [OptionError('no backend'), FileError('full')])
def test_faults_of_no_image_end_validation(error):
    with pytest.raises(type(error), match=str(error)):
        measure(Images(30, 20), error=error)


@pytest.mark.parametrize('sides', [(20,), (20, 20), (DataError('gone'), 20)])
def test_nothing_to_measure_is_an_error(sides):
    with pytest.raises(DataError, match='some: no image can be restored and measured'):
        measure(Images(*sides), error=AssertionError())


@pytest.mark.parametrize(('kind', 'size'), [('PairsDataset', 500), ('PairedImageDataset', 0)])
def test_damaged_file_is_named(tmp_path, caplog, kind, size):
    from basicsr.utils.registry import DATASET_REGISTRY

    tiny_run.write(tmp_path)
    damaged = tmp_path / 'data' / 'gt' / '2.png'
    damaged.write_bytes(damaged.read_bytes()[:size])
    options = {f'dataroot_{side}': str(tmp_path / 'data' / side) for side in ('lq', 'gt')}
    options |= {'type': kind, 'name': 'mine', 'phase': 'val', 'scale': 1, 'io_backend': {'type': 'disk'}}
    logging.getLogger('basicsr').propagate = True
    results = measure(DATASET_REGISTRY.get(kind)(options))
    assert list(results.failures) == ['2'] and '1 of 4 images failed' in caplog.text and '2: unreadable' in caplog.text
    assert kind != 'PairsDataset' or str(damaged) in results.failures['2']
