"""Datasets of BasicSR's and of other plugins, whose random choices come from global generators, made repeatable."""

from typing import Any

from torch.utils.data import Dataset

from ast_plugin.data import random_states


class SeededSamples(Dataset):
    """A dataset each sample of which is drawn with generators seeded by (seed, epoch, position).

    What it gives then depends neither on the number of workers nor on what was drawn before, so that a run can go on
    in the middle of an epoch. All else is the dataset's own.

    Args:
        dataset: with a length, and indices that are numbers.
        seed: the run's.
    """

    index_carries_epoch = True

    def __init__(self, dataset: Dataset, seed: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: tuple[int, int]) -> Any:
        epoch, position = index
        with random_states.preserved():
            random_states.seed_cpu(self.seed, epoch, position)
            return self.dataset[position % len(self)]

    def __getattr__(self, name: str) -> Any:
        if name == 'dataset':  # not there yet, while this is unpickled in a worker
            raise AttributeError(name)
        return getattr(self.dataset, name)
