"""Small substitutes for the bundled weights, so that tests do not depend on the latter."""

import importlib.util

import torch

from ast_plugin import weights
from ast_plugin.archs.ast_arch import AST
from ast_plugin.archs.networks import build_network
from ast_plugin.evaluation.classifier import CLASSES, DegradationClassifier

from ..docs.pages import ROOT

TINY = {'type': 'AST', 'img_size': 64, 'embed_dim': 4, 'depths': [1] * 9, 'num_heads': [1] * 9}
CARD = {'recipe': 'pretrained/rain', 'steps': 3, 'date': '2026-11-27', 'results': {'real gain': 9.25}, 'version': '1'}
_RELEASED = {}  # content by the names of files


def identity() -> AST:
    """Return a network that computes the identity, as the output of its last layer is zero."""
    network = build_network(TINY)
    torch.nn.init.zeros_(network.output_proj.weight)
    torch.nn.init.zeros_(network.output_proj.bias)
    return network


def decided(**scores) -> DegradationClassifier:
    """Return a classifier that predicts the same class for every image."""
    network = DegradationClassifier().eval()
    torch.nn.init.zeros_(network.head.weight)
    network.head.bias.data = torch.tensor([float(scores.get(name, 0)) for name in CLASSES])
    return network


def release_tiny(monkeypatch, folder) -> None:
    """Replace the bundled weights by identity networks and a classifier that predicts clean for every image."""
    monkeypatch.setattr(weights, 'FOLDER', folder)
    if not _RELEASED:
        for task in weights.TASKS:
            weights.release(task, identity().state_dict(), TINY, CARD)
        release_decided(clean=9)
        names = [f'{name}.safetensors' for name in (*weights.TASKS, weights.CLASSIFIER)]
        _RELEASED.update((name, (folder / name).read_bytes()) for name in (*names, 'SHA256SUMS'))
    for name, content in _RELEASED.items():
        (folder / name).write_bytes(content)


def release_decided(**scores) -> None:
    weights.release(weights.CLASSIFIER, decided(**scores).state_dict(), {'type': 'DegradationClassifier'}, {})


def load_tool(name):
    """Import a script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
