"""Weights files: official, BasicSR's and safetensors; read without running what lies in them, written whole or not."""

import json
import os
import pickle
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ast_plugin.errors import CheckpointError

# where the states of the field's files lie, in the order in which they are looked for
STATE_KEYS = ('params_ema', 'params', 'state_dict', 'model_state_dict', 'model')
NETWORK_KEY = 'network'  # of safetensors' metadata: the network's options as JSON
TEMPORARY_SUFFIX = '.tmp'  # of files that are being written, hidden by a dot before their names
_BLOCK_BYTES = 2**20


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
    content = _torch_load(path)
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


def save_weights(path: str | os.PathLike, state: Mapping[str, Tensor], network: Mapping[str, Any]) -> None:
    """Write a state as safetensors whose metadata carry the network's options.

    Args:
        path: the file, replaced as a whole.
        state: names and tensors; shared memory is written twice.
        network: the network's options with its `type`, of plain JSON values.
    Raises:
        CheckpointError: if the file cannot be written; what was there stays.
    """
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    content = save(tensors, {'format': 'pt', NETWORK_KEY: json.dumps(network)})
    write_atomically(path, lambda file: file.write(content))


def save_torch(path: str | os.PathLike, content: Any) -> None:
    """torch.save that leaves the whole new file or the whole old one.

    Raises:
        CheckpointError: if the file cannot be written; what was there stays.
    """
    write_atomically(path, lambda file: torch.save(content, file))


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Call `write` with a temporary file beside `path`, bring it safely to disk, and put it in the place of `path`.

    What lies on disk is read back and compared before it takes the place of what was there.

    Args:
        path: the file; its folder must be there.
        write: calls `write` of what it is given; nothing else can be done with that.
    Raises:
        CheckpointError: if anything on the way fails; what was at `path` stays.
    """
    path = Path(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f'.{path.name}.', suffix=TEMPORARY_SUFFIX, delete=False
        ) as file:
            temporary = Path(file.name)
            output = _Output(file)
            output.fill(write)
            file.flush()
            os.fsync(file.fileno())
        if _checksum(temporary) != output.checksum:
            raise OSError('what was read back is not what had been written')
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(
            f'{path} cannot be written: {reason}. An older file of that name is left alone'
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


class _Output:
    """A file that is written from its beginning to its end, the checksum of what it was given, and what failed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.checksum = 0
        self.error: OSError | None = None

    def fill(self, write: Callable[[BinaryIO], Any]) -> None:
        try:
            write(self)
        except RuntimeError as error:
            # torch.save makes a riddle of a full disk; the system's own words are clearer.
            raise self.error or OSError(str(error)) from error

    def write(self, content: Any) -> int:
        try:
            written = self.file.write(content)
        except OSError as error:
            self.error = error
            raise
        self.checksum = zlib.crc32(content, self.checksum)
        return written

    def flush(self) -> None:
        self.file.flush()


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open('rb') as file:
        while block := file.read(_BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _sync_folder(folder: Path) -> None:
    """Bring a file's new name to disk. Not every system can; the file itself is safe by then."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # what torch has to say about pickle protocols helps nobody here
            return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        if not _is_pickle(path):
            raise CheckpointError(f'{path} is not a weights file{_reason(error)}') from error
        raise CheckpointError(
            f'{path} holds more than weights and is not opened, because unpickling such a file can run code'
            f'{_reason(error)}. Ask its author for a file of tensors alone'
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        # torch's readers raise any of these on files that are cut or of another kind
        raise CheckpointError(f'{path} is cut or not a weights file{_reason(error)}: fetch it again') from error


def _is_pickle(path: Path) -> bool:
    with path.open('rb') as file:
        return file.read(1) == pickle.PROTO or zipfile.is_zipfile(path)


def _reason(error: BaseException) -> str:
    """The sentence of torch's long message that says what is wrong, in brackets; nothing if there is none."""
    text = str(error).removeprefix('Weights only load failed. ')
    lines = [line.strip() for line in text.splitlines() if ' ' in line.strip()]
    reason = next((line for line in lines if 'GLOBAL' in line), lines[0] if lines else '')
    if 'weights_only' in reason:  # advice to switch the safety off
        return ''
    return f' ({reason.split(". ")[0].rstrip(".")})' if reason else ''


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items())
    )


def _without_module(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if all(name.startswith('module.') for name in state):
        return {name.removeprefix('module.'): tensor for name, tensor in state.items()}
    return dict(state)


def _some(content: Mapping) -> str:
    names = [str(name) for name in list(content)[:4]]
    return ', '.join(names) + (f' and {len(content) - 4} more' if len(content) > 4 else '') if names else 'nothing'
