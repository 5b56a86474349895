"""Networks in folders of Hugging Face's form, and in a repository that a stand-in serves."""

import copy
import inspect
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ast_plugin.archs.ast_arch import AST, AST_B, AST_T, AST_XS, VARIANTS
from ast_plugin.archs.mixed.mixed_arch import Mixed
from ast_plugin.archs.networks import load_network
from ast_plugin.checkpoints import read_checkpoint
from ast_plugin.cli.main import main
from ast_plugin.errors import BackendUnavailable, CheckpointError, FileError, OptionError
from ast_plugin.evaluation.restorer import Restorer
from ast_plugin.files import file_digest
from ast_plugin.weights import TASKS, find_weights
from tests import tiny_run

from . import tiny_networks
from .golden import NAMES, GoldenCase

TINY = {key: value for key, value in tiny_networks.AST.items() if key != 'type'}
MIX = {'base': tiny_networks.SWINIR, 'mix': [{'match': tiny_networks.ATTENTIONS, 'with': {'type': 'ASSA'}}]}
NETWORKS = {
    'plain': (AST, TINY),
    'gray': (AST, TINY | {'in_chans': 1, 'out_chans': 1, 'attention': 'topk', 'topk_ratio': 0.25, 'ffn': 'leff'}),
    'AST_XS': (AST_XS, {'embed_dim': 4, 'img_size': 64}),
    'Mixed': (Mixed, MIX),
}


def same(network, other):
    state, others = network.state_dict(), other.state_dict()
    assert state.keys() == others.keys() and all(torch.equal(state[name], others[name]) for name in state)
    return network.options == other.options


# What needs no huggingface_hub


def test_options_are_remembered():
    assert AST(16, embed_dim=4).options == {'type': 'AST', **{k: p.default for k, p in signature(AST)}} | {
        'img_size': 16,
        'embed_dim': 4,
        'depths': [2] * 9,
        'num_heads': [1, 2, 4, 8, 16, 16, 8, 4, 2],
    }
    with torch.device('meta'):
        sizes = {name: build().options for name, build in {'AST_XS': AST_XS, 'AST_T': AST_T, 'AST_B': AST_B}.items()}
    assert {name: (options['embed_dim'], tuple(options['depths'])) for name, options in sizes.items()} == {
        name: (row['embed_dim'], row['depths']) for name, row in VARIANTS.items()
    }
    network = AST(**TINY)
    assert same(copy.deepcopy(network), network)


def signature(network_type):
    return inspect.signature(network_type).parameters.items()


def test_signature_is_the_constructors():
    assert [name for name, _ in signature(AST)][:3] == ['img_size', 'in_chans', 'out_chans']
    assert [name for name, _ in signature(Mixed)][:2] == ['base', 'mix']
    with pytest.raises(TypeError, match='unexpected keyword'):
        AST(nonsense=3)


def test_without_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    AST.save_pretrained.__globals__['_on_hub'].cache_clear()
    for call in (lambda: AST(**TINY).save_pretrained(tmp_path), lambda: AST.from_pretrained(tmp_path)):
        with pytest.raises(BackendUnavailable, match=r'pip install "ast_plugin\[hub\]"'):
            call()
    AST.save_pretrained.__globals__['_on_hub'].cache_clear()


def folder_of(tmp_path, state, metadata=None, config=None) -> Path:
    """A folder as somebody else's code writes it."""
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / 'model.safetensors', metadata)
    if config is not None:
        (tmp_path / 'config.json').write_text(config if isinstance(config, str) else json.dumps(config))
    return tmp_path


def test_folder_is_a_weights_file(tmp_path):
    network = AST(**TINY | {'img_size': 16})
    folder = folder_of(tmp_path, network.state_dict(), config=network.options)
    assert read_checkpoint(folder).network == network.options
    assert same(load_network(None, folder), network)
    restored = Restorer.from_weights(folder, device='cpu').network
    assert restored.options['img_size'] == 16


def test_folder_is_measured(tmp_path, monkeypatch, capfd):
    network = load_network(tiny_networks.SRVGG | {'num_feat': 8, 'num_conv': 1})
    folder_of(tmp_path, network.state_dict())
    tiny_run.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    ours = ['--force_yml', 'model_type=RestorationModel', 'datasets:val:type=PairsDataset']
    assert main(['test', '-opt', 'tiny.yml', '--weights', str(tmp_path), *ours]) == 0
    assert file_digest(tmp_path / 'model.safetensors') in capfd.readouterr().out


@pytest.mark.parametrize('config', [None, '{', '[1]', {'hidden_size': 3}, {'type': 3}])
def test_folder_with_another_config(tmp_path, config):
    network = AST(**TINY | {'img_size': 128})
    folder = folder_of(tmp_path, network.state_dict(), config=config)
    assert read_checkpoint(folder).network is None
    load_network(None, folder)  # told by names and shapes


def test_folder_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r'is a folder without model\.safetensors: expected a weights file'):
        read_checkpoint(tmp_path)


# With it


@pytest.fixture
def hub():
    return pytest.importorskip('huggingface_hub', reason='the extra `hub` is not installed')


