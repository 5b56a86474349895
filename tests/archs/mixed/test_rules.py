"""Invalid rules, semantics of globs, and declarations of blocks."""

from contextlib import suppress

import pytest
import torch
from torch import nn

from ast_plugin.archs.mixed.block_registry import BLOCKS, declaration
from ast_plugin.archs.mixed.mixed_arch import Mixed, build_base
from ast_plugin.archs.mixed.rules import assign, read_rules
from ast_plugin.errors import OptionError, PluginError, ShapeError
from tests.archs.tiny_networks import EDSR, KEEP, SWINIR, Timm, TokenNet, rule

WRAP = {'op': 'wrap'}


class Nested(nn.Sequential):
    def __init__(self):
        super().__init__(Mixed(EDSR, [rule('body.0', 'MLP')]))


class Open(nn.Module):
    def forward(self, x, *_, **__):
        return 2 * x


class Pooled(nn.Module):
    """Channel attention on pooled maps, layers with a second input, and a layer that is called in a plain list."""

    def __init__(self):
        super().__init__()
        self.pooled = nn.Conv2d(3, 3, 1)
        self.pair, self.skips, self.later, self.mask, self.listed = (Open() for _ in range(5))
        self.plain = [self.listed]

    def forward(self, x):
        y = self.later(self.later(self.skips(self.pair(x, x), [x])), scale=x)
        pixels = y.flatten(2).transpose(0, 2)
        y = self.mask(pixels, pixels @ pixels.transpose(1, 2) > 0).transpose(0, 2).view_as(x)
        return self.plain[0](y) * self.pooled(x.mean((2, 3), keepdim=True))


class Twice(nn.Module):
    """A layer called with a map and with its mean, a network that contains a norm, and a layer whose weight is read."""

    def __init__(self):
        super().__init__()
        self.layer, self.conv = nn.Linear(3, 3), nn.Conv2d(3, 3, 3, padding=1)
        self.mlp = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3))

    def forward(self, x):
        y = self.mlp(x.permute(0, 2, 3, 1))
        y = (self.layer(y) * self.layer(y.mean((1, 2)))[:, None, None]).permute(0, 3, 1, 2)
        return self.conv(y) * self.conv.weight.mean()


NESTED, POOLED, TWICE = ({'type': kind.__name__} for kind in (Nested, Pooled, Twice))
HIDDEN = {'type': 'TokenNet', 'way': 'hidden'}
STYLEGAN = {'type': 'StyleGAN2Generator', 'out_size': 8, 'narrow': 0.1}


@pytest.mark.parametrize(
    ('rules', 'words'),
    [
        ([], r'mix: expected 1 items or more'),
        ('ASSA', r'mix: expected a list'),
        ([rule(keys={'opp': 'replace'})], r'mix\.0\.opp: unknown key, did you mean op\?'),
        ([{'with': {'type': 'ASSA'}}], r'mix\.0\.match: required'),
        ([rule('class:')], r'mix\.0\.match: expected a glob'),
        ([rule(), {'match': 'a'}], r'mix\.1\.with: required'),
        ([{'match': 'a', 'with': 'ASSA'}], r'mix\.0\.with: expected a mapping'),
        ([rule(block='ASA')], r'mix\.0\.with: no block is registered as ASA, did you mean ASSA'),
        ([rule(windowsize=8)], r'with: ASSA has no option windowsize, did you mean window_size\?'),
        ([rule(layout='nchw')], r'with: ASSA has no option layout'),
        ([{'match': 'a', 'with': {'type': 'ASSA', 3: 4}}], r'with\.3: Keys should be strings'),
        ([rule(keys={'op': 'swap'})], r'mix\.0\.op: expected .replace., .append., .prepend. or .wrap., got'),
        ([rule(keys={'keep_weights': 'yes'})], r'keep_weights: expected true or false'),
        ([rule(keys=KEEP | WRAP)], r'mix\.0: keep_weights requires op: replace; wrap keeps the module'),
        ([rule(keys={'dense_share': 0.9})], r'mix\.0: dense_share requires keep_weights'),
        ([rule(keys={**KEEP, 'dense_share': 1})], r'dense_share: expected less than 1, got 1'),
        ([rule(keys={'gain': 0.1})], r'mix\.0: gain requires op: wrap'),
        ([rule(keys={**WRAP, 'gain': float('nan')})], r'gain: expected a finite number'),
    ],
)
def test_invalid_rules(rules, words):
    with pytest.raises(OptionError, match=words):
        read_rules(rules)


