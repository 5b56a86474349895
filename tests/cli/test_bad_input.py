"""Bad input: exit status 2, a clear message on stderr, no traceback, and no file written, renamed or executed."""

import io
import os
import sys

import pytest
import torch

from ast_plugin.cli.main import main
from tests import tiny_run

OURS = 'model_type=RestorationModel'
EMPTY_LIST = (
    'datasets:train={name: rain, type: PairsDataset, layout: spad, dataroot: ., '
    'gt_size: 8, batch_size_per_gpu: 2, num_worker_per_gpu: 0}'
)
UNEVEN = '{type: CosineAnnealingRestartLR, periods: [1, 2], restart_weights: [1]}'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the tiny run and the results of an older run of the same name."""
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
    """Run a command that must fail and return its stderr; check that no file has changed."""
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
    ('overrides', 'expected'),
    [
        (['datasets:train:gt_sise=3'], 'tiny.yml: datasets.train.gt_sise: unknown key, did you mean gt_size?'),
        (['network_g:type=AST_TT'], 'did you mean AST_T? (is its plugin installed?'),
        (['name=__import__("os").system("touch ran") or "/"'], 'a valid folder name'),
        (['datasets:train:dataroot_gt=nowhere'], 'train: PairedImageDataset: No such file or directory: nowhere'),
        (['datasets:val:dataroot_gt=~nobody/x'], 'datasets.val: PairedImageDataset: No such file or directory'),
        (['datasets:train:gt_size=400'], 'datasets.train: PairedImageDataset cannot read the sample of data/lq/'),
        (['datasets:train:dataroot_gt=bad'], '.png: not a PNG, JPEG, WebP, TIFF or BMP file'),
        ([EMPTY_LIST], 'tiny.yml: datasets.train: real_world.txt is empty'),
        (['network_g:act_type=unheard'], 'network_g: SRVGGNetCompact cannot be built'),
        (['network_g={type: AST, depths: [1, 2]}'], 'tiny.yml: network_g: depths must be'),
        (['train:pixel_opt:reduction=most'], 'train.pixel_opt: L1Loss cannot be built from these options: ValueError'),
        (['train:optim_g:betas=[2, 3]'], 'train.optim_g: AdamW cannot be built from these options: ValueError'),
        ([f'train:scheduler={UNEVEN}'], 'train.scheduler: CosineAnnealingRestartLR cannot be built'),
        ([OURS, 'val:protocol={type: agan, tile: 64}'], 'val.protocol: protocol agan: overlap is 80 and tile is 64'),
        (['val:metrics:psnr:crop_border=wide'], 'val.metrics.psnr: calculate_psnr cannot measure with these options'),
        (['val:metrics:x={type: pyiqa, metric: lpips}'], 'val.metrics.x: the package pyiqa is not installed: pip inst'),
        (['path:pretrain_network_g=nothing.pth'], 'nothing.pth does not exist'),
        (['path:resume_state=nothing.state'], 'path.resume_state: no such file: nothing.state'),
        (['path:resume_state=data'], 'path.resume_state: expected a .state file, got the folder data'),
        (['train:optim_g:type=SAM'], 'train.optim_g.type: the optimiser SAM is not supported'),
        ([OURS, 'train:accumulate=3'], 'train.accumulate: a batch of 2 cannot be split into 3'),
        ([OURS, 'train:compile=true'], 'train.compile needs repeated blocks'),
        (['logger:wandb={project: rain}'], 'set logger.use_tb_logger to true'),
        (['logger:wandb={project: rain}', 'logger:use_tb_logger=true'], 'pip install "ast_plugin[wandb]"'),
    ],
)
def test_training_is_rejected(folder, capfd, monkeypatch, overrides, expected):
    for package in ('pyiqa', 'wandb'):
        monkeypatch.setitem(sys.modules, package, None)
    (folder / 'real_world.txt').write_text('\n')
    (folder / 'bad').mkdir()
    for number in range(4):
        (folder / 'bad' / f'{number}.png').write_bytes(b'not an image')
    message = train(folder, capfd, *overrides)
    assert expected in message
    assert len(message.splitlines()) == 1


def test_dataset_without_key_or_data(folder, capfd):
    (folder / 'tiny.yml').write_text(tiny_run.OPTIONS.replace('    use_rot: true\n', ''))
    assert "datasets.train: PairedImageDataset needs the key 'use_rot', which is missing" in train(folder, capfd)
    for file in (folder / 'data').rglob('*.png'):
        file.unlink()
    (folder / 'tiny.yml').write_text(tiny_run.OPTIONS)
    assert 'datasets.train: PairedImageDataset finds no data' in train(folder, capfd)


def test_state_without_its_weights(folder, capfd):
    state = folder / 'experiments' / 'tiny' / 'training_states' / '4.state'
    state.parent.mkdir()
    torch.save({'iter': 4}, state)
    message = complaint(folder, capfd, 'train', '-opt', 'tiny.yml', '--auto_resume')
    assert f'{state} needs {folder}/experiments/tiny/models/net_g_4.pth' in message


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        ('train -opt tiny.yml --root file', 'cannot be created: Not a directory'),
        ('train -opt tiny.yml --launcher pytorch', 'start the processes by `torchrun'),
        ('train -opt tiny.yml --launcher slurm', 'start the processes by `srun'),
        ('train -opt file', 'file: expected'),
        ('test -opt file', 'file: expected'),
        ('infer -i ~nobody_/x.png -o out', '~nobody_/x.png: cannot be read: No such file'),
        ('measure ~nobody_/x.png file', '~nobody_/x.png: no such file'),
        ('test -opt tiny.yml', 'train first (`basicsr train -opt tiny.yml`)'),
    ],
)
def test_run_is_rejected(folder, capfd, monkeypatch, arguments, expected):
    for name in ('RANK', 'WORLD_SIZE', 'SLURM_PROCID'):
        monkeypatch.delenv(name, raising=False)
    (folder / 'file').write_text('- a\n- b\n')
    assert expected in complaint(folder, capfd, *arguments.split())


@pytest.mark.parametrize('arguments', ['train -opt {}', 'infer -i {} -o out --task rain'])
def test_name_that_is_too_long(folder, capfd, arguments):
    name = 300 * 'x' + '.pth'
    assert complaint(folder, capfd, *arguments.format(name).split()).endswith(f'{name}: File name too long\n')


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
    'cut': (lambda: saved(good())[:-500], 'truncated'),
    'other network': (lambda: saved(good(num_feat=12)), 'the weights do not match'),
    'code': (lambda: saved({**good(), 'extra': Malicious()}), 'can run code'),
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
