"""Networks in Hugging Face folders, and in a simulated repository."""

import copy
import inspect
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from ast_plugin.archs.ast_arch import AST, AST_XS
from ast_plugin.archs.mixed.mixed_arch import Mixed
from ast_plugin.archs.networks import load_network
from ast_plugin.checkpoints import CONFIG, PRETRAINED, read_checkpoint
from ast_plugin.errors import BackendUnavailable, CheckpointError, FileError, OptionError
from ast_plugin.evaluation.restorer import Restorer
from ast_plugin.evaluation.results import describe_provenance
from ast_plugin.files import file_digest
from ast_plugin.weights import find_weights

from . import tiny_networks
from .golden import GoldenCase

TINY = {key: value for key, value in tiny_networks.AST.items() if key != 'type'}
MIX = {'base': tiny_networks.SWINIR, 'mix': [tiny_networks.rule(tiny_networks.ATTENTIONS)]}
NETWORKS = {
    'gray': (AST, TINY | {'in_chans': 1, 'out_chans': 1, 'attention': 'topk', 'topk_ratio': 0.25, 'ffn': 'leff'}),
    'AST_XS': (AST_XS, {'embed_dim': 4, 'img_size': 64}),
    'Mixed': (Mixed, MIX),
}


def same(network, other):
    state, others = network.state_dict(), other.state_dict()
    assert state.keys() == others.keys() and all(torch.equal(state[name], others[name]) for name in state)
    return network.options == other.options


def folder_of(tmp_path, state, config=None) -> Path:
    """Write a folder as third-party code does."""
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / 'model.safetensors')
    if config is not None:
        (tmp_path / 'config.json').write_text(config if isinstance(config, str) else json.dumps(config))
    return tmp_path


def test_options_are_recorded():
    defaults = {name: parameter.default for name, parameter in inspect.signature(AST).parameters.items()}
    network = AST(16, embed_dim=4)
    told = {'img_size': 16, 'embed_dim': 4, 'depths': [2] * 9, 'num_heads': [1, 2, 4, 8, 16, 16, 8, 4, 2]}
    assert network.options == {'type': 'AST', **defaults, **told}
    assert same(copy.deepcopy(network), network)
    assert list(inspect.signature(Mixed).parameters)[:2] == ['base', 'mix']
    with pytest.raises(TypeError, match='unexpected keyword'):
        AST(nonsense=3)


def test_folder_is_a_weights_file(tmp_path):
    network = AST(**TINY | {'img_size': 16})
    folder = folder_of(tmp_path, network.state_dict(), config=network.options)
    assert same(load_network(None, folder), network)
    assert Restorer.from_weights(folder, device='cpu').network.options['img_size'] == 16
    for config in ('{', '[1]', {'hidden_size': 3}, {'type': 3}):
        folder_of(tmp_path, network.state_dict(), config)
        assert read_checkpoint(folder).network is None
    assert load_network(None, folder).options['embed_dim'] == 4  # inferred from names and shapes
    told = describe_provenance(SimpleNamespace(describe=str), {}, folder, torch.device('cpu'))
    assert told['sha256'] == file_digest(folder / 'model.safetensors')


@pytest.mark.parametrize('which', NETWORKS)
def test_folder_round_trip(tmp_path, which):
    build, options = NETWORKS[which]
    network, folder = build(**options), tmp_path / 'new' / 'folder'
    network.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    (folder / 'README.md').write_text('of its author')
    loaded = build.from_pretrained(str(folder))
    assert type(loaded) is type(network) and not loaded.training and same(loaded, network)
    assert json.loads((folder / 'config.json').read_text()) == network.options
    assert not any(key.startswith('base_') for key in network.options)  # only used for initialisation
    assert read_checkpoint(folder / 'model.safetensors').network == network.options
    loaded.save_pretrained(folder)  # overwrite
    assert same(load_network(None, folder), network)  # `--weights FOLDER`
    assert (folder / 'README.md').read_text() == 'of its author'


