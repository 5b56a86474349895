"""Mixed: blocks in the networks of BasicSR and in others, weights kept, sizes from the caller."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ast_plugin.archs.block_registry import BLOCKS
from ast_plugin.archs.blocks import DenseAttention
from ast_plugin.archs.kept_weights import keep_weights
from ast_plugin.archs.mixed_arch import Mixed, build_base
from ast_plugin.errors import CheckpointError, OptionError, ShapeError
from ast_plugin.ops import pad_to_multiple
from ast_plugin.weights_files import save_torch, save_weights

from .networks import (
    AST,
    EDSR,
    MSRRESNET,
    RCAN,
    RIDNET,
    RRDBNET,
    SRVGG,
    SWINIR,
    Timm,
    TokenNet,
    excite,
    picture,
    relative,
)

ATTENTIONS = 'layers.*.residual_group.blocks.*.attn'
FEED_FORWARDS = 'layers.*.residual_group.blocks.*.mlp'
BLOCK = {'type': 'ASTBlock', 'window_size': 4, 'mlp_ratio': 2}
ODD = [(13, 22), (7, 31), (19, 5)]


@pytest.fixture
def registered(monkeypatch):
    """Register networks for one test."""
    from basicsr.utils.registry import ARCH_REGISTRY

    def register(**networks):
        for name, network in networks.items():
            monkeypatch.setitem(ARCH_REGISTRY._obj_map, name, network)

    return register


@pytest.mark.parametrize(
    ('base', 'rules', 'kinds', 'count'),
    [
        (SWINIR, [{'match': ATTENTIONS, 'with': {'type': 'ASSA'}}], {'windows'}, 4),
        (SWINIR, [{'match': FEED_FORWARDS, 'with': {'type': 'FRFN'}}], {'tokens'}, 4),
        (SWINIR, [{'match': 'layers.*.residual_group.blocks.*', 'with': {'type': 'ASTBlock'}}], {'tokens'}, 4),
        (SWINIR, [{'match': 'class:RSTB', 'op': 'append', 'with': BLOCK}], {'tokens'}, 2),
        (SWINIR, [{'match': '**.conv', 'op': 'prepend', 'with': BLOCK}], {'nchw'}, 2),
        (
            EDSR,
            [{'match': 'body.*', 'op': 'wrap', 'gain': 0.1, 'with': {'type': 'ASSA', 'window_size': 4}}],
            {'nchw'},
            3,
        ),
        (RCAN, [{'match': 'class:ChannelAttention', 'with': {'type': 'ASSA', 'window_size': 4}}], {'nchw'}, 4),
        (MSRRESNET, [{'match': 'body.*', 'with': BLOCK}], {'nchw'}, 3),
        (RRDBNET, [{'match': 'body.*.rdb3', 'op': 'append', 'with': BLOCK}], {'nchw'}, 2),
        (SRVGG, [{'match': 'body.[246]', 'with': {'type': 'FRFN', 'mlp_ratio': 2}}], {'nchw'}, 3),
        (RIDNET, [{'match': 'class:EAM', 'op': 'append', 'with': BLOCK}], {'nchw'}, 2),
        (AST, [{'match': '**.attn', 'with': {'type': 'TopKAttention'}}], {'nhwc'}, 5),
        (AST, [{'match': '**.ffn', 'with': {'type': 'LeFF'}}], {'nhwc'}, 9),
    ],
    ids=lambda value: value['type'] if isinstance(value, dict) else None,
)
def test_networks_run_and_learn_on_odd_sizes(base, rules, kinds, count):
    network = Mixed(base, rules)
    assert {exchange.kind for exchange in network.exchanges} == kinds
    assert len(network.exchanges) == count
    for size in ODD:
        x = picture(*size, batch=2)
        y = network(x)
        assert y.shape == x.shape
        assert torch.isfinite(y).all()
    network(picture(24, 40, batch=2)).square().mean().backward()
    names = [name for name, parameter in network.named_parameters() if '.block.' in name and parameter.grad is None]
    assert not names
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())


@pytest.mark.parametrize('block', ['ASSA', 'FRFN', 'LeFF', 'MLP', 'ASTBlock'])
def test_our_blocks_start_as_those_of_ast(block):
    mixed = Mixed(SWINIR, [{'match': 'layers.0.residual_group.blocks.0', 'with': {'type': block}}])
    made = mixed.base.layers[0].residual_group.blocks[0].block
    linear = [layer for layer in made.modules() if isinstance(layer, nn.Linear)]
    assert linear and all(not layer.bias.any() and layer.weight.std() < 0.03 for layer in linear)


def test_scale_is_that_of_the_base():
    network = Mixed({**EDSR, 'upscale': 2}, [{'match': 'body.*', 'op': 'append', 'with': BLOCK}])
    assert network.scale == 2
    assert network(picture(7, 5)).shape == (1, 3, 14, 10)


def test_pictures_are_padded_to_what_the_base_takes():
    network = Mixed(RRDBNET, [{'match': 'body.*', 'op': 'wrap', 'with': BLOCK}]).eval()
    assert network.size_multiple == 4
    x = picture(10, 15)
    with torch.no_grad():
        want = network.base(pad_to_multiple(x, 4))[..., :10, :15]
        torch.testing.assert_close(network(x), want)
    assert Mixed(EDSR, [{'match': 'body.*', 'op': 'wrap', 'with': BLOCK}]).size_multiple == 1
    assert Mixed(SWINIR, [{'match': FEED_FORWARDS, 'with': {'type': 'MLP'}}]).size_multiple == 4
    asked = Mixed(EDSR, [{'match': 'body.*', 'op': 'wrap', 'with': BLOCK}], size_multiple=16)
    assert asked.size_multiple == 16


# ---- weights


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


def test_another_order_of_the_position_bias_is_kept(swinir):
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
    torch.manual_seed(1)
    network = build_base(AST).eval()
    torch.manual_seed(1)
    mixed = Mixed(
        AST, [{'match': '**.attn', 'with': {'type': 'ASSA'}, 'keep_weights': True, 'dense_share': 0.5}]
    ).eval()
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
    assert all(
        module.gain.grad.abs().sum() > 0 for module in mixed.modules() if getattr(module, 'gain', None) is not None
    )


def test_weights_go_round(tmp_path, swinir):
    network, path = swinir
    rules = [{'match': ATTENTIONS, 'with': {'type': 'ASSA'}, 'keep_weights': True}]
    first = excite(Mixed(SWINIR, rules, base_weights=path))
    second = Mixed(SWINIR, rules)
    second.load_state_dict(
        {f'module.{name}': tensor for name, tensor in first.state_dict().items()} and first.state_dict()
    )
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


# ---- how blocks are called


@pytest.fixture
def recorder(monkeypatch):
    """A block of somebody else that doubles what it gets, and remembers how it was called."""
    seen = []

    class Doubling(nn.Module):
        works_in, replaces = 'tokens', ('tokens', 'maps')

        def __init__(self, channels: int) -> None:
            super().__init__()
            self.channels = channels
            self.one = nn.Parameter(torch.ones(1))

        def forward(self, x, size):
            seen.append((tuple(x.shape), size))
            return 2 * self.one * x

    monkeypatch.setitem(BLOCKS._module_dict, 'Doubling', Doubling)
    return seen


@pytest.mark.parametrize(
    ('op', 'expected'),
    [
        ('replace', lambda layer, x: 2 * x),
        ('append', lambda layer, x: 2 * layer(x)),
        ('prepend', lambda layer, x: layer(2 * x)),
    ],
)
def test_what_each_operation_computes(recorder, op, expected):
    torch.manual_seed(2)
    layer = build_base(EDSR).body[1]
    torch.manual_seed(2)
    mixed = Mixed(EDSR, [{'match': 'body.1', 'op': op, 'with': {'type': 'Doubling'}}])
    x = torch.randn(2, 8, 3, 5)
    torch.testing.assert_close(mixed.base.body[1](x), expected(layer, x))
    assert recorder[-1] == ((2, 15, 8), (3, 5))


def test_wrap_is_a_branch(recorder):
    torch.manual_seed(2)
    layer = build_base(EDSR).body[1]
    torch.manual_seed(2)
    mixed = Mixed(EDSR, [{'match': 'body.1', 'op': 'wrap', 'gain': 0.5, 'with': {'type': 'Doubling'}}])
    x = torch.randn(2, 8, 3, 5)
    y = layer(x)
    normed = nn.functional.layer_norm(y.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2)
    torch.testing.assert_close(mixed.base.body[1](x), y + normed)


@pytest.mark.parametrize('way', ['pair', 'numbers', 'own numbers', 'map'])
def test_tokens_get_their_size_from_whoever_knows(registered, recorder, way):
    registered(TokenNet=TokenNet)
    network = Mixed({'type': 'TokenNet', 'way': way}, [{'match': 'blocks.*.ffn', 'with': {'type': 'Doubling'}}])
    for size in ((4, 9), (9, 4), (6, 6), (1, 36)):  # as many tokens each time
        recorder.clear()
        network(picture(*size, batch=2))
        assert recorder == [((2, 36, 8), size)] * 2


def test_neighbours_are_those_of_the_map(registered):
    """FRFN among tokens computes what it computes on the map."""
    registered(TokenNet=TokenNet)
    network = Mixed({'type': 'TokenNet'}, [{'match': 'blocks.0.ffn', 'with': {'type': 'FRFN'}}])
    adapter = network.base.blocks[0].ffn
    seen = []
    adapter.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    network(picture(5, 11))
    tokens, output = seen[0]
    want = adapter.block(tokens.reshape(1, 5, 11, 8)).flatten(1, 2)
    assert torch.equal(output, want)


@pytest.fixture
def token_network():
    rules = [
        {'match': ATTENTIONS, 'with': {'type': 'ASSA'}},
        {'match': FEED_FORWARDS, 'with': {'type': 'FRFN', 'mlp_ratio': 2}},
    ]
    return excite(Mixed(SWINIR, rules)).eval()


def test_threads_do_not_mix_their_sizes(token_network):
    pictures = [picture(8, 4 * n) for n in range(1, 7)]
    with torch.no_grad():
        want = [token_network(x) for x in pictures]
    faults = []

    def run(number):
        with torch.no_grad():
            for _ in range(5):
                if not torch.equal(token_network(pictures[number]), want[number]):
                    faults.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(pictures))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_it_moves_like_any_module(token_network):
    x = picture(9, 14)
    with torch.no_grad():
        want = token_network(x)
        assert relative(copy.deepcopy(token_network).double()(x.double()).float(), want) < 1e-4
        assert relative(copy.deepcopy(token_network).to(memory_format=torch.channels_last)(x), want) < 1e-5


@pytest.mark.parametrize('way', ['map', 'pair'])
def test_blocks_computed_again_outside_of_who_knows_their_size(registered, way):
    from ast_plugin.models import network_switches

    registered(TokenNet=TokenNet)
    network = Mixed({'type': 'TokenNet', 'way': way}, [{'match': 'blocks.*.ffn', 'with': {'type': 'FRFN'}}])
    saving = network_switches.apply(copy.deepcopy(network), {'gradient_checkpointing': True})
    wide, high = picture(8, 12), picture(12, 8)  # as many tokens: the size has to be that of each pass
    for each in (network, saving):
        (each(wide).square().mean() + each(high).square().mean()).backward()
    for plain, again in zip(network.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(again.grad, plain.grad)


def test_copies_and_pickles(token_network):
    x = picture(9, 14)
    with torch.no_grad():
        want = token_network(x)
        for twin in (copy.deepcopy(token_network), pickle.loads(pickle.dumps(token_network))):
            assert torch.equal(twin(x), want)


def test_replicas_of_data_parallel_have_sizes_of_their_own(token_network):
    """What nn.DataParallel makes: shallow copies with children of their own, each run in a thread."""

    def replica(module):
        twin = module._replicate_for_data_parallel()
        for key, child in module._modules.items():
            twin._modules[key] = None if child is None else replica(child)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                setattr(twin, key, parameter.detach())
        for key, buffer in module._buffers.items():
            twin._buffers[key] = buffer
        return twin

    x = picture(8, 12)
    with torch.no_grad():
        assert torch.equal(replica(token_network)(x), token_network(x))


def test_checkpoints_recompute_with_the_same_size(token_network):
    def gradients(run):
        token_network.zero_grad()
        run(picture_).square().sum().backward()
        return [parameter.grad.clone() for parameter in token_network.parameters()]

    picture_ = picture(8, 20)
    plain = gradients(token_network)
    for reentrant in (False, True):
        x = picture_.clone().requires_grad_()
        again = gradients(lambda _, x=x, reentrant=reentrant: checkpoint(token_network, x, use_reentrant=reentrant))
        for a, b in zip(plain, again, strict=True):
            torch.testing.assert_close(a, b)


def test_gradient_checkpointing_of_training(token_network):
    from ast_plugin.models import network_switches

    x = picture(8, 20)
    want = token_network(x)
    saving = network_switches.apply(copy.deepcopy(token_network), {'gradient_checkpointing': True})
    output = saving(x)
    torch.testing.assert_close(output, want)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in saving.parameters())


def test_compiled_layers_see_the_size_in_one_graph(token_network):
    torch.compiler.reset()
    layer = token_network.base.layers[0].residual_group.blocks[0]
    x = torch.randn(1, 96, 8)
    with torch.no_grad():
        want = layer(x, (8, 12))
        got = torch.compile(layer, backend='eager', fullgraph=True)(x, (8, 12))
    torch.testing.assert_close(got, want)


def test_blocks_of_the_base_are_those_of_the_mixed():
    mixed = Mixed(AST, [{'match': '**.attn', 'with': {'type': 'DenseAttention'}}])
    assert [kind.__name__ for kind in mixed.block_classes] == ['ASTBlock']
    assert not hasattr(Mixed(EDSR, [{'match': 'body.0', 'with': BLOCK}]), 'block_classes')


def test_the_options_given_are_left_alone():
    base, rules = copy.deepcopy(SWINIR), [{'match': ATTENTIONS, 'with': {'type': 'ASSA', 'qkv_bias': True}}]
    Mixed(base, rules)
    assert base == SWINIR
    assert rules == [{'match': ATTENTIONS, 'with': {'type': 'ASSA', 'qkv_bias': True}}]


def test_it_can_be_built_where_nothing_has_values():
    with torch.device('meta'):
        network = Mixed(SWINIR, [{'match': ATTENTIONS, 'with': {'type': 'ASSA'}, 'keep_weights': True}])
    assert not any(parameter.is_meta for parameter in network.parameters())


def test_a_module_under_two_names_is_exchanged_under_both(registered):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 3, 3, padding=1)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    registered(Shared=Shared)
    for name in ('a', 'b', '*'):
        network = Mixed({'type': 'Shared'}, [{'match': name, 'with': {'type': 'MLP'}}])
        assert network.base.a is network.base.b
        assert type(network.base.a.block).__name__ == 'MLP'
        assert [exchange.name for exchange in network.exchanges] == ['a']


def test_kept_modules_around_exchanged_ones():
    rules = [
        {'match': 'class:RSTB', 'op': 'append', 'with': BLOCK},
        {'match': ATTENTIONS, 'with': {'type': 'ASSA'}},
    ]
    network = Mixed(SWINIR, rules)
    assert [exchange.op for exchange in network.exchanges] == ['append'] * 2 + ['replace'] * 4
    assert type(network.base.layers[0].original.residual_group.blocks[1].attn.block).__name__ == 'ASSA'
    assert network(picture(9, 10)).shape == (1, 3, 9, 10)


@pytest.mark.parametrize('op', ['append', 'prepend', 'wrap'])
def test_who_knows_the_size_may_be_exchanged_too(op):
    """A block of SwinIR tells its own adapter and the one of its feed-forward network height and width."""
    rules = [
        {'match': 'class:SwinTransformerBlock', 'op': op, 'with': {'type': 'ASTBlock', 'mlp_ratio': 1}},
        {'match': FEED_FORWARDS, 'with': {'type': 'FRFN'}},
        {'match': 'class:RSTB', 'op': op, 'with': BLOCK},
    ]
    assert Mixed(SWINIR, rules)(picture(9, 14)).shape == (1, 3, 9, 14)


class Plain(nn.Module):
    """Convolutions, the middle one of which a test changes."""

    def __init__(self, channels: int = 3):
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, channels, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return x + self.last(self.middle(self.first(x)))


@pytest.mark.filterwarnings('ignore:.*weight_norm')
@pytest.mark.parametrize('norm', [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
def test_weights_that_are_computed(registered, norm):
    class Normed(Plain):
        def __init__(self):
            super().__init__()
            norm(self.first)

    registered(Normed=Normed)
    network = Mixed({'type': 'Normed'}, [{'match': 'middle', 'with': {'type': 'FRFN'}}])
    network(picture(5, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_channels_that_no_argument_of_a_known_name_says(registered):
    class Raw(Plain):
        def __init__(self, colours: int):
            super().__init__(colours)

    registered(Raw=Raw)
    network = Mixed({'type': 'Raw', 'colours': 4}, [{'match': 'middle', 'with': {'type': 'MLP'}}])
    assert network.in_channels == 4


def test_networks_that_give_more_in_training(registered):
    class Supervised(Plain):
        def forward(self, x):
            y = super().forward(x)
            return [y, y] if self.training else y

    registered(Supervised=Supervised)
    network = Mixed({'type': 'Supervised'}, [{'match': 'middle', 'with': {'type': 'MLP'}}])
    assert network.eval()(picture(5, 6)).shape == (1, 3, 5, 6)
    with pytest.raises(ShapeError, match='Supervised returns a list in training'):
        network.train()(picture(5, 6))


def test_blocks_as_timm_has_them(registered):
    """Sizes in pairs, heads of the attention inside, feed-forward networks in windows that do not say how large."""
    registered(Timm=Timm)
    network = Mixed({'type': 'Timm'}, [{'match': 'blocks.*', 'with': {'type': 'ASTBlock'}}])
    for number, exchange in enumerate(network.exchanges):
        want = {'dim': 12, 'num_heads': 3, 'window_size': 4, 'shift_size': 2 * number, 'mlp_ratio': 2.0}
        assert dict(exchange.options) == want
    torch.manual_seed(4)
    base = build_base({'type': 'Timm'}).eval()
    torch.manual_seed(4)
    network = Mixed({'type': 'Timm'}, [{'match': '**.mlp', 'with': {'type': 'MLP'}, 'keep_weights': True}]).eval()
    assert {exchange.kind for exchange in network.exchanges} == {'windows'}
    x = picture(8, 12)
    with torch.no_grad():
        torch.testing.assert_close(network(x), base(x))


def test_hidden_channels_are_as_many_as_before(registered):
    class Awkward(Plain):
        def __init__(self):
            super().__init__()
            self.middle = nn.Sequential(nn.Linear(22, 30), nn.GELU(), nn.Linear(30, 22))  # int(22 · (30 / 22)) is 29
            self.first, self.last = nn.Conv2d(3, 22, 1), nn.Conv2d(22, 3, 1)

        def forward(self, x):
            return self.last(self.middle(self.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    registered(Awkward=Awkward)
    network = Mixed({'type': 'Awkward'}, [{'match': 'middle', 'with': {'type': 'MLP'}, 'keep_weights': True}])
    assert network.base.middle.block.expand.out_features == 30
