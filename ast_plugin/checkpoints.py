"""Weights and training states on disk: read without running what lies in them, written whole or not at all.

Weights are official files, BasicSR's, or safetensors. A training state is what torch.save writes, a zip file in which
each part has its checksum. Reading by torch does not look at those; `read_state` does.
"""

import functools
import io
import json
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.errors import CheckpointError, FileError
from ast_plugin.files import PARTIAL_SUFFIX, write_file

# where the states of the field's files lie, in the order in which they are looked for
STATE_KEYS = ('params_ema', 'params', 'state_dict', 'model_state_dict', 'model')
NETWORK_KEY = 'network'  # of safetensors' metadata: the network's options as JSON
STATE, WEIGHTS = '{}.state', 'net_g_{}.pth'  # the names of a run's files, by iteration
ABANDONED_SUFFIX = '.abandoned'


@dataclass(frozen=True)
class Checkpoint:
    """What a weights file holds.

    Attributes:
        path: the file.
        state: names and tensors, on the CPU, without DataParallel's `module.`.
        network: the network's options with its `type`, where the file carries them.
        param_key: the key under which the state lay, None if it was the whole file.
    """

    path: Path
    state: dict[str, Tensor]
    network: dict | None = None
    param_key: str | None = None


def read_checkpoint(path: str | os.PathLike, param_key: str | None = None) -> Checkpoint:
    """Read a weights file: safetensors, or what torch.save wrote, with weights_only and nothing else.

    Args:
        path: the file.
        param_key: the key of the state; without it the first of `STATE_KEYS` that the file has, else the whole file.
    Raises:
        CheckpointError: if the file is missing, cut, not a weights file, holds code, or has no such key.
    """
    path = Path(path)
    if not path.is_file():
        what = 'is a folder' if path.is_dir() else 'does not exist'
        raise CheckpointError(f'{path} {what}: expected a weights file (.pth or .safetensors)')
    if path.suffix == '.safetensors':
        return _read_safetensors(path)
    content = _read_torch(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f'{path} holds a {type(content).__name__}, expected a dictionary of weights')
    found = param_key if param_key in content else next((key for key in STATE_KEYS if key in content), None)
    if param_key is not None and found is None and not _is_state(content):
        raise CheckpointError(f'{path} has no {param_key!r}; it has {_some(content)}')
    state = content if found is None else content[found]
    if not _is_state(state):
        raise CheckpointError(f'{path} holds no weights: expected names and tensors, found {_some(content)}')
    return Checkpoint(path, _without_module(state), None, found)


def load_into(network: nn.Module, checkpoint: Checkpoint, *, strict: bool = True, assign: bool = False) -> None:
    """Load the weights of a file into a network; `strict` and `assign` as torch has them.

    Raises:
        CheckpointError: if they are of another network; says by which names and shapes.
    """
    try:
        network.load_state_dict(checkpoint.state, strict=strict, assign=assign)
    except CheckpointError as error:
        raise CheckpointError(f'{checkpoint.path}: {error}') from error
    except RuntimeError as error:
        lines = ' '.join(' '.join(str(error).splitlines()[1:3]).split())  # the first one says only that there are some
        raise CheckpointError(
            f'{checkpoint.path}: weights of another network than {type(network).__name__} with these options: '
            f'{lines[:300]}{"…" if len(lines) > 300 else ""}'
        ) from error


def save_weights(
    path: str | os.PathLike,
    state: Mapping[str, Tensor],
    network: Mapping[str, Any],
    card: Mapping[str, Any] | None = None,
) -> None:
    """Write a state as safetensors whose metadata carry the network's options; shared memory is written twice.

    Args:
        path: the file.
        state: names and tensors.
        network: the network's options with its `type`.
        card: further metadata; each value is written as JSON.
    Raises:
        FileError: if the file cannot be written; what was there stays.
    """
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    metadata = {key: json.dumps(value) for key, value in {**(card or {}), NETWORK_KEY: network}.items()}
    write_file(path, save(tensors, {'format': 'pt', **metadata}))


def save_torch(path: str | os.PathLike, content: Any) -> None:
    """torch.save that leaves the whole new file or the whole old one.

    Raises:
        FileError: if the file cannot be written; what was there stays.
    """
    buffer = io.BytesIO()  # given the file itself, torch.save makes a riddle of a full disk
    torch.save(content, buffer)
    write_file(path, buffer.getvalue())


