"""`basicsr export` in this process, on small weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ast_plugin.archs.networks import build_network
from ast_plugin.checkpoints import save_torch, save_weights

from ..archs.tiny_networks import SRVGG
from ..docs.pages import blocks
from ..weights.helpers import TINY, release_tiny


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, with small weights in w.pth and w.safetensors, and bundled weights of every task."""
    network = build_network(SRVGG)
    save_torch(tmp_path / 'w.pth', {'params': network.state_dict()})
    save_weights(tmp_path / 'w.safetensors', network.state_dict(), SRVGG)
    (tmp_path / 'o.yml').write_text(f'name: o\nnetwork_g: {json.dumps(SRVGG)}\n')
    (tmp_path / 'released').mkdir()
    release_tiny(monkeypatch, tmp_path / 'released')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_export_task(here, basicsr):
    onnxruntime = pytest.importorskip('onnxruntime', reason='extra onnx')
    out, err = basicsr('export', '--task', 'rain', '-o', 'rain.onnx')
    assert out.startswith('rain.onnx: AST as onnx, ') and '1x3x37x91: matches PyTorch' in err
    session = onnxruntime.InferenceSession('rain.onnx')
    known = session.get_modelmeta().custom_metadata_map
    assert json.loads(known['network']) == TINY and json.loads(known['recipe']) == 'pretrained/rain'
    # The script of docs/export.md, with weights that leave images unchanged.
    (script,) = [text for name, text in blocks('py') if name.startswith('export-')]
    for size in ((37, 91), (480, 720)):
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save('photo.png')
        exec(compile(script, 'docs/export.md', 'exec'), {})
        np.testing.assert_array_equal(np.asarray(Image.open('restored.png')), pixels)


@pytest.mark.parametrize(
    'words', ['--weights rain --size 20x30', '--weights w.safetensors', '--weights w.pth -opt o.yml --size 20x30']
)
def test_export_weights(words, here, basicsr):
    basicsr('export', *words.split(), '-o', 'w.pt', '--format', 'torchscript')
    assert torch.jit.load('w.pt')(torch.zeros(1, 3, 20, 30)).shape == (1, 3, 20, 30)


def test_export_reports_assumptions(here, basicsr):
    save_torch(here / 'bare.pth', {'params': build_network(TINY | {'img_size': 128}).state_dict()})
    _, err = basicsr('export', '--weights', 'bare.pth', '-o', 'w.pt', '--format', 'torchscript', '--size', '9x9')
    assert 'note: bare.pth: img_size cannot be inferred' in err
