"""Which sample comes when: a shuffle that depends on seed and epoch alone, in full batches for every rank."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Dataset, Sampler

from ast_plugin.errors import DataError


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
        batch = opt.get('batch_size_per_gpu') or 1
        self.num_samples = max(1, math.ceil(len(dataset) * ratio / (num_replicas * batch))) * batch
        self.total_size = self.num_samples * num_replicas

    def __iter__(self) -> Iterator[tuple[int, int]] | Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        length = len(self.dataset)
        repeats, rest = divmod(self.total_size, length)
        whole = np.arange(repeats * length)
        part = repeats * length + generator.permutation(length)[:rest]
        positions = generator.permutation(np.concatenate([whole, part]))[self.rank :: self.num_replicas]
        if getattr(self.dataset, 'index_carries_epoch', False):
            return ((self.epoch, int(position)) for position in positions)
        return (int(position) for position in positions % length)

    def __len__(self) -> int:
        return self.num_samples

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is of."""
        self.epoch = epoch
