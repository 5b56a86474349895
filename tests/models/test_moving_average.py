from copy import deepcopy

import torch
from torch import nn

from ast_plugin.models.training_step import update_average


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.register_buffer('mask', torch.tensor([-100.0, 0.1, 1 / 3]))
        self.register_buffer('index', torch.tensor([3, 1]))


def test_weights_and_statistics_are_averaged_counters_copied():
    network = Net()
    average = deepcopy(network).requires_grad_(False)
    want = {name: tensor.double() for name, tensor in average.state_dict().items()}
    mask = average.mask.clone()
    for step in range(50):
        with torch.no_grad():
            network[0].weight.add_(0.1)
        network(torch.rand(2, 3, 5, 5) + step)
        update_average(average, network, 0.9)
        for name, tensor in network.state_dict().items():
            want[name] = 0.9 * want[name] + 0.1 * tensor if tensor.is_floating_point() else tensor.double()
    for name, tensor in average.state_dict().items():
        torch.testing.assert_close(tensor.double(), want[name], rtol=1e-5, atol=1e-6)
    assert average[1].num_batches_tracked == 50
    assert average[1].running_mean.abs().max() > 0.1
    assert torch.equal(average.mask, mask)


def test_no_decay_copies():
    network, average = Net(), Net()
    update_average(average, network, 0)
    assert all(torch.equal(a, b) for a, b in zip(average.parameters(), network.parameters(), strict=True))