@pytest.mark.parametrize(
    ('base', 'rules', 'kind', 'words'),
    [
        # matched modules
        (SWINIR, [rule('layers.*.block.*.attn')], OptionError, r'similar names: .*_group\.blocks\.\*\.attn'),
        (SWINIR, [rule('class:WindowAttn')], OptionError, 'existing classes: WindowAttention'),
        (SWINIR, [rule('*.attn')], OptionError, r'no module matches .*residual_group\.blocks\.\*\.attn'),
        (SWINIR, [rule(), rule('**.0.attn')], OptionError, r'mix\.1\.match: .* also matches mix\.0'),
        (SWINIR, [rule('**.blocks.*', 'ASTBlock'), rule()], OptionError, r'inside .*blocks\.0, which mix\.0 replaces'),
        (SWINIR, [rule('layers')], ShapeError, r'layers \(ModuleList\): the module is never called'),
        # unsuitable positions
        (SWINIR, [rule(block='FRFN')], ShapeError, r'\(windows\), but the block supports only tokens and maps'),
        (SWINIR, [rule('**.mlp.fc1', 'MLP')], ShapeError, r'input is \[1, \d+, 8\] and the output \[1, \d+, 16\]'),
        ({**EDSR, 'upscale': 2}, [rule('upsample.1', 'FRFN')], ShapeError, r'128, 130\], but a block preserves'),
        (HIDDEN, [rule('blocks.*.ffn', 'FRFN')], ShapeError, 'height and width .* are not an argument of any caller'),
        (POOLED, [rule('pooled', 'MLP')], ShapeError, r'got \[1, 3, 1, 1\] and'),
        (POOLED, [rule('pair', 'MLP')], ShapeError, r'second input \[1, 3, 64, 65\] of torch.float32 in addition'),
        (POOLED, [rule('skips', 'MLP')], ShapeError, 'second input'),
        (POOLED, [rule('later', 'MLP')], ShapeError, 'second input'),
        (POOLED, [rule('mask', 'MLP')], ShapeError, r'second input \[4160, 3, 3\] of torch.bool in addition'),
        (POOLED, [rule('listed', 'MLP')], OptionError, 'does not use the block at listed: .* a plain list'),
        (TWICE, [rule('conv', 'MLP')], OptionError, 'uses the modules in other ways than calling'),
        (TWICE, [rule('layer', 'MLP')], ShapeError, r'called with different kinds of input, .* 65, 3\] and \[1, 3\]'),
        # sizes
        (SWINIR, [rule(shift_size=2)], ShapeError, 'expected no shift_size, .*, got 2'),
        (SWINIR, [rule('**.mlp', 'FRFN', mlp_ratio='2')], OptionError, r"FRFN at layers.*must be a number .*, not '2'"),
        (SWINIR, [rule(window_size=8)], ShapeError, 'expected window_size 4, .*, got 8'),
        (SWINIR, [rule(dim=16)], ShapeError, 'expected 8 channels, got 16'),
        (EDSR, [rule('body.*', window_size=65)], OptionError, 'window_size 65 is larger than the feature map, 64x65'),
        (EDSR, [rule('body.*', window_size='large')], OptionError, r'ASSA at body\.0 .*large'),
        (EDSR, [rule('conv_last', 'FRFN', {'op': 'append'})], OptionError, 'needs at least 4 channels, not 3'),
        # weights
        (SWINIR, [rule('**.mlp', 'FRFN', KEEP)], OptionError, 'FRFN cannot keep weights of Mlp'),
        (EDSR, [rule('body.*', 'MLP', KEEP)], OptionError, 'MLP cannot keep weights of Residual'),
        (TWICE, [rule('mlp', 'MLP', KEEP)], OptionError, r'the block has no counterpart for 1\.weight, 1\.bias'),
        (EDSR, [rule('body.*', keys=KEEP)], OptionError, 'expected a window attention'),
        (SWINIR, [rule(keys=KEEP, num_heads=4)], ShapeError, r'bias is \[49, 2\], but the block has \[49, 4\]'),
        (SWINIR, [rule(keys=KEEP, qkv_bias=False)], ShapeError, r'q\.bias is \[8\], but the block has no such'),
        (SWINIR, [rule(block='DenseAttention', keys={**KEEP, 'dense_share': 0.9})], OptionError, 'has no gate'),
        # bases
        ({'type': 'Mixed', 'base': EDSR, 'mix': []}, [rule()], OptionError, 'Mixed cannot be the base of a Mixed'),
        (NESTED, [rule()], OptionError, 'Nested contains a Mixed'),
        ({'type': 'SwinIRR'}, [rule()], OptionError, 'no network is registered as SwinIRR, did you mean SwinIR'),
        ({}, [rule()], OptionError, r'base: expected \{type: NAME'),
        (STYLEGAN, [rule()], OptionError, 'needs operators compiled for CUDA'),
        ({'type': 'SpyNet'}, [rule('basic_module.0', 'MLP')], OptionError, 'does not run on images'),
        ({'type': 'EDSR', 'num_in_ch': 3}, [rule()], OptionError, 'base: the network EDSR cannot .*num_out_ch'),
    ],
)
def test_impossible_rules(registered, base, rules, kind, words):
    registered(**{network.__name__: network for network in (Nested, Pooled, Twice, TokenNet)})
    with pytest.raises(kind, match=words):
        Mixed(base, rules)


