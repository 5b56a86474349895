"""Mixed with weights of the base: closeness to the base at the start, and saving and loading."""

import pytest
import torch

from ast_plugin.archs.blocks import DenseAttention
from ast_plugin.archs.mixed.adapters import keep_weights
from ast_plugin.archs.mixed.mixed_arch import Mixed, build_base
from ast_plugin.checkpoints import save_torch, save_weights
from ast_plugin.errors import CheckpointError, OptionError
from ast_plugin.ops import pad_to_multiple
from tests.archs.tiny_networks import (
    AST,
    ATTENTIONS,
    EDSR,
    FEED_FORWARDS,
    KEEP,
    ODD,
    SWINIR,
    excite,
    image,
    relative,
    rule,
)


@pytest.fixture
def swinir(tmp_path):
    """A function that returns a SwinIR whose attention affects the output, and its weights file."""

    def build(**options):
        network = excite(build_base(SWINIR | options)).eval()
        save_torch(tmp_path / 'swinir.pth', {'params': network.state_dict()})
        return network, str(tmp_path / 'swinir.pth')

    return build


def difference(network, mixed, size):
    x = image(*size, batch=2)
    with torch.no_grad():
        want = network(pad_to_multiple(x, 4))[..., : size[0], : size[1]]
        return relative(mixed(x), want)


def test_initial_error_by_dense_share(swinir):
    network, path = swinir()
    kept, less, default, fresh = (
        Mixed(SWINIR, [rule(ATTENTIONS, keys=keys)], base_weights=path).eval()
        for keys in ({**KEEP, 'dense_share': 0.999}, {**KEEP, 'dense_share': 0.9}, KEEP, {})
    )
    near, further, far = (difference(network, mixed, ODD[0]) for mixed in (kept, less, fresh))
    assert 0 < near < min(0.01, further) and max(0.01, further) < far
    for mixed, share in ((kept, 0.999), (default, 0.99)):
        gates = [module.gate.softmax(0)[0].item() for module in mixed.modules() if hasattr(module, 'gate')]
        assert gates == pytest.approx([share] * 4)


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'embed_dim': 16},  # 16 tokens of 16 channels have the shape of a mask, 16 × 16
        {'qk_scale': 0.9, 'qkv_bias': False},
    ],
)
def test_equal_blocks_compute_the_same(swinir, options):
    network, path = swinir(**options)
    rules = [rule(ATTENTIONS, 'DenseAttention', KEEP), rule(FEED_FORWARDS, 'MLP', KEEP)]
    mixed = Mixed(SWINIR | options, rules, base_weights=path).eval()
    assert mixed.exchanges[0].options['qkv_bias'] == options.get('qkv_bias', True)
    assert difference(network, mixed, ODD[1]) < 1e-5


def test_another_order_of_position_bias(swinir):
    """A table indexed by (key - query) instead of (query - key) is converted."""
    network, _ = swinir()
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


@pytest.mark.parametrize(
    ('base', 'one'),
    [
        (AST, rule(keys={**KEEP, 'dense_share': 0.5})),
        (EDSR, rule('body.*', keys={'op': 'wrap'}, window_size=4)),
    ],
)
def test_initially_unchanged_networks(base, one):
    torch.manual_seed(1)
    network = build_base(base).eval()
    torch.manual_seed(1)
    mixed = Mixed(base, [one]).eval()
    x = image(20, 33)
    with torch.no_grad():
        assert relative(mixed(x), network(x)) < 1e-6
    mixed(x).sum().backward()
    gains = [module.gain for module in mixed.modules() if getattr(module, 'gain', None) is not None]
    assert all(gain.grad.any() for gain in gains) and bool(gains) == (base is EDSR)


def test_weights_round_trip(tmp_path, swinir):
    network, path = swinir()
    rules = [rule(ATTENTIONS, keys=KEEP)]
    first = excite(Mixed(SWINIR, rules, base_weights=path)).eval()
    second = Mixed(SWINIR, rules).eval()
    second.load_state_dict(first.state_dict())
    x = image(*ODD[0])
    with torch.no_grad():
        assert torch.equal(first(x), second(x))
    with pytest.raises(CheckpointError, match=r'specify weights of the base alone as network_g\.base_weights'):
        second.load_state_dict(network.state_dict())
    with pytest.raises(CheckpointError, match=r'base_weights: .*swinir\.pth: the weights do not match EDSR'):
        Mixed(EDSR, [rule('body.*', 'MLP')], base_weights=path)
    save_weights(tmp_path / 'w.safetensors', network.state_dict(), SWINIR)
    third = Mixed(SWINIR, rules, base_weights=str(tmp_path / 'w.safetensors'))
    assert torch.equal(third.base.conv_first.weight, network.conv_first.weight)
