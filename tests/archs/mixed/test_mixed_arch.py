"""Mixed: blocks in networks of BasicSR and others, weight transfer, token sizes from the caller."""

import copy

import pytest
import torch
from torch import nn

from ast_plugin.archs.mixed.mixed_arch import Mixed, build_base
from ast_plugin.errors import ShapeError
from ast_plugin.ops import pad_to_multiple
from tests.archs.tiny_networks import (
    AST,
    ATTENTIONS,
    EDSR,
    FEED_FORWARDS,
    KEEP,
    RCAN,
    RRDBNET,
    SMALL,
    SWINIR,
    Timm,
    image,
    rule,
)

APPEND, WRAP = {'op': 'append'}, {'op': 'wrap'}
LINEAR = ('ASSA', 'FRFN', 'MLP', 'ASTBlock')  # blocks of linear layers


@pytest.mark.parametrize(
    ('base', 'one', 'kind', 'count'),
    [
        (SWINIR, rule(ATTENTIONS), 'windows', 4),
        (SWINIR, rule(FEED_FORWARDS, 'FRFN'), 'tokens', 4),
        (SWINIR, rule('layers.*.residual_group.blocks.*', 'ASTBlock'), 'tokens', 4),
        (SWINIR, rule('class:RSTB', keys=APPEND, **SMALL), 'tokens', 2),
        (SWINIR, rule('**.conv', keys={'op': 'prepend'}, **SMALL), 'nchw', 2),
        (EDSR, rule('body.*', keys={**WRAP, 'gain': 0.1}, window_size=4), 'nchw', 3),
        (RCAN, rule('class:ChannelAttention', window_size=4), 'nchw', 4),
        (RRDBNET, rule('body.*.rdb3', keys=APPEND, **SMALL), 'nchw', 2),
        (AST, rule(block='TopKAttention'), 'nhwc', 5),
        (AST, rule('**.ffn', 'LeFF'), 'nhwc', 9),
    ],
    ids=lambda value: value['type'] if isinstance(value, dict) and 'type' in value else None,
)
def test_networks_run_and_learn_on_odd_sizes(base, one, kind, count):
    network = Mixed(base, [one])
    assert [exchange.site.kind for exchange in network.exchanges] == [kind] * count
    x = image(13, 22, batch=2)
    y = network(x)
    assert y.shape == x.shape and torch.isfinite(y).all()
    y.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert not [name for name, gradient in gradients.items() if '.block.' in name and gradient is None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_blocks_are_initialised_as_in_ast():
    places = {f'layers.{n // 2}.residual_group.blocks.{n % 2}': block for n, block in enumerate(LINEAR)}
    mixed = Mixed(SWINIR, [rule(place, block) for place, block in places.items()])
    for place in places:
        made = mixed.base.get_submodule(place).block
        linear = [layer for layer in made.modules() if isinstance(layer, nn.Linear)]
        assert linear and all(not layer.bias.any() and layer.weight.std() < 0.03 for layer in linear)


def test_images_are_padded_for_the_base():
    network = Mixed(RRDBNET, [rule('body.*', keys=WRAP, **SMALL)]).eval()
    x = image(10, 15)
    with torch.no_grad():
        want = network.base(pad_to_multiple(x, 4))[..., :10, :15]
        torch.testing.assert_close(network(x), want)
    larger = Mixed({**EDSR, 'upscale': 2}, [rule('body.*', keys=APPEND, **SMALL)], size_multiple=16)
    assert larger(image(7, 5)).shape == (1, 3, 14, 10)
    swinir = Mixed(SWINIR, [rule(FEED_FORWARDS, 'MLP')])
    told = [(mixed.size_multiple, mixed.scale) for mixed in (network, larger, swinir)]
    assert told == [(4, 1), (16, 2), (4, 1)]


def test_mixed_on_meta_leaves_its_options():
    base, rules = copy.deepcopy(AST), [rule(block='DenseAttention', qkv_bias=True)]
    with torch.device('meta'):
        network = Mixed(base, rules)
    assert not any(parameter.is_meta for parameter in network.parameters())
    assert (base, rules) == (AST, [rule(block='DenseAttention', qkv_bias=True)])
    assert [kind.__name__ for kind in network.block_classes] == ['ASTBlock']  # of the base


def test_shared_module(registered):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 3, 3, padding=1)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    registered(Shared=Shared)
    for name in ('a', 'b', '*'):
        network = Mixed({'type': 'Shared'}, [rule(name, 'MLP')])
        assert network.base.a is network.base.b
        assert type(network.base.a.block).__name__ == 'MLP'
        assert [exchange.site.name for exchange in network.exchanges] == ['a']


