"""Tests that each repair of BasicSR is needed and fixes its fault."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ast_plugin import toolbox

# isort: split
import torch
from basicsr import train
from basicsr.models.base_model import BaseModel
from basicsr.utils import dist_util, registry

from ast_plugin.errors import CheckpointError, OptionError, PluginError
from ast_plugin.toolbox.repairs import REPAIRS

ROOT = Path(__file__).parents[1]
BEFORE_IMPORT = [toolbox.define_torchvision_operators, toolbox.provide_functional_tensor]


@pytest.fixture(scope='module')
def faults(tmp_path_factory) -> dict:
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = str(server.getsockname()[1])
    program = Path(__file__).with_name('basicsr_faults.py')
    command = [sys.executable, str(program), port, str(tmp_path_factory.mktemp('faults'))]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize('repair', [*BEFORE_IMPORT, *REPAIRS], ids=lambda repair: repair.__name__)
def test_repair_fixes_its_fault(faults, repair):
    assert faults[repair.__name__] == {'before': False, 'after': True}
    assert 'Fault: ' in repair.__doc__


def test_unneeded_modules_are_deferred():
    program = """
import sys, numpy, ast_plugin, basicsr
print(*sorted({'torch._dynamo', 'torch._dynamo.utils', 'scipy.stats', 'sympy'} & set(sys.modules)), sep=',')
from basicsr.data import degradations
table = degradations.cdf2(numpy.eye(2), numpy.zeros((1, 1, 2)))
import scipy.stats, torchvision
print(float(table), scipy.stats.norm.cdf(0), type(scipy.stats).__name__)
supported = torchvision.ops.roi_align.__globals__['is_compile_supported']
print(supported('cpu'), supported('meta'), type(sys.modules['torch._dynamo.utils']).__name__)
"""
    result = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    deferred, distribution, compiler = result.stdout.splitlines()
    assert deferred == '' and distribution == '0.25 0.5 module'
    assert compiler == 'True False module'


def test_repairing_again_changes_nothing():
    before = BaseModel.model_to_device, train.init_tb_loggers, train.CPUPrefetcher
    toolbox.repair_after_import()
    assert before == (BaseModel.model_to_device, train.init_tb_loggers, train.CPUPrefetcher)


def test_other_basicsr_version_is_rejected(monkeypatch):
    monkeypatch.setattr('basicsr.__version__', '1.5.0')
    monkeypatch.setattr(toolbox, '_repaired', False)
    with pytest.raises(PluginError, match=r'1\.5\.0 is installed: pip install basicsr==1\.4\.2'):
        toolbox.repair_after_import()


def test_registry_falls_back_to_basicsrs_suffix():
    things = registry.Registry('thing')
    things.register(int, suffix='basicsr')
    assert things.get('int') is int
    assert registry.ARCH_REGISTRY.get('SRVGGNetCompact').__name__ == 'SRVGGNetCompact'  # released with the suffix
    with pytest.raises(OptionError, match=r'no thing named .float. is registered'):
        things.get('float')
    with pytest.raises(KeyError):
        things.get('float')


def test_nothing_to_resume(tmp_path):
    path = {'training_states': str(tmp_path), 'models': 'models'}
    for auto_resume in (True, False):
        assert train.load_resume_state({'auto_resume': auto_resume, 'path': path}) is None
    with pytest.raises(CheckpointError, match=r'7\.state'):
        train.load_resume_state({'auto_resume': False, 'path': {**path, 'resume_state': str(tmp_path / '7.state')}})


def test_slurm_starts_on_cpus(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda **options: calls.append(options))
    monkeypatch.setattr(subprocess, 'check_output', lambda command, **_: f'first-of-{command[-1]}\nother\n')
    slurm = {'SLURM_PROCID': '3', 'SLURM_NTASKS': '4', 'SLURM_NODELIST': 'n[1-2]', 'SLURM_LOCALID': '1'}
    monkeypatch.setattr(os, 'environ', {**slurm, 'MASTER_PORT': '1234'})
    dist_util.init_dist('slurm', backend='nccl')
    assert calls == [{'backend': 'gloo'}]
    told = {'RANK': '3', 'WORLD_SIZE': '4', 'LOCAL_RANK': '1', 'MASTER_ADDR': 'first-of-n[1-2]', 'MASTER_PORT': '1234'}
    assert os.environ == {**slurm, **told}
    dist_util.init_dist('slurm', port=29501)
    assert os.environ['MASTER_PORT'] == '29501'


def test_cuda_start_is_basicsrs_own(monkeypatch):
    devices = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    monkeypatch.setattr(torch.cuda, 'set_device', devices.append)
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda **options: devices.append(options))
    monkeypatch.setenv('RANK', '6')
    dist_util.init_dist('pytorch')
    assert devices == [2, {'backend': 'nccl'}]


def test_networks_on_cuda_are_wrapped_by_basicsr(monkeypatch):
    wrapped = []
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 3)
    monkeypatch.setattr(
        'basicsr.models.base_model.DistributedDataParallel', lambda net, **options: wrapped.append(options)
    )
    model = BaseModel({'num_gpu': 1, 'is_train': True, 'dist': True})
    monkeypatch.setattr(torch.nn.Module, 'to', lambda net, device: net)
    model.model_to_device(torch.nn.Linear(1, 1))
    assert wrapped == [{'device_ids': [3], 'find_unused_parameters': False}]
