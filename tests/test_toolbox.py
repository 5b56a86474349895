"""BasicSR, unmodified on disk, works; and each repair is needed and mends its fault."""

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from ast_plugin import toolbox
from ast_plugin.errors import CheckpointError, OptionError, PluginError

ROOT = Path(__file__).parents[1]
train = importlib.import_module('basicsr.train')
REPAIRS = importlib.import_module('ast_plugin.toolbox.repairs').REPAIRS


def python(code: str, *arguments: str, env: dict | None = None) -> subprocess.CompletedProcess:
    """Run code, or a file, in a process of its own, where nothing is imported yet."""
    command = [code] if code.endswith('.py') else ['-c', code]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', **(env or {})}
    return subprocess.run([sys.executable, *command, *arguments], capture_output=True, text=True, env=environment)


def free_port() -> str:
    with socket.create_server(('127.0.0.1', 0)) as server:
        return str(server.getsockname()[1])


# Repairs before the import

UNLOADABLE = """
import sys, torch
def refuse(path):
    raise OSError(path)
torch.ops.load_library = refuse
from ast_plugin import toolbox
"""


def test_torchvision_without_its_operators():
    broken = python(UNLOADABLE + 'import torchvision')
    assert 'torchvision::nms does not exist' in broken.stderr
    mended = python(
        UNLOADABLE + 'toolbox.define_torchvision_operators(); import torchvision\n'
        'toolbox.define_torchvision_operators()'
    )
    assert mended.returncode == 0, mended.stderr


def test_functional_tensor():
    code = (
        'from ast_plugin import toolbox; toolbox.define_torchvision_operators()\n'
        '{}; from torchvision.transforms.functional_tensor import rgb_to_grayscale'
    )
    broken = python(code.format('pass'))
    assert "No module named 'torchvision.transforms.functional_tensor'" in broken.stderr
    repair = 'toolbox.provide_functional_tensor()'
    mended = python(code.format(f'{repair}; {repair}'))
    assert mended.returncode == 0, mended.stderr


# Repairs after the import


@pytest.fixture(scope='module')
def faults(tmp_path_factory) -> dict:
    folder = str(tmp_path_factory.mktemp('faults'))
    result = python(str(Path(__file__).with_name('basicsr_faults.py')), free_port(), folder)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize('repair', REPAIRS, ids=lambda repair: repair.__name__)
def test_repair_mends_its_fault(faults, repair):
    assert faults[repair.__name__] == {'before': False, 'after': True}
    assert 'Fault: ' in repair.__doc__


def test_repairing_again_changes_nothing():
    from basicsr.models.base_model import BaseModel

    before = BaseModel.model_to_device, train.init_tb_loggers, train.CPUPrefetcher
    toolbox.repair_after_import()
    assert before == (BaseModel.model_to_device, train.init_tb_loggers, train.CPUPrefetcher)


def test_another_basicsr_is_refused(monkeypatch):
    monkeypatch.setattr('basicsr.__version__', '1.5.0')
    monkeypatch.setattr(toolbox, '_repaired', False)
    with pytest.raises(PluginError, match=r'1\.5\.0 is installed: pip install basicsr==1\.4\.2'):
        toolbox.repair_after_import()


def test_registry_falls_back_to_basicsrs_suffix():
    from basicsr.utils.registry import ARCH_REGISTRY, Registry

    registry = Registry('thing')
    registry.register(int, suffix='basicsr')
    assert registry.get('int') is int
    assert ARCH_REGISTRY.get('SRVGGNetCompact').__name__ == 'SRVGGNetCompact'  # released with the suffix
    with pytest.raises(OptionError, match=r'no thing named .float. is registered'):
        registry.get('float')
    with pytest.raises(KeyError):
        registry.get('float')


def resume_options(tmp_path, **path) -> dict:
    return {'auto_resume': not path, 'path': {'training_states': str(tmp_path), 'models': 'models', **path}}


def test_resume_reads_optimizers_and_schedulers(tmp_path):
    from basicsr.models.lr_scheduler import MultiStepRestartLR

    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    state = {
        'iter': 3,
        'epoch': 0,
        'optimizers': [optimizer.state_dict()],
        'schedulers': [MultiStepRestartLR(optimizer, [5, 9]).state_dict()],
    }
    torch.save(state, tmp_path / '3.state')
    got = train.load_resume_state(resume_options(tmp_path))
    assert torch.equal(got['optimizers'][0]['state'][0]['exp_avg'].cpu(), state['optimizers'][0]['state'][0]['exp_avg'])
    assert got['schedulers'] == state['schedulers']


