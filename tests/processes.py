"""Script for test_distributed.py: one process of a distributed run, which reports its results as JSON.

    processes.py FOLDER

Computes in float64, so that the order of summation affects at most the last digits.
"""

import json
import math
import sys
from pathlib import Path

import ast_plugin  # noqa: F401 (before BasicSR)

# isort: split
import torch
from basicsr.models import build_model
from basicsr.utils.dist_util import get_dist_info, init_dist
from basicsr.utils.registry import ARCH_REGISTRY
from torch.utils.data import DataLoader

from ast_plugin.data.randomness import EpochSampler
from ast_plugin.errors import TrainingError
from tests.models.test_restoration_model import Pairs, options

BATCH = 4  # of all processes together
NAMES = ('a/one.png', 'b/one.png', 'three.png', 'c/one.png', 'five.png')


class HalfUsed(torch.nn.Module):
    """Network with one weight that never receives a gradient."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = torch.nn.Conv2d(3, 3, 1), torch.nn.Conv2d(3, 3, 1)

    def forward(self, image):
        return self.used(image)


class RecordedPairs(Pairs):
    """Five noisy images, of different sizes in validation; records which of them were read."""

    def __init__(self, batch_size: int | None = None) -> None:
        super().__init__(NAMES)
        self.opt |= {'seed': 3, 'batch_size_per_gpu': batch_size}
        self.side = None if batch_size is None else 16
        self.read: set[int] = set()

    def __getitem__(self, index: int) -> dict:
        self.read.add(index)
        sample = super().__getitem__(index)
        return {**sample, **{key: sample[key][:, : self.side, : self.side] for key in ('lq', 'gt')}}


def distributed_options(folder: Path, rank: int, count: int, **top) -> dict:
    folder.mkdir(exist_ok=True)
    opt = options(
        folder,
        total_iter=4,
        optim_g={'type': 'SGD', 'lr': 0.5},
        scheduler={'type': 'MultiStepLR', 'milestones': [9]},
        ema_decay=0.5,
        accumulate=2,
    )
    opt['path']['experiments_root'] = str(folder)
    processes = {'rank': rank, 'world_size': count, 'dist': count > 1, 'manual_seed': 0, 'datasets': {}}
    logger = {'print_freq': 2, 'save_checkpoint_freq': 2, 'use_tb_logger': True, 'tb_pictures': 3}
    return {**opt, **processes, 'logger': logger, **top}


def train(folder: Path, rank: int, count: int) -> dict:
    """Train four steps across the end of an epoch, then validate an odd number of images."""
    torch.manual_seed(7 + rank)  # initial weights differ between processes until they are synchronized
    if rank == 0:
        torch.manual_seed(7)
    model = build_model(distributed_options(folder, rank, count))
    sampler = EpochSampler(RecordedPairs(BATCH // count), count, rank)
    loader = DataLoader(sampler.dataset, BATCH // count, sampler=sampler, drop_last=True)
    iteration = 0
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for batch in loader:
            iteration += 1
            model.update_learning_rate(iteration)
            model.feed_data({key: value.double() if key in ('lq', 'gt') else value for key, value in batch.items()})
            model.optimize_parameters(iteration)
    shown = []
    pairs = RecordedPairs()
    writer = type('Writer', (), {'add_image': lambda self, tag, *a, **k: shown.append(tag), 'add_scalar': print})()
    model._restore = restore_in_double(model)
    model.validation(DataLoader(pairs), iteration, writer if rank == 0 else None, save_img=True)
    model.run_log.flush()
    results = model.measure(DataLoader(pairs))
    if rank == 0:
        torch.save(model.weights(), folder / 'weights.pth')
    return {
        'names': list(results.restored),
        'values': [values['psnr'] for values in results.restored.values()],
        'inputs': [values['psnr'] for values in results.degraded.values()],
        'best': model.best_metric_results['pairs']['psnr'],
        'read': sorted(pairs.read),
        'shown': shown,
        'log': model.log_dict,
    }


def restore_in_double(model):
    original = model._restore
    return lambda sample: original({**sample, 'lq': sample['lq'].double(), 'gt': sample['gt'].double()})


def unused(folder: Path, rank: int, count: int) -> None:
    """Train with an unused weight, which DistributedDataParallel rejects without `find_unused_parameters`."""
    ARCH_REGISTRY.register(HalfUsed)
    model = build_model(
        distributed_options(folder, rank, count, network_g={'type': 'HalfUsed'}, find_unused_parameters=True)
    )
    for iteration in (1, 2):
        model.feed_data({key: torch.rand(1, 3, 8, 8).double() for key in ('lq', 'gt')})
        model.optimize_parameters(iteration)


def nan_in_the_last(folder: Path, rank: int, count: int) -> list:
    """Return the results or errors for both policies if a loss is NaN in one process."""
    told = []
    for policy in ('skip', 'stop'):
        opt = distributed_options(folder / policy, rank, count)
        opt['train']['on_nonfinite'] = policy
        model = build_model(opt)
        before = {name: weight.clone() for name, weight in model.weights()['params'].items()}
        images = torch.full((2, 3, 16, 16), math.nan if rank == count - 1 else 0.5).double()
        model.feed_data({'lq': images, 'gt': torch.zeros_like(images), 'lq_path': [f'{rank}.png'] * 2})
        try:
            model.optimize_parameters(1)
            told.append('left out')
        except TrainingError as error:
            told.append(str(error).partition('. Expected')[0])
        assert all(torch.equal(weight, before[name]) for name, weight in model.weights()['params'].items())
    return told


def main() -> None:
    torch.set_default_dtype(torch.float64)
    init_dist('pytorch')
    rank, count = get_dist_info()
    folder = Path(sys.argv[1])
    report = train(folder, rank, count)
    if count > 1:
        unused(folder / 'unused', rank, count)
        report['nan'] = nan_in_the_last(folder, rank, count)
    (folder / f'report_{rank}.json').write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main()
