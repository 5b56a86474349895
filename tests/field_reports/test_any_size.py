"""Networks accept images of any size in every command; traces are correct at other sizes, or raise."""

import warnings

import numpy as np
import pytest
import torch

from ast_plugin.archs.ast_arch import AST
from ast_plugin.archs.networks import AnySize, any_size, build_network, load_network
from ast_plugin.evaluation.protocols import PROTOCOLS, read_protocol
from ast_plugin.evaluation.restorer import Restorer
from ast_plugin.ops import attention_weights, use_backend
from ast_plugin.ops.windows import pad_to_multiple
from tests.archs.tiny_networks import AST as SMALL_AST
from tests.archs.tiny_networks import RRDBNET, SWINIR, excite, rule

SWINIR_7 = {**SWINIR, 'window_size': 7, 'img_size': 28}
TILED = {'type': 'tiled', 'tile': 30, 'overlap': 5}
MIXED = {'type': 'Mixed', 'base': SWINIR, 'mix': [rule('**.attn')]}


def random(height, width, channels=3, batch=1):
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ('options', 'scale', 'protocols'),
    [
        (SWINIR_7, 1, [*PROTOCOLS, TILED]),
        (RRDBNET, 1, ['whole', TILED]),
        ({**RRDBNET, 'scale': 2}, 2, ['whole', TILED]),
        ({**SWINIR, 'upscale': 2, 'upsampler': 'pixelshuffledirect'}, 2, ['whole', TILED]),
    ],
)
def test_protocols_restore_any_size(options, scale, protocols):
    network, image = load_network(options), random(37, 50)
    for protocol in protocols:
        assert read_protocol(protocol).restore(network, image).shape == (1, 3, scale * 37, scale * 50), protocol


@pytest.mark.parametrize('size', [(1, 1), (3, 2), (37, 50)])
@pytest.mark.parametrize('options', [SWINIR, RRDBNET], ids=lambda options: options['type'])
def test_any_size_is_the_padded_network(options, size):
    network = load_network(options)
    image = random(*size)
    with torch.no_grad():
        want = network(pad_to_multiple(image, 4))[..., : size[0], : size[1]]
        assert torch.equal(PROTOCOLS['whole'].restore(network, image), want.clamp(0, 1))


def test_any_size_wraps_picky_networks_once(monkeypatch):
    network = build_network(SMALL_AST)
    assert any_size(network) is network
    picky = build_network(SWINIR)
    assert isinstance(any_size(picky), AnySize)
    monkeypatch.setattr('ast_plugin.archs.networks.try_sizes', None)  # sizes are tried once
    assert any_size(any_size(picky)).network is picky and any_size(picky).size_multiple == 4


def test_restorer_takes_any_size():
    restorer, image = Restorer(build_network(SWINIR), device='cpu'), np.zeros((7, 9, 3), np.uint8)
    assert restorer.restore(image).shape == image.shape
    assert restorer.spread(image.astype(np.float32)).shape == (7, 9)


def traced(network, size, dtype=torch.float32):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')
        return torch.jit.trace(network, random(*size).to(dtype), check_trace=False)


OTHERS = [random(16, 16, batch=2), random(32, 32), random(32, 8), random(8, 32), random(20, 37), random(4, 4, batch=4)]


@pytest.mark.parametrize(
    ('network', 'size'),
    [
        (lambda: load_network(MIXED), (13, 22)),
        (lambda: load_network({**MIXED, 'mix': [rule('**.mlp', 'FRFN')]}), (16, 16)),
        (lambda: any_size(load_network(SWINIR)), (13, 22)),
        (lambda: any_size(load_network(RRDBNET)), (13, 22)),
    ],
    ids=['mixed attention', 'mixed ffn', 'padded SwinIR', 'padded RRDBNet'],
)
def test_trace_of_others_is_right_or_raises(network, size, tmp_path):
    torch.manual_seed(0)
    network = excite(network())
    traced(network, size).save(tmp_path / 'trace.pt')
    trace, num_raised = torch.jit.load(tmp_path / 'trace.pt'), 0
    for image in [random(*size), *OTHERS]:
        with torch.no_grad():
            try:
                got = trace(image)
            except torch.jit.Error as error:
                assert 'this network was traced for [1, 3, 16, ' in str(error)
                num_raised += 1
            else:
                torch.testing.assert_close(got, network(image))
    assert num_raised >= len(OTHERS) - 1


@pytest.mark.parametrize(('attention', 'size'), [('topk', (13, 22)), ('assa', (32, 32))])
def test_trace_of_ast_takes_any_size(attention, size):
    torch.manual_seed(0)
    network = excite(AST(**{key: value for key, value in SMALL_AST.items() if key != 'type'}, attention=attention))
    network = network.double().eval()
    with use_backend('reference'), torch.no_grad():
        trace = traced(network, size, torch.float64)
        for image in [random(*size), *OTHERS, random(1, 1), random(2, 3)]:
            torch.testing.assert_close(trace(image.double()), network(image.double()))


def test_trace_of_topk_refuses_other_windows():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trace = torch.jit.trace(lambda scores: attention_weights(scores, 'topk'), torch.rand(2, 4, 4))
    scores = torch.rand(3, 5, 4)
    assert torch.equal(trace(scores), attention_weights(scores, 'topk'))
    with pytest.raises(torch.jit.Error, match='traced for'):
        trace(torch.rand(2, 8, 8))
