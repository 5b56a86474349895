"""Calls of the blocks in Mixed: each operation, and token sizes under copying, threads and compilation."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm
from torch.utils.checkpoint import checkpoint

from ast_plugin.archs.mixed.block_registry import BLOCKS
from ast_plugin.archs.mixed.mixed_arch import Mixed, build_base
from ast_plugin.models import network_switches
from tests.archs.tiny_networks import ATTENTIONS, EDSR, FEED_FORWARDS, SWINIR, TokenNet, excite, image, relative, rule


@pytest.fixture
def recorder(monkeypatch):
    """A third-party block that doubles its input and records its calls."""
    seen = []

    class Doubling(nn.Module):
        works_in, replaces = 'tokens', ('tokens', 'maps')

        def __init__(self, channels: int) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.ones(1))

        def forward(self, x, size):
            seen.append((tuple(x.shape), size))
            return 2 * self.one * x

    monkeypatch.setitem(BLOCKS._module_dict, 'Doubling', Doubling)
    return seen


@pytest.mark.parametrize(
    ('keys', 'expected'),
    [
        ({'op': 'replace'}, lambda layer, x: 2 * x),
        ({'op': 'append'}, lambda layer, x: 2 * layer(x)),
        ({'op': 'prepend'}, lambda layer, x: layer(2 * x)),
        (
            {'op': 'wrap', 'gain': 0.5},
            lambda layer, x: layer(x) + layer_norm(layer(x).permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2),
        ),
    ],
)
def test_operations(recorder, keys, expected):
    torch.manual_seed(2)
    layer = build_base(EDSR).body[1]
    torch.manual_seed(2)
    mixed = Mixed(EDSR, [rule('body.1', 'Doubling', keys)])
    x = torch.randn(2, 8, 3, 5)
    torch.testing.assert_close(mixed.base.body[1](x), expected(layer, x))
    assert recorder[-1] == ((2, 15, 8), (3, 5))


@pytest.mark.parametrize('way', ['pair', 'swapped', 'numbers', 'own numbers', 'map'])
def test_tokens_get_their_size_from_a_caller(registered, recorder, way):
    registered(TokenNet=TokenNet)
    network = Mixed({'type': 'TokenNet', 'way': way}, [rule('blocks.*.ffn', 'Doubling')])
    for size in ((4, 9), (9, 4), (6, 6), (1, 36)):  # as many tokens each time
        recorder.clear()
        network(image(*size, batch=2))
        assert recorder == [((2, 36, 8), size)] * 2


def test_neighbours_are_those_of_the_map(registered):
    """FRFN on tokens gives the same result as on the feature map."""
    registered(TokenNet=TokenNet)
    network = Mixed({'type': 'TokenNet', 'way': 'own numbers'}, [rule('blocks.0.ffn', 'FRFN')])
    layer, tokens = network.base.blocks[0], torch.rand(1, 55, 8)
    want = tokens + layer.ffn.block(tokens.reshape(1, 5, 11, 8)).flatten(1, 2)
    assert torch.equal(layer(tokens, 5, 11), want)


@pytest.fixture(scope='module')
def token_network():
    torch.manual_seed(0)
    return excite(Mixed(SWINIR, [rule(ATTENTIONS), rule(FEED_FORWARDS, 'FRFN', mlp_ratio=2)])).eval()


def test_threads_do_not_mix_their_sizes(token_network):
    def run(x):
        with torch.no_grad():
            return token_network(x)

    images = [image(8, 4 * n) for n in range(1, 5)]
    with ThreadPoolExecutor(len(images)) as pool:
        got = list(pool.map(run, 5 * images))
    assert all(map(torch.equal, got, 5 * list(map(run, images))))


def test_moves_and_copies_like_any_module(token_network):
    x = image(9, 14)
    with torch.no_grad():
        want = token_network(x)
        assert relative(copy.deepcopy(token_network).double()(x.double()).float(), want) < 1e-4
        assert relative(copy.deepcopy(token_network).to(memory_format=torch.channels_last)(x), want) < 1e-5
        assert torch.equal(pickle.loads(pickle.dumps(token_network))(x), want)


def test_replicas_have_their_own_sizes(token_network):
    """Replicas as in nn.DataParallel: shallow copies with separate children, each run in a thread."""

    def replica(module):
        twin = module._replicate_for_data_parallel()
        for key, child in module._modules.items():
            twin._modules[key] = None if child is None else replica(child)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                setattr(twin, key, parameter.detach())
        twin._buffers.update(module._buffers)
        return twin

    x = image(8, 12)
    with torch.no_grad():
        assert torch.equal(replica(token_network)(x), token_network(x))


def test_checkpoints_recompute_with_their_size(token_network):
    def gradients(run):
        token_network.zero_grad()
        run().square().sum().backward()
        return [parameter.grad.clone() for parameter in token_network.parameters()]

    x = image(8, 20).requires_grad_()
    plain = gradients(lambda: token_network(x))
    for reentrant in (False, True):
        again = gradients(lambda reentrant=reentrant: checkpoint(token_network, x, use_reentrant=reentrant))
        torch.testing.assert_close(again, plain)


@pytest.mark.parametrize('way', ['map', 'pair'])
def test_checkpointed_blocks_know_their_size(registered, way):
    registered(TokenNet=TokenNet)
    network = Mixed({'type': 'TokenNet', 'way': way}, [rule('blocks.*.ffn', 'FRFN')])
    saving = network_switches.apply(copy.deepcopy(network), {'gradient_checkpointing': True})
    wide, high = image(8, 12), image(12, 8)  # as many tokens: the size has to be that of each pass
    for each in (network, saving):
        (each(wide).square().mean() + each(high).square().mean()).backward()
    for plain, again in zip(network.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(again.grad, plain.grad)


def test_compiled_layers_know_their_size(token_network):
    torch.compiler.reset()
    layer = token_network.base.layers[0].residual_group.blocks[0]
    x = torch.randn(1, 96, 8)
    with torch.no_grad():
        got = torch.compile(layer, backend='eager', fullgraph=True)(x, (8, 12))
        torch.testing.assert_close(got, layer(x, (8, 12)))
