"""What is random in training: which sample comes when, and the generators of a process.

All of it follows from the seed, the epoch and the position, so that a run can go on in the middle of an epoch.
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
    """The epoch, from 0, that an iteration, from 1, belongs to, and how many of that epoch's are done after it."""
    epoch = max(0, iteration - 1) // iters_per_epoch
    return epoch, iteration - epoch * iters_per_epoch


class EpochSampler(Sampler):
    """Drop-in for BasicSR's EnlargedSampler.

    An epoch goes through the dataset `ratio` times, and on to the next number of samples that gives full batches to
    every rank: BasicSR's loader drops a partial batch, so that a set smaller than one batch would train on nothing.
    What is added is drawn afresh in each epoch; no image comes more than once oftener than another.

    Datasets that say `index_carries_epoch` get `(epoch, position)`; the image is `position % len(dataset)`, and each
    of its repeats has a position, thus random choices, of its own. Other datasets get the number of the image.

    Args:
        dataset: has a length; `seed` and `batch_size_per_gpu` are read from its `opt`, where it has one.
        num_replicas: number of processes that train.
        rank: which of them this is.
        ratio: how many times an epoch goes through the dataset.
    Raises:
        DataError: if the dataset is empty.
    """

    def __init__(self, dataset: Dataset, num_replicas: int, rank: int, ratio: float = 1) -> None:
        opt = getattr(dataset, 'opt', None) or {}
        if len(dataset) == 0:
            raise DataError(f'datasets.{opt.get("phase", "train")} is empty: a dataset to train on needs an image')
        self.dataset, self.num_replicas, self.rank, self.ratio = dataset, num_replicas, rank, ratio
        self.seed = opt.get('seed') or 0
        self.epoch = 0
        self.resumed_epoch, self.num_used = -1, 0  # samples of that epoch that have been used before
        self.fill(opt.get('batch_size_per_gpu') or 1)

    def fill(self, batch: int) -> None:
        """Let an epoch consist of full batches of this many samples a process."""
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
        """Say that a run goes on after an iteration, with batches of this many samples a process.

        Iterating the epoch of that iteration gives what it has not used yet, nothing if the epoch is through; the
        length stays that of a whole epoch.
        """
        self.resumed_epoch, num_done = epoch_of(iteration, self.num_samples // batch)
        self.num_used = num_done * batch

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is of."""
        self.epoch = epoch


class SeededSamples(Dataset):
    """A dataset of BasicSR's or another plugin's, whose samples depend on (seed, epoch, position) alone.

    Its random choices come from global generators, which are seeded for each sample. All else is the dataset's own;
    its indices must be numbers.
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
            np.random.seed(for_numpy)  # noqa: NPY002 (others draw from it)
            torch.default_generator.manual_seed(for_torch)
            return self.dataset[position % len(self)]

    def __getattr__(self, name: str) -> Any:
        if name == 'dataset':  # not there yet, while this is unpickled in a worker
            raise AttributeError(name)
        return getattr(self.dataset, name)


def capture(every_device: bool = True) -> dict[str, Any]:
    """Return the states of the global generators as tensors and plain values, which torch reads without pickle.

    They are torch's, numpy's and Python's; of all GPUs or, for processes that share a machine's, of the current one.
    """
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (BasicSR draws from it)
    return {
        'torch': torch.get_rng_state(),
        'cuda': {device: torch.cuda.get_rng_state(device) for device in _devices(every_device)},
        'numpy': [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        'python': [version, torch.tensor(numbers), gauss],
    }


def restore(states: dict[str, Any]) -> None:
    """Put the generators where `capture` found them; GPUs that are no longer there are left out."""
    torch.set_rng_state(states['torch'].cpu())
    for device in states['cuda'].keys() & set(_devices()):
        torch.cuda.set_rng_state(states['cuda'][device].cpu(), device)
    name, keys, *rest = states['numpy']
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, numbers, gauss = states['python']
    random.setstate((version, tuple(numbers.tolist()), gauss))


@contextmanager
def preserved() -> Iterator[None]:
    """Leave the generators afterwards as they are now, whatever is drawn in between."""
    states = capture()
    try:
        yield
    finally:
        restore(states)


def _devices(every_device: bool = True) -> list[int]:
    if not torch.cuda.is_initialized():
        return []
    return list(range(torch.cuda.device_count())) if every_device else [torch.cuda.current_device()]
