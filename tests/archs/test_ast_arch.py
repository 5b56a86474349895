import inspect
import pickle
from copy import deepcopy
from itertools import cycle

import pytest
import torch

from ast_plugin.archs.ast_arch import AST, AST_B, AST_T, AST_XS, VARIANTS
from ast_plugin.archs.blocks import ATTENTIONS, FEED_FORWARDS, ASTBlock, DropPath
from ast_plugin.archs.state import rename_official
from ast_plugin.errors import CheckpointError, OptionError, ShapeError

from .golden import NAMES, GoldenCase

TINY = {'embed_dim': 4, 'depths': (1,) * 9, 'num_heads': (1,) * 9, 'drop_path_rate': 0.0, 'img_size': 32}


def tiny(**options):
    return AST(**{**TINY, **options})


@pytest.mark.parametrize('name', NAMES)
def test_official_outputs(name):
    case = GoldenCase(name)
    has_gradients = 'grad_norms' in case.facts
    net = AST(**{'drop_path_rate': 0.0, **case.options}).train(has_gradients)
    assert sum(p.numel() for p in net.parameters()) == case.facts['params']
    net.load_state_dict(case.state())
    with torch.set_grad_enabled(has_gradients):
        output = net(case.input(), case.mask())
    assert case.error(output) < 2e-5
    assert float(output.detach().double().norm()) == pytest.approx(case.facts['norm'], rel=2e-5)
    if has_gradients:
        loss = torch.sqrt((output - case.target(output)) ** 2 + 1e-6).mean()
        loss.backward()
        assert loss.item() == pytest.approx(case.facts['charbonnier_loss'], rel=1e-5)
        ours = {name: float(p.grad.double().norm()) for name, p in net.named_parameters()}
        official = {rename_official(name): norm for name, norm in case.facts['grad_norms'].items()}
        assert ours == pytest.approx(official, rel=5e-4, abs=5e-10 * max(official.values()))


def test_variants_are_rows_of_the_table():
    sizes = {AST_XS: None, AST_T: 6_645_347, AST_B: 65_362_455}
    for (name, row), (build, num_parameters) in zip(VARIANTS.items(), sizes.items(), strict=True):
        parameters = inspect.signature(build).parameters
        assert build.__name__ == name and set(parameters) == set(inspect.signature(AST).parameters)
        assert {key: parameters[key].default for key in row} == row
        with torch.device('meta'):
            network = build(in_chans=3)
        options = network.options
        assert (options['embed_dim'], tuple(options['depths']), options['in_chans']) == (*row.values(), 3)
        assert num_parameters in (None, sum(p.numel() for p in network.parameters()))
        with pytest.raises(TypeError, match='embed_dimension'):
            build(embed_dimension=3)


@pytest.mark.parametrize(('attention', 'ffn'), zip(ATTENTIONS, cycle(FEED_FORWARDS)))
def test_combinations_train_every_parameter(attention, ffn):
    net = tiny(attention=attention, ffn=ffn, depths=(1, 1, 1, 1, 2, 1, 1, 1, 1))
    net(torch.rand(2, 3, 32, 64)).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        # softmax is invariant to a bias of the keys, which shifts all scores of a row equally
        assert parameter.grad.abs().sum() > 0 or name.endswith('kv.bias'), name


def test_output_size_equals_input_size():
    net = tiny().eval()
    for H, W in ((1, 1), (1, 9), (17, 2), (31, 33), (32, 64)):
        x = torch.rand(2, 3, H, W)
        padded = torch.nn.functional.pad(x, (0, -W % 32, 0, -H % 32), mode='reflect') if min(H, W) > 16 else x
        with torch.no_grad():
            y = net(x)
            torch.testing.assert_close(net(padded)[..., :H, :W], y)
            torch.testing.assert_close(net(x[1:]), y[1:])  # images of a batch are independent
        assert y.shape == x.shape and torch.isfinite(y).all()


def test_img_size_sets_window_and_shift():
    for options, multiple, window_and_shift in (
        ({'img_size': 32}, 32, (2, 0)),
        ({'img_size': 128}, 128, (8, 0)),
        ({'img_size': 256}, 128, (8, 4)),
        ({'img_size': 256, 'window_size': 12}, 192, (12, 6)),
    ):
        net = tiny(depths=(2,) * 9, **options)
        attention = net.bottleneck.blocks[1].attn
        assert (net.size_multiple, (attention.window_size, attention.shift_size)) == (multiple, window_and_shift)


def test_mask_is_per_image_and_padded():
    net = tiny().eval().double()
    for parameter in net.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    x = torch.rand(2, 3, 40, 24, dtype=torch.float64)
    mask = torch.zeros(2, 1, 40, 24)
    mask[1, :, :, 5:] = 1
    with torch.no_grad():
        plain, masked = net(x), net(x, mask)
        torch.testing.assert_close(masked[0], plain[0])
        assert (masked[1] - plain[1]).abs().max() > 1e-4
        torch.testing.assert_close(net(x[1:], mask[1:]), masked[1:])


