"""The random numbers of a process: torch's on the CPU and on its devices, numpy's and Python's."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


def capture(every_device: bool = True) -> dict[str, Any]:
    """Return the states of the global generators as tensors and plain values, which torch reads without pickle.

    Of all GPUs or, for processes that share a machine's, of the current one alone.
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
    present = set(_devices())
    for device, state in states['cuda'].items():
        if device in present:
            torch.cuda.set_rng_state(state.cpu(), device)
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


def seed_cpu(*numbers: int) -> None:
    """Seed Python's generator, numpy's, and torch's on the CPU, with what the numbers make together."""
    for_python, for_numpy, for_torch = map(int, np.random.SeedSequence(numbers).generate_state(3))
    random.seed(for_python)
    np.random.seed(for_numpy)  # noqa: NPY002 (others draw from it)
    torch.default_generator.manual_seed(for_torch)


def _devices(every_device: bool = True) -> list[int]:
    if not torch.cuda.is_initialized():
        return []
    return list(range(torch.cuda.device_count())) if every_device else [torch.cuda.current_device()]


class SeededSamples(Dataset):
    """A dataset of BasicSR's or another plugin's, whose samples depend on (seed, epoch, position) alone.

    Its random choices come from global generators, which are seeded for each sample, so that a run can go on in the
    middle of an epoch. All else is the dataset's own; its indices must be numbers.
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
            seed_cpu(self.seed, epoch, position)
            return self.dataset[position % len(self)]

    def __getattr__(self, name: str) -> Any:
        if name == 'dataset':  # not there yet, while this is unpickled in a worker
            raise AttributeError(name)
        return getattr(self.dataset, name)
