"""Validation protocols: each against its definition written out, and what option files may make of them."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ast_plugin.errors import DataError, MemoryShortage, OptionError, ShapeError
from ast_plugin.evaluation import tiling
from ast_plugin.evaluation.protocols import PROTOCOLS, read_protocol
from ast_plugin.metrics import psnr_rgb, psnr_y_matlab, ssim_rgb, ssim_y_matlab
from ast_plugin.ops import use_backend
from ast_plugin.options import sections


class Blur(nn.Module):
    """Convolution with a receptive field of ±2 pixels plus the global mean; not equivariant under flips."""

    def __init__(self, enlarge=1):
        super().__init__()
        kernel = torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(0)) / 20
        self.kernel = nn.Parameter(kernel)
        self.enlarge = enlarge
        self.shapes = []

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        self.shapes.append(tuple(x.shape))
        result = x + F.conv2d(x, self.kernel, padding=2) + x.mean((2, 3), keepdim=True) / 4
        return result.repeat_interleave(self.enlarge, -1).repeat_interleave(self.enlarge, -2)


def image(height, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random((1, 3, height, width), dtype=np.float32))


def apply(network, x):
    with torch.no_grad():
        return network.eval()(x)


@pytest.mark.parametrize(('height', 'width', 'side'), [(100, 61, 128), (130, 90, 256), (128, 128, 128), (7, 129, 256)])
def test_spad_pads_zeros_to_a_square(height, width, side):
    network, lq = Blur(), image(height, width)
    square = torch.zeros(1, 3, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, :, top : top + height, left : left + width] = lq
    expected = apply(network, square)[:, :, top : top + height, left : left + width]
    restored = read_protocol('spad').restore(network, lq)
    levels = (restored * 255).round()
    torch.testing.assert_close(levels, (expected.clamp(0, 1) * 255).round(), rtol=0, atol=0)
    torch.testing.assert_close(restored, levels / 255, rtol=0, atol=0)
    assert network.shapes[-1] == (1, 3, side, side)


def averaged_tiles(network, lq, tile, overlap):
    """Reference implementation of the official protocol for raindrops and haze."""
    total, count = torch.zeros_like(lq), torch.zeros_like(lq)
    starts = []
    for size in lq.shape[-2:]:
        starts.append([start for start in range(0, size, tile - overlap) if start + tile < size] + [size - tile])
    for top in starts[0]:
        for left in starts[1]:
            place = (..., slice(top, top + tile), slice(left, left + tile))
            total[place] += apply(network, lq[place])
            count[place] += 1
    return (total / count).clamp(0, 1)


@pytest.mark.parametrize(
    ('options', 'tile', 'overlap', 'size'),
    [
        ('agan', 384, 80, (390, 700)),
        ({'type': 'densehaze', 'tile': 144, 'overlap': 48}, 144, 48, (150, 200)),  # the authors' at an eighth
    ],
)
def test_agan_and_densehaze_average_tiles(options, tile, overlap, size):
    network, lq = Blur(), image(*size)
    restored = read_protocol(options).restore(network, lq)
    torch.testing.assert_close(restored, averaged_tiles(network, lq, tile, overlap), rtol=0, atol=5e-7)
    assert set(network.shapes) == {(1, 3, tile, tile)}
    haze = PROTOCOLS['densehaze']
    assert (haze.tile, haze.overlap, haze.blend, haze.round) == (1152, 384, 'mean', False)


@pytest.mark.parametrize(('height', 'width'), [(1, 1), (37, 61)])
def test_one_pass(height, width):
    network, lq = Blur(), image(height, width)
    expected = apply(network, lq).clamp(0, 1)
    rounded = (expected * 255).round() / 255
    for name, result in (('whole', expected), ('tiled', expected), ('basicsr', rounded)):
        torch.testing.assert_close(read_protocol(name).restore(network, lq), result, rtol=0, atol=0)
        assert network.shapes[-1] == (1, 3, height, width)


def test_tiled_follows_the_free_memory(monkeypatch):
    monkeypatch.setattr(tiling, 'available_bytes', lambda device: 10**7)
    monkeypatch.setattr(tiling, 'peak_bytes', lambda network, image: 150 * 128 * 128)
    network, notes = Blur(), []
    lq = image(130, 500)
    restored = read_protocol('tiled').restore(network, lq, on_note=notes.append)
    assert {shape[2:] for shape in network.shapes} == {(128, 128)}
    assert len(notes) == 1 and 'restored in tiles of 128' in notes[0]
    monkeypatch.setattr(tiling, 'peak_bytes', lambda network, image: 10 * 128 * 128)
    for backend in ('auto', 'reference'):  # measured once for each backend
        with use_backend(backend):
            read_protocol('tiled').restore(network, lq, on_note=notes.append)
        assert len(notes) == 2
    expected = read_protocol({'type': 'tiled', 'tile': 128, 'overlap': 32}).restore(network, lq)
    torch.testing.assert_close(restored, expected)


TURNS = [
    lambda x: x,
    lambda x: x.flip(-1),
    lambda x: x.flip(-2),
    lambda x: x.flip(-1, -2),
    lambda x: x.transpose(-1, -2),
    lambda x: x.rot90(1, (-2, -1)),
    lambda x: x.rot90(-1, (-2, -1)),
    lambda x: x.rot90(1, (-2, -1)).flip(-1),
]


@pytest.mark.parametrize(
    'options', [{'type': 'whole'}, {'type': 'agan', 'tile': 24, 'overlap': 5}, {'type': 'spad', 'round': False}]
)
def test_self_ensemble_is_a_switch_on_any(options):
    """The self-ensemble is equivariant under flips and rotations, unlike the network."""
    # Square, so that padding and tiles are symmetric; values for which the network output stays in [0, 1].
    network, lq = Blur(), image(43, 43) / 4 + 0.2
    plain, ensemble = (read_protocol({**options, 'self_ensemble': switch}) for switch in (False, True))
    results = [ensemble.restore(network, turn(lq)) for turn in TURNS]
    backs = [next(back for back in TURNS if torch.equal(back(turn(lq)), lq)) for turn in TURNS]
    parts = [back(plain.restore(network, turn(lq).contiguous())) for turn, back in zip(TURNS, backs, strict=True)]
    assert all(part.min() > 0 and part.max() < 1 for part in parts)
    torch.testing.assert_close(results[0], sum(parts) / 8, rtol=0, atol=2e-6)
    for turn, result in zip(TURNS, results, strict=True):
        torch.testing.assert_close(result, turn(results[0]), rtol=0, atol=2e-6)
    assert (parts[0] - parts[1]).abs().max() > 0.002


def test_self_ensemble_of_a_portrait():
    network = Blur()
    lq = image(20, 33)
    restored = read_protocol({'type': 'whole', 'self_ensemble': True}).restore(network, lq)
    assert restored.shape == lq.shape
    assert {shape[2:] for shape in network.shapes} == {(20, 33), (33, 20)} and len(network.shapes) == 8


@pytest.mark.parametrize('options', ['spad', {'type': 'whole', 'self_ensemble': True}, {'type': 'agan', 'tile': 90}])
def test_networks_that_enlarge(options):
    lq = image(100, 61)
    assert read_protocol(options).restore(Blur(enlarge=2), lq).shape == (1, 3, 200, 122)
    doubled = read_protocol(options).restore(nn.Upsample(scale_factor=2), lq)
    torch.testing.assert_close(doubled, F.interpolate(lq, scale_factor=2), rtol=0, atol=0.002)


@pytest.mark.parametrize('self_ensemble', [False, True])
def test_processing_resolution(self_ensemble):
    protocol = read_protocol({'type': 'whole', 'processing_resolution': 12, 'self_ensemble': self_ensemble})
    sizes = []

    def darken(patches):
        sizes.append(tuple(sorted(patches.shape[-2:])))
        return patches - 0.125

    lq = image(24, 40).clamp(0.125, 1)
    torch.testing.assert_close(protocol.restore(darken, lq), lq - 0.125)
    assert protocol.restore(darken, lq.half()).dtype == torch.float32
    assert set(sizes) == {(12, 20)}

    def darken_to_the_right(patches):  # the mean with the mirror image is even
        return patches - torch.linspace(0, 0.25, patches.shape[-1])

    torch.testing.assert_close(protocol.restore(darken_to_the_right, lq), lq - 0.125)
    with pytest.raises(ShapeError, match=r'processing_resolution needs results of the size of their inputs'):
        protocol.restore(lambda patches: patches.repeat_interleave(2, -1).repeat_interleave(2, -2), lq)


def test_network_and_input_are_left_as_they_were():
    network, lq = Blur().train(), image(9, 9)
    before = lq.clone()
    for name in PROTOCOLS:
        restored = read_protocol(name).restore(network, lq)
        assert network.training and torch.equal(lq, before) and restored.dtype == torch.float32
    assert read_protocol('whole').restore(nn.Identity(), lq).data_ptr() != lq.data_ptr()
    with pytest.raises(ShapeError):
        read_protocol('whole').restore(network, torch.rand(1, 4, 9, 9))


def test_rounding_before_measuring():
    clean = torch.full((1, 3, 16, 16), 0.5)
    close = clean + 0.0002
    assert read_protocol('agan').measure(close, clean)['psnr'] == pytest.approx(20 * math.log10(1 / 0.0002), abs=0.01)
    assert read_protocol('spad').measure(close, clean) == {'psnr': math.inf, 'ssim': 1}
    rounded = read_protocol({'type': 'agan', 'round': True})
    assert rounded.measure(close, clean) == {'psnr': math.inf, 'ssim': 1}
    own = {'mine': {'type': 'calculate_psnr', 'crop_border': 2}}
    for name, finite in (('whole', True), ('basicsr', False)):
        assert math.isfinite(read_protocol(name).measure(close, clean, own)['mine']) == finite


def test_each_protocol_has_its_definition():
    restored, clean = image(40, 30), image(40, 30, seed=1)
    eight = [(values * 255).round().byte() for values in (restored, clean)]
    expected = {'psnr': psnr_y_matlab(*eight), 'ssim': ssim_y_matlab(*eight)}
    assert read_protocol('spad').measure(restored, clean) == pytest.approx(expected)
    for name in ('agan', 'densehaze', 'whole', 'tiled'):
        expected = {'psnr': psnr_rgb(restored, clean), 'ssim': ssim_rgb(restored, clean)}
        assert read_protocol(name).measure(restored, clean) == pytest.approx(expected)
    assert read_protocol('basicsr').measure(restored, clean) == {}


def test_metric_that_fails_is_named():
    small = image(5, 6)
    with pytest.raises(ShapeError, match=r'^ours: the images have 6x5 pixels: SSIM needs at least 11'):
        read_protocol('spad').measure(small, small, {'ours': {'type': 'calculate_ssim_matlab'}})
    niqe = {'theirs': {'type': 'calculate_niqe', 'crop_border': 0}}
    with pytest.raises(DataError, match=r'^theirs: calculate_niqe fails on an image of 6x5: '):
        read_protocol('basicsr').measure(small, small, niqe)


def test_non_finite_results_are_rejected():
    for value in (math.nan, math.inf):
        with pytest.raises(DataError, match='not finite'):
            read_protocol('whole').restore(lambda x, value=value: x * value, torch.ones(1, 3, 4, 4))


class Forgetful(Blur):
    """Network that raises PyTorch's out-of-memory error on a CPU above a number of pixels."""

    largest = 2 * 32 * 32

    def forward(self, x):
        if x.shape[0] * x.shape[-1] * x.shape[-2] > self.largest:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return super().forward(x)


