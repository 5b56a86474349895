"""Completion of the options of a run for BasicSR's pipelines."""

import copy
import os

import pytest

from ast_plugin import options
from ast_plugin.errors import OptionError

OPT = {
    'name': 'run',
    'model_type': 'SRModel',
    'num_gpu': 0,
    'datasets': {
        'train': {'name': 'a', 'type': 'Seeded', 'dataroot_lq': '~/lq'},
        'val': {'name': 'b', 'type': 'Plain'},
        'val_2': {'name': 'c', 'type': 'Seeded', 'seed': 3},
        'test_rain': {'name': 'd', 'type': 'Plain'},
    },
    'path': {'pretrain_network_g': '~/w.pth', 'strict_load_g': True},
    'train': {'total_iter': 5},
    'val': {'val_freq': 5},
    'logger': {'print_freq': 100, 'save_checkpoint_freq': 100},
}


def dataset_with(*keys):
    """Return a dataset class with options_type."""
    return type('Described', (), {'options_type': type('Options', (), {'model_fields': dict.fromkeys(keys)})})


TYPES = {'Seeded': dataset_with('seed'), 'Plain': object, 'Kept': dataset_with('keep_uint8')}


def test_prepare_for_training(tmp_path):
    before = copy.deepcopy(OPT)
    process = {'is_train': True, 'rank': 1, 'world_size': 2, 'dist': True}
    opt = options.prepare(OPT, root=tmp_path, dataset_types=TYPES, **process)
    assert before == OPT
    assert {key: opt[key] for key in (*process, 'auto_resume')} == {**process, 'auto_resume': False}
    assert opt['datasets'] == {
        'train': {
            'name': 'a',
            'type': 'Seeded',
            'dataroot_lq': os.path.expanduser('~/lq'),
            'seed': opt['manual_seed'],
            'phase': 'train',
            'scale': 1,
        },
        'val': {'name': 'b', 'type': 'Plain', 'phase': 'val', 'scale': 1},
        'val_2': {'name': 'c', 'type': 'Seeded', 'seed': 3, 'phase': 'val', 'scale': 1},
    }
    folder = tmp_path / 'experiments/run'
    assert opt['path'] == {
        'pretrain_network_g': os.path.expanduser('~/w.pth'),
        'strict_load_g': True,
        'experiments_root': str(folder),
        'log': str(folder),
        **{name: str(folder / name) for name in ('models', 'training_states', 'visualization')},
    }
    assert opt['val'] == {'val_freq': 5, 'save_img': False, 'suffix': None}
    assert opt['logger'] == {**OPT['logger'], 'use_tb_logger': False}  # required by BasicSR
    assert os.listdir(tmp_path) == []
    assert len({options.prepare(OPT)['manual_seed'] for _ in range(8)}) > 1  # random


def test_prepare_for_testing(tmp_path):
    without = {key: value for key, value in OPT.items() if key not in ('val', 'path', 'num_gpu')}
    opt = options.prepare(without, root=tmp_path, is_train=False)
    assert list(opt['datasets']) == ['val', 'val_2', 'test_rain']
    assert opt['val'] == {'save_img': False, 'suffix': None}
    assert set(opt['path']) == {'results_root', 'log', 'visualization'}
    assert isinstance(opt['num_gpu'], int)


def test_counts_become_int():
    whole = {'batch_size_per_gpu': 2.0, 'dataset_enlarge_ratio': 0.5}
    opt = {**OPT, 'manual_seed': 1e3, 'num_gpu': 0.0, 'logger': {'print_freq': 1e2, 'keep_checkpoints': 3.0}}
    opt['datasets'] = {'train': {**OPT['datasets']['train'], **whole}}
    opt = options.prepare({**opt, 'train': {'total_iter': 5e3, 'accumulate': 2.0, 'ema_decay': 0.5}})
    found = [opt['manual_seed'], opt['num_gpu'], *(opt['datasets']['train'][key] for key in whole)]
    found += [opt['logger'][key] for key in ('print_freq', 'keep_checkpoints')]
    assert repr(found) == '[1000, 0, 2, 0.5, 100, 3]'
    assert repr(opt['train']) == "{'total_iter': 5000, 'accumulate': 2, 'ema_decay': 0.5}"


def test_debug_mode():
    opt = options.prepare(OPT, debug=True)
    assert opt['name'] == 'debug_run'
    assert opt['path']['experiments_root'].endswith('debug_run')
    assert (opt['val']['val_freq'], opt['logger']['print_freq'], opt['logger']['save_checkpoint_freq']) == (8, 1, 8)
    assert options.prepare({**OPT, 'val': None}, debug=True)['val'] is None


@pytest.mark.parametrize(
    ('model_type', 'given', 'expected'),
    [
        ('RestorationModel', None, True),
        ('RestorationModel', False, False),
        ('SRModel', None, False),
        ('SRModel', True, OptionError),
    ],
)
def test_keep_uint8_by_model(model_type, given, expected):
    datasets = {key: {'name': key, 'type': 'Kept', 'keep_uint8': given} for key in ('train', 'val')}
    opt = {**OPT, 'model_type': model_type, 'datasets': datasets}
    if expected is OptionError:
        with pytest.raises(OptionError, match=r'datasets\.train\.keep_uint8: SRModel expects floats'):
            options.prepare(opt, dataset_types=TYPES)
    else:
        prepared = options.prepare(opt, dataset_types=TYPES)['datasets']
        assert prepared['train']['keep_uint8'] is expected and prepared['val']['keep_uint8'] is given
