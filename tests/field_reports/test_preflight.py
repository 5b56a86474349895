"""`check` and `train` test data, network, losses, device and metrics together before any folder is changed."""

import re
from urllib.error import URLError

import pytest
import torch
import yaml

from ast_plugin.cli.main import main
from ast_plugin.models import preflight
from tests import tiny_run
from tests.archs.tiny_networks import AST, RRDBNET, SWINIR
from tests.data.images import noise, save

GRAY = {'type': 'SRVGGNetCompact', 'num_feat': 8, 'num_conv': 1, 'upscale': 1, 'num_in_ch': 1, 'num_out_ch': 1}
NIQE = {'niqe': {'type': 'calculate_niqe', 'crop_border': 0}}
OURS = {'model_type': 'RestorationModel'}
TOO_SMALL = {'datasets': {'train': {'gt_size': 30}}}


def merge(into, changes):
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict) and 'type' not in value:
            merge(into[key], value)
        else:
            into[key] = value
    return into


@pytest.fixture
def command(tmp_path, capsys):
    """Run a command on the tiny run with changes; an older run of the same name must stay in place."""
    file = tiny_run.write(tmp_path)
    older = tmp_path / 'experiments' / 'tiny' / 'older.txt'
    older.parent.mkdir(parents=True)
    older.write_text('an older run')

    def run(name, *changes):
        opt = yaml.safe_load(tiny_run.OPTIONS)
        for key in ('lq', 'gt'):
            for dataset in opt['datasets'].values():
                dataset[f'dataroot_{key}'] = str(tmp_path / 'data' / key)
        for change in changes:
            merge(opt, change)
        file.write_text(yaml.safe_dump(opt, sort_keys=False))
        status = main([name, '-opt', str(file), '--root', str(tmp_path)])
        assert sorted(older.parents[1].rglob('*')) == [older.parent, older]
        assert not (tmp_path / 'tb_logger').exists()
        return status, capsys.readouterr().err

    return run


FAULTS = {
    'gpu': ([{'num_gpu': 1}], 'num_gpu: 1, but this machine has no GPU'),
    'patch': ([{'network_g': SWINIR}, TOO_SMALL], 'SwinIR is trained on multiples of 4 pixels'),
    'patch of ours': ([OURS, {'network_g': SWINIR}, TOO_SMALL], 'SwinIR is trained on multiples of 4 pixels'),
    'patch of RRDBNet': ([OURS, {'network_g': RRDBNET}, TOO_SMALL], 'RRDBNet is trained on multiples of'),
    'channels in': ([{'network_g': GRAY}], 'datasets.val: '),
    'channels in of ours': ([OURS, {'network_g': {**AST, 'in_chans': 1}}], r'AST expects .*\[B, 1, H, W\]'),
    'channels out': ([OURS, {'network_g': {**AST, 'out_chans': 1}}], 'datasets.val: '),
    'enlarging': ([OURS, {'network_g': {**SWINIR, 'upscale': 2, 'upsampler': 'pixelshuffle'}}], 'datasets.val: '),
    'metric without gt': ([], 'img2'),
    'border': ([OURS, {'network_g': AST, 'val': {'metrics': {'psnr': {'crop_border': 30}}}}], 'large enough for psnr'),
    'small for NIQE': ([OURS, {'network_g': AST, 'val': {'metrics': NIQE}}], 'no image is large enough for niqe'),
    'backend': ([OURS, {'network_g': AST, 'backend': 'triton'}], "backend 'triton' cannot run"),
    'weights with NaN': ([OURS, {'network_g': AST}], 'not finite'),
}


