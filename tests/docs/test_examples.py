"""Run the Python examples of the README and docs/ unchanged, check the YAML examples, and build mixed networks."""

import pytest

from ast_plugin import options
from ast_plugin.archs.mixed.block_registry import BLOCKS
from ast_plugin.archs.mixed.mixed_arch import Mixed, build_base
from ast_plugin.checkpoints import save_torch
from ast_plugin.errors import BackendUnavailable
from ast_plugin.models.preflight import load_registered
from ast_plugin.options import safe_yaml, validation

from .pages import blocks


def examples(language):
    return [pytest.param(text, id=name) for name, text in blocks(language)]


@pytest.mark.parametrize('code', examples('python'))
def test_python(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(BLOCKS.module_dict)
    try:
        exec(compile(code, 'example', 'exec'), {'__name__': 'example'})
    except BackendUnavailable as error:
        pytest.skip(str(error))
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


ANY_DATASET = ('name', 'gt_size', 'batch_size_per_gpu', 'num_worker_per_gpu')  # keys that examples may omit


@pytest.mark.parametrize('text', examples('yaml'))
def test_yaml_fits_a_shipped_file(text):
    """Check each YAML example as a replacement of the same sections in a shipped file."""
    shown = safe_yaml.read_text(text, 'example')
    is_comparison = 'networks' in shown
    file = options.find('compare/quick' if is_comparison else 'AST_quickstart')
    opt = options.load(file)
    common = {key: opt['datasets']['train'][key] for key in ANY_DATASET}
    for phase, dataset in shown.pop('datasets', {}).items():
        opt['datasets'][phase] = {**common, **dataset}
    if 'minutes' in shown.get('compare', {}):
        del opt['train']['total_iter']
    for key, value in shown.items():
        opt[key] = {**opt[key], **value} if key == 'path' else value
    validation.check(opt, str(file), load_registered())
