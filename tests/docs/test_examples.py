"""The blocks of Python in the README and docs/ run as they stand, and the mixed networks are built."""

import pytest

from ast_plugin.archs.mixed.block_registry import BLOCKS
from ast_plugin.archs.mixed.mixed_arch import Mixed, build_base
from ast_plugin.checkpoints import save_torch
from ast_plugin.options import safe_yaml

from .pages import blocks


def examples(language):
    return [pytest.param(text, id=name) for name, text in blocks(language)]


@pytest.mark.parametrize('code', examples('python'))
def test_python(code):
    before = set(BLOCKS.module_dict)
    try:
        exec(compile(code, 'example', 'exec'), {'__name__': 'example'})
    finally:
        for name in set(BLOCKS.module_dict) - before:
            BLOCKS._module_dict.pop(name)


@pytest.mark.parametrize(
    'text', [pytest.param(text, id=name) for name, text in blocks('yaml') if 'type: Mixed' in text]
)
def test_mixed_networks_are_built(text, tmp_path):
    network = safe_yaml.read_text(text, 'example')['network_g']
    base = {**network['base'], 'depths': [2], 'num_heads': [2], 'embed_dim': 8}
    save_torch(tmp_path / 'w.pth', build_base(base).state_dict())
    mixed = Mixed(base, network['mix'], base_weights=str(tmp_path / 'w.pth'))
    assert {exchange.rule.declaration.name for exchange in mixed.exchanges} == {
        rule['with']['type'] for rule in network['mix']
    }