@pytest.mark.parametrize(('fault', 'name'), [*((fault, 'check') for fault in FAULTS), ('patch', 'train')])
def test_fault_is_found_beforehand(command, tmp_path, fault, name, monkeypatch):
    changes, message = FAULTS[fault]
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    if fault == 'weights with NaN':
        from ast_plugin.archs.networks import build_network

        state = build_network(AST).state_dict()
        torch.save({'params': {key: tensor * float('nan') for key, tensor in state.items()}}, tmp_path / 'w.pth')
        changes = [*changes, {'path': {'pretrain_network_g': str(tmp_path / 'w.pth')}}]
    if fault == 'metric without gt':
        val = {'type': 'SingleImageDataset', 'name': 'v', 'dataroot_lq': str(tmp_path / 'data' / 'lq')}
        changes = [{'datasets': {'val': {**val, 'io_backend': {'type': 'disk'}}}}]
    status, errors = command(name, *changes)
    assert status == 2
    assert re.search(message, errors), errors
    assert 'Traceback' not in errors


@pytest.mark.parametrize(
    'changes',
    [
        [],
        [OURS],
        [OURS, {'network_g': SWINIR}],
        [OURS, {'network_g': AST}, {'train': {'mixing': {'type': 'cutmix', 'alpha': 1.0}, 'accumulate': 2}}],
        [OURS, {'network_g': AST}, {'train': {'ema_decay': 0.9}}],
    ],
    ids=['SRModel', 'ours', 'sizes of validation', 'mixing', 'average'],
)
def test_sound_options_pass(command, changes):
    status, errors = command('check', *changes)
    assert status == 0, errors
    assert 'tiny: valid' in errors


def test_one_image_large_enough_passes(command, tmp_path):
    for side in ('lq', 'gt'):
        save(tmp_path / 'data' / side / '9.png', noise(200, 200, 3))
    status, errors = command('check', OURS, {'network_g': AST, 'val': {'metrics': NIQE}})
    assert status == 0, errors


@pytest.mark.parametrize(('changes', 'message'), [({}, ''), ({'in_chans': 1}, r'AST expects .*\[B, 1, H, W\]')])
def test_large_network_passes_shapes(command, monkeypatch, changes, message):
    monkeypatch.setattr(preflight, '_AFFORDABLE', 1.0)
    monkeypatch.setattr(preflight, '_try_model', None)
    status, errors = command('check', OURS, {'network_g': {**AST, **changes}})
    assert status == (2 if message else 0), errors
    assert re.search(message, errors), errors


def test_weights_that_cannot_be_fetched(command, monkeypatch):
    def fetch(*arguments, **options):
        raise URLError('no network here')

    monkeypatch.setattr('torch.hub.load_state_dict_from_url', fetch)
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', fetch)
    perceptual = {'type': 'PerceptualLoss', 'layer_weights': {'conv1_1': 1.0}, 'vgg_type': 'vgg11'}
    status, errors = command('check', OURS, {'train': {'perceptual_opt': perceptual}})
    assert status == 2
    assert re.search('no network here.*pretrained_models', errors), errors


def test_trial_leaves_random_numbers(command):
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    command('check', OURS)
    assert torch.equal(torch.rand(1), want)


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    preflight._check_device({'num_gpu': 2}, 'o.yml')
    with pytest.raises(preflight.OptionError, match='num_gpu: 4, but this machine has 2: '):
        preflight._check_device({'num_gpu': 4}, 'o.yml')
    monkeypatch.setenv('WORLD_SIZE', '4')  # of two machines
    preflight._check_device({'num_gpu': 4}, 'o.yml')


DAMAGES = {
    'empty': lambda folder: [path.write_bytes(b'') for path in folder.iterdir()],
    'one more': lambda folder: save(folder / 'more.png', noise(40, 40, 3)),
    'other size': lambda folder: [save(path, noise(44, 40, 3)) for path in folder.iterdir()],
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_data_that_is_there_and_wrong(command, tmp_path, damage):
    DAMAGES[damage](tmp_path / 'data' / 'gt')
    status, errors = command('check')
    assert status == 2 and 'datasets.train: ' in errors and ': valid' not in errors
    assert damage == 'one more' or str(tmp_path / 'data' / ('gt' if damage == 'empty' else 'lq')) in errors


@pytest.mark.parametrize('border', [4, 40])
def test_niqe_with_a_border_passes(border):
    metrics = {'niqe': {'type': 'calculate_niqe', 'crop_border': border}}
    preflight._check_metrics({'metrics': metrics}, 'o.yml')
