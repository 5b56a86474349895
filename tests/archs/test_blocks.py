"""Blocks as modules: layouts, arbitrary sizes, and padding without effect on the result."""

from collections import defaultdict
from itertools import product

import pytest
import torch
from torch.nn.utils import prune

from ast_plugin import ops
from ast_plugin.archs.blocks import ASSA, ATTENTIONS, FEED_FORWARDS, FRFN, MLP, ASTBlock
from ast_plugin.errors import OptionError, ShapeError

DIM = 8
BUILDERS = {
    **{name: lambda layout, kind=kind: kind(DIM, 2, 4, 2, layout=layout) for name, kind in ATTENTIONS.items()},
    **{name: lambda layout, kind=kind: kind(DIM, 2.0, layout=layout) for name, kind in FEED_FORWARDS.items()},
    'block': lambda layout: ASTBlock(DIM, 2, 4, 1, 2.0, layout=layout),
}


@pytest.fixture(autouse=True)
def _in_double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def excite(module):
    """Set weights large enough that attention scores affect the output."""
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn_like(parameter))
    return module


@pytest.mark.parametrize('name', BUILDERS)
def test_layouts_agree_on_any_size(name):
    nhwc, nchw = BUILDERS[name]('nhwc'), BUILDERS[name]('nchw')
    nchw.load_state_dict(nhwc.state_dict())
    for size in ((1, 1), (8, 8), (13, 10)):
        x = torch.randn(2, DIM, *size, requires_grad=True)
        y = nchw(x)
        torch.testing.assert_close(y, nhwc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        y.square().sum().backward()
        assert torch.isfinite(x.grad).all()
    assert all(parameter.grad is not None for parameter in nchw.parameters())


def reference(block, x):
    """Attention between tokens in the same window that both wrapped around the same edges or none."""
    side, shift = block.window_size, block.shift_size
    heads, d = block.num_heads, block.dim // block.num_heads
    groups, out = defaultdict(list), torch.full_like(x, float('nan'))
    for token in product(*map(range, x.shape[1:3])):
        lengths = [length + -length % side for length in x.shape[1:3]]
        places = [(n - shift) % length for n, length in zip(token, lengths, strict=True)]
        window = *(place // side for place in places), *(n < shift for n in token)
        groups[window].append((*token, places[0] % side * side + places[1] % side))
    for tokens in groups.values():
        row, column, index = map(list, zip(*tokens, strict=True))
        inside = x[:, row, column]
        q = block.q(inside).unflatten(-1, (heads, d)).transpose(1, 2)
        k, v = (part.unflatten(-1, (heads, d)).transpose(1, 2) for part in block.kv(inside).chunk(2, dim=-1))
        table = ops.relative_position_index(side)[index][:, index]
        scores = q @ k.transpose(-1, -2) * d**-0.5 + block.position_bias[table].permute(2, 0, 1)
        weights = ops.attention_weights(scores, block.kind, block.gate)
        out[:, row, column] = block.proj((weights @ v).transpose(1, 2).flatten(2))
    return out


@pytest.mark.parametrize('kind', ['assa', 'dense', 'sparse', 'sparse_relu'])
def test_attention_ignores_padding(kind):
    for shift, size in ((0, (5, 10)), (1, (3, 3)), (3, (7, 4))):
        block = excite(ATTENTIONS[kind](DIM, 2, 4, shift))
        block.kv.weight.data *= 0.3  # keeps scores below 100, so that the mask of -100 zeroes relu
        x = torch.randn(2, *size, DIM)
        with torch.no_grad():
            torch.testing.assert_close(block(x), reference(block, x))


def test_mask_and_padding_value_at_any_size(monkeypatch):
    block, x = excite(ASSA(DIM, 2, 4, 1)), torch.randn(2, 6, 5, DIM)
    mask = torch.zeros(1, 1, 12, 10)
    with torch.no_grad():
        plain = block(x)
        torch.testing.assert_close(block(x, mask), plain)
        mask[..., 4:] = 1
        assert not torch.allclose(block(x, mask), plain)
        pad = torch.nn.functional.pad
        monkeypatch.setattr(torch.nn.functional, 'pad', lambda t, sides, **k: pad(t, sides, value=1e3))
        torch.testing.assert_close(block(x), plain)


@pytest.mark.parametrize('layer', ['attn.q', 'ffn.partial_conv', 'ffn.project'])
def test_layers_that_would_not_be_called(layer):
    block = ASTBlock(DIM, 2, 4)
    block.set_submodule(layer, torch.nn.Sequential(block.get_submodule(layer)))
    with pytest.raises(OptionError, match='Sequential cannot replace a linear layer or convolution inside a block'):
        block(torch.rand(1, 4, 4, DIM))


@pytest.mark.parametrize(
    ('reparameterize', 'name'),
    [
        (torch.nn.utils.weight_norm, 'weight_g'),
        (torch.nn.utils.spectral_norm, 'weight_orig'),
        (lambda layer: prune.random_unstructured(layer, 'weight', 0.5), 'weight_orig'),
    ],
)
@pytest.mark.filterwarnings('ignore:.*weight_norm.* is deprecated')
def test_computed_weights_are_updated(reparameterize, name):
    block, x = excite(ASTBlock(DIM, 2, 4)), torch.rand(1, 4, 4, DIM)
    layers = [block.attn.q, block.ffn.partial_conv, block.ffn.project]
    for layer in map(reparameterize, layers):
        before = block(x)
        getattr(layer, name).data[:] = 1 + torch.rand_like(getattr(layer, name))
        assert not torch.allclose(block(x), before)
    for _ in range(2):  # the graph of a weight that is not computed again would be freed
        block(x).sum().backward()
    assert all(getattr(layer, name).grad.any() for layer in layers)


def test_mlp_on_tokens_equals_mlp_on_maps():
    block = excite(MLP(DIM, 2.0).float())
    x = torch.randn(2, 12, DIM, dtype=torch.float32)
    with torch.no_grad(), ops.use_backend('fused'):
        torch.testing.assert_close(block(x), block(x.unflatten(1, (3, 4))).flatten(1, 2))


@pytest.mark.parametrize(
    ('build', 'shape', 'words'),
    [
        (lambda: ASSA(DIM, 2), (1, DIM, 4, 4), r'ASSA expects feature maps of 8 channels.*\[1, 8, 4, 4\]'),
        (lambda: FRFN(DIM, layout='nchw'), (1, 4, 4, DIM), r'FRFN expects feature maps of 8 channels'),
        (lambda: FRFN(DIM, layout='nchw'), (1, 4, DIM), r'\[B, C, H, W\], got \[1, 4, 8\]'),
        (lambda: MLP(DIM), (1, 4, 9), r'MLP expects 8 channels, got \[1, 4, 9\]'),
        (lambda: ASSA(DIM, 2, 4).attend_windows, (2, 9, DIM), r'windows \[B, 16, 8\] of 4x4 tokens, got \[2, 9, 8\]'),
    ],
)
def test_wrong_shapes_are_named(build, shape, words):
    with pytest.raises(ShapeError, match=words):
        build()(torch.zeros(shape))


@pytest.mark.parametrize(
    ('build', 'arguments', 'words'),
    [
        (ASSA, {'num_heads': 3}, '8 channels are not divisible by 3 heads'),
        (ASSA, {'num_heads': 2.0}, 'num_heads must be a whole number of 1 or more, not 2.0'),
        (ASSA, {'num_heads': True}, 'num_heads must be a whole number of 1 or more, not True'),
        (ASSA, {'num_heads': 2, 'layout': 'hwc'}, "layout must be one of nhwc, nchw, not 'hwc'"),
        (ASSA, {'num_heads': 2, 'window_size': (8, 8)}, r'window_size must be a whole number .*\(8, 8\)'),
        (ASSA, {'num_heads': 2, 'shift_size': 1.5}, r'shift_size must be in \[0, 8\), the window size, not 1.5'),
        (ASSA, {'num_heads': 2, 'qkv_bias': 'no'}, "qkv_bias must be true or false, not 'no'"),
        (ATTENTIONS['topk'], {'num_heads': 2, 'topk_ratio': 5}, r'topk_ratio must be in \(0, 1\], not 5'),
        (ASTBlock, {'num_heads': 2, 'ffn': 'swiglu'}, "ffn must be one of frfn, leff, mlp, not 'swiglu'"),
        (ASTBlock, {'num_heads': 2, 'attention': 'flash'}, 'attention must be one of assa'),
        (FRFN, {'mlp_ratio': '2'}, "mlp_ratio must be a number that gives at least 1 hidden channel .*, not '2'"),
        (FEED_FORWARDS['leff'], {'mlp_ratio': 0.1}, 'mlp_ratio must be a number .*, not 0.1'),
        (MLP, {'mlp_ratio': float('nan')}, 'mlp_ratio must be a number .*, not nan'),
    ],
)
def test_wrong_options_are_named(build, arguments, words):
    with pytest.raises(OptionError, match=words):
        build(DIM, **arguments)