def test_fewer_tiles_at_once_in_short_memory():
    notes, lq = [], image(70, 70)
    options = {'type': 'agan', 'tile': 32, 'overlap': 8}
    restored = read_protocol({**options, 'batch': 8}).restore(Forgetful(), lq, on_note=notes.append)
    torch.testing.assert_close(restored, read_protocol(options).restore(Blur(), lq))
    assert 'trying batches of 4' in notes[0] and 'trying batches of 2' in notes[1] and len(notes) == 2


def test_pass_that_does_not_fit():
    with pytest.raises(OptionError, match=r'70x60 does not fit in the memory of cpu.*tiled'):
        read_protocol('whole').restore(Forgetful(), image(60, 70))


def test_result_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(tiling, 'available_bytes', lambda device: 2 * 4 * 3 * 60 * 70 - 1)
    network = Blur()
    with pytest.raises(MemoryShortage, match='70x60 does not fit in memory: its result needs'):
        read_protocol('tiled').restore(network, image(60, 70))
    assert not network.shapes


@pytest.mark.parametrize(('multiple', 'advice'), [(8, 'choose a tile size below 70'), (128, 'would not help')])
def test_advice_where_memory_is_short(multiple, advice):
    network = Forgetful()
    network.takes_any_size, network.size_multiple = True, multiple
    with pytest.raises(MemoryShortage, match=advice):
        read_protocol('tiled').restore(network, image(60, 70))