def read_state(path: str | Path) -> dict[str, Any]:
    """Read a training state, ours or BasicSR's, onto the CPU, after its checksums were found right.

    Raises:
        CheckpointError: if the file is missing, damaged, no training state, or holds anything but data.
    """
    path = Path(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
            if damaged is not None:
                raise CheckpointError(f'the part {damaged} is damaged')
        state = _torch_load(path)
        iteration = state['iter']
        if not isinstance(iteration, int) or iteration < 0:
            raise CheckpointError(f'it says that its iteration is {iteration!r}')
    except Exception as error:  # torch raises half a dozen kinds for files that are not what they should be
        reason = str(error).splitlines()[0].split('. ')[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f'{path} is no training state that can be resumed from: {reason}; name another .state '
            'file in path.resume_state, or remove this one to resume from the one before'
        ) from error
    return state


@functools.cache  # a folder is looked through before a run starts and once more when it does
def _tell(line: str) -> None:
    print(f'basicsr: warning: {line}', file=sys.stderr, flush=True)


def newest_whole(folder: str | Path, warn: Callable[[str], None] = _tell) -> Path | None:
    """The state of the highest iteration that can be read; None if there is none.

    Args:
        folder: an experiment's `training_states`; it need not be there.
        warn: takes a line on each newer one that cannot be read.
    """
    for _, path in sorted(_numbered(Path(folder), STATE).items(), reverse=True):
        try:
            read_state(path)
        except CheckpointError as error:
            warn(f'passed over: {error}')
            continue
        return path
    return None


def keep_newest(folder: str | Path, name: str, iteration: int, count: int) -> None:
    """Delete files older than the `count` newest up to `iteration`, and what a killed process left unfinished.

    States beyond `iteration` are of a run that was given up when this one was resumed from an earlier state, or they
    are damaged; they are put aside under another name, so that nobody resumes from them by mistake.

    Args:
        folder: where the files lie.
        name: `STATE` or `WEIGHTS`; files of other names stay.
        iteration: of the file just written.
        count: at least 1.
    Raises:
        FileError: if a file cannot be deleted.
    """
    folder = Path(folder)
    numbered = _numbered(folder, name)
    past = sorted(number for number in numbered if number <= iteration)
    try:
        for number in past[:-count]:
            numbered[number].unlink(missing_ok=True)
        for leftover in folder.glob(f'.*{PARTIAL_SUFFIX}'):
            leftover.unlink(missing_ok=True)
        for number in numbered.keys() - set(past):
            if name == STATE:
                numbered[number].replace(f'{numbered[number]}{ABANDONED_SUFFIX}')
    except OSError as error:
        raise FileError(f'older files in {folder} cannot be removed: {error.strerror}') from error


def _read_safetensors(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework='pt') as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        network = json.loads(metadata[NETWORK_KEY]) if NETWORK_KEY in metadata else None
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f'{path} is cut or not a safetensors file: {error}') from error
    if network is not None and not (isinstance(network, dict) and isinstance(network.get('type'), str)):
        raise CheckpointError(f'{path} describes its network as {network!r}, expected options with a type')
    return Checkpoint(path, _without_module(state), network)


def _torch_load(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # what torch has to say about pickle protocols helps nobody here
        return torch.load(path, map_location='cpu', weights_only=True)


def _read_torch(path: Path) -> Any:
    try:
        return _torch_load(path)
    except pickle.UnpicklingError as error:
        if path.read_bytes()[:1] != pickle.PROTO and not zipfile.is_zipfile(path):
            raise CheckpointError(f'{path} is not a weights file{_reason(error)}') from error
        raise CheckpointError(
            f'{path} holds more than weights and is not opened, because unpickling such a file can run code'
            f'{_reason(error)}. Ask its author for a file of tensors alone'
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        # torch's readers raise any of these on files that are cut or of another kind
        raise CheckpointError(f'{path} is cut or not a weights file{_reason(error)}: fetch it again') from error


def _reason(error: BaseException) -> str:
    """The sentence of torch's long message that says what is wrong, in brackets; nothing if there is none."""
    text = str(error).removeprefix('Weights only load failed. ')
    lines = [line.strip() for line in text.splitlines() if ' ' in line.strip()]
    reason = next((line for line in lines if 'GLOBAL' in line), lines[0] if lines else '')
    if 'weights_only' in reason:  # advice to switch the safety off
        return ''
    return f' ({reason.split(". ")[0].rstrip(".")})' if reason else ''


def _is_state(content: Any) -> bool:
    items = content.items() if isinstance(content, Mapping) else ()
    return bool(items) and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in items)


def _without_module(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if all(name.startswith('module.') for name in state):
        return {name.removeprefix('module.'): tensor for name, tensor in state.items()}
    return dict(state)


def _some(content: Mapping) -> str:
    names = [str(name) for name in list(content)[:4]]
    return ', '.join(names) + (f' and {len(content) - 4} more' if len(content) > 4 else '') if names else 'nothing'


def _numbered(folder: Path, name: str) -> dict[int, Path]:
    pattern = re.compile(re.escape(name).replace(r'\{\}', r'(\d+)'), re.ASCII)
    if not folder.is_dir():
        return {}
    matches = ((pattern.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in matches if match}
