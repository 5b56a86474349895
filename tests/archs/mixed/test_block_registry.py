"""The registry of blocks: what is in it, and what a block must say of itself."""

import pytest
import torch
from torch import nn

from ast_plugin.archs.mixed.block_registry import BLOCKS, declaration
from ast_plugin.archs.mixed.mixed_arch import Mixed
from ast_plugin.errors import OptionError
from tests.archs.tiny_networks import EDSR, rule


def test_what_is_registered():
    assert set(BLOCKS.module_dict) == {
        'ASSA',
        'DenseAttention',
        'SparseAttention',
        'ReLUAttention',
        'TopKAttention',
        'FRFN',
        'LeFF',
        'MLP',
        'ASTBlock',
    }
    for name in BLOCKS.module_dict:
        said = declaration(name)
        assert said.sizes['dim'] == 'dim'
        block = said.build(**{'dim': 8, **({'num_heads': 2} if 'num_heads' in said.sizes else {})})
        x = torch.rand(2, 9, 10, 8)
        assert block(x).shape == x.shape
        assert 'windows' not in said.replaces or said.works_in == 'any' or hasattr(block, 'attend_windows')


@pytest.mark.parametrize(
    ('attributes', 'words'),
    [
        ({}, 'says works_in = None'),
        ({'works_in': 'hwc'}, "says works_in = 'hwc': expected one of nhwc, nchw"),
        ({'works_in': 'nchw'}, r'says replaces = \(\)'),
        ({'works_in': 'nchw', 'replaces': ('pixels',)}, 'expected some of windows, tokens, maps'),
        ({'works_in': 'nchw', 'replaces': 'maps', 'sizes': {'width': 'breadth'}}, 'expected values among dim'),
    ],
)
def test_blocks_that_say_nothing_useful(monkeypatch, attributes, words):
    monkeypatch.setitem(BLOCKS._module_dict, 'Odd', type('Odd', (nn.Identity,), attributes))
    with pytest.raises(OptionError, match=words):
        declaration('Odd')


def test_sizes_under_other_names(monkeypatch):
    class Wide(nn.Conv2d):
        works_in, replaces, sizes = 'nchw', 'maps', {'width': 'dim'}

        def __init__(self, width: int) -> None:
            super().__init__(width, width, 1)

    monkeypatch.setitem(BLOCKS._module_dict, 'Wide', Wide)
    network = Mixed(EDSR, [rule('body.0', 'Wide')])
    assert network.exchanges[0].options == {'width': 8}
