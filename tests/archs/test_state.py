import re

import pytest
import torch

from ast_plugin.archs.ast_arch import AST
from ast_plugin.archs.state import OFFICIAL_NAMES, describe_mismatch, infer_options, plain_state
from ast_plugin.errors import CheckpointError

from .golden import NAMES, GoldenCase

OPTIONS = [
    {},
    {'img_size': 64, 'window_size': 8},
    {'img_size': 32, 'window_size': 8},
    {'window_size': 4, 'mlp_ratio': 2.5, 'qkv_bias': False},
    {'depths': (1, 2, 3, 1, 2, 1, 1, 2, 1), 'num_heads': (1, 1, 2, 2, 4, 4, 2, 2, 1), 'ffn': 'leff'},
    {'embed_dim': 16, 'mlp_ratio': 2.65625},  # 42.5 hidden channels of the first level are rounded
    {'in_chans': 1, 'out_chans': 4, 'embed_dim': 8, 'ffn': 'mlp', 'attention': 'dense'},
]


@pytest.mark.parametrize('options', OPTIONS)
def test_options_are_inferred(options):
    built = {'embed_dim': 4, 'depths': (1,) * 9, 'num_heads': (1,) * 9, **options}
    with torch.device('meta'):
        state = AST(**built).state_dict()
        told, assumed = infer_options(state)
        assert describe_mismatch(AST(**told).state_dict(), state) is None
    for key, value in options.items():
        if key != 'num_heads':  # those of the encoder have no effect and cannot be inferred
            assert told[key] == (list(value) if isinstance(value, tuple) else value), key
    assert told['num_heads'][4:] == list(built['num_heads'][4:])
    tells_img_size = options.get('img_size', 128) / 16 < options.get('window_size', 8)
    assert any('img_size' in line for line in assumed) != tells_img_size
    assert any('assuming dense' in line for line in assumed) == (options.get('attention') == 'dense')


def test_names_of_official_states():
    names = set()
    for case in map(GoldenCase, NAMES):
        state = {key: torch.empty(shape, device='meta') for key, shape in case.facts['state_dict'].items()}
        told, _ = infer_options({f'module.{key}': tensor for key, tensor in state.items()})
        assert told.items() >= {'ffn': case.options['ffn'], 'depths': case.options.get('depths', [2] * 9)}.items()
        with torch.device('meta'):
            assert describe_mismatch(AST(**told).state_dict(), state) is None
        names |= state.keys()
    for official, ours in OFFICIAL_NAMES:  # every row is used
        renamed = {re.sub(official, ours, name) for name in names}
        assert renamed != names, official
        names = renamed


def test_other_states_are_rejected():
    for state in ({}, {'conv.weight': torch.zeros(3)}, {'input_proj.weight': torch.zeros(4)}):
        with pytest.raises(CheckpointError, match='not the state dict of an AST'):
            infer_options(state)


def test_only_names_with_prefix_are_converted():
    a, b = torch.zeros(1), torch.ones(1)
    state = {'net.encoderlayer_0.blocks.0.mlp.fc1.bias': a, 'other.encoderlayer_0.blocks.0.mlp.fc1.bias': b}
    converted = plain_state(state, 'net.')
    assert converted == {'net.encoder.0.blocks.0.ffn.expand.bias': a, 'other.encoderlayer_0.blocks.0.mlp.fc1.bias': b}