@pytest.mark.parametrize('square', [10**6, 10**9])
def test_square_that_does_not_fit(square):
    with pytest.raises(OptionError, match=f'8x4, zero-padded to {square}x{square}, does not fit.*smaller square'):
        read_protocol({'type': 'spad', 'square': square}).restore(nn.Identity(), image(4, 8))


@pytest.mark.parametrize(
    ('value', 'message'),
    [
        ('agn', 'protocol: expected one of basicsr, .*, got agn, did you mean agan'),
        ({'tile': 3}, 'protocol: expected one of .*, got None'),
        ({'type': ['agan']}, r"protocol: expected one of .*, got \['agan'\]"),
        ({'type': 'whole', 'overlap': 8}, r'protocol\.overlap: no effect, as whole does not use tiles; set tile'),
        ({'type': 'agan', 'tile': None, 'batch': 2}, r'protocol\.batch: no effect, as agan does not use tiles'),
        ({'type': 'agan', 'til': 3}, "agan: .*'til'"),
        ({'type': 'agan', 'tile': 64}, 'agan: overlap is 80 and tile is 64'),
        ({'type': 'agan', 'tile': 'all'}, "tile is 'all': expected the tile size in pixels, or auto"),
        ({'type': 'tiled', 'overlap': -1}, 'overlap is -1'),
        ({'type': 'agan', 'batch': 0}, 'batch is 0'),
        ({'type': 'spad', 'square': 0}, 'spad: square is 0'),
        ({'type': 'whole', 'processing_resolution': 0}, 'whole: processing_resolution is 0: expected at least 1'),
    ],
)
def test_invalid_protocols(value, message):
    with pytest.raises(OptionError, match=message):
        read_protocol(value)