def test_folder_with_official_names(tmp_path):
    case = GoldenCase('tiny_leff_128')
    state = {key: torch.rand(shape) for key, shape in case.facts['state_dict'].items()}
    folder_of(tmp_path, {f'module.{key}': tensor for key, tensor in state.items()})
    expected = AST(**case.options)
    expected.load_state_dict(state)
    official = AST.from_pretrained(tmp_path, drop_path_rate=0.3)  # not stored in the weights
    assert official.options == {**expected.options, 'drop_path_rate': 0.3, 'num_heads': official.options['num_heads']}
    same(official, expected)


def test_bundled_weights(tmp_path):
    shutil.copy(find_weights('rain'), tmp_path / 'model.safetensors')
    ours = load_network(None, find_weights('rain'))
    assert same(AST_XS.from_pretrained(tmp_path), ours) and same(AST.from_pretrained(tmp_path), ours)


NO_BIAS = {name: tensor for name, tensor in AST(**TINY).state_dict().items() if name != 'output_proj.bias'}


@pytest.mark.parametrize(
    ('change', 'options', 'error', 'message'),
    [
        (lambda folder: shutil.rmtree(folder), {}, CheckpointError, 'w: expected a folder with model.safetensors'),
        (lambda folder: (folder / PRETRAINED).unlink(), {}, CheckpointError, r'is a folder without model\.safetensors'),
        (lambda folder: os.truncate(folder / PRETRAINED, 999), {}, CheckpointError, 'is truncated or not a safeten'),
        (lambda folder: Mixed(**MIX).save_pretrained(folder), {}, OptionError, 'expected the network AST, got Mixed'),
        (lambda folder: folder_of(folder, NO_BIAS), {}, CheckpointError, 'output_proj.bias .* is missing'),
        (lambda folder: (folder / CONFIG).write_text('[1]'), {}, CheckpointError, r'a folder with .* and config\.json'),
        (None, {'embed_dim': 8}, CheckpointError, 'do not match the network'),
        (None, {'nonsense': 3}, OptionError, 'AST cannot be built: .*nonsense'),
    ],
)
def test_invalid_folders(tmp_path, monkeypatch, change, options, error, message):
    folder = tmp_path / 'w'
    AST(**TINY).save_pretrained(folder)
    if change is not None:
        change(folder)
    if not folder.exists():
        pytest.importorskip('huggingface_hub', reason='the extra `hub` is not installed')
        monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(error, match=message):
        AST.from_pretrained(folder, **options)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(FileError, match='cannot be written'):
        AST(**TINY).save_pretrained(tmp_path / 'file')


def test_repository(tmp_path, monkeypatch):
    """Upload to and download from a folder that stands in for the public functions of huggingface_hub."""
    hub = pytest.importorskip('huggingface_hub', reason='the extra `hub` is not installed')
    from huggingface_hub.utils import EntryNotFoundError

    served, calls = tmp_path / 'served', []
    network = AST(**TINY)

    def upload(self, *, repo_id, folder_path, revision, **options):
        shutil.copytree(folder_path, served)
        calls.append((repo_id, revision, options))
        return f'https://huggingface.co/{repo_id}/commit/1'

    def download(repo_id, filename, revision=None, **options):
        calls.append((repo_id, filename, revision))
        if not (served / filename).exists():
            raise type('NotThere', (EntryNotFoundError,), {'__init__': lambda self: None})
        return str(served / filename)

    monkeypatch.setattr(hub.HfApi, 'create_repo', lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(hub.HfApi, 'upload_folder', upload)
    monkeypatch.setattr(hub, 'hf_hub_download', download)
    assert network.push_to_hub('some/rain', branch='b', commit_message='m').endswith('some/rain/commit/1')
    assert same(AST.from_pretrained('some/rain', revision='v1'), network)
    downloads = [('some/rain', name, 'v1') for name in ('config.json', 'model.safetensors')]
    assert calls == [('some/rain', 'b', {'commit_message': 'm'}), *downloads]
    assert 'library_name: ast_plugin' in (served / 'README.md').read_text()
    (served / 'config.json').unlink()
    assert same(AST.from_pretrained('some/rain'), network)


def test_repository_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    for call in (lambda: AST(**TINY).push_to_hub('a/b'), lambda: AST.from_pretrained('a/b')):
        with pytest.raises(BackendUnavailable, match=r'pip install "ast_plugin\[hub\]"'):
            call()
