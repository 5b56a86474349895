"""The weights that come with this package, by task.

    network = ast_plugin.load('rain')    # [B, 3, H, W] in [0, 1], of any size, to the restored images
    card = read_card('rain')             # how they came to be

SHA256SUMS, as sha256sum writes it, lists the files of record; no other is read. Each carries in its metadata, as JSON:
network (options with their type), recipe (an option file by name), photographs (name, number, licence), steps, date,
results (figures by name) and version (of this package). `tools/release_weights.py` writes both.
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
CLASSIFIER = 'classifier'  # the network that tells the task, see `ast_plugin.evaluation.classifier`
FOLDER = Path(__file__).parent


def load(task: str, device: str | torch.device = 'cpu', dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the network that restores images of a task, with its weights, in evaluation mode.

    Args:
        task: a name of `TASKS`.
        device: where the network goes, see `ast_plugin.devices.find_device`.
        dtype: of its weights and of the images that it takes.
    Returns:
        A network from RGB [B, 3, H, W] in [0, 1], of any height and width, to the restored images.
    Raises:
        OptionError: if there is no such task, or no such device; says what is near.
        CheckpointError: if the weights are not in this installation, or were altered.
    """
    return load_network(None, find_weights(task)).to(find_device(device), dtype)


def is_shipped(task: str) -> bool:
    """Whether this installation is to have weights for a task."""
    return f'{task}.safetensors' in _read_digests()


def find_weights(task: str) -> Path:
    """Return the weights file of a task, after its SHA-256 was found to be that of record.

    Raises:
        OptionError, CheckpointError: as `load`.
    """
    if task not in (*TASKS, CLASSIFIER):
        raise OptionError(f'there are no weights for the task {task}{did_you_mean(task, TASKS)}: {", ".join(TASKS)}')
    path = FOLDER / f'{task}.safetensors'
    digest = _read_digests().get(path.name)
    if digest is None or not path.is_file():
        raise CheckpointError(
            f'{path} is not there: this installation came without the weights for {task}; install a wheel that has '
            f'them, or name others with --task or --weights'
        )
    if file_digest(path) != digest:
        raise CheckpointError(f'{path} was altered: its SHA-256 is not that in SHA256SUMS; install the package anew')
    return path


def resolve_weights(name: str) -> Path:
    """Return the path of a weights file by what a command line says: a file, else the name of a task.

    Raises:
        CheckpointError: as `load`; or if a word names neither, says what task is near.
    """
    path = Path(name).expanduser()
    if os.path.exists(path) or name != path.stem:
        return path
    if name in TASKS:
        return find_weights(name)
    raise CheckpointError(
        f'{name} does not exist: expected a weights file (.pth or .safetensors) or a task '
        f'({", ".join(TASKS)}){did_you_mean(name, TASKS)}'
    )


def read_card(task: str) -> dict[str, Any]:
    """Return what the metadata of a task's weights say, by the keys that this module's docstring lists.

    Raises:
        OptionError, CheckpointError: as `load`.
    """
    with safe_open(find_weights(task), framework='pt') as file:
        return {key: json.loads(text) for key, text in file.metadata().items() if key != 'format'}


def release(task: str, state: Mapping[str, Tensor], network: Mapping[str, Any], card: Mapping[str, Any]) -> Path:
    """Write a state in float16, with its card, as the weights of record of a task.

    Raises:
        CheckpointError: if float16 cannot hold the state.
    """
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    lost = [name for name, tensor in halves.items() if not torch.isfinite(tensor).all()]
    if lost:
        raise CheckpointError(f'{lost[0]} has values that are not finite in float16')
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