def test_gradient_checkpointing_changes_nothing():
    plain, saving = tiny(drop_path_rate=0.3), tiny(drop_path_rate=0.3, use_checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 32, 32)
    for net in (plain, saving):
        torch.manual_seed(2)
        net(x).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_residual_only_where_channels_agree():
    for channels in ({'in_chans': 4, 'out_chans': 3}, {'in_chans': 2, 'out_chans': 2}):
        net, x = tiny(**channels).eval(), torch.rand(1, channels['in_chans'], 8, 8)
        net.output_proj.weight.data.zero_()
        net.output_proj.bias.data.fill_(0.5)
        assert torch.equal(net(x), x + 0.5 if net.in_chans == net.out_chans else torch.full((1, 3, 8, 8), 0.5))


def test_stochastic_depth():
    net = tiny(depths=(2,) * 9, drop_path_rate=0.7)
    rates = [block.drop_path.rate for block in net.modules() if isinstance(block, ASTBlock)]
    down = [0.1 * i for i in range(8)]
    assert rates == pytest.approx([*down, 0.7, 0.7, *down[::-1]])
    deep = tiny(depths=(1, 1, 1, 1, 1, 2, 2, 2, 2))
    assert deep.decoder[-1].blocks[-1].drop_path.rate == 0
    drop = DropPath(0.25).train()
    out = drop(torch.ones(4000, 1, 1, 1))
    assert out.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert float(out.mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(drop.eval()(out), out)


def test_copies_and_half_precisions():
    net, x = tiny().eval(), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        want = net(x)
        for twin in (deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(twin(x), want)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            mixed = net(x)
        half = deepcopy(net).bfloat16()(x.bfloat16())
    for got in (mixed, half):
        assert (got.float() - want).norm() / want.norm() < 2e-2


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'ffn': 'ffn'}, "ffn must be one of frfn, leff, mlp, not 'ffn'"),
        ({'depths': (1, 2, 3)}, 'depths must be 9 numbers'),
        ({'num_heads': (1,) * 8 + (0,)}, 'num_heads must be 9 numbers of 1 or more'),
        ({'embed_dim': 2}, 'at least 4'),
        ({'img_size': 8}, 'img_size at least 16'),
        ({'window_size': 0}, 'window_size must be at least 1'),
        ({'drop_path_rate': 1.5}, r'drop_path_rate must be in \[0, 1\)'),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(OptionError, match=words):
        tiny(**options)


def test_wrong_shapes_are_named():
    for shapes, words in (
        ([(3, 8, 8)], r'\[B, 3, H, W\].*\[3, 8, 8\]'),
        ([(1, 4, 8, 8)], r'\[1, 4, 8, 8\]'),
        ([(1, 3, 0, 8)], 'expects a non-empty input'),
        ([(2, 3, 8, 8), (2, 8, 8)], r'mask must be \[1, 1, 8, 8\] or \[2, 1, 8, 8\]'),
    ):
        with pytest.raises(ShapeError, match=words):
            tiny()(*map(torch.zeros, shapes))


def test_both_sets_of_names_load_strictly():
    case = GoldenCase('tiny_mlp_128')
    net = AST(**case.options)
    wrapped = torch.nn.Sequential(deepcopy(net))  # AST.load_state_dict is not called
    official = case.state()
    net.load_state_dict(official)
    loaded = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.load_state_dict({f'module.{name}': tensor for name, tensor in official.items()})
    net.load_state_dict(loaded)
    wrapped.load_state_dict({f'0.{name}': tensor for name, tensor in official.items()})
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in wrapped[0].state_dict().items())
    official.pop('conv.blocks.0.attn.w')
    with pytest.raises(CheckpointError, match=r'bottleneck.blocks.0.attn.gate \[2\] is missing'):
        net.load_state_dict(official)


def test_mismatch_names_options_of_the_file():
    net, deep = tiny(), (1, 1, 1, 1, 2, 1, 1, 1, 1)
    state = net.state_dict()
    for other, words in (
        (tiny(embed_dim=8).state_dict(), r'input_proj.weight is \[8, 3, 3, 3\], expected \[4, 3.* and \d+ more'),
        (tiny(embed_dim=8, depths=deep).state_dict(), r'embed_dim: 8, depths: \[1, 1, 1, 1, 2, 1, 1, 1, 1\]: set'),
        ({'conv_first.weight': torch.zeros(1)}, 'do not belong to an AST'),
        ({f'net.{k}': t for k, t in state.items()} | {'vgg.weight': torch.zeros(1)}, 'vgg.weight .* is unexpected'),
        ({f'{a}.{k}': t for k, t in state.items() for a in ('net', 'teacher')}, 'teacher.* is unexpected'),
    ):
        with pytest.raises(CheckpointError, match=words):
            net.load_state_dict(other)
    net.output_proj = torch.nn.Identity()
    with pytest.raises(CheckpointError, match=r'output_proj\.weight .* is unexpected.*, or the network was modified'):
        net.load_state_dict(state)
