"""Small weights in the place of those that come along, so that no test depends on which these are."""

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
    """A network that changes nothing: what its last layer adds to the image is zero."""
    network = build_network(TINY)
    torch.nn.init.zeros_(network.output_proj.weight)
    torch.nn.init.zeros_(network.output_proj.bias)
    return network


def decided(**scores) -> DegradationClassifier:
    """A classifier that takes every image for the same."""
    network = DegradationClassifier().eval()
    torch.nn.init.zeros_(network.head.weight)
    network.head.bias.data = torch.tensor([float(scores.get(name, 0)) for name in CLASSES])
    return network


def release_tiny(monkeypatch, folder) -> None:
    """Put weights that change nothing, and a classifier that finds all clean, in the place of those that come along."""
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
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
