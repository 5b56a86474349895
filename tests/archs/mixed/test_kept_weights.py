"""Mixed with the weights that the base had: how close it starts, and that they go round."""

import pytest
import torch

from ast_plugin.archs.blocks import DenseAttention
from ast_plugin.archs.mixed.adapters import keep_weights
from ast_plugin.archs.mixed.mixed_arch import Mixed, build_base
from ast_plugin.checkpoints import save_torch, save_weights
from ast_plugin.errors import CheckpointError, OptionError
from ast_plugin.ops import pad_to_multiple
from tests.archs.mixed.networks import (
    AST,
    ATTENTIONS,
    BLOCK,
    EDSR,
    FEED_FORWARDS,
    ODD,
    SWINIR,
    excite,
    picture,
    relative,
)


@pytest.fixture
def swinir(tmp_path):
    """A SwinIR whose attention matters, and its weights file."""
    network = excite(build_base(SWINIR)).eval()
    path = tmp_path / 'swinir.pth'
    save_torch(path, {'params': network.state_dict()})
    return network, str(path)


def difference(network, mixed, size):
    x = picture(*size)
    with torch.no_grad():
        want = network(pad_to_multiple(x, 4))[..., : size[0], : size[1]]
        return relative(mixed(x), want)


def test_keep_weights_starts_as_close_as_asked(swinir):
    network, path = swinir
    rule = {'match': ATTENTIONS, 'with': {'type': 'ASSA'}}
    kept = Mixed(SWINIR, [{**rule, 'keep_weights': True, 'dense_share': 0.999}], base_weights=path).eval()
    less = Mixed(SWINIR, [{**rule, 'keep_weights': True, 'dense_share': 0.9}], base_weights=path).eval()
    fresh = Mixed(SWINIR, [rule], base_weights=path).eval()
    for size in ODD:
        near, further, far = (difference(network, mixed, size) for mixed in (kept, less, fresh))
        assert 0 < near < 0.01
        assert near < further < far
        assert far > 0.01
    gates = [module.gate.softmax(0)[0].item() for module in kept.modules() if hasattr(module, 'gate')]
    assert gates == pytest.approx([0.999] * 4)


def test_windows_with_as_many_tokens_as_channels():
    """16 tokens of 16 channels look like a mask of 16 x 16."""
    options = {**SWINIR, 'embed_dim': 16}
    torch.manual_seed(3)
    network = build_base(options).eval()
    torch.manual_seed(3)
    rules = [{'match': ATTENTIONS, 'with': {'type': 'DenseAttention'}, 'keep_weights': True}]
    mixed = Mixed(options, rules)
    for theirs in (network, mixed):  # the same large weights in both
        for parameter in theirs.parameters():
            parameter.data *= 3
    assert difference(network, mixed.eval(), ODD[0]) < 1e-5


def test_the_share_is_099_if_not_said():
    network = Mixed(SWINIR, [{'match': ATTENTIONS, 'with': {'type': 'ASSA'}, 'keep_weights': True}])
    gates = [module.gate.softmax(0)[0].item() for module in network.modules() if hasattr(module, 'gate')]
    assert gates == pytest.approx([0.99] * 4)


def test_what_computes_the_same_is_the_same(swinir):
    network, path = swinir
    rules = [
        {'match': ATTENTIONS, 'with': {'type': 'DenseAttention'}, 'keep_weights': True},
        {'match': FEED_FORWARDS, 'with': {'type': 'MLP'}, 'keep_weights': True},
    ]
    mixed = Mixed(SWINIR, rules, base_weights=path).eval()
    assert all(difference(network, mixed, size) < 1e-5 for size in ODD)


def test_another_scale_of_the_queries_is_kept(tmp_path):
    options = {**SWINIR, 'qk_scale': 0.9, 'qkv_bias': False}
    network = excite(build_base(options)).eval()
    save_torch(tmp_path / 'w.pth', network.state_dict())
    rules = [{'match': ATTENTIONS, 'with': {'type': 'DenseAttention'}, 'keep_weights': True}]
    mixed = Mixed(options, rules, base_weights=str(tmp_path / 'w.pth')).eval()
    assert mixed.exchanges[0].options['qkv_bias'] is False
    assert difference(network, mixed, ODD[0]) < 1e-5


def test_another_order_of_position_bias(swinir):
    """A table that is indexed backwards, as (key - query) instead of (query - key), says the same thing otherwise."""
    network, _ = swinir
    attention = network.layers[0].residual_group.blocks[0].attn
    block = DenseAttention(8, 2, 4)
    keep_weights(block, attention)
    want = block.position_bias.detach().clone()
    attention.relative_position_bias_table.data = attention.relative_position_bias_table.data.flip(0)
    attention.relative_position_index = 48 - attention.relative_position_index
    keep_weights(block, attention)
    assert torch.equal(block.position_bias, want)
    attention.relative_position_index[0, 0] = 3
    with pytest.raises(OptionError, match='depends on more than relative position'):
        keep_weights(block, attention)


def test_our_own_attention_is_read_too():
    rules = [{'match': '**.attn', 'with': {'type': 'ASSA'}, 'keep_weights': True, 'dense_share': 0.5}]
    torch.manual_seed(1)
    network = build_base(AST).eval()
    torch.manual_seed(1)
    mixed = Mixed(AST, rules).eval()
    x = picture(20, 33)
    with torch.no_grad():
        assert relative(mixed(x), network(x)) < 1e-6


def test_a_wrapped_network_starts_as_it_was():
    torch.manual_seed(5)
    network = build_base(EDSR).eval()
    torch.manual_seed(5)
    mixed = Mixed(EDSR, [{'match': 'body.*', 'op': 'wrap', 'with': {'type': 'ASSA', 'window_size': 4}}]).eval()
    x = picture(9, 14)
    with torch.no_grad():
        torch.testing.assert_close(mixed(x), network(x))
    mixed(x).sum().backward()
    assert all(layer.gain.grad.any() for layer in mixed.base.body)


def test_weights_go_round(tmp_path, swinir):
    network, path = swinir
    rules = [{'match': ATTENTIONS, 'with': {'type': 'ASSA'}, 'keep_weights': True}]
    first = excite(Mixed(SWINIR, rules, base_weights=path))
    second = Mixed(SWINIR, rules)
    second.load_state_dict(first.state_dict())
    x = picture(*ODD[0])
    with torch.no_grad():
        assert torch.equal(first.eval()(x), second.eval()(x))
    with pytest.raises(CheckpointError, match=r'given as network_g\.base_weights'):
        second.load_state_dict(network.state_dict())
    save_weights(tmp_path / 'w.safetensors', network.state_dict(), SWINIR)
    third = Mixed(SWINIR, rules, base_weights=str(tmp_path / 'w.safetensors'))
    assert torch.equal(third.base.conv_first.weight, network.conv_first.weight)


def test_base_weights_that_do_not_fit(tmp_path, swinir):
    _, path = swinir
    rules = [{'match': 'body.*', 'op': 'append', 'with': BLOCK}]
    with pytest.raises(CheckpointError, match=r'base_weights: .*swinir\.pth: weights of another network than EDSR'):
        Mixed(EDSR, rules, base_weights=path)
    with pytest.raises(CheckpointError, match=r'missing\.pth does not exist'):
        Mixed(EDSR, rules, base_weights=str(tmp_path / 'missing.pth'))
