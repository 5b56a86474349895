"""Tests that a run killed at random moments ends with the same bits as an undisturbed run."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ast_plugin.checkpoints import read_state

NUM_KILLS = 8
ROOT = Path(__file__).parents[2]


def assert_same(a, b, where=''):
    """Assert bitwise equality of two training states or parts of them."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f'{where}.{key}')
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, f'{where}.{number}')
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


def losses(folder: Path) -> dict[int, set[str]]:
    """Return every loss that was computed for an iteration, including attempts that were killed."""
    found = {}
    for line in (folder / 'losses').read_text().splitlines():
        iteration, *values = line.split()
        found.setdefault(int(iteration), set()).add(' '.join(values))
    return found


@pytest.mark.parametrize('num_workers', ['0', '2'])
def test_killed_run_ends_like_an_undisturbed_one(tmp_path, num_workers):
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name('killed_runs.py')), tmp_path, str(NUM_KILLS), num_workers],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    report, folder = json.loads(result.stdout.splitlines()[-1]), tmp_path
    output = (folder / 'killed' / 'output').read_text()
    assert report['whole'] == report['last'] == 0, output[-3000:]
    assert [status for *_, status in report['kills']] == [-9] * NUM_KILLS, output[-3000:]
    assert report['stops'] == [128 + signal.SIGTERM, 128 + signal.SIGINT], output[-3000:]
    stops = re.findall(r'basicsr: stopped by (SIG\w+), saved after iteration (\d+); resume with: (.*)', output)
    assert [name for name, *_ in stops] == ['SIGTERM', 'SIGINT']
    for _, iteration, command in stops:
        assert re.search(rf'Resuming training from epoch: \d+, iter: {iteration}\.', output)
        assert command.startswith('basicsr train -opt run.yml --root ') and command.endswith(' --auto_resume')
    # Workers of a killed run may print tracebacks before they exit.
    assert num_workers != '0' or 'Traceback' not in output
    # The kills are distributed over the run.
    assert len(set(re.findall('Resuming training from epoch: .*', output))) >= 4

    whole, killed = (folder / name / 'experiments' / 'run' for name in ('whole', 'killed'))
    last = [read_state(run / 'training_states' / '40.state') for run in (whole, killed)]
    assert {'params', 'params_ema', 'optimizers', 'best_metric_results', 'random'} <= last[0].keys()
    assert_same(*last)
    for name in ('net_g_40.pth', 'net_g_latest.pth', 'net_g_best.pth'):
        assert_same(*(torch.load(run / 'models' / name, weights_only=True) for run in (whole, killed)))
    assert (whole / 'metrics.csv').read_bytes() == (killed / 'metrics.csv').read_bytes()
    assert losses(folder / 'killed') == losses(folder / 'whole')
    assert sorted(losses(folder / 'whole')) == list(range(1, 41))
    for run in (whole, killed):
        names = sorted(path.name for kind in ('models', 'training_states') for path in (run / kind).iterdir())
        best = ['net_g_best.pth', 'net_g_best.safetensors']
        assert names == ['35.state', '40.state', 'net_g_35.pth', 'net_g_40.pth', *best, 'net_g_latest.pth']
