"""Tests of device selection on simulated CUDA and MPS machines, and of its use by every command."""

import platform
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import ast_plugin  # noqa: F401 (before BasicSR)
from ast_plugin import devices, options
from ast_plugin.cli.main import main
from ast_plugin.devices import (
    describe_device,
    find_device,
    keep_freed_memory,
    present_devices,
    return_freed_memory,
    wait_for,
    widest_dtype,
)
from ast_plugin.errors import OptionError
from ast_plugin.evaluation import cost, tiling
from ast_plugin.models import preflight
from tests import tiny_run
from tests.options.test_runs import OPT

CPU, ONE, FOUR, APPLE = (0, False), (1, False), (4, False), (0, True)


@pytest.fixture
def machine(monkeypatch):
    """Simulate a machine with a number of CUDA GPUs, with or without MPS; test tensors are on the CPU."""

    def play(count, has_mps):
        zeros = torch.zeros

        def zeros_there(*size, device, **options):
            there = {'cuda': count, 'mps': has_mps, 'cpu': 1}.get(device.type, 0)
            if (device.index or 0) >= there:
                raise RuntimeError(f'no {device}')
            return zeros(*size, **options)

        monkeypatch.setattr(torch.cuda, 'is_available', lambda: count > 0)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: has_mps)
        monkeypatch.setattr(devices, 'torch', SimpleNamespace(**{**vars(torch), 'zeros': zeros_there}))

    return play


@pytest.mark.parametrize(
    ('what', 'present'),
    [
        (CPU, ['cpu']),
        (ONE, ['cuda', 'cpu']),
        (FOUR, ['cuda:0', 'cuda:1', 'cuda:2', 'cuda:3', 'cpu']),
        (APPLE, ['mps', 'cpu']),
        ((1, True), ['cuda', 'mps', 'cpu']),
    ],
)
def test_auto_takes_the_first_present(machine, what, present):
    machine(*what)
    assert present_devices() == present
    assert find_device() == find_device('auto') == find_device(None) == torch.device(present[0])
    assert [str(find_device(name)) for name in present] == present


@pytest.mark.parametrize(
    ('what', 'name', 'present'),
    [
        (CPU, 'mps', 'cpu'),
        (FOUR, 'cuda:4', 'cuda:0, cuda:1, cuda:2, cuda:3, cpu'),
        (APPLE, 'cuda', 'mps, cpu'),
        (CPU, 'nonsense', 'cpu'),
        (CPU, '', 'cpu'),
    ],
)
def test_absent_device_is_rejected(machine, what, name, present):
    machine(*what)
    with pytest.raises(OptionError, match=re.escape(f'device {name} is not available; available devices: {present} (')):
        find_device(name)


@pytest.mark.parametrize('name', ['cuda:99', 'meta'])
def test_absent_device_is_rejected_unplayed(name):
    with pytest.raises(OptionError, match=f'{name} is not available; available devices: .*cpu'):
        find_device(name)


@pytest.mark.parametrize(
    ('what', 'given', 'chosen'),
    [
        (CPU, {}, ('cpu', 0)),
        (FOUR, {}, ('cuda', 4)),
        (APPLE, {}, ('mps', 0)),
        (FOUR, {'num_gpu': 0}, ('cpu', 0)),
        (FOUR, {'device': 'cpu', 'num_gpu': 2}, ('cpu', 0)),
        (FOUR, {'device': 'cuda', 'num_gpu': 0}, ('cuda', 4)),
        (FOUR, {'device': 'cuda', 'num_gpu': 3}, ('cuda', 3)),
        (APPLE, {'device': 'auto', 'num_gpu': 'auto'}, ('mps', 0)),
        (CPU, {'num_gpu': 2}, ('cuda', 2)),  # rejected by preflight
    ],
)
def test_run_takes_its_device(machine, what, given, chosen):
    machine(*what)
    opt = {key: value for key, value in OPT.items() if key != 'num_gpu'} | given
    prepared = options.prepare(opt)
    assert (prepared['device'], prepared['num_gpu']) == chosen
    with pytest.raises(OptionError, match='available devices: '):
        options.prepare({**opt, 'device': 'mps' if not what[1] else 'cuda'})


def test_mps_is_one_process():
    with pytest.raises(OptionError, match='device: mps supports one process only'):
        preflight._check_device({'num_gpu': 0, 'device': 'mps', 'dist': True}, 'o.yml')


def test_mps_batch_is_tried_whole():
    opt = {'num_gpu': 0, 'device': 'mps', 'dist': False, 'datasets': {'train': {'batch_size_per_gpu': 6}}, 'train': {}}
    assert preflight._num_tried(opt) == 6 and preflight._num_tried({**opt, 'device': 'cpu'}) == 2


