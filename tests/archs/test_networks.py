"""Networks of all kinds at scale 1, on pictures of any size."""

import pytest
import torch
from torch import nn

import ast_plugin  # noqa: F401 (before BasicSR)
from ast_plugin.archs.networks import AnySize, input_channels, load_network, network_of, required_multiple
from ast_plugin.checkpoints import read_checkpoint, save_torch, save_weights
from ast_plugin.errors import CheckpointError, OptionError

EDSR = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 4, 'num_block': 1, 'upscale': 1}
SWINIR = {
    'type': 'SwinIR',
    'upscale': 1,
    'img_size': 16,
    'window_size': 4,
    'embed_dim': 4,
    'depths': [1],
    'num_heads': [1],
    'upsampler': '',
}
BASELINES = {  # of the toolbox, at scale 1, with the multiple that each needs
    'EDSR': (EDSR, 1),
    'SwinIR': (SWINIR, 4),
    'RCAN': (
        {**EDSR, 'type': 'RCAN', 'num_group': 1, 'squeeze_factor': 2},
        1,
    ),
    'MSRResNet': ({'type': 'MSRResNet', 'num_feat': 4, 'num_block': 1, 'upscale': 1}, 1),
    'RIDNet': ({'type': 'RIDNet', 'in_channels': 3, 'mid_channels': 16, 'out_channels': 3}, 1),
    'RRDBNet': ({'type': 'RRDBNet', 'num_in_ch': 3, 'num_out_ch': 3, 'scale': 1, 'num_feat': 4, 'num_block': 1}, 4),
    'SRVGGNetCompact': ({'type': 'SRVGGNetCompact', 'num_feat': 4, 'num_conv': 1, 'upscale': 1}, 1),
}


@pytest.mark.parametrize('name', BASELINES)
def test_baselines_restore_any_size(name):
    options, multiple = BASELINES[name]
    network = load_network(options, None)
    assert required_multiple(network) == multiple
    image = torch.rand(1, 3, 17, 22)
    with torch.no_grad():
        assert AnySize(network, multiple)(image).shape == image.shape


class Shifting(nn.Module):
    """Takes multiples of 4, and shows what it gets."""

    def forward(self, image):
        if image.shape[-1] % 4 or image.shape[-2] % 4:
            raise RuntimeError('not a multiple')
        self.seen = image
        return image + 1


def test_padding_mirrors_and_is_cut_away():
    network = Shifting()
    image = torch.arange(15.0).reshape(1, 1, 3, 5)
    assert torch.equal(AnySize(network, 4)(image), image + 1)
    assert network.seen[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 3, 2, 1]
    assert network.seen[0, 0, 3].tolist() == network.seen[0, 0, 1].tolist()
    tiny = torch.tensor([[[[7.0]]]])
    assert torch.equal(AnySize(network, 4)(tiny), tiny + 1)
    assert network.seen.shape == (1, 1, 4, 4)


def test_what_needs_no_padding_gets_none():
    network = Shifting()
    image = torch.rand(1, 1, 8, 4)
    AnySize(network, 4)(image)
    assert network.seen is image


def test_multiple_of_a_network_that_enlarges():
    with pytest.raises(OptionError, match='expected the same size'):
        required_multiple(load_network({**EDSR, 'upscale': 2}, None))


def test_weights(tmp_path):
    network = load_network(EDSR, None)
    save_torch(tmp_path / 'w.pth', {'params': network.state_dict()})
    again = load_network(EDSR, str(tmp_path / 'w.pth'))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    assert not again.training
    with pytest.raises(CheckpointError, match='weights of another network than EDSR'):
        load_network({**EDSR, 'num_feat': 8}, str(tmp_path / 'w.pth'))


def test_a_file_that_describes_itself_is_enough(tmp_path):
    save_weights(tmp_path / 'w.safetensors', load_network(EDSR, None).state_dict(), EDSR)
    assert network_of(read_checkpoint(tmp_path / 'w.safetensors')) == (EDSR, [])
    save_torch(tmp_path / 'w.pth', {'params': load_network(EDSR, None).state_dict()})
    with pytest.raises(CheckpointError, match='does not say which network it is of'):
        network_of(read_checkpoint(tmp_path / 'w.pth'))


@pytest.mark.parametrize(('options', 'channels'), [(EDSR, 3), ({'in_chans': 1}, 1), ({}, 3), ({'in_chans': None}, 3)])
def test_channels(options, channels):
    assert input_channels(options) == channels
