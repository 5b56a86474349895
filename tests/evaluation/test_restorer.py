import numpy as np
import pytest
import torch
from torch import nn

from ast_plugin.archs.networks import CHANNEL_KEYS, build_network
from ast_plugin.checkpoints import save_weights
from ast_plugin.errors import CheckpointError, DataError, OptionError, ShapeError
from ast_plugin.evaluation import tiling
from ast_plugin.evaluation.restorer import Restorer

from ..weights.helpers import TINY


class Scale(nn.Module):
    """Network that multiplies its input and upscales it by repeating pixels."""

    def __init__(self, factor=1.0, enlarge=1, out_channels=None):
        super().__init__()
        self.factor, self.enlarge, self.out_channels = factor, enlarge, out_channels
        self.sizes = []

    def forward(self, x):
        self.sizes.append(tuple(x.shape[-2:]))
        x = x[:, : self.out_channels] * self.factor
        return x.repeat_interleave(self.enlarge, -1).repeat_interleave(self.enlarge, -2)


def noise(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


@pytest.fixture
def tiny_weights(tmp_path):
    """Return a network and the path of its weights."""
    network = build_network(TINY)
    save_weights(tmp_path / 'a.safetensors', network.state_dict(), TINY)
    return network, tmp_path / 'a.safetensors'


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_every_value_survives_an_identity(dtype):
    levels = np.arange(np.iinfo(dtype).max + 1).reshape(16, -1).astype(dtype)
    for image in (levels, *(noise(*shape, dtype=dtype) for shape in ((5, 7, 3), (1, 1, 3), (1, 1)))):
        np.testing.assert_array_equal(Restorer(Scale()).restore(image), image, strict=True)


def test_results_are_clamped_and_rounded():
    image = np.array([[100, 101, 255, 0]], np.uint8)
    np.testing.assert_array_equal(Restorer(Scale(1.3)).restore(image), [[130, 131, 255, 0]])
    np.testing.assert_array_equal(Restorer(Scale(-1)).restore(image), np.zeros((1, 4)))
    image = np.array([[10000, 60000]], np.uint16)
    np.testing.assert_array_equal(Restorer(Scale(1.00004)).restore(image), [[10000, 60002]])


@pytest.mark.parametrize('dtype', [np.float64, np.float16])
def test_floating_point_stays_unrounded(dtype):
    image = np.random.default_rng(0).random((5, 7, 3)).astype(dtype)
    restored = Restorer(Scale(0.5)).restore(image)
    assert restored.dtype == np.float32
    np.testing.assert_allclose(restored, image.astype(np.float32) / 2, atol=1e-7)


def test_gray_through_color_and_gray_networks():
    gray, color = noise(6, 5), noise(6, 5, 3)
    assert Restorer(Scale(), in_channels=1).restore(gray).shape == (6, 5)
    assert Restorer(Scale(out_channels=1)).restore(color).shape == (6, 5)
    with pytest.raises(DataError, match='gray images only'):
        Restorer(Scale(), in_channels=1).restore(color)
    with pytest.raises(OptionError, match='has 4 input channels'):
        Restorer(Scale(), in_channels=4)


@pytest.mark.parametrize(
    ('shape', 'dtype'), [((4, 4, 4), np.uint8), ((4,), np.uint8), ((0, 4, 3), np.uint8), ((4, 4), np.int32)]
)
def test_arrays_that_are_not_images(shape, dtype):
    with pytest.raises(ShapeError, match='expected an image'):
        Restorer(Scale()).restore(np.zeros(shape, dtype))


def test_tiles_bound_what_the_network_sees():
    network = Scale()
    progress = []
    image = noise(50, 40, 3)
    restored = Restorer(network, tile=32, overlap=8).restore(image, on_tile=lambda *call: progress.append(call))
    np.testing.assert_array_equal(restored, image)
    assert set(network.sizes) == {(32, 32)}
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_ample_memory_needs_no_measuring(monkeypatch):
    network, notes = Scale(), []
    monkeypatch.setattr(tiling, 'peak_bytes', None)
    Restorer(network).restore(noise(150, 200, 3), on_note=notes.append)
    assert network.sizes == [(150, 200)] and not notes


class Forgetful(Scale):
    """Network that raises PyTorch's out-of-memory error on a CPU above a size."""

    def forward(self, x):
        if x.shape[-1] * x.shape[-2] > 128 * 128:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes")
        return super().forward(x)


def test_smaller_tiles_when_memory_runs_out():
    network, notes = Forgetful(), []
    image = noise(300, 600, 3)
    np.testing.assert_array_equal(Restorer(network).restore(image, on_note=notes.append), image)
    assert set(network.sizes) == {(128, 128)}
    assert 'trying tiles of 256' in notes[0] and 'trying tiles of 128' in notes[1]


def test_invalid_tiles_are_rejected_early(tmp_path):
    with pytest.raises(OptionError):
        Restorer(Scale(), tile=8, overlap=8)
    with pytest.raises(OptionError):
        Restorer.from_weights(tmp_path / 'missing.pth', tile=8, overlap=8)


def test_metadata_name_the_network(tiny_weights):
    network, path = tiny_weights
    restorer = Restorer.from_weights(path, device='cpu')
    assert restorer.notes == ()
    assert restorer.network.bottleneck.blocks[0].attn.window_size == network.bottleneck.blocks[0].attn.window_size
    image = noise(40, 33, 3)
    values = torch.from_numpy(image).float().div(255).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = network.eval()(values)[0].clamp(0, 1).mul(255).round().permute(1, 2, 0).numpy()
    assert np.abs(restorer.restore(image).astype(int) - expected).max() <= 1

    with pytest.raises(CheckpointError, match=r'a\.safetensors.*embed_dim'):
        Restorer.from_weights(path, network=TINY | {'embed_dim': 8})


@pytest.mark.parametrize(('requested', 'want'), [(None, 48), (0, None), (24, 24)])
def test_processing_resolution_of_a_file(tmp_path, requested, want):
    save_weights(tmp_path / 'a.safetensors', build_network(TINY).state_dict(), TINY, {'processing_resolution': 48})
    restorer = Restorer.from_weights(tmp_path / 'a.safetensors', processing_resolution=requested)
    assert restorer.protocol.processing_resolution == want
    assert restorer.restore(noise(70, 50, 3)).shape == (70, 50, 3)


def test_processing_resolution_that_is_no_size(tmp_path):
    save_weights(tmp_path / 'a.safetensors', build_network(TINY).state_dict(), TINY, {'processing_resolution': 'half'})
    with pytest.raises(CheckpointError, match='processing_resolution in its metadata is "half": expected a number'):
        Restorer.from_weights(tmp_path / 'a.safetensors')


def test_networks_of_the_toolbox(tmp_path):
    options = {'type': 'SRVGGNetCompact', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 4, 'num_conv': 1, 'upscale': 2}
    network = build_network(options)
    torch.save({'params_ema': network.state_dict()}, tmp_path / 'a.pth')
    restorer = Restorer.from_weights(tmp_path / 'a.pth', network=options, device='cpu', tile=24, overlap=12)
    whole = Restorer.from_weights(tmp_path / 'a.pth', network=options, device='cpu')
    image = noise(40, 33, 3)
    restored = restorer.restore(image)
    assert restored.shape == (80, 66, 3)
    assert np.abs(restored.astype(int) - whole.restore(image)).max() <= 1
    # Unknown to the plugin and, if installed, to spandrel.
    torch.save({'params_ema': {'strange.weight': torch.zeros(3)}}, tmp_path / 'b.pth')
    with pytest.raises(CheckpointError, match=r'b\.pth does not name its network.*-opt'):
        Restorer.from_weights(tmp_path / 'b.pth', device='cpu')
    with pytest.raises(CheckpointError, match=r'a\.pth: the weights do not match SRVGGNetCompact'):
        Restorer.from_weights(tmp_path / 'a.pth', network=options | {'num_feat': 8}, device='cpu')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'type': 'ATS'}, 'no network is registered as ATS, did you mean AST'),
        ({'type': None}, 'no network is registered as None'),
        ({'type': 'EDSR', 'colour': 3}, r'EDSR cannot be built.*colour'),
        ({'type': 'AST', 'depths': [1]}, 'depths'),
    ],
)
def test_networks_that_cannot_be_built(options, message):
    with pytest.raises(OptionError, match=message):
        build_network(options)


@pytest.mark.parametrize('key', CHANNEL_KEYS)
def test_gray_networks_whatever_their_channel_key(tmp_path, monkeypatch, key):
    from basicsr.utils.registry import ARCH_REGISTRY

    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Gray', lambda **options: nn.Sequential(nn.Conv2d(options[key], 1, 1)))
    torch.save({'params': nn.Sequential(nn.Conv2d(1, 1, 1)).state_dict()}, tmp_path / 'a.pth')
    restorer = Restorer.from_weights(tmp_path / 'a.pth', network={'type': 'Gray', key: 1}, device='cpu')
    assert restorer.restore(noise(8, 8)).shape == (8, 8)