def test_sizes_out_of_range():
    for key, value in (('size_multiple', 0), ('nominal_size', 1.5), ('nominal_size', True)):
        with pytest.raises(OptionError, match=f'{key}: expected a whole number'):
            Mixed(EDSR, [rule('body.*', 'MLP')], **{key: value})


def test_any_module_for_a_block():
    """Replacing any module of a network raises only the plugin's own errors."""
    base = {'type': 'MSRResNet', 'num_feat': 8, 'num_block': 1, 'upscale': 1}
    shapes = []
    for name in [name for name, _ in build_base(base).named_modules() if name]:
        for op in ('replace', 'wrap'):
            with suppress(PluginError):
                network = Mixed(base, [rule(name, 'LeFF', {'op': op})])
                shapes.append(network(torch.rand(1, 3, 5, 6)).shape)
    assert len(shapes) > 8 and set(shapes) == {(1, 3, 5, 6)}


GLOBS = {
    'body.*': ['body.0', 'body.10'],
    'body.?': ['body.0'],
    'body.[0-9]': ['body.0'],
    'body.**': ['body', 'body.0', 'body.0.attn', 'body.10', 'body.10.attn'],
    '**.attn': ['body.0.attn', 'body.10.attn', 'tail.deep.body.0.attn'],
    '**.body.*': ['body.0', 'body.10', 'tail.deep.body.0'],
    '*': ['body', 'tail'],
    'tail.**.attn': ['tail.deep.body.0.attn'],
    'Body.*': [],
    'class:Ident*': ['body.0.attn', 'body.10.attn', 'tail.deep.body.0.attn'],
    'class:identity': [],
}


def test_globs():
    def tree(branches):
        return nn.ModuleDict({name: tree(branch) for name, branch in branches.items()}) if branches else nn.Identity()

    layer = {'attn': {}}
    network = tree({'body': {'0': layer, '10': layer}, 'tail': {'deep': {'body': {'0': layer}}}})
    for pattern, expected in GLOBS.items():
        rules = read_rules([rule(pattern, 'MLP', {'op': 'append'})])
        if expected:
            assert list(assign(network, rules)) == expected, pattern
        else:
            with pytest.raises(OptionError, match='no module matches'):
                assign(network, rules)


# ---- declarations of blocks


def test_what_is_registered():
    attentions = {'ASSA', 'DenseAttention', 'SparseAttention', 'ReLUAttention', 'TopKAttention'}
    assert set(BLOCKS.module_dict) == attentions | {'FRFN', 'LeFF', 'MLP', 'ASTBlock'}
    for name in BLOCKS.module_dict:
        declared = declaration(name)
        assert declared.sizes['dim'] == 'dim'
        block = declared.build(**{'dim': 8, **({'num_heads': 2} if 'num_heads' in declared.sizes else {})})
        x = torch.rand(2, 9, 10, 8)
        assert block(x).shape == x.shape
        assert 'windows' not in declared.replaces or declared.works_in == 'any' or hasattr(block, 'attend_windows')


@pytest.mark.parametrize(
    ('attributes', 'words'),
    [
        ({}, 'has works_in = None'),
        ({'works_in': 'hwc'}, "has works_in = 'hwc': expected one of nhwc, nchw"),
        ({'works_in': 'nchw'}, r'has replaces = \(\)'),
        ({'works_in': 'nchw', 'replaces': ('pixels',)}, 'expected some of windows, tokens, maps'),
        ({'works_in': 'nchw', 'replaces': 'maps', 'sizes': {'width': 'breadth'}}, 'expected values among dim'),
    ],
)
def test_invalid_declarations_of_blocks(monkeypatch, attributes, words):
    monkeypatch.setitem(BLOCKS._module_dict, 'Odd', type('Odd', (nn.Identity,), attributes))
    with pytest.raises(OptionError, match=words):
        declaration('Odd')


def test_sizes_under_other_names(registered, monkeypatch):
    class Wide(nn.Conv2d):
        works_in, replaces, sizes = 'nchw', 'maps', {'width': 'dim'}

        def __init__(self, width: int) -> None:
            super().__init__(width, width, 1)

    class Windowed(nn.Linear):
        works_in, replaces = 'windows', 'windows'

        def __init__(self, window: int) -> None:
            super().__init__(12, 12)

        def forward(self, x, mask):
            return super().forward(x)

    monkeypatch.setitem(BLOCKS._module_dict, 'Wide', Wide)
    monkeypatch.setitem(BLOCKS._module_dict, 'Windowed', Windowed)
    registered(Timm=Timm)
    network = Mixed(EDSR, [rule('body.0', 'Wide')])
    assert network.exchanges[0].options == {'width': 8}
    network = Mixed({'type': 'Timm'}, [rule('**.mlp', 'Windowed', window=4)])  # of windows whose size is not declared
    assert network.exchanges[0].options == {'window': 4}
