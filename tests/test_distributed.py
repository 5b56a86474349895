"""Tests of distributed runs: results equal those of one process, and a failure ends all processes."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests import tiny_run

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
NUMBERS = {'atol': 1e-12, 'rtol': 1e-9}  # float64, different order of summation


def start(count: int, *command: str, cwd: Path, **environment: str) -> list[subprocess.Popen]:
    """Start the processes of a run with the environment of torchrun, but without torchrun."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = str(server.getsockname()[1])
    everyones = {
        **os.environ,
        **ENVIRONMENT,
        'MASTER_ADDR': '127.0.0.1',
        'MASTER_PORT': port,
        'WORLD_SIZE': str(count),
        **environment,
    }
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**everyones, 'RANK': str(rank), 'LOCAL_RANK': str(rank)},
        )
        for rank in range(count)
    ]


def finish(started: list[subprocess.Popen], timeout: float = 600) -> list[tuple[int, str, str]]:
    """Return exit status, output and errors of each process."""
    results = []
    for process in started:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            for other in started:
                other.kill()
            raise
        results.append((process.returncode, output, errors))
    return results


@pytest.fixture(scope='module')
def runs(tmp_path_factory) -> dict[int, tuple[Path, list[dict]]]:
    """Train with one and with two processes; return, by their number, the folder and the report of each process."""
    found = {}
    folders = {count: tmp_path_factory.mktemp(f'by_{count}') for count in (1, 2)}
    for count, folder in folders.items():
        results = finish(start(count, str(ROOT / 'tests' / 'processes.py'), str(folder), cwd=ROOT))
        assert [status for status, _, _ in results] == [0] * count, results
        reports = [json.loads((folder / f'report_{rank}.json').read_text()) for rank in range(count)]
        found[count] = folder, reports
    return found


def test_two_processes_learn_as_one(runs):
    """Both use micro-batches of the same total batch."""
    one, two = (torch.load(folder / 'weights.pth', weights_only=True) for folder, _ in runs.values())
    assert one.keys() == two.keys() == {'params', 'params_ema'}
    for key in one:
        for name, weight in one[key].items():
            assert weight.dtype == torch.float64 or not weight.is_floating_point()
            torch.testing.assert_close(two[key][name], weight, **NUMBERS)
    assert any(not torch.equal(one['params'][name], one['params_ema'][name]) for name in one['params'])  # it differs


def test_two_processes_stop_together(runs):
    for report in runs[2][1]:
        assert report['nan'] == ['left out', 'iteration 1: the loss l_pix is nan; images: 1.png, 1.png']


def test_losses_in_the_log_are_means(runs):
    logs = []
    for folder, _ in runs.values():
        with (folder / 'metrics.csv').open() as file:
            logs.append([float(row['l_pix']) for row in csv.DictReader(file) if row['l_pix']])
    assert len(logs[0]) == 4
    np.testing.assert_allclose(logs[0], logs[1], rtol=1e-9)


def test_validation_is_shared(runs):
    (folder_one, (one,)), (folder_two, two) = runs.values()
    assert two[0]['read'] == [0, 2, 4] and two[1]['read'] == [1, 3]
    for report in two:
        assert report['names'] == one['names'] == ['one', 'one_2', 'three', 'one_3', 'five']
        assert report['values'] == one['values']
        assert report['inputs'] == one['inputs']
        assert report['best'] == one['best']
    assert two[0]['shown'] == one['shown'] == ['pairs/one', 'pairs/one_2', 'pairs/three']
    assert len(set(one['values'])) == 5
    pictures = [
        {path.name: path.read_bytes() for path in (folder / 'visualization').rglob('*.png')}
        for folder in (folder_one, folder_two)
    ]
    assert pictures[0] == pictures[1]
    assert pictures[0].keys() == {f'{name}_4.png' for name in one['names']}
    assert (folder_two / 'models' / 'net_g_best.safetensors').is_file()


def write_run(folder: Path, **changes) -> None:
    """Write the tiny run with RestorationModel, an odd number of training pairs, and changes of the training set."""
    file = tiny_run.write(folder)
    for kind in ('lq', 'gt'):
        (folder / 'data' / kind / '3.png').unlink()
    opt = yaml.safe_load(file.read_text(encoding='utf-8'))
    opt['model_type'] = 'RestorationModel'
    opt['logger']['use_tb_logger'] = True
    opt['datasets']['train'].update(changes)
    file.write_text(yaml.safe_dump(opt), encoding='utf-8')


def test_torchrun_trains_on_cpus(tmp_path):
    write_run(tmp_path)
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    result = subprocess.run(
        [*torchrun, '-m', 'ast_plugin', 'train', '-opt', 'tiny.yml', '--launcher', 'pytorch'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **ENVIRONMENT},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    experiment = tmp_path / 'experiments' / 'tiny'
    models = {'net_g_2.pth', 'net_g_4.pth', 'net_g_latest.pth', 'net_g_best.pth', 'net_g_best.safetensors'}
    assert {path.name for path in (experiment / 'models').iterdir()} == models
    assert {path.name for path in (experiment / 'training_states').iterdir()} >= {'2.state', '4.state'}
    rows = list(csv.reader((experiment / 'metrics.csv').read_text().splitlines()))
    assert [row[0] for row in rows] == ['iter', '1', '2', '2', '3', '4', '4']
    assert (experiment / 'curve.png').is_file()
    assert list((tmp_path / 'tb_logger' / 'tiny').iterdir())
    assert result.stderr.count('Start training from epoch: 0') == 1  # only the first process logs
    assert 'eta: 0:00:00' in result.stderr and 'day' not in result.stderr
    assert 'UserWarning' not in result.stderr


FAILS_IN_ONE = """\
import os, sys
import ast_plugin
from basicsr.utils.registry import DATASET_REGISTRY
from ast_plugin.cli.main import main
from ast_plugin.data.pairs_dataset import PairsDataset
from ast_plugin.errors import DataError

@DATASET_REGISTRY.register()
class FailsInOne(PairsDataset):
    reads = 0
    def __getitem__(self, index):
        FailsInOne.reads += 1
        if os.environ['RANK'] == os.environ['FAILS'] and FailsInOne.reads > 4:
            if os.environ['HOW'] == 'killed':
                os.kill(os.getpid(), 9)
            raise DataError('2.png cannot be read')
        return super().__getitem__(index)

sys.exit(main(['train', '-opt', 'tiny.yml', '--launcher', 'pytorch']))
"""


@pytest.mark.parametrize('how', ['error', 'killed'])
def test_failure_of_one_is_reported_once(tmp_path, how):
    write_run(tmp_path, type='FailsInOne')
    first, second = finish(start(2, '-c', FAILS_IN_ONE, cwd=tmp_path, FAILS='1', HOW=how))
    assert first[0] == 2, first[2]
    told = [line for _, _, errors in (first, second) for line in errors.splitlines() if 'basicsr: error' in line]
    if how == 'error':
        assert second[0] == 2
        saved = 'Iteration 1 is saved; fix the cause, resume with --auto_resume'
        assert told == [f'basicsr: error: [rank 1] 2.png cannot be read. {saved}']
        state = torch.load(tmp_path / 'experiments/tiny/training_states/1.state', weights_only=True)
        assert state['iter'] == 1 and len(state['random']) == 2
    else:
        assert second[0] == -9
        assert len(told) == 1 and told[0].startswith('basicsr: error: [rank 0] another process of this run is gone')
    assert 'Traceback' not in first[2] + second[2]
