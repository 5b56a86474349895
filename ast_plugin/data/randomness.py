"""Sample order and random states of training.

Both follow from the seed, the epoch and the position, so that a run can resume within an epoch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ast_plugin.errors import DataError


def epoch_of(iteration: int, iters_per_epoch: int) -> tuple[int, int]:
    """Return the epoch (from 0) of an iteration (from 1), and the number of its iterations done after that one."""
    epoch = max(0, iteration - 1) // iters_per_epoch
    return epoch, iteration - epoch * iters_per_epoch


class EpochSampler(Sampler):
    """Drop-in replacement for BasicSR's EnlargedSampler.

    An epoch covers the dataset `ratio` times, rounded up to full batches on every rank: BasicSR's loader drops partial
    batches, so a dataset smaller than one batch would yield nothing. The additional samples are drawn anew in each
    epoch, and the usage counts of images differ by at most one.

    Datasets with `index_carries_epoch` get `(epoch, position)`. Their image is `position % len(dataset)`, and each
    repeat of an image has its own position, hence its own random choices. Other datasets get the image number.

    Args:
        dataset: sized dataset; `seed` and `batch_size_per_gpu` are read from its `opt`, if it has one.
        num_replicas: number of training processes.
        rank: rank of this process.
        ratio: number of times that an epoch covers the dataset.
    Raises:
        DataError: if the dataset is empty.
    """

    def __init__(self, dataset: Dataset, num_replicas: int, rank: int, ratio: float = 1) -> None:
        opt = getattr(dataset, 'opt', None) or {}
        if len(dataset) == 0:
            raise DataError(f'datasets.{opt.get("phase", "train")} is empty: training needs at least one image')
        self.dataset, self.num_replicas, self.rank, self.ratio = dataset, num_replicas, rank, ratio
        self.seed = opt.get('seed') or 0
        self.epoch = 0
        self.resumed_epoch, self.num_used = -1, 0  # number of samples of that epoch used before resuming
        self.fill(opt.get('batch_size_per_gpu') or 1)

    def fill(self, batch: int) -> None:
        """Set the epoch length so that it consists of full batches of `batch` samples per process."""
        self.num_samples = max(1, math.ceil(len(self.dataset) * self.ratio / (self.num_replicas * batch))) * batch

    def __iter__(self) -> Iterator[tuple[int, int]] | Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        length = len(self.dataset)
        repeats, rest = divmod(self.num_samples * self.num_replicas, length)
        whole = np.arange(repeats * length)
        part = repeats * length + generator.permutation(length)[:rest]
        positions = generator.permutation(np.concatenate([whole, part]))[self.rank :: self.num_replicas]
        if self.epoch == self.resumed_epoch:
            positions = positions[self.num_used :]
        if getattr(self.dataset, 'index_carries_epoch', False):
            return ((self.epoch, int(position)) for position in positions)
        return (int(position) for position in positions % length)

    def __len__(self) -> int:
        return self.num_samples

    def resume(self, iteration: int, batch: int) -> None:
        """Continue after `iteration`, with batches of `batch` samples per process.

        Iterating over the epoch of that iteration yields only its unused samples, none if the epoch is complete. The
        length remains that of a full epoch.
        """
        self.resumed_epoch, num_done = epoch_of(iteration, self.num_samples // batch)
        self.num_used = num_done * batch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass over the dataset."""
        self.epoch = epoch


class SeededSamples(Dataset):
    """Wrapper that makes the samples of a third-party dataset depend only on (seed, epoch, position).

    The global generators, from which such datasets draw, are seeded for each sample. All other attributes are those of
    the dataset. Its indices must be integers.
    """

    index_carries_epoch = True

    def __init__(self, dataset: Dataset, seed: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: tuple[int, int]) -> Any:
        epoch, position = index
        with preserved():
            sequence = np.random.SeedSequence((self.seed, epoch, position))
            for_python, for_numpy, for_torch = map(int, sequence.generate_state(3))
            random.seed(for_python)
            np.random.seed(for_numpy)  # noqa: NPY002 (third-party datasets draw from it)
            torch.default_generator.manual_seed(for_torch)
            return self.dataset[position % len(self)]

    def __getattr__(self, name: str) -> Any:
        if name == 'dataset':  # not set yet while a worker unpickles this object
            raise AttributeError(name)
        return getattr(self.dataset, name)


def capture(every_device: bool = True) -> dict[str, Any]:
    """Return the states of the global generators of torch, NumPy and Python as tensors and plain values.

    `torch.load` reads them with `weights_only`. Includes every GPU, or only the current one without `every_device`, for
    processes that share a machine.
    """
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (BasicSR draws from it)
    return {
        'torch': torch.get_rng_state(),
        'cuda': {device: torch.cuda.get_rng_state(device) for device in _devices(every_device)},
        'mps': torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
        'numpy': [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        'python': [version, torch.tensor(numbers), gauss],
    }


def restore(states: dict[str, Any]) -> None:
    """Restore the generator states returned by `capture`; devices that no longer exist are skipped."""
    torch.set_rng_state(states['torch'].cpu())
    for device in states['cuda'].keys() & set(_devices()):
        torch.cuda.set_rng_state(states['cuda'][device].cpu(), device)
    if states.get('mps') is not None and torch.backends.mps.is_available():  # older states lack it
        torch.mps.set_rng_state(states['mps'].cpu())
    name, keys, *rest = states['numpy']
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, numbers, gauss = states['python']
    random.setstate((version, tuple(numbers.tolist()), gauss))


@contextmanager
def preserved() -> Iterator[None]:
    """Restore the global generators on exit to their states on entry."""
    states = capture()
    try:
        yield
    finally:
        restore(states)


def _devices(every_device: bool = True) -> list[int]:
    if not torch.cuda.is_initialized():
        return []
    return list(range(torch.cuda.device_count())) if every_device else [torch.cuda.current_device()]