def test_nested_rules():
    """A replaced block of SwinIR passes height and width to its adapter and to the blocks inside it."""
    rules = [
        rule('class:SwinTransformerBlock', 'ASTBlock', {'op': 'prepend'}, mlp_ratio=1),
        rule(FEED_FORWARDS, 'FRFN'),
        rule(ATTENTIONS),
        rule('layers.0', keys=APPEND, **SMALL),
        rule('layers.1', keys=WRAP, **SMALL),
    ]
    network = Mixed(SWINIR, rules)
    assert [exchange.rule.op for exchange in network.exchanges].count('replace') == 8
    inner = network.base.layers[0].original.residual_group.blocks[1].original
    assert type(inner.attn.block).__name__ == 'ASSA'
    assert network(image(9, 14)).shape == (1, 3, 9, 14)


class Plain(nn.Module):
    """Convolutions, of which tests replace the middle one; returns a list in training."""

    def __init__(self, colours: int = 3):
        super().__init__()
        self.first, self.last = nn.Conv2d(colours, 8, 3, padding=1), nn.Conv2d(8, colours, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = x + self.last(self.middle(self.first(x)))
        return [y, y] if self.training else y


@pytest.mark.filterwarnings('ignore:.*weight_norm')
def test_weights_that_are_computed(registered):
    class Normed(Plain):
        def __init__(self):
            super().__init__()
            nn.utils.weight_norm(self.first)
            nn.utils.parametrizations.weight_norm(self.last)

    registered(Normed=Normed)
    network = Mixed({'type': 'Normed'}, [rule('middle', 'FRFN')]).eval()
    network(image(5, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_channels_and_lists_of_outputs(registered):
    registered(Plain=Plain)
    network = Mixed({'type': 'Plain', 'colours': 4}, [rule('middle', 'MLP')])
    assert network.in_channels == 4  # found by trying
    x = torch.rand(1, 4, 5, 6)
    assert network.eval()(x).shape == x.shape
    with pytest.raises(ShapeError, match='expected a single image tensor, got list'):
        network.train()(x)


def test_timm_style_blocks(registered):
    """Sizes as pairs, heads declared by a submodule, and feed-forward networks on windows of undeclared size."""
    registered(Timm=Timm)
    network = Mixed({'type': 'Timm'}, [rule('blocks.*', 'ASTBlock')])
    for number, exchange in enumerate(network.exchanges):
        want = {'dim': 12, 'num_heads': 3, 'window_size': 4, 'shift_size': 2 * number, 'mlp_ratio': 2.0}
        assert dict(exchange.options) == want
    torch.manual_seed(4)
    base = build_base({'type': 'Timm'}).eval()
    torch.manual_seed(4)
    network = Mixed({'type': 'Timm'}, [rule('**.mlp', 'MLP', KEEP)]).eval()
    assert {exchange.site.kind for exchange in network.exchanges} == {'windows'}
    x = image(8, 12)
    with torch.no_grad():
        torch.testing.assert_close(network(x), base(x))


def test_hidden_channels_are_preserved(registered):
    class Awkward(nn.Module):
        def __init__(self):
            super().__init__()
            self.middle = nn.Sequential(nn.Linear(22, 30), nn.GELU(), nn.Linear(30, 22))  # int(22 · (30 / 22)) is 29
            self.first, self.last = nn.Linear(3, 22), nn.Linear(22, 3)

        def forward(self, x):
            return self.last(self.middle(self.first(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)

    registered(Awkward=Awkward)
    network = Mixed({'type': 'Awkward'}, [rule('middle', 'MLP', KEEP)])
    assert network.base.middle.block.expand.out_features == 30