def test_nothing_to_resume(tmp_path):
    assert train.load_resume_state(resume_options(tmp_path)) is None
    assert train.load_resume_state(resume_options(tmp_path / 'missing')) is None
    assert train.load_resume_state({**resume_options(tmp_path), 'auto_resume': False}) is None


class Evil:
    def __reduce__(self):
        return (print, ('code out of a pickle',))


@pytest.mark.parametrize('content', ['missing', 'truncated', 'code', 'weights'])
def test_bad_state_is_named(tmp_path, content, capsys):
    path = tmp_path / '7.state'
    if content != 'missing':
        torch.save({'code': {'iter': Evil()}, 'weights': {'params': {}}}.get(content, {'iter': 7}), path)
    if content == 'truncated':
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r'7\.state'):
        train.load_resume_state(resume_options(tmp_path, resume_state=str(path)))
    assert 'code out of a pickle' not in capsys.readouterr().out


@pytest.mark.parametrize(
    ('name', 'options', 'told'),
    [
        ('AdmaW', {}, 'did you mean AdamW'),
        ('LBFGS', {}, 'LBFGS cannot be used here'),
        ('AdamW', {'moment': 3}, 'moment'),
        ('SGD', {'momentum': -1.0}, 'momentum'),
    ],
)
def test_bad_optimizer(name, options, told):
    from basicsr.models.base_model import BaseModel

    with pytest.raises(OptionError, match=told):
        BaseModel.get_optimizer(None, name, [torch.nn.Parameter(torch.zeros(2))], 1e-3, **options)


WORKER = """
import torch, ast_plugin
from basicsr.models.base_model import BaseModel
from basicsr.utils.dist_util import get_dist_info, init_dist
init_dist('pytorch')
rank, size = get_dist_info()
torch.manual_seed(rank)
model = BaseModel({'num_gpu': 0, 'is_train': True, 'dist': True, 'rank': rank, 'world_size': size})
net = model.model_to_device(torch.nn.Linear(1, 1, bias=False))
net(torch.tensor([[rank + 1.0]])).sum().backward()
mean = model.reduce_loss_dict({'l': torch.tensor(float(rank))})['l']
print(size, net.module.weight.grad.item(), mean if rank == 0 else '')
del net  # gloo's threads, which it holds, would abort the process when they outlive the interpreter
torch.distributed.destroy_process_group()
"""


def test_two_processes_train_together_on_cpus():
    environment = {
        **os.environ,
        'PYTHONPATH': str(ROOT),
        'OMP_NUM_THREADS': '1',
        'CUDA_VISIBLE_DEVICES': '',
        'WORLD_SIZE': '2',
        'MASTER_ADDR': '127.0.0.1',
        'MASTER_PORT': free_port(),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', WORKER],
            env={**environment, 'RANK': rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in '01'
    ]
    try:
        results = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert results[0][0].splitlines()[-1] == '2 1.5 0.5', results
    assert results[1][0].splitlines()[-1].strip() == '2 1.5', results


def test_slurm_starts_on_cpus(monkeypatch):
    from basicsr.utils.dist_util import init_dist

    calls = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda **options: calls.append(options))
    monkeypatch.setattr(subprocess, 'check_output', lambda command, **_: f'first-of-{command[-1]}\nother\n')
    monkeypatch.setattr(
        os,
        'environ',
        {
            'SLURM_PROCID': '3',
            'SLURM_NTASKS': '4',
            'SLURM_NODELIST': 'n[1-2]',
            'SLURM_LOCALID': '1',
            'MASTER_PORT': '1234',
        },
    )
    init_dist('slurm', backend='nccl')
    assert calls == [{'backend': 'gloo'}]
    told = {name: os.environ[name] for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')}
    assert told == {
        'RANK': '3',
        'WORLD_SIZE': '4',
        'LOCAL_RANK': '1',
        'MASTER_ADDR': 'first-of-n[1-2]',
        'MASTER_PORT': '1234',
    }
    init_dist('slurm', port=29501)
    assert os.environ['MASTER_PORT'] == '29501'


def test_cuda_start_is_basicsrs_own(monkeypatch):
    from basicsr.utils import dist_util

    devices = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    monkeypatch.setattr(torch.cuda, 'set_device', devices.append)
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda **options: devices.append(options))
    monkeypatch.setenv('RANK', '6')
    dist_util.init_dist('pytorch')
    assert devices == [2, {'backend': 'nccl'}]


def test_networks_on_cuda_are_wrapped_by_basicsr(monkeypatch):
    from basicsr.models.base_model import BaseModel

    wrapped = []
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 3)
    monkeypatch.setattr(
        'basicsr.models.base_model.DistributedDataParallel', lambda net, **options: wrapped.append(options)
    )
    model = BaseModel({'num_gpu': 1, 'is_train': True, 'dist': True})
    monkeypatch.setattr(torch.nn.Module, 'to', lambda net, device: net)
    model.model_to_device(torch.nn.Linear(1, 1))
    assert wrapped == [{'device_ids': [3], 'find_unused_parameters': False}]


