"""Random generators captured, restored, and left alone."""

import random

import numpy as np
import torch

from ast_plugin.checkpoints import save_torch
from ast_plugin.data import randomness
from ast_plugin.data.randomness import SeededSamples


def draw() -> tuple:
    # The second number of a pair of normal ones is kept back by the generators.
    return random.gauss(0, 1), np.random.randn(), torch.randn(1).item(), random.random(), np.random.rand()  # noqa: NPY002


def test_states_come_back_from_a_file(tmp_path):
    draw()
    save_torch(tmp_path / 'states', randomness.capture())
    expected = [draw() for _ in range(3)]
    randomness.restore(torch.load(tmp_path / 'states', weights_only=True))
    assert [draw() for _ in range(3)] == expected


def test_preserved_leaves_no_trace():
    states = randomness.capture()
    expected = draw()
    randomness.restore(states)
    with randomness.preserved():
        draw()
    assert draw() == expected


class Noise(torch.utils.data.Dataset):
    """A dataset such as BasicSR's: indices are numbers, chance comes from the global generators."""

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
    before = randomness.capture()
    expected = draw()
    randomness.restore(before)
    again = [dataset[index] for index in reversed(positions)][::-1]
    assert draw() == expected
    in_workers = list(torch.utils.data.DataLoader(dataset, None, sampler=positions, num_workers=2))
    for one, other, third in zip(first, again, in_workers, strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)
    assert not torch.equal(SeededSamples(Noise(), seed=2)[0, 0], first[0])
    assert (len(dataset), dataset.opt) == (4, Noise.opt)
