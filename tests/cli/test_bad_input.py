"""Bad input: exit status 2, a clear message on stderr, no traceback, nothing written, nothing renamed, nothing run."""

import io
import os
import pickle
import re
import sys

import cv2
import numpy as np
import pytest
import torch

from ast_plugin.cli.main import main
from tests import tiny_run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the tiny run, and the results of an older run of that name."""
    tiny_run.write(tmp_path)
    (tmp_path / 'experiments' / 'tiny').mkdir(parents=True)
    (tmp_path / 'experiments' / 'tiny' / 'old.log').write_text('old')
    monkeypatch.chdir(tmp_path)
    from basicsr.utils import logger

    monkeypatch.setattr(logger, 'initialized_logger', {})
    return tmp_path


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*'))


def complaint(folder, capfd, *arguments):
    """What the command says on stderr when it refuses to run, having left everything as it was."""
    from basicsr.utils.logger import initialized_logger

    before = tree(folder)
    capfd.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith('basicsr: error: ')
    assert 'Traceback' not in captured.err + captured.out
    assert tree(folder) == before
    assert 'basicsr' not in initialized_logger
    return captured.err.removeprefix('basicsr: error: ')


def train(folder, capfd, *overrides):
    return complaint(folder, capfd, 'train', '-opt', 'tiny.yml', *(['--force_yml', *overrides] if overrides else ()))


@pytest.mark.parametrize(
    'content',
    [
        '',
        '- a\n- b\n',
        'a: !!python/object/apply:os.system ["touch ran"]\n',
        "name: \"{{ __import__('os').system('touch ran') }}\"\n",
    ],
)
@pytest.mark.parametrize('command', ['train', 'test'])
def test_files_that_are_no_option_files(folder, capfd, command, content):
    (folder / 'bad.yml').write_bytes(content if isinstance(content, bytes) else content.encode())
    message = complaint(folder, capfd, command, '-opt', 'bad.yml')
    assert message.startswith('bad.yml')


def test_five_faults_give_five_lines(folder, capfd):
    message = train(
        folder,
        capfd,
        'train:total_iter=many',
        'network_g:num_feet=3',
        'datasets:val:typ=x',
        'model_type=SRModell',
        'val:metrics:psnr:crop=1',
    )
    lines = message.splitlines()
    assert len(lines) == 5
    assert all(line.startswith('tiny.yml: ') for line in lines)


@pytest.mark.parametrize(
    ('overrides', 'expected'),
    [
        (['datasets:train:gt_sise=3'], 'tiny.yml: datasets.train.gt_sise: unknown key, did you mean gt_size?'),
        (['network_g:type=AST_TT'], 'did you mean AST_T? (is its plugin installed?'),
        (['name=__import__("os").system("touch ran") or "/"'], 'a name that can name a folder'),
        (
            ['datasets:train:dataroot_gt=nowhere'],
            'datasets.train: PairedImageDataset: No such file or directory: nowhere',
        ),
        (['datasets:val:dataroot_gt=~nobody/x'], 'datasets.val: PairedImageDataset: No such file or directory'),
        (['datasets:train:gt_size=400'], 'datasets.train: PairedImageDataset cannot read the sample of data/lq/'),
        (['network_g:act_type=unheard'], 'network_g: SRVGGNetCompact cannot be made'),
        (['network_g={type: AST, depths: [1, 2]}'], 'tiny.yml: network_g: depths must be'),
        (['train:pixel_opt:reduction=most'], 'train.pixel_opt: L1Loss cannot be made of these options: ValueError'),
        (['train:optim_g:betas=[2, 3]'], 'train.optim_g: AdamW cannot be made of these options: ValueError'),
        (
            ['train:scheduler={type: CosineAnnealingRestartLR, periods: [1, 2], restart_weights: [1]}'],
            'train.scheduler: CosineAnnealingRestartLR cannot be made',
        ),
        (
            ['model_type=RestorationModel', 'val:protocol={type: agan, tile: 64}'],
            'val.protocol: protocol agan: overlap is 80 and tile is 64: the overlap must be smaller',
        ),
        (['val:metrics:psnr:crop_border=wide'], 'val.metrics.psnr: calculate_psnr cannot measure with these options'),
        (['path:pretrain_network_g=nothing.pth'], 'nothing.pth does not exist'),
        (['path:resume_state=nothing.state'], 'path.resume_state: no such file: nothing.state'),
        (['train:optim_g:type=SAM'], 'train.optim_g.type: the optimiser SAM cannot be used here'),
        (['model_type=RestorationModel', 'train:accumulate=3'], 'train.accumulate: a batch of 2 cannot be cut into 3'),
        (['model_type=RestorationModel', 'train:compile=true'], 'train.compile works on repeated blocks'),
    ],
)
def test_training_is_refused(folder, capfd, overrides, expected):
    message = train(folder, capfd, *overrides)
    assert expected in message
    assert len(message.splitlines()) == 1


def test_key_of_a_dataset_is_named_once(folder, capfd):
    (folder / 'real_world.txt').write_text('\n')
    source = '{name: rain, type: PairsDataset, layout: spad, dataroot: .'
    loader = 'gt_size: 8, batch_size_per_gpu: 2, num_worker_per_gpu: 0}'
    message = train(folder, capfd, f'datasets:train={source}, {loader}')
    assert 'tiny.yml: datasets.train: real_world.txt is empty' in message


def test_a_metric_of_an_extra_that_is_not_there(folder, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyiqa', None)
    expected = 'val.metrics.lpips: the package pyiqa is not installed: pip install "ast_plugin[metrics]"'
    assert expected in train(folder, capfd, 'val:metrics:lpips={type: pyiqa, metric: lpips}')


def test_missing_key_of_a_dataset(folder, capfd):
    text = tiny_run.OPTIONS.replace('    use_rot: true\n', '')
    (folder / 'tiny.yml').write_text(text)
    assert "datasets.train: PairedImageDataset needs the key 'use_rot', which is not there" in train(folder, capfd)


def test_empty_data(folder, capfd):
    for file in (folder / 'data').rglob('*.png'):
        file.unlink()
    assert 'datasets.train: PairedImageDataset finds no data' in train(folder, capfd)


def test_corrupt_image(folder, capfd):
    for file in (folder / 'data' / 'gt').iterdir():
        file.write_bytes(b'not an image')
    expected = r'tiny.yml: datasets.train: data/gt/\d.png: not a PNG, JPEG, WebP, TIFF or BMP file\n'
    assert re.fullmatch(expected, train(folder, capfd))


def test_state_without_its_weights(folder, capfd):
    state = folder / 'experiments' / 'tiny' / 'training_states' / '4.state'
    state.parent.mkdir()
    torch.save({'iter': 4}, state)
    message = complaint(folder, capfd, 'train', '-opt', 'tiny.yml', '--auto_resume')
    assert f'{state} needs {folder}/experiments/tiny/models/net_g_4.pth' in message


def test_weights_and_biases_that_is_not_there(folder, capfd, monkeypatch):
    message = train(folder, capfd, 'logger:wandb={project: rain}')
    assert 'set logger.use_tb_logger to true' in message
    monkeypatch.setitem(sys.modules, 'wandb', None)
    message = train(folder, capfd, 'logger:wandb={project: rain}', 'logger:use_tb_logger=true')
    assert 'pip install "ast_plugin[wandb]"' in message


def test_root_that_cannot_be_made(folder, capfd):
    (folder / 'file').write_text('x')
    message = complaint(folder, capfd, 'train', '-opt', 'tiny.yml', '--root', 'file')
    assert 'cannot be made: Not a directory' in message


@pytest.mark.parametrize(('launcher', 'expected'), [('pytorch', 'torchrun'), ('slurm', 'srun')])
def test_launcher_that_did_not_launch(folder, capfd, monkeypatch, launcher, expected):
    for name in ('RANK', 'WORLD_SIZE', 'SLURM_PROCID'):
        monkeypatch.delenv(name, raising=False)
    message = complaint(folder, capfd, 'train', '-opt', 'tiny.yml', '--launcher', launcher)
    assert f'start the processes by `{expected}' in message


# ---- weights


class Malicious:
    def __reduce__(self):
        return os.mkdir, ('ran',)


def good(num_feat=8):
    from basicsr.archs import ARCH_REGISTRY

    return {'params': ARCH_REGISTRY.get('SRVGGNetCompact')(num_feat=num_feat, num_conv=1, upscale=1).state_dict()}


def saved(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


WEIGHTS = {
    'cut': (lambda: saved(good())[:-500], 'cut'),
    'other network': (lambda: saved(good(num_feat=12)), 'weights of another network'),
    'code': (lambda: saved({**good(), 'extra': Malicious()}), 'can run code'),
    'bare code': (lambda: pickle.dumps(Malicious()), 'can run code'),
    'image': (lambda: cv2.imencode('.png', np.zeros((8, 8, 3), np.uint8))[1].tobytes(), 'weights file'),
    'yaml': (lambda: b'{params: 1}', 'weights file'),
    'list': (lambda: saved([torch.zeros(3)]), 'expected a dictionary of weights'),
}


@pytest.mark.parametrize(('content', 'expected'), WEIGHTS.values(), ids=WEIGHTS)
def test_weights(folder, capfd, content, expected):
    (folder / 'w.pth').write_bytes(content())
    for message in (
        train(folder, capfd, 'path:pretrain_network_g=w.pth'),
        complaint(folder, capfd, 'test', '-opt', 'tiny.yml', '--weights', 'w.pth'),
    ):
        assert message.startswith('w.pth')
        assert expected in message
        assert len(message.splitlines()) == 1


def test_nothing_trained_yet(folder, capfd):
    message = complaint(folder, capfd, 'test', '-opt', 'tiny.yml')
    assert 'no weights to test' in message
    assert 'basicsr train -opt tiny.yml' in message