# The like of BasicSR's own tests that need no GPU


def test_registries_are_full():
    from basicsr.utils import registry

    found = {
        name: set(getattr(registry, f'{name}_REGISTRY').keys())
        for name in ('ARCH', 'DATASET', 'LOSS', 'METRIC', 'MODEL')
    }
    assert found['ARCH'] >= {'SwinIR', 'EDSR', 'RCAN', 'MSRResNet', 'RRDBNet', 'RIDNet', 'ECBSR'}
    assert found['DATASET'] >= {'PairedImageDataset', 'SingleImageDataset', 'REDSDataset', 'FFHQDataset'}
    assert found['LOSS'] >= {'L1Loss', 'MSELoss', 'CharbonnierLoss', 'WeightedTVLoss', 'PerceptualLoss', 'GANLoss'}
    assert found['METRIC'] >= {'calculate_psnr', 'calculate_ssim', 'calculate_niqe'}
    assert found['MODEL'] >= {'SRModel', 'SRGANModel', 'VideoBaseModel', 'SwinIRModel'}


@pytest.fixture
def model_options(tmp_path) -> dict:
    for folder in ('models', 'states'):
        (tmp_path / folder).mkdir()
    return {
        'name': 'tiny',
        'model_type': 'SRModel',
        'scale': 1,
        'num_gpu': 0,
        'dist': False,
        'is_train': True,
        'rank': 0,
        'network_g': {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 4, 'num_block': 1, 'upscale': 1},
        'path': {'models': str(tmp_path / 'models'), 'training_states': str(tmp_path / 'states')},
        'train': {
            'ema_decay': 0.9,
            'optim_g': {'type': 'AdamW', 'lr': 1e-2},
            'pixel_opt': {'type': 'L1Loss'},
            'scheduler': {'type': 'CosineAnnealingRestartLR', 'periods': [1], 'eta_min': 1e-4},
        },
    }


def test_srmodel_trains_and_resumes_on_cpu(model_options, tmp_path):
    from basicsr.models import build_model

    model = build_model(model_options)
    model.feed_data({'lq': torch.rand(2, 3, 8, 8), 'gt': torch.rand(2, 3, 8, 8)})
    losses = []
    for iteration in range(1, 5):  # beyond the end of the schedule
        model.update_learning_rate(iteration)
        model.optimize_parameters(iteration)
        losses.append(model.get_current_log()['l_pix'])
    assert losses[-1] < losses[0]
    assert model.get_current_learning_rate() == [1e-4]
    model.save(0, 4)

    model_options['auto_resume'] = True
    state = train.load_resume_state(model_options)
    again = build_model(model_options)
    again.resume_training(state)
    assert Path(model_options['path']['pretrain_network_g']) == tmp_path / 'models' / 'net_g_4.pth'
    assert again.get_current_learning_rate() == [1e-4]
    for got, want in zip(again.net_g.parameters(), model.net_g.parameters(), strict=True):
        assert torch.equal(got, want)


@pytest.fixture
def pairs(tmp_path) -> tuple[Path, Path]:
    """Two folders with three pictures each."""
    generator = np.random.default_rng(0)
    folders = tmp_path / 'lq', tmp_path / 'gt'
    for folder in folders:
        folder.mkdir()
        for name in 'abc':
            cv2.imwrite(str(folder / f'{name}.png'), generator.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    return folders


@pytest.mark.parametrize('backend', ['disk', 'lmdb'])
def test_paired_image_dataset_reads(pairs, backend):
    from basicsr.data import build_dataset
    from basicsr.utils.lmdb_util import make_lmdb_from_imgs

    roots = [str(folder) for folder in pairs]
    if backend == 'lmdb':
        for root in roots:
            keys = sorted(path.stem for path in Path(root).glob('*.png'))
            make_lmdb_from_imgs(root, f'{root}.lmdb', [f'{key}.png' for key in keys], keys)
        roots = [f'{root}.lmdb' for root in roots]
    dataset = build_dataset(
        {
            'name': 'pairs',
            'type': 'PairedImageDataset',
            'phase': 'train',
            'scale': 1,
            'gt_size': 16,
            'use_hflip': True,
            'use_rot': True,
            'dataroot_lq': roots[0],
            'dataroot_gt': roots[1],
            'io_backend': {'type': backend},
        }
    )
    assert len(dataset) == 3
    assert dataset[1]['lq'].shape == dataset[1]['gt'].shape == (3, 16, 16)