def test_invalid_images():
    for wrong in (torch.rand(3, 8, 8), torch.rand(1, 3, 0, 8)):
        with pytest.raises(ShapeError, match='expected non-empty images'):
            read_protocol('whole').restore(nn.Identity(), wrong)


@pytest.mark.parametrize(
    ('options', 'line'),
    [
        ({'type': 'whole', 'tile': 64}, 'whole: tiles of 64, overlap 16, ramp; not rounded'),
        ({'type': 'tiled'}, 'tiled: one pass, or tiles if memory is low, overlap 1/4 tile, ramp; not rounded'),
        (
            {'type': 'whole', 'processing_resolution': 9},
            'whole: one pass; downscaled to a shorter side of 9, averaged with its mirror image; not rounded',
        ),
        (
            {'type': 'spad', 'self_ensemble': True},
            'spad: zero-padded to a square, side a multiple of 128; one pass; self-ensemble of eight flips and '
            'rotations; rounded to 8 bits',
        ),
    ],
)
def test_description(options, line):
    assert read_protocol(options).describe() == line


def test_schema_matches_protocols():
    assert set(get_args(sections.ProtocolName)) == set(PROTOCOLS)
    for key in set(sections.ProtocolOptions.model_fields) - {'type'}:
        value = getattr(PROTOCOLS['agan'], key)
        assert getattr(read_protocol({'type': 'agan', key: value}), key) == value
