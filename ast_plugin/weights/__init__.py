"""Pretrained weights bundled with the package, by task.

    network = ast_plugin.load('rain')    # maps images [B, 3, H, W] in [0, 1], of any size, to restored images
    card = read_card('rain')             # how the weights were trained

SHA256SUMS, in the format of sha256sum, lists the bundled files; no others are read. The metadata of each file hold, as
JSON: network (options including type), recipe (name of the option file), photographs (name, number, licence), steps,
date, results (by name), version (of this package) and, for haze, processing_resolution (see `Restorer`).
`tools/release_weights.py` writes both.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ast_plugin.archs.networks import load_network
from ast_plugin.checkpoints import save_weights
from ast_plugin.devices import find_device
from ast_plugin.errors import CheckpointError, OptionError, did_you_mean
from ast_plugin.files import file_digest, write_file

TASKS = ('rain', 'raindrop', 'haze')
CLASSIFIER = 'classifier'  # the network that predicts the task, see `ast_plugin.evaluation.classifier`
FOLDER = Path(__file__).parent


def load(task: str, device: str | torch.device = 'cpu', dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load the pretrained network of a task, in evaluation mode.

    Args:
        task: one of `TASKS`.
        device: device of the network, see `ast_plugin.devices.find_device`.
        dtype: dtype of the weights and of the input images.
    Returns:
        A network that maps RGB images [B, 3, H, W] in [0, 1], of any height and width, to restored images.
    Raises:
        OptionError: if there is no such task or device; the message suggests similar names.
        CheckpointError: if the weights are missing from this installation or were modified.
    """
    return load_network(None, find_weights(task)).to(find_device(device), dtype)


def is_shipped(task: str) -> bool:
    """Whether this installation includes weights for a task."""
    return f'{task}.safetensors' in _read_digests()


def find_weights(task: str) -> Path:
    """Return the path of the weights file of a task, after verifying its SHA-256.

    Raises:
        OptionError, CheckpointError: see `load`.
    """
    if task not in (*TASKS, CLASSIFIER):
        raise OptionError(f'unknown task {task}{did_you_mean(task, TASKS)}: expected one of {", ".join(TASKS)}')
    path = FOLDER / f'{task}.safetensors'
    digest = _read_digests().get(path.name)
    if digest is None or not path.is_file():
        raise CheckpointError(
            f'{path} not found: this installation does not include weights for {task}; install a release that includes '
            'them, or specify others with --task or --weights'
        )
    if file_digest(path) != digest:
        raise CheckpointError(f'{path} was modified: its SHA-256 differs from SHA256SUMS; reinstall the package')
    return path


def resolve_weights(name: str) -> Path:
    """Return the path of a weights file, given a path or the name of a task.

    Raises:
        CheckpointError: see `load`; or if the name is neither, with a suggestion of a similar task.
    """
    path = Path(os.path.expanduser(name))
    if os.path.exists(path) or name != path.stem:
        return path
    if name in TASKS:
        return find_weights(name)
    raise CheckpointError(
        f'{name} does not exist: expected a weights file (.pth or .safetensors) or a task '
        f'({", ".join(TASKS)}){did_you_mean(name, TASKS)}'
    )


def read_card(task: str) -> dict[str, Any]:
    """Return the metadata of a task's weights, with the keys listed in the module docstring.

    Raises:
        OptionError, CheckpointError: see `load`.
    """
    with safe_open(find_weights(task), framework='pt') as file:
        return {key: json.loads(text) for key, text in file.metadata().items() if key != 'format'}


def release(task: str, state: Mapping[str, Tensor], network: Mapping[str, Any], card: Mapping[str, Any]) -> Path:
    """Save a state dict in float16, with its card, as the bundled weights of a task, and update SHA256SUMS.

    Raises:
        CheckpointError: if values exceed the range of float16.
    """
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    lost = [name for name, tensor in halves.items() if not torch.isfinite(tensor).all()]
    if lost:
        raise CheckpointError(f'expected values in the range of float16, got larger or non-finite ones in {lost[0]}')
    path = FOLDER / f'{task}.safetensors'
    save_weights(path, halves, network, card)
    digests = _read_digests() | {path.name: file_digest(path)}
    lines = [f'{digest}  {name}\n' for name, digest in sorted(digests.items())]
    write_file(FOLDER / 'SHA256SUMS', ''.join(lines).encode())
    return path


def _read_digests() -> dict[str, str]:
    path = FOLDER / 'SHA256SUMS'
    rows = (line.split() for line in path.read_text().splitlines()) if path.is_file() else ()
    return {name: digest for digest, name in rows}
