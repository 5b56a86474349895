"""Samples of an epoch on each rank; capturing, restoring and preserving random states."""

import random
from collections import Counter
from itertools import chain, product

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ast_plugin.checkpoints import save_torch
from ast_plugin.data import randomness
from ast_plugin.data.randomness import EpochSampler, SeededSamples, epoch_of
from ast_plugin.errors import DataError


class Numbers:
    def __init__(self, length: int, batch: int = 1, seed: int = 0, index_carries_epoch: bool = True) -> None:
        self.length = length
        self.opt = {'batch_size_per_gpu': batch, 'seed': seed, 'phase': 'train'}
        self.index_carries_epoch = index_carries_epoch

    def __len__(self) -> int:
        return self.length


def indices(dataset: Numbers, replicas: int = 1, ratio: float = 1, epoch: int = 0) -> list[list]:
    ranks = []
    for rank in range(replicas):
        sampler = EpochSampler(dataset, replicas, rank, ratio)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
    return ranks


@pytest.mark.parametrize('settings', product([1, 3, 8, 21], [1, 4], [1, 3], [0.4, 1, 5]))
def test_full_batches_on_disjoint_ranks(settings):
    length, batch, replicas, ratio = settings
    dataset = Numbers(length, batch)
    ranks = indices(dataset, replicas, ratio, epoch=2)
    assert len({len(rank) for rank in ranks}) == 1
    assert len(ranks[0]) > 0 and len(ranks[0]) % batch == 0
    total = list(chain(*ranks))
    assert len(total) < length * ratio + replicas * batch
    assert {epoch for epoch, _ in total} == {2}
    positions = [position for _, position in total]
    assert len(set(positions)) == len(positions)
    counts = Counter(position % length for position in positions)
    assert max(counts.values()) - min(counts[image] for image in range(length)) <= 1
    assert ratio < 1 or set(counts) == set(range(length))


def test_order_depends_on_seed_and_epoch_alone():
    assert indices(Numbers(50)) == indices(Numbers(50))
    orders = [indices(Numbers(50, seed=seed), epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    positions = {tuple(position for _, position in order[0]) for order in orders}
    assert len(positions) == 4
    added = {tuple(sorted(p for _, p in indices(Numbers(5, batch=8), epoch=epoch)[0] if p >= 5)) for epoch in range(20)}
    assert len(added) > 1
    together, apart = indices(Numbers(24, batch=2)), indices(Numbers(24, batch=1), replicas=2)
    assert sorted(chain(*together)) == sorted(chain(*apart))


def test_other_datasets_get_plain_numbers():
    (numbers,) = indices(Numbers(3, batch=4, index_carries_epoch=False))
    assert len(numbers) == 4 and set(numbers) == {0, 1, 2}
    plain = EpochSampler(list(range(7)), 2, 0)
    assert len(plain) == 4 and all(isinstance(number, int) for number in plain)


def test_empty_datasets_and_several_devices():
    with pytest.raises(DataError, match=r'datasets\.train is empty'):
        EpochSampler(Numbers(0), 1, 0)
    sampler = EpochSampler(Numbers(10, batch=2), 1, 0)
    sampler.fill(8)
    assert len(sampler) == len(list(sampler)) == 16


@pytest.mark.parametrize('replicas', [1, 2])
@pytest.mark.parametrize('iteration', [1, 5, 6, 13])
def test_a_resumed_epoch_continues_where_it_was(replicas, iteration):
    dataset = Numbers(10 * replicas, batch=2)  # five iterations per epoch
    for rank in range(replicas):
        whole, resumed = (EpochSampler(dataset, replicas, rank) for _ in range(2))
        resumed.resume(iteration, 2)
        samples = {whole: [], resumed: []}
        for epoch in range(4):
            for sampler in (whole, resumed) if epoch >= epoch_of(iteration, 5)[0] else (whole,):
                sampler.set_epoch(epoch)
                samples[sampler] += sampler
        assert samples[resumed] == samples[whole][2 * iteration :]


def test_epochs_of_iterations():
    assert [epoch_of(iteration, 5) for iteration in (0, 1, 5, 6, 10)] == [(0, 0), (0, 1), (0, 5), (1, 1), (1, 5)]


def draw() -> tuple:
    # The generators cache the second number of a pair of normal numbers.
    return random.gauss(0, 1), np.random.randn(), torch.randn(1).item(), random.random(), np.random.rand()  # noqa: NPY002


def test_states_come_back(tmp_path):
    draw()
    save_torch(tmp_path / 'states', randomness.capture())
    expected = [draw() for _ in range(3)]
    randomness.restore(torch.load(tmp_path / 'states', weights_only=True))
    with randomness.preserved():
        draw()
    assert [draw() for _ in range(3)] == expected


@pytest.mark.parametrize('is_there', [True, False])
def test_random_state_of_mps(monkeypatch, is_there):
    """Played by a CPU generator; a state of another machine, and one of an older version, can be restored."""
    generator = torch.Generator()
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: is_there)
    monkeypatch.setattr(torch.mps, 'get_rng_state', generator.get_state)
    monkeypatch.setattr(torch.mps, 'set_rng_state', generator.set_state)
    states = {**randomness.capture(), **({} if is_there else {'mps': torch.zeros(1)})}
    before = torch.rand(1, generator=generator)
    randomness.restore(states)
    assert torch.equal(torch.rand(1, generator=generator), before) == is_there
    del states['mps']
    randomness.restore(states)


class Noise(Dataset):
    """Dataset like BasicSR's: integer indices, and randomness from the global generators."""

    opt = {'name': 'noise'}

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor([float(index), *draw()], dtype=torch.float64)


def test_samples_of_others_are_repeatable():
    dataset = SeededSamples(Noise(), seed=1)
    positions = [(epoch, position) for epoch in (0, 1) for position in range(6)]
    first = [dataset[index] for index in positions]
    assert [sample[0].item() for sample in first[:6]] == [0, 1, 2, 3, 0, 1]
    assert len({tuple(sample[1:].tolist()) for sample in first}) == len(first)
    with randomness.preserved():
        expected = draw()
    again = [dataset[index] for index in reversed(positions)][::-1]
    assert draw() == expected
    in_workers = list(DataLoader(dataset, None, sampler=positions, num_workers=2))
    for one, other, third in zip(first, again, in_workers, strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)
    assert not torch.equal(SeededSamples(Noise(), seed=2)[0, 0], first[0])
    assert (len(dataset), dataset.opt) == (4, Noise.opt)
