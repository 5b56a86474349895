"""Building networks by name and from weights, and running them on images of any size."""

import pytest
import torch
from torch import nn

import ast_plugin  # noqa: F401 (before BasicSR)
from ast_plugin.archs.ast_arch import AST_XS
from ast_plugin.archs.networks import any_size, input_channels, load_network, network_of, required_multiple
from ast_plugin.checkpoints import Checkpoint, read_checkpoint, save_torch, save_weights
from ast_plugin.errors import CheckpointError, OptionError
from ast_plugin.ops import pad_to_multiple
from tests.archs.tiny_networks import EDSR, RRDBNET, SWINIR


class Picky(nn.Module):
    """A network that accepts only multiples of its window, and does not run on the meta device."""

    window_size = 12

    def forward(self, image):
        if image.shape[-1] % 12 or image.shape[-2] % 12:
            raise RuntimeError('not a multiple')
        return image + image.mean().item()


def test_multiples_of_networks():
    networks = [*map(load_network, (EDSR, SWINIR, RRDBNET)), Picky()]
    assert [required_multiple(network) for network in networks] == [1, 4, 4, 12]
    image = torch.rand(1, 3, 3, 15)
    torch.testing.assert_close(any_size(networks[-1])(image), image + pad_to_multiple(image, 12).mean())
    with pytest.raises(OptionError, match='expected an output of the size of the input, got scale 2 of EDSR'):
        required_multiple(load_network({**EDSR, 'upscale': 2}))


def test_network_of_a_weights_file(tmp_path):
    network = load_network(EDSR)
    state = network.state_dict()
    save_torch(tmp_path / 'w.pth', {'params': state})
    again = load_network(EDSR, tmp_path / 'w.pth')
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    assert not again.training
    with pytest.raises(CheckpointError, match='the weights do not match EDSR'):
        load_network({**EDSR, 'num_feat': 4}, tmp_path / 'w.pth')
    with pytest.raises(CheckpointError, match='does not name its network'):
        network_of(read_checkpoint(tmp_path / 'w.pth'))
    save_weights(tmp_path / 'w.safetensors', state, EDSR)
    assert network_of(read_checkpoint(tmp_path / 'w.safetensors')) == (EDSR, [])
    with torch.device('meta'):
        state = AST_XS().state_dict()
    options, assumed = network_of(Checkpoint(tmp_path, state))
    assert (options['type'], options['embed_dim']) == ('AST', 16)
    assert any('img_size' in line for line in assumed)


def test_channels():
    given = (EDSR, {'in_chans': 1}, {}, {'in_chans': None}, {'type': 'Mixed', 'base': {'num_in_ch': 4}})
    assert [input_channels(options) for options in given] == [3, 1, 3, 3, 4]