@pytest.mark.parametrize('which', NETWORKS)
def test_round_trip(hub, tmp_path, which):
    build, options = NETWORKS[which]
    network = build(**options)
    network.save_pretrained(tmp_path / 'new' / 'folder')
    folder = tmp_path / 'new' / 'folder'
    assert sorted(path.name for path in folder.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    loaded = build.from_pretrained(str(folder))
    assert type(loaded) is type(network) and not loaded.training and same(loaded, network)
    assert json.loads((folder / 'config.json').read_text()) == network.options
    assert same(load_network(None, folder), network)  # `--weights FOLDER`, and the file alone:
    assert read_checkpoint(folder / 'model.safetensors').network == network.options
    loaded.save_pretrained(folder)  # over it
    assert same(type(network).from_pretrained(folder), network)


def test_base_weights_are_no_option(hub, tmp_path):
    base = load_network(MIX['base'])
    torch.save({'params': base.state_dict()}, tmp_path / 'base.pth')
    mixed = Mixed(**MIX, base_weights=str(tmp_path / 'base.pth'))
    mixed.save_pretrained(tmp_path / 'folder')
    (tmp_path / 'base.pth').unlink()
    assert same(Mixed.from_pretrained(tmp_path / 'folder'), mixed)


@pytest.mark.parametrize('name', [name for name in NAMES if name.startswith('tiny')][::2])
def test_official_names_round_trip(hub, tmp_path, name):
    case = GoldenCase(name)
    state = {key: torch.rand(shape) for key, shape in case.facts['state_dict'].items()}
    folder_of(tmp_path, {f'module.{key}': tensor for key, tensor in state.items()})
    official = AST.from_pretrained(tmp_path, **case.options)
    expected = AST(**case.options)
    expected.load_state_dict(state)
    same(official, expected)  # but for heads of the encoder, which are not used and leave no trace
    official.save_pretrained(tmp_path)  # under our names
    assert not any(key.startswith('module.') for key in load_file(tmp_path / 'model.safetensors'))
    assert same(AST.from_pretrained(tmp_path), official)
    assert AST.from_pretrained(tmp_path).options['ffn'] == case.options['ffn']


def test_official_state_tells_its_options(hub, tmp_path):
    network = AST(**TINY | {'img_size': 128, 'num_heads': [1] * 9, 'drop_path_rate': 0.1})
    assert same(AST.from_pretrained(folder_of(tmp_path, network.state_dict())), network)


@pytest.mark.parametrize('task', TASKS)
def test_weights_that_come_along(hub, tmp_path, task):
    try:
        shutil.copy(find_weights(task), tmp_path / 'model.safetensors')
    except CheckpointError:
        pytest.skip(f'no weights for {task}')
    ours, loaded = load_network(None, find_weights(task)), AST.from_pretrained(tmp_path)
    assert same(AST_XS.from_pretrained(tmp_path), ours) and same(loaded, ours)
    image = torch.rand(1, 3, 24, 40)
    torch.testing.assert_close(loaded(image), ours(image))


def test_given_arguments_go_first(hub, tmp_path):
    AST(**TINY | {'img_size': 128}).save_pretrained(tmp_path)
    assert AST.from_pretrained(tmp_path, img_size=256).options['img_size'] == 256


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        ('missing', CheckpointError, 'nowhere: expected a folder with model.safetensors'),
        ('empty', CheckpointError, r'is a folder without model\.safetensors'),
        ('cut', CheckpointError, 'is cut or not a safetensors file'),
        ('mixed', OptionError, 'is of the network Mixed: expected AST'),
        ('shapes', CheckpointError, 'do not fit the network'),
        ('argument', OptionError, 'AST cannot be built: .*nonsense'),
        ('incomplete', CheckpointError, 'output_proj.bias .* is missing'),
        ('config', CheckpointError, r'expected a folder with model\.safetensors and config\.json'),
    ],
)
def test_what_cannot_be_loaded(hub, tmp_path, monkeypatch, change, error, message):
    folder, more = tmp_path / 'nowhere', {}
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    if change == 'empty':
        folder.mkdir()
    elif change != 'missing':
        (Mixed(**MIX) if change == 'mixed' else AST(**TINY)).save_pretrained(folder)
    if change == 'cut':
        content = (folder / 'model.safetensors').read_bytes()
        (folder / 'model.safetensors').write_bytes(content[: len(content) // 2])
    if change == 'config':
        (folder / 'config.json').write_text('[1]')
    if change == 'incomplete':
        state = {k: v for k, v in AST(**TINY).state_dict().items() if k != 'output_proj.bias'}
        folder_of(folder, state)
    more = {'shapes': {'embed_dim': 8}, 'argument': {'nonsense': 3}}.get(change, {})
    with pytest.raises(error, match=message):
        AST.from_pretrained(folder, **more)


def test_folder_that_cannot_be_written(hub, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(FileError, match='cannot be written'):
        AST(**TINY).save_pretrained(tmp_path / 'file')


def test_repository(hub, tmp_path, monkeypatch):
    """The public calls of huggingface_hub, answered by a folder: what is asked for, and that weights come back."""
    served, asked = tmp_path / 'served', []
    network = AST(**TINY)

    def upload(self, *, repo_id, folder_path, **options):
        shutil.copytree(folder_path, served)
        return f'https://huggingface.co/{repo_id}/commit/1'

    def download(repo_id, filename, revision=None, **options):
        asked.append((repo_id, filename, revision))
        return str(served / filename)

    monkeypatch.setattr(hub.HfApi, 'create_repo', lambda self, repo_id, **_: type('Url', (), {'repo_id': repo_id}))
    monkeypatch.setattr(hub.HfApi, 'upload_folder', upload)
    monkeypatch.setattr(hub, 'hf_hub_download', download)
    monkeypatch.setattr('huggingface_hub.hub_mixin.hf_hub_download', download)
    AST.save_pretrained.__globals__['_on_hub'].cache_clear()
    assert network.push_to_hub('somebody/rain') == 'https://huggingface.co/somebody/rain/commit/1'
    loaded = AST.from_pretrained('somebody/rain', revision='v1')
    AST.save_pretrained.__globals__['_on_hub'].cache_clear()
    assert same(loaded, network)
    assert asked == [('somebody/rain', name, 'v1') for name in ('config.json', 'model.safetensors')]
    assert 'library_name: ast_plugin' in (served / 'README.md').read_text()
