"""Script for test_exact_resume.py: train a run undisturbed, and again while it is repeatedly killed and resumed.

  python killed_runs.py FOLDER NUM_KILLS NUM_WORKERS

Imports take seconds and are done once; each run is a fork of this process that calls the command. Half of the kills
are sent by this process at random times after a random iteration has begun. In the other half, the run kills itself
inside functions that write, rename and delete. In between it is stopped by SIGTERM and SIGINT.

The runs are in FOLDER/whole and FOLDER/killed; both write the losses of each iteration to a file `losses`. Prints how
the runs were killed.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import cv2
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401 (draws the curves)
import numpy as np
import torch._dynamo  # noqa: F401 (torch.optim imports it on first use)
import yaml

from ast_plugin.cli.main import main as basicsr
from ast_plugin.evaluation.validator import Validator
from ast_plugin.models.restoration_model import RestorationModel
from tests import tiny_run

NUM_PAIRS = 14
NUM_ITERATIONS = 40
# Places where a run kills itself, and the maximum number of times that it passes them before.
PLACES = {'half': 5, 'fsync': 5, 'rename': 3, 'renamed': 3, 'delete': 3, 'weights saved': 1, 'validation': 3}

# Stop signals by the number of the kill that they precede.
STOPS = {2: signal.SIGTERM, 6: signal.SIGINT}


def write_data(folder: Path) -> None:
    """Write pairs of small images and the option file.

    The network learns to brighten, but validation pairs are identical: the first validation is the best.
    """
    opt = yaml.safe_load(tiny_run.write(folder, NUM_PAIRS).read_text())
    roots = {'dataroot_lq': 'data/val_lq', 'dataroot_gt': 'data/val_gt'}
    for root in roots.values():
        (folder / root).mkdir()
        for number in range(2):
            image = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / root / f'{number}.png'), image)
    opt['datasets']['train'] |= {'type': 'PairsDataset', 'gt_size': 16}
    opt['datasets']['val'] = {'name': 'val', 'type': 'PairsDataset', **roots}
    ones = [1] * 9
    network = {'type': 'AST', 'img_size': 16, 'embed_dim': 4, 'depths': ones, 'num_heads': ones, 'drop_path_rate': 0.2}
    train = {
        'ema_decay': 0.9,
        'total_iter': NUM_ITERATIONS,
        'optim_g': {'type': 'AdamW', 'lr': 1e-3},
        'scheduler': {'type': 'WarmupCosineLR', 'warmup_iter': 20},
        'pixel_opt': {'type': 'ASTCharbonnierLoss'},
    }
    opt |= {'name': 'run', 'model_type': 'RestorationModel', 'network_g': network, 'train': train}
    opt['val']['val_freq'] = 10
    opt['logger'] |= {'save_checkpoint_freq': 5, 'keep_checkpoints': 2}
    (folder / 'run.yml').write_text(yaml.safe_dump(opt), encoding='utf-8')


def fork(arguments: list[str], losses: Path, output: Path, place: str | None = None, count: int = 0) -> tuple[int, int]:
    """Start a run in a child; return its process id and a pipe that receives a byte when an iteration begins."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    status = 1
    try:
        os.close(reader)
        os.setpgrp()  # signals are sent to the whole group, as by terminals and launchers
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        tell_iterations(writer, losses)
        if place:
            die_at(place, count)
        status = basicsr(['train', *arguments])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def tell_iterations(writer: int, losses: Path) -> None:
    """Write a byte into a pipe when an iteration begins, and a line into a file when it is done."""
    optimize = RestorationModel.optimize_parameters

    def optimize_parameters(self, current_iter):
        os.write(writer, b'.')
        optimize(self, current_iter)
        line = ' '.join([str(current_iter), *(float(loss).hex() for loss in self.log_dict.values())])
        with losses.open('a') as file:
            file.write(line + '\n')

    RestorationModel.optimize_parameters = optimize_parameters


def die_at(place: str, count: int) -> None:
    """Make this process kill itself when it reaches a place for the `count`-th time."""
    holder, name, dies_before = {
        'half': (os, 'fsync', True),
        'fsync': (os, 'fsync', True),
        'rename': (Path, 'replace', True),
        'renamed': (Path, 'replace', False),
        'delete': (Path, 'unlink', False),
        'weights saved': (RestorationModel, 'save_training_state', True),
        'validation': (Validator, '_measure_image', True),
    }[place]
    original = getattr(holder, name)
    calls = 0

    def deadly(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count and dies_before:
            if place == 'half':
                with suppress(OSError):  # a folder cannot be truncated
                    os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(holder, name, deadly)


def end(child: int, reader: int, num_iterations: int = 0, delay: float = 0.0, number: int = signal.SIGKILL) -> int:
    """Send a signal to a run after `num_iterations` and a delay, or wait for its end; return its exit status."""
    if num_iterations:
        # read returns nothing if the run has already ended; the signal then has no effect.
        all(os.read(reader, 1) for _ in range(num_iterations))
        time.sleep(delay)
        os.killpg(child, number)
    _, status = os.waitpid(child, 0)
    os.close(reader)
    return os.waitstatus_to_exitcode(status)


def compare(folder: Path, num_kills: int, num_workers: int) -> dict:
    """Train undisturbed, then with kills; return how each attempt ended."""
    arguments = ['-opt', 'run.yml', '--auto_resume', '--force_yml', f'datasets:train:num_worker_per_gpu={num_workers}']
    for name in ('whole', 'killed'):
        (folder / name).mkdir(parents=True)

    def start(name: str, place: str | None = None, count: int = 0) -> tuple[int, int]:
        home = folder / name
        return fork([*arguments, '--root', str(home)], home / 'losses', home / 'output', place, count)

    begin = time.monotonic()
    whole = end(*start('whole'))
    seconds = time.monotonic() - begin
    kills, stops = [], []
    chance = random.Random(num_workers)
    for number in range(num_kills):
        if number in STOPS:
            stops.append(end(*start('killed'), chance.randint(1, 4), number=STOPS[number]))
        place = chance.choice(list(PLACES)) if number % 2 else 'time'
        count = chance.randint(1, PLACES.get(place, 9))
        if place == 'time':
            status = end(*start('killed'), count, chance.random() * seconds / NUM_ITERATIONS)
        else:
            status = end(*start('killed', place, count))
        kills.append([place, count, status])
    last = end(*start('killed'))
    return {'whole': whole, 'kills': kills, 'stops': stops, 'last': last, 'seconds': time.monotonic() - begin}


def main() -> None:
    folder, num_kills, num_workers = Path(sys.argv[1]), *map(int, sys.argv[2:])
    write_data(folder)
    os.chdir(folder)
    print(json.dumps(compare(folder, num_kills, num_workers)))


if __name__ == '__main__':
    main()
