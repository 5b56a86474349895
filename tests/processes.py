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
from torch.utils.data import DataLoader, Dataset

from ast_plugin.data.randomness import EpochSampler
from ast_plugin.errors import TrainingError

TINY = {'type': 'AST', 'img_size': 16, 'embed_dim': 4, 'depths': [1] * 9, 'num_heads': [1] * 9, 'drop_path_rate': 0.0}
BATCH = 4  # of all processes together
NAMES = ('a/one.png', 'b/one.png', 'three.png', 'c/one.png', 'five.png')


class HalfUsed(torch.nn.Module):
    """Network with one weight that never receives a gradient."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = torch.nn.Conv2d(3, 3, 1), torch.nn.Conv2d(3, 3, 1)

    def forward(self, image):
        return self.used(image)


class Pairs(Dataset):
    """Five noisy images, of different sizes in validation; records which of them were read."""

    def __init__(self, batch_size: int | None = None) -> None:
        self.opt = {'name': 'pairs', 'seed': 3, **({'batch_size_per_gpu': batch_size} if batch_size else {})}
        self.is_train = batch_size is not None
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(NAMES)

    def __getitem__(self, index: int) -> dict:
        self.read.append(index)
        generator = torch.Generator().manual_seed(index)
        gt = torch.rand(3, 16, 16 if self.is_train else 16 + 5 * index, generator=generator)
        lq = (gt + 0.1 * torch.randn(gt.shape, generator=generator)).clamp(0, 1)
        return {'lq': lq, 'gt': gt, 'lq_path': NAMES[index], 'gt_path': NAMES[index]}


def options(folder: Path, rank: int, count: int, **top) -> dict:
    paths = {name: str(folder / name) for name in ('experiments_root', 'models', 'training_states', 'visualization')}
    for path in paths.values():
        Path(path).mkdir(exist_ok=True, parents=True)
    return {
        'name': 'tiny',
        'model_type': 'RestorationModel',
        'is_train': True,
        'dist': count > 1,
        'num_gpu': 0,
        'rank': rank,
        'world_size': count,
        'manual_seed': 0,
        'network_g': dict(TINY),
        'datasets': {},
        'path': paths,
        'train': {
            'total_iter': 4,
            'optim_g': {'type': 'SGD', 'lr': 0.5},
            'scheduler': {'type': 'MultiStepLR', 'milestones': [9]},
            'pixel_opt': {'type': 'ASTCharbonnierLoss'},
            'ema_decay': 0.5,
            'accumulate': 2,
        },
        'val': {'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 0}}},
        'logger': {'print_freq': 2, 'save_checkpoint_freq': 2, 'use_tb_logger': True, 'tb_pictures': 3},
        **top,
    }


def train(folder: Path, rank: int, count: int) -> dict:
    """Train four steps across the end of an epoch, then validate an odd number of images."""
    torch.manual_seed(7 + rank)  # initial weights differ between processes until they are synchronized
    if rank == 0:
        torch.manual_seed(7)
    model = build_model(options(folder, rank, count))
    sampler = EpochSampler(Pairs(BATCH // count), count, rank)
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
    pairs = Pairs()
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
        'read': sorted(set(pairs.read)),
        'shown': shown,
        'log': model.log_dict,
    }


def restore_in_double(model):
    original = model._restore
    return lambda sample: original({**sample, 'lq': sample['lq'].double(), 'gt': sample['gt'].double()})


def unused(folder: Path, rank: int, count: int) -> None:
    """Train with an unused weight, which DistributedDataParallel rejects without `find_unused_parameters`."""
    ARCH_REGISTRY.register(HalfUsed)
    model = build_model(options(folder, rank, count, network_g={'type': 'HalfUsed'}, find_unused_parameters=True))
    for iteration in (1, 2):
        model.feed_data({key: torch.rand(1, 3, 8, 8).double() for key in ('lq', 'gt')})
        model.optimize_parameters(iteration)


def nan_in_the_last(folder: Path, rank: int, count: int) -> list:
    """Return the results or errors for both policies if a loss is NaN in one process."""
    told = []
    for policy in ('skip', 'stop'):
        opt = options(folder / policy, rank, count)
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
