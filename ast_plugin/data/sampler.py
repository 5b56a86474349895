"""Which sample comes when: a shuffle that depends on seed and epoch alone, in full batches for every rank."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
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
        self.dataset = dataset
        self.num_replicas = num_replicas
        self.rank = rank
        self.epoch = 0
        self.seed = opt.get('seed') or 0
        self.ratio = ratio
        self.resumed: tuple[int, int] | None = None  # an epoch, and how many of its samples have been used
        self.fill(opt.get('batch_size_per_gpu') or 1)

    def fill(self, batch: int) -> None:
        """Let an epoch consist of full batches of this many samples a process."""
        self.num_samples = max(1, math.ceil(len(self.dataset) * self.ratio / (self.num_replicas * batch))) * batch
        self.total_size = self.num_samples * self.num_replicas

    def __iter__(self) -> Iterator[tuple[int, int]] | Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        length = len(self.dataset)
        repeats, rest = divmod(self.total_size, length)
        whole = np.arange(repeats * length)
        part = repeats * length + generator.permutation(length)[:rest]
        positions = generator.permutation(np.concatenate([whole, part]))[self.rank :: self.num_replicas]
        if self.resumed is not None and self.epoch == self.resumed[0]:
            positions = positions[self.resumed[1] :]
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
        epoch, num_done = epoch_of(iteration, self.num_samples // batch)
        self.resumed = (epoch, num_done * batch)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is of."""
        self.epoch = epoch
