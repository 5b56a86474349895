"""EpochSampler: what an epoch holds, on every rank."""

from collections import Counter
from itertools import chain

import pytest

from ast_plugin.data.randomness import EpochSampler, epoch_of
from ast_plugin.errors import DataError


class Numbers:
    def __init__(self, length: int, batch: int = 1, seed: int = 0, index_carries_epoch: bool = True) -> None:
        self.length = length
        self.opt = {'batch_size_per_gpu': batch, 'seed': seed, 'phase': 'train'}
        self.index_carries_epoch = index_carries_epoch

    def __len__(self) -> int:
        return self.length


def indices(dataset: Numbers, replicas: int = 1, ratio: float = 1, epoch: int = 0) -> list[list]:
    samplers = [EpochSampler(dataset, replicas, rank, ratio) for rank in range(replicas)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in samplers]


@pytest.mark.parametrize('length', [1, 3, 8, 21])
@pytest.mark.parametrize('batch', [1, 4])
@pytest.mark.parametrize('replicas', [1, 3])
@pytest.mark.parametrize('ratio', [0.4, 1, 5])
def test_full_batches_on_disjoint_ranks(length, batch, replicas, ratio):
    dataset = Numbers(length, batch)
    ranks = indices(dataset, replicas, ratio, epoch=2)
    assert len({len(rank) for rank in ranks}) == 1
    assert all(len(rank) == len(EpochSampler(dataset, replicas, 0, ratio)) for rank in ranks)
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


def test_ranks_share_what_one_process_would_see():
    together = indices(Numbers(24, batch=2))[0]
    apart = indices(Numbers(24, batch=1), replicas=2)
    assert sorted(together) == sorted(chain(*apart))


def test_added_images_change_from_epoch_to_epoch():
    added = {tuple(sorted(p for _, p in indices(Numbers(5, batch=8), epoch=epoch)[0] if p >= 5)) for epoch in range(20)}
    assert len(added) > 1


def test_other_datasets_get_plain_numbers():
    (numbers,) = indices(Numbers(3, batch=4, index_carries_epoch=False))
    assert len(numbers) == 4 and set(numbers) == {0, 1, 2}
    plain = EpochSampler(list(range(7)), 2, 0)
    assert len(plain) == 4 and all(isinstance(number, int) for number in plain)


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match=r'datasets\.train is empty'):
        EpochSampler(Numbers(0), 1, 0)


@pytest.mark.parametrize('replicas', [1, 2])
@pytest.mark.parametrize('iteration', [1, 4, 5, 6, 13, 15])
def test_a_resumed_epoch_goes_on_where_it_was(replicas, iteration):
    dataset = Numbers(10 * replicas, batch=2)  # five iterations an epoch
    for rank in range(replicas):
        whole, resumed = (EpochSampler(dataset, replicas, rank) for _ in range(2))
        resumed.resume(iteration, 2)
        samples = [[], []]
        first = epoch_of(iteration, 5)[0]
        for epoch in range(4):
            whole.set_epoch(epoch)
            samples[0] += whole
            if epoch >= first:
                resumed.set_epoch(epoch)
                samples[1] += resumed
        assert samples[1] == samples[0][2 * iteration :]


def test_epochs_of_iterations():
    assert [epoch_of(iteration, 5) for iteration in (0, 1, 5, 6, 10)] == [(0, 0), (0, 1), (0, 5), (1, 1), (1, 5)]


def test_batches_of_several_devices_are_filled():
    sampler = EpochSampler(Numbers(10, batch=2), 1, 0)
    sampler.fill(8)
    assert len(sampler) == len(list(sampler)) == 16
