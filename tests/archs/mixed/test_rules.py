"""Rules that are wrong, and what globs mean."""

import pytest
import torch
from torch import nn

from ast_plugin.archs.mixed.block_registry import declaration
from ast_plugin.archs.mixed.mixed_arch import Mixed
from ast_plugin.archs.mixed.rules import Rule, assign, read_rules
from ast_plugin.errors import CheckpointError, OptionError, PluginError, ShapeError
from tests.archs.mixed.networks import EDSR, MSRRESNET, SWINIR, TokenNet

ASSA = {'type': 'ASSA'}
ATTN = {'match': '**.attn', 'with': ASSA}


@pytest.fixture(autouse=True)
def _networks(monkeypatch):
    import basicsr.archs  # noqa: F401 - registers
    from basicsr.utils.registry import ARCH_REGISTRY

    class Gossip(nn.Module):
        """Looks into its layer instead of only calling it."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(x) * self.conv.weight.mean()

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Mixed(EDSR, [{'match': 'body.0', 'with': {'type': 'MLP'}}])

        def forward(self, x):
            return self.inner(x)

    class Pooled(nn.Module):
        """Channel attention alone, and a second tensor beside the map."""

        def __init__(self):
            super().__init__()
            self.pooled, self.pair = nn.Conv2d(3, 3, 1), Pair()

        def forward(self, x):
            return self.pair(x, x) * self.pooled(x.mean((2, 3), keepdim=True))

    class Pair(nn.Module):
        def forward(self, x, y):
            return x + y

    class Twice(nn.Module):
        """A layer for a map, then for its mean; and a feed-forward network with a convolution in it."""

        def __init__(self):
            super().__init__()
            self.layer, self.conv = nn.Linear(3, 3), nn.Conv2d(3, 3, 3, padding=1)
            self.mlp = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3))

        def forward(self, x):
            y = self.mlp(x.permute(0, 2, 3, 1))
            return self.conv((self.layer(y) * self.layer(y.mean((1, 2)))[:, None, None]).permute(0, 3, 1, 2))

    for network in (Gossip, Nested, Pooled, Twice, TokenNet):
        monkeypatch.setitem(ARCH_REGISTRY._obj_map, network.__name__, network)


@pytest.mark.parametrize(
    ('rules', 'words'),
    [
        ([], r'mix: expected a list of rules'),
        ('ASSA', r'mix: expected a list of rules'),
        (['ASSA'], r'mix\.0: expected \{match'),
        ([{**ATTN, 'opp': 'replace'}], r'mix\.0\.opp: unknown key, did you mean op\?'),
        ([{'with': ASSA}], r'mix\.0\.match: expected a glob.*got None'),
        ([{'match': 'class:', 'with': ASSA}], r'mix\.0\.match: expected a glob'),
        ([ATTN, {'match': 'a'}], r'mix\.1\.with: expected the block'),
        ([{'match': 'a', 'with': 'ASSA'}], r'mix\.0\.with: expected the block'),
        (
            [{'match': 'a', 'with': {'type': 'ASA'}}],
            r'mix\.0\.with\.type: no block is registered as ASA, did you mean ASSA',
        ),
        ([{'match': 'a', 'with': {'type': 3}}], r'no block is registered as 3'),
        ([{'match': 'a', 'with': {**ASSA, 'windowsize': 8}}], r'with\.windowsize: .*did you mean window_size\?'),
        ([{'match': 'a', 'with': {**ASSA, 'layout': 'nchw'}}], r'with\.layout: ASSA takes no such option'),
        ([{**ATTN, 'op': 'swap'}], r'mix\.0\.op: expected one of replace, append, prepend, wrap'),
        ([{**ATTN, 'keep_weights': 'yes'}], r'keep_weights: expected true or false'),
        ([{**ATTN, 'keep_weights': True, 'op': 'wrap'}], r'keep_weights: wrap keeps the module'),
        ([{**ATTN, 'dense_share': 0.9}], r'dense_share: goes with keep_weights'),
        ([{**ATTN, 'keep_weights': True, 'dense_share': 1}], r'dense_share: expected a number between 0 and 1'),
        ([{**ATTN, 'keep_weights': True, 'dense_share': 'all'}], r'dense_share: expected a number'),
        ([{**ATTN, 'gain': 0.1}], r'gain: a number, for op: wrap alone'),
        ([{**ATTN, 'op': 'wrap', 'gain': float('nan')}], r'gain: a number'),
        ([{**ATTN, 'op': 'wrap', 'gain': 10**400}], r'gain: a number'),
        ([{'match': 'a', 'with': {**ASSA, 3: 4}}], r'with\.3: ASSA takes no such option'),
        ([{**ATTN, 'op': ['wrap']}], r"op: expected one of .*, got \['wrap'\]"),
    ],
)
def test_rules_that_cannot_be_read(rules, words):
    with pytest.raises(OptionError, match=words):
        read_rules(rules)


@pytest.mark.parametrize(
    ('base', 'rules', 'kind', 'words'),
    [
        # what a rule means
        (
            SWINIR,
            [{'match': 'layers.*.residual_group.block.*.attn', 'with': ASSA}],
            OptionError,
            r'no module is meant by .*; near it are layers\.\*\.residual_group\.blocks\.\*\.attn',
        ),
        (SWINIR, [{'match': 'class:WindowAttn', 'with': ASSA}], OptionError, 'classes there are: WindowAttention'),
        (SWINIR, [{'match': '*.attn', 'with': ASSA}], OptionError, r'residual_group\.blocks\.\*\.attn'),
        (
            SWINIR,
            [ATTN, {'match': '**.0.attn', 'with': ASSA}],
            OptionError,
            r'mix\.1\.match: .*exchanged twice, by mix\.0',
        ),
        (
            SWINIR,
            [{'match': '**.blocks.*', 'with': {'type': 'ASTBlock'}}, ATTN],
            OptionError,
            r'attn would be exchanged twice, it lies in .*blocks\.0, which mix\.0 replaces',
        ),
        (SWINIR, [{'match': '**', 'with': {'type': 'MLP'}}], OptionError, 'exchanged twice'),
        (SWINIR, [{'match': 'layers', 'with': ASSA}], ShapeError, r'layers \(ModuleList\) is never called'),
        # what cannot stand there
        (
            SWINIR,
            [{'match': '**.attn', 'with': {'type': 'FRFN'}}],
            ShapeError,
            r'windows, and it stands among tokens or on maps',
        ),
        (
            SWINIR,
            [{'match': '**.mlp.fc1', 'with': {'type': 'MLP'}}],
            ShapeError,
            r'\[1, \d+, 8\] come in and \[1, \d+, 16\] go out',
        ),
        (
            {**EDSR, 'upscale': 2},
            [{'match': 'upsample.1', 'op': 'replace', 'with': {'type': 'FRFN'}}],
            ShapeError,
            r'\[1, 32, 64, 65\] come in and \[1, 8, 128, 130\] go out, and a block keeps the shape',
        ),
        (
            {'type': 'TokenNet', 'way': 'hidden'},
            [{'match': 'blocks.*.ffn', 'with': {'type': 'FRFN'}}],
            ShapeError,
            'no caller is given their height and width',
        ),
        (
            {'type': 'Pooled'},
            [{'match': 'pooled', 'with': {'type': 'MLP'}}],
            ShapeError,
            r'works on \[1, 3, 1, 1\], then on',
        ),
        (
            {'type': 'Pooled'},
            [{'match': 'pair', 'with': {'type': 'MLP'}}],
            ShapeError,
            r'it is given \[1, 3, 64, 65\] besides',
        ),
        (
            {'type': 'Gossip'},
            [{'match': 'conv', 'with': {'type': 'MLP'}}],
            OptionError,
            'does more with the modules than calling',
        ),
        (
            {'type': 'Twice'},
            [{'match': 'layer', 'with': {'type': 'MLP'}}],
            ShapeError,
            r'layer \(Linear\) is called in different ways, with \[1, 64, 65, 3\] and with \[1, 3\]',
        ),
        # sizes
        (
            SWINIR,
            [{'match': '**.attn', 'with': {**ASSA, 'shift_size': 2}}],
            ShapeError,
            'shift_size 2 asked for, it is the caller who cuts the windows',
        ),
        (
            SWINIR,
            [{'match': '**.mlp', 'with': {'type': 'FRFN', 'mlp_ratio': '2'}}],
            OptionError,
            r"mix\.0: FRFN at layers.*mlp_ratio must be a number .*, not '2'",
        ),
        (
            SWINIR,
            [{'match': '**.attn', 'with': {**ASSA, 'num_heads': 3}}],
            OptionError,
            '8 channels do not divide into 3 heads',
        ),
        (
            SWINIR,
            [{'match': '**.attn', 'with': {**ASSA, 'window_size': 8}}],
            ShapeError,
            'window_size 8 asked for, .*4x4',
        ),
        (
            SWINIR,
            [{'match': '**.attn', 'with': {**ASSA, 'dim': 16}}],
            ShapeError,
            '16 channels asked for, the place has 8',
        ),
        (
            EDSR,
            [{'match': 'body.*', 'with': {**ASSA, 'window_size': 65}}],
            OptionError,
            r'window_size 65 is larger than the map there, 64x65',
        ),
        (
            EDSR,
            [{'match': 'body.*', 'with': {**ASSA, 'window_size': 'large'}}],
            OptionError,
            r'ASSA at body\.0 .*large',
        ),
        (
            EDSR,
            [{'match': 'body.*', 'with': {**ASSA, 'shift_size': 9}}],
            OptionError,
            r'shift_size must be in \[0, 8\)',
        ),
        (
            EDSR,
            [{'match': 'conv_last', 'op': 'append', 'with': {'type': 'FRFN'}}],
            OptionError,
            'needs at least 4 of them, not 3',
        ),
        # weights
        (
            SWINIR,
            [{'match': '**.mlp', 'with': {'type': 'FRFN'}, 'keep_weights': True}],
            OptionError,
            'FRFN can keep nothing of Mlp',
        ),
        (
            EDSR,
            [{'match': 'body.*', 'with': {'type': 'MLP'}, 'keep_weights': True}],
            OptionError,
            'MLP can keep nothing of Residual',
        ),
        (
            {'type': 'Twice'},
            [{'match': 'mlp', 'with': {'type': 'MLP'}, 'keep_weights': True}],
            OptionError,
            r'it has learned more than the block has a place for, 1\.weight, 1\.bias',
        ),
        (EDSR, [{'match': 'body.*', 'with': ASSA, 'keep_weights': True}], OptionError, 'it is no window attention'),
        (
            SWINIR,
            [{'match': '**.attn', 'with': {**ASSA, 'num_heads': 4}, 'keep_weights': True}],
            ShapeError,
            r'position_bias is \[49, 2\], the block has \[49, 4\]',
        ),
        (
            SWINIR,
            [{'match': '**.attn', 'with': {**ASSA, 'qkv_bias': False}, 'keep_weights': True}],
            ShapeError,
            r'q\.bias is \[8\], the block has nothing',
        ),
        (
            SWINIR,
            [{'match': '**.attn', 'with': {'type': 'DenseAttention'}, 'keep_weights': True, 'dense_share': 0.9}],
            OptionError,
            'DenseAttention has no gate',
        ),
        # bases
        ({'type': 'Mixed', 'base': EDSR, 'mix': []}, [ATTN], OptionError, 'Mixed cannot be the base of a Mixed'),
        ({'type': 'Nested'}, [ATTN], OptionError, 'Nested has a Mixed in it'),
        ({'type': 'SwinIRR'}, [ATTN], OptionError, 'no network is registered as SwinIRR, did you mean SwinIR'),
        ({}, [ATTN], OptionError, r'base: expected \{type: NAME'),
        (
            {'type': 'EDVR', 'num_feat': 8, 'num_extract_block': 1, 'num_reconstruct_block': 1},
            [ATTN],
            OptionError,
            'EDVR needs operators compiled for CUDA',
        ),
        (
            {'type': 'StyleGAN2Generator', 'out_size': 8, 'narrow': 0.1},
            [ATTN],
            OptionError,
            'needs operators compiled for CUDA',
        ),
        (
            {'type': 'SpyNet'},
            [{'match': 'basic_module.0', 'with': {'type': 'MLP'}}],
            OptionError,
            'does not run on images',
        ),
        (
            {'type': 'EDSR', 'num_in_ch': 3},
            [ATTN],
            OptionError,
            'base: the network EDSR cannot be built with .*num_out_ch',
        ),
    ],
)
def test_rules_that_cannot_be_followed(base, rules, kind, words):
    with pytest.raises(kind, match=words):
        Mixed(base, rules)


@pytest.mark.parametrize('key', ['size_multiple', 'nominal_size'])
@pytest.mark.parametrize('value', [0, -8, 1.5, '8', True])
def test_sizes_that_make_no_sense(key, value):
    with pytest.raises(OptionError, match=f'{key}: expected a whole number'):
        Mixed(EDSR, [{'match': 'body.*', 'with': {'type': 'MLP'}}], **{key: value})


def test_nothing_is_left_behind_by_a_failure():
    """No error but our own, whichever module of a network is exchanged for whichever block."""
    tried = 0
    names = [name for name, _ in Mixed(MSRRESNET, [{'match': 'body.0', 'with': {'type': 'MLP'}}]).base.named_modules()]
    for name in filter(None, names):
        for op in ('replace', 'append', 'wrap'):
            try:
                network = Mixed(MSRRESNET, [{'match': name, 'op': op, 'with': {'type': 'LeFF'}}])
            except PluginError:
                continue
            tried += 1
            assert network(torch.rand(1, 3, 5, 6)).shape == (1, 3, 5, 6)
    assert tried > 20


NAMES = [
    'body',
    'body.0',
    'body.0.attn',
    'body.10',
    'body.10.attn',
    'tail',
    'tail.deep.body.0',
    'tail.deep.body.0.attn',
]


@pytest.mark.parametrize(
    ('pattern', 'expected'),
    [
        ('body.*', ['body.0', 'body.10']),
        ('body.?', ['body.0']),
        ('body.[0-9]', ['body.0']),
        ('body.**', ['body', 'body.0', 'body.0.attn', 'body.10', 'body.10.attn']),
        ('**.attn', ['body.0.attn', 'body.10.attn', 'tail.deep.body.0.attn']),
        ('**.body.*', ['body.0', 'body.10', 'tail.deep.body.0']),
        ('*', ['body', 'tail']),
        ('tail.**.attn', ['tail.deep.body.0.attn']),
        ('Body.*', []),
        ('class:Ident*', ['body.0.attn', 'body.10.attn', 'tail.deep.body.0.attn']),
        ('class:identity', []),
    ],
)
def test_what_globs_mean(pattern, expected):
    network = nn.Module()
    for name in NAMES:
        parent, _, key = name.rpartition('.')
        for step in range(len(parts := parent.split('.')) if parent else 0):
            path = '.'.join(parts[: step + 1])
            if path not in dict(network.named_modules()):
                network.get_submodule(path.rpartition('.')[0]).add_module(parts[step], nn.Module())
        network.get_submodule(parent).add_module(key, nn.Identity() if key == 'attn' else nn.Module())
    rule = Rule('mix.0', pattern, declaration('MLP'), {}, op='append')
    if not expected:
        with pytest.raises(OptionError, match='no module is meant'):
            assign(network, [rule])
    else:
        assert list(assign(network, [rule])) == expected


def test_weights_of_strangers_are_not_run(tmp_path):
    import pickle

    (tmp_path / 'w.pth').write_bytes(pickle.dumps(print))
    with pytest.raises(CheckpointError):
        Mixed(EDSR, [{'match': 'body.*', 'with': {'type': 'MLP'}}], base_weights=str(tmp_path / 'w.pth'))
