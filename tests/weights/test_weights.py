"""Bundled weights: finding, verifying, listing, loading and releasing them, and errors for missing ones."""

import itertools
import subprocess

import numpy as np
import pytest
import torch

import ast_plugin
from ast_plugin import weights
from ast_plugin.archs.networks import build_network
from ast_plugin.checkpoints import read_checkpoint, save_torch
from ast_plugin.cli.main import main
from ast_plugin.errors import CheckpointError, OptionError
from ast_plugin.evaluation.restorer import Restorer

from ..docs.pages import ROOT
from .helpers import CARD, TINY, identity, load_tool, release_tiny


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    folder = tmp_path / 'weights'
    folder.mkdir()
    release_tiny(monkeypatch, folder)
    return folder


def test_load_returns_the_network(shipped):
    network = ast_plugin.load('rain')
    assert not network.training and type(network).__name__ == 'AST'
    image = torch.rand(1, 3, 13, 30)
    torch.testing.assert_close(network(image), image)
    assert ast_plugin.load('haze', dtype=torch.float64)(image.double()).dtype == torch.float64
    with pytest.raises(AttributeError, match='no attribute'):
        ast_plugin.laod  # noqa: B018

    for name in weights.TASKS:
        network = torch.hub.load(str(ROOT), name, source='local', dtype=torch.float64)
        assert next(network.parameters()).dtype == torch.float64


def test_arrays(shipped):
    restorer = Restorer.from_task('raindrop', device='cpu')
    for dtype, shape in itertools.product((np.uint8, np.uint16), ((3, 5, 3), (1, 1, 3), (70, 9))):
        image = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)
        np.testing.assert_array_equal(restorer.restore(image), image)


def test_card_and_list(shipped, capsys):
    assert weights.read_card('rain') == CARD | {'network': TINY}
    assert read_checkpoint(weights.find_weights('rain')).state['input_proj.weight'].dtype == torch.float16
    subprocess.run(['sha256sum', '--check', '--strict', '--quiet', 'SHA256SUMS'], cwd=shipped, check=True)
    (shipped / 'haze.safetensors').unlink()
    assert main(['list', 'weights']) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading == 'weights (3)'
    assert rows[0].split()[:2] == ['rain', 'AST'] and 'real gain +9.2 dB (pretrained/rain, 3 steps' in rows[0]
    assert rows[2].split()[0] == 'haze' and 'not found' in rows[2]


@pytest.mark.parametrize('task', ['rian', 'snowflakes'])
def test_unknown_task(shipped, task, tmp_path, capsys):
    (tmp_path / 'a.png').write_bytes(b'')
    assert main(['infer', '-i', str(tmp_path / 'a.png'), '-o', str(tmp_path / 'out'), '--task', task]) == 2
    error = capsys.readouterr().err
    assert 'rain, raindrop, haze' in error and ('did you mean rain?' in error) == (task != 'snowflakes')
    assert not (tmp_path / 'out').exists()


def test_modified_and_missing(shipped):
    path = shipped / 'rain.safetensors'
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r'rain\.safetensors was modified.*SHA-256'):
        ast_plugin.load('rain')
    path.unlink()
    with pytest.raises(CheckpointError, match=r'does not include weights for rain.*--weights'):
        ast_plugin.load('rain')
    (shipped / 'SHA256SUMS').unlink()  # as in a wheel without package data
    with pytest.raises(CheckpointError, match='does not include weights for haze'):
        Restorer.from_task('haze')
    with pytest.raises(OptionError, match='unknown task fog'):
        ast_plugin.load('fog')


def test_bundled_weights():
    """Digests, sizes, cards and networks of the committed weights."""
    for task in filter(weights.is_shipped, weights.TASKS):
        assert weights.find_weights(task).stat().st_size <= 8_000_000
        card = weights.read_card(task)
        assert {'network', 'recipe', 'photographs', 'steps', 'date', 'results', 'version'} <= card.keys()
        assert ast_plugin.load(task)(torch.rand(1, 3, 16, 16)).isfinite().all()


def test_release_tool(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(weights, 'FOLDER', tmp_path)
    tool = load_tool('release_weights')
    network = build_network(TINY)
    (tmp_path / 'r.yml').write_text(f'network_g: {TINY}\n')
    averaged = {name: tensor + 1 for name, tensor in network.state_dict().items()}
    save_torch(tmp_path / 'w.pth', {'params': network.state_dict(), 'params_ema': averaged})
    arguments = ['rain', str(tmp_path / 'w.pth'), '--steps', '70', '--recipe', str(tmp_path / 'r.yml')]
    assert tool.main([*arguments, '--results', 'synthetic gain=8.5']) == 0
    card = weights.read_card('rain')
    assert (card['steps'], card['results']) == (70, {'synthetic gain': 8.5}) and card['photographs'][0]['licence']
    released = ast_plugin.load('rain').state_dict()
    torch.testing.assert_close(released['output_proj.bias'], averaged['output_proj.bias'], atol=1e-3, rtol=1e-3)
    assert tool.main([*arguments, '--strength', '0.5', '--processing-resolution', '256']) == 0
    card = weights.read_card('rain')
    assert (card['strength'], card['processing_resolution']) == (0.5, 256)
    halved = ast_plugin.load('rain').state_dict()
    for name in ('output_proj.weight', 'output_proj.bias'):
        torch.testing.assert_close(halved[name], released[name] / 2, atol=1e-3, rtol=1e-3)
    save_torch(tmp_path / 'other.pth', {'params': {name: tensor + 5 for name, tensor in averaged.items()}})
    blend = ['--blend', str(tmp_path / 'other.pth')]
    assert tool.main([*arguments, *blend, '0.5', *blend, '0.2']) == 0
    assert weights.read_card('rain')['blend'] == [0.5, 0.2]
    for name, tensor in ast_plugin.load('rain').state_dict().items():
        torch.testing.assert_close(tensor, averaged[name] + 3, atol=1e-2, rtol=1e-2)
    assert tool.main([*arguments, *blend, 'half']) == 2
    assert tool.main(arguments[:4]) == 2  # the recipe's network is another one
    assert 'weights' in capsys.readouterr().err


def test_release_rejects_values_beyond_float16(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, 'FOLDER', tmp_path)
    state = identity().state_dict() | {'output_proj.bias': torch.full((3,), 1e6)}
    with pytest.raises(CheckpointError, match=r'float16.*output_proj\.bias'):
        weights.release('rain', state, TINY, CARD)
    assert not list(tmp_path.iterdir())