def test_float64_is_float32_on_mps():
    assert widest_dtype(torch.float64, torch.device('mps')) == torch.float32
    assert widest_dtype(torch.float64, torch.device('cpu')) == torch.float64
    assert widest_dtype(torch.bfloat16, torch.device('mps')) == torch.bfloat16


@pytest.mark.parametrize('tile', [8, 'auto'])
def test_tiles_have_the_device_s_dtype(monkeypatch, tile):
    monkeypatch.setattr(tiling, 'widest_dtype', lambda dtype, device: torch.float32)
    monkeypatch.setattr(tiling, 'available_bytes', lambda device: 2**20)
    seen = set()

    def network(image):
        seen.add(image.dtype)
        return image

    image = torch.rand(1, 3, 20, 12, dtype=torch.float64)
    restored = tiling.Tiling(tile).run(network, image)
    assert seen == {torch.float32} and restored.dtype == torch.float64
    torch.testing.assert_close(restored, image, rtol=0, atol=1e-6)


def test_memory_of_mps_is_the_machine_s(monkeypatch):
    monkeypatch.setattr(torch.mps, 'recommended_max_memory', lambda: 3000)
    monkeypatch.setattr(torch.mps, 'driver_allocated_memory', lambda: 1000)
    assert cost.available_bytes(torch.device('mps')) == 2000
    assert cost.available_bytes(torch.device('cpu')) > 2000


def test_waiting_and_naming(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.mps, 'synchronize', lambda: waited.append('mps'))
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: waited.append('cuda'))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'H100')
    names = [torch.device(name) for name in ('cpu', 'mps', 'cuda')]
    for device in names:
        wait_for(device)
    assert waited == ['mps', 'cuda'] and [describe_device(each) for each in names] == ['cpu', 'mps', 'cuda (H100)']


@pytest.mark.parametrize(
    'command',
    [
        'train -opt tiny.yml',
        'test -opt tiny.yml --weights w.pth',
        'check -opt tiny.yml',
        'compare -opt compare/quick',
        'info -opt AST_quickstart',
        'mix -opt mix/SwinIR_ASSA_FRFN',
        'infer -i data/lq -o out --task rain',
    ],
)
def test_every_command_refuses_an_absent_device(machine, tmp_path, monkeypatch, capfd, command):
    machine(*CPU)
    tiny_run.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main([*command.split(), '--device', 'mps']) == 2
    assert 'device mps is not available; available devices: cpu (' in capfd.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_unknown_device_of_a_file_is_rejected(tmp_path, monkeypatch, capfd):
    tiny_run.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(['check', '-opt', 'tiny.yml', '--device', 'gpu']) == 2
    assert "device: expected 'auto', 'cpu', 'cuda' or 'mps', got the text 'gpu'" in capfd.readouterr().err


def test_demo_hands_the_device_on(monkeypatch, tmp_path, capsys):
    commands, results = [], tmp_path / 'results' / 'AST_quickstart'
    results.mkdir(parents=True)
    (results / 'unseen.csv').write_text('image,input psnr,psnr\na,20,24\nmean,20,23.5\n')

    def run(command, check):
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr('subprocess.run', run)
    assert main(['demo', '--device', 'cpu', '--root', str(tmp_path)]) == 0
    assert [command[-2:] for command in commands] == [['--device', 'cpu']] * 2
    assert f'{results}/unseen_worst_and_best.png\nPSNR gain over input: +3.50 dB\n' in capsys.readouterr().out
    monkeypatch.setattr('subprocess.run', lambda *_, **__: SimpleNamespace(returncode=3))
    assert main(['demo', '--root', str(tmp_path)]) == 3


_MEMORY = """
import resource, torch
from ast_plugin.devices import keep_freed_memory
from ast_plugin.evaluation.cost import available_bytes

def pages():
    for turn in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = bytearray(2**26)
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open('/proc/self/statm').read().split()[1]) * 4096

print(pages())
keep_freed_memory()
print(pages())
available_bytes(torch.device('cpu'))
before = resident()
blocks = [bytearray(2**20) for _ in range(200)]
last = bytearray(1000)
del blocks
print(resident() - before)
available_bytes(torch.device('cpu'))
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != 'linux' or not platform.libc_ver()[0], reason='glibc alone is told')
def test_freed_memory_is_kept_and_counts_as_free():
    lines = subprocess.check_output([sys.executable, '-c', _MEMORY], text=True).split()
    new_pages, kept_pages, kept, returned = map(int, lines)
    assert new_pages > 10_000 and kept_pages < 1000
    assert kept > 150 * 2**20 and returned < 50 * 2**20


def test_freed_memory_elsewhere(monkeypatch):
    monkeypatch.setattr(devices.ctypes, 'CDLL', lambda name: SimpleNamespace())
    keep_freed_memory()
    return_freed_memory()
