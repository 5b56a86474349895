"""Startup time of `basicsr train` until the end of the first iteration, compared with BasicSR's own training.

  python tools/benchmark.py start
  python tools/benchmark.py start --turns 5 --json benchmarks/start_cpu.json

Both train the same small network on the same pairs of PNG files and batches; `basicsr train` also validates options and
data. They alternate in new processes and are measured in wall-clock and CPU time, as are the imports of torch and
BasicSR alone. The process of BasicSR's training imports the plugin first, because BasicSR itself cannot be imported
with torchvision newer than 0.16.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ast_plugin.errors import OptionError
from benchmarks import records
from benchmarks.data import write_pairs
from benchmarks.records import Line, say

_FIRST_ITERATION = 'iter:       1,'
_THEIRS = 'import ast_plugin; from basicsr.train import train_pipeline; train_pipeline({root!r})'


def options(folder: Path, is_ours: bool, workers: int) -> dict[str, Any]:
    """Return options of a short training on the pairs in `folder`, for BasicSR's classes or the plugin's."""
    theirs = {'use_shuffle': True, 'dataset_enlarge_ratio': 1, 'prefetch_mode': None}
    return {
        'name': 'start',
        'model_type': 'RestorationModel' if is_ours else 'SRModel',
        'scale': 1,
        'num_gpu': 0,
        'manual_seed': 0,
        'datasets': {
            'train': {
                'name': 'pairs',
                'type': 'PairsDataset' if is_ours else 'PairedImageDataset',
                'dataroot_lq': str(folder / 'lq'),
                'dataroot_gt': str(folder / 'gt'),
                'io_backend': {'type': 'disk'},
                'gt_size': 64,
                'use_hflip': True,
                'use_rot': True,
                'num_worker_per_gpu': workers,
                'batch_size_per_gpu': 4,
                **({} if is_ours else theirs),
            }
        },
        'network_g': {'type': 'MSRResNet', 'num_feat': 16, 'num_block': 2, 'upscale': 1},
        'path': {'pretrain_network_g': None, 'strict_load_g': True, 'resume_state': None},
        'train': {
            'total_iter': 1,
            'optim_g': {'type': 'Adam', 'lr': 0.0001},
            'scheduler': {'type': 'MultiStepLR', 'milestones': [100], 'gamma': 0.5},
            'pixel_opt': {'type': 'L1Loss'},
            **({} if is_ours else {'warmup_iter': -1}),
        },
        'logger': {'print_freq': 1, 'save_checkpoint_freq': 1000, 'use_tb_logger': False},
    }


def commands(folder: Path, workers: int) -> dict[str, list[str]]:
    """Write the option files and return the commands to measure, by name."""
    for name in ('ours', 'theirs'):
        content = yaml.safe_dump(options(folder, name == 'ours', workers), sort_keys=False)
        (folder / f'{name}.yml').write_text(content, encoding='utf-8')
    python, ours, theirs = sys.executable, str(folder / 'ours.yml'), str(folder / 'theirs.yml')
    return {
        'import torch': [python, '-c', 'import torch'],
        'import basicsr': [python, '-c', 'import ast_plugin, basicsr'],
        'BasicSR, first iteration': [python, '-c', _THEIRS.format(root=str(folder)), '-opt', theirs],
        'basicsr train, first iteration': [python, '-m', 'ast_plugin', 'train', '-opt', ours],
    }


def measure(started: dict[str, list[str]], folder: Path, turns: int) -> list[Line]:
    """Run each command `turns` times without existing experiments; return rows with `seconds` and `cpu_seconds`."""
    lines: dict[str, Line] = {name: {'what': name, 'seconds': [], 'cpu_seconds': []} for name in started}
    for turn in range(turns):
        say(f'turn {turn + 1} of {turns}')
        for name, command in started.items():
            shutil.rmtree(folder / 'experiments', ignore_errors=True)
            seconds, cpu = _first_iteration(command, folder, is_training='iteration' in name)
            lines[name]['seconds'].append(round(seconds, 3))
            lines[name]['cpu_seconds'].append(round(cpu, 3))
    return list(lines.values())


def _first_iteration(command: Sequence[str], folder: Path, is_training: bool) -> tuple[float, float]:
    """Return seconds until the first iteration is logged, else until exit, and the CPU time until exit."""
    path = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, [os.environ.get('PYTHONPATH')])])
    before, start, found, said = os.times(), time.perf_counter(), None, []
    with subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, 'PYTHONPATH': path, 'PYTHONUNBUFFERED': '1'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout:
            said.append(line)
            if found is None and _FIRST_ITERATION in line:
                found = time.perf_counter() - start
    if process.returncode or (is_training and found is None):
        raise OptionError(f'{" ".join(command[:4])} ended with {process.returncode}: {"".join(said[-5:])}')
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return found or time.perf_counter() - start, cpu


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `benchmark.py start`."""
    records.add_count(parser, '--turns', 5, 'runs of each command')
    records.add_count(parser, '--workers', 0, 'DataLoader worker processes', smallest=0)
    records.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write the record."""
    with tempfile.TemporaryDirectory(prefix='basicsr_benchmark_') as name:
        folder = Path(name)
        write_pairs(folder, 48, 256)
        lines = measure(commands(folder, args.workers), folder, args.turns)
    rows = [
        [line['what'], *(f'{statistics.median(line[clock]):.2f} s' for clock in ('seconds', 'cpu_seconds'))]
        for line in lines
    ]
    print(records.markdown(['command', 'median', 'CPU time until exit'], rows))
    records.write(args.json, 'start', {'turns': args.turns, 'workers': args.workers}, lines)
    return 0
