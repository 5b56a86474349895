"""The examples of docs/ run as they stand."""

import re
from pathlib import Path

import pytest

from ast_plugin.options import safe_yaml

DOCS = Path(__file__).parents[1] / 'docs'


def examples(language):
    for path in sorted(DOCS.glob('*.md')):
        for number, match in enumerate(
            re.finditer(rf'^```{language}\n(.*?)^```', path.read_text('utf-8'), re.M | re.S), 1
        ):
            yield pytest.param(match[1], id=f'{path.stem}-{number}')


@pytest.mark.parametrize('code', examples('python'))
def test_python(code):
    from ast_plugin.archs.block_registry import BLOCKS

    before = dict(BLOCKS.module_dict)
    try:
        exec(compile(code, 'example', 'exec'), {'__name__': 'example'})
    finally:
        for name in set(BLOCKS.module_dict) - set(before):
            BLOCKS._module_dict.pop(name)


def test_the_three_that_are_promised_are_there():
    text = (DOCS / 'blocks.md').read_text(encoding='utf-8')
    for title in ('A stage of a U-Net', 'The neck of a detector', 'The head of a segmentation network'):
        assert '```python' in text.partition(f'\n## {title}\n')[2].partition('\n## ')[0], title


@pytest.mark.parametrize('text', examples('yaml'))
def test_option_files(text, tmp_path):
    """Those with a Mixed are built; the weights that they name are those of their base."""
    from ast_plugin.archs.mixed_arch import Mixed, build_base
    from ast_plugin.checkpoints import save_torch

    network = safe_yaml.read_text(text, 'example')['network_g']
    base = {**network['base'], 'depths': [2], 'num_heads': [2], 'embed_dim': 8}
    save_torch(tmp_path / 'w.pth', build_base(base).state_dict())
    mixed = Mixed(base, network['mix'], base_weights=str(tmp_path / 'w.pth'))
    assert {exchange.block for exchange in mixed.exchanges} == {rule['with']['type'] for rule in network['mix']}
