import argparse
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ast_plugin  # noqa: F401  registers everything
from ast_plugin.archs.ast_arch import AST
from ast_plugin.compare import benchmark_training
from ast_plugin.compare.benchmark_training import SWITCHES, Settings, measure, prepare_step, table
from ast_plugin.errors import OptionError

ROOT = Path(__file__).parents[2]
START = {}
TINY = Settings('TinyAST', batch=2, size=16, iters=3, device='cpu')


@pytest.fixture(autouse=True)
def _tiny_network(monkeypatch):
    from basicsr.utils.registry import ARCH_REGISTRY

    build = functools.partial(AST, img_size=16, embed_dim=4, depths=[1] * 9, num_heads=[1] * 9)
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'TinyAST', build)


def arguments(*words):
    parser = argparse.ArgumentParser()
    benchmark_training.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize('name', SWITCHES)
def test_every_switch_makes_steps(name, monkeypatch):
    seen = []
    monkeypatch.setattr('ast_plugin.models.network_switches.DEFAULT_BACKEND', 'eager')
    monkeypatch.setattr('torch.optim.AdamW.step', _recorded(torch.optim.AdamW.step, seen))
    step = prepare_step(TINY, SWITCHES[name])
    step(1)
    step(2)
    assert len(seen) == 2
    assert torch.equal(seen[0], START.setdefault('weights', seen[0])), 'all start from the same weights'
    assert not torch.equal(seen[1], seen[0])


def _recorded(original, seen):
    @functools.wraps(original)
    def step(self, *args, **kwargs):
        seen.append(torch.cat([p.detach().flatten().clone() for p in self.param_groups[0]['params']]))
        return original(self, *args, **kwargs)

    return step


def test_switches_take_turns_and_one_that_fails_is_a_line(monkeypatch):
    order = []

    def prepared(settings, train):
        if train.get('precision') == 'fp16':
            raise OptionError('not here\nat all')
        return lambda iteration: order.append((train.get('precision', 'fp32'), iteration))

    monkeypatch.setattr(benchmark_training, 'prepare_step', prepared)
    monkeypatch.setattr(benchmark_training, '_peak_bytes', lambda settings, train: (2**20, None))
    lines = measure(TINY, {name: SWITCHES[name] for name in ('fp32', 'fp16', 'bf16')}, lambda text: None)
    assert order[4:] == [(name, turn) for turn in (3, 4, 5) for name in ('fp32', 'bf16')]
    assert [line.get('failed') for line in lines] == [None, 'OptionError: not here', None]
    assert all(len(line['seconds']) == 3 and line['iterations_per_second'] > 0 for line in lines[::2])


def test_table():
    lines = [
        {'switch': 'fp32', 'iterations_per_second': 2.0, 'peak_bytes': 100 * 2**20},
        {'switch': 'bf16', 'iterations_per_second': 3.0, 'peak_bytes': 60 * 2**20},
        {'switch': 'fp16', 'failed': 'OptionError: no', 'peak_bytes': 1},
        {'switch': 'fused', 'iterations_per_second': 2.5, 'peak_bytes': None},
    ]
    rows = table({'cpu': lines, 'cuda': None}).splitlines()
    assert rows[0] == '| switch | CPU it/s | × | CPU peak MB | × | CUDA it/s | × | CUDA peak MB | × |'
    assert [re.sub(' +', ' ', row) for row in rows[2:]] == [
        '| fp32 | 2.000 | 1.00 | 100 | 1.00 | | | | |',
        '| bf16 | 3.000 | 1.50 | 60 | 0.60 | | | | |',
        '| fp16 | does not work here | | | | | | | |',
        '| fused | 2.500 | 1.25 | | | | | | |',
    ]


def test_memory_of_a_process_grows_by_what_a_step_needs(monkeypatch):
    if not Path('/proc/self/status').exists():
        pytest.skip('only Linux tells')
    # More than an allocator keeps back, so that what earlier tests have freed cannot serve.
    monkeypatch.setattr(benchmark_training, 'prepare_step', lambda settings, train: lambda _: bytearray(b'x' * 2**27))
    assert benchmark_training._resident_growth(TINY, {}) > 2**26


def test_wrong_arguments(monkeypatch):
    with pytest.raises(OptionError, match='1 or more'):
        benchmark_training.run(arguments('--iters', '0'))
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    with pytest.raises(OptionError, match='finds no GPU'):
        benchmark_training.run(arguments('--device', 'cuda'))


def test_the_command_prints_a_table_and_writes_a_record(tmp_path):
    file = tmp_path / 'records' / 'train.json'
    words = ['train', '--net', 'AST_XS', '--size', '16', '--batch', '1', '--iters', '1', '--switches', 'fp32', '--json']
    result = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'benchmark.py', *words, file],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={'PATH': '/usr/bin:/bin', 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert '| fp32 | ' in result.stdout
    assert 'CUDA: AST_B, batch 8 of 256²: not measured, no GPU is at hand' in result.stdout
    record = json.loads(file.read_text())
    assert record['results']['cuda'] is None
    assert record['results']['cpu'][0]['peak_bytes'] > 10 * 2**20
    assert record['versions']['torch'] == torch.__version__
    assert record['machine']['threads'] == 1


def test_records_of_the_project_can_be_read():
    for file in (ROOT / 'benchmarks').glob('train*.json'):
        record = json.loads(file.read_text())
        assert table(record['results']).startswith('| switch |')
        assert {line['switch'] for line in record['results']['cpu']} <= set(SWITCHES)
