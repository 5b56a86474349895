"""Safe reading and atomic writing of weights files and training states.

Weights files are official ones, BasicSR's, or safetensors. Training states are written by torch.save as zip files with
a checksum for each part, which are verified here because torch.load ignores them.
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
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ast_plugin.errors import CheckpointError, FileError
from ast_plugin.files import PARTIAL_SUFFIX, write_file
from ast_plugin.names import say

AVERAGED = re.compile(r'(?:^|[._-])(?:\w*ema|swa|avg|averaged?)(?:$|[._-])', re.IGNORECASE)
# keys of state dictionaries in common checkpoint formats, in order of preference
STATE_KEYS = (
    *('params', 'state_dict', 'model_state_dict', 'model', 'generator', 'gen'),
    *('net_g', 'netG', 'G', 'net', 'network'),
)
NETWORK_KEY = 'network'  # key of safetensors metadata with the network's options as JSON
PRETRAINED, CONFIG = 'model.safetensors', 'config.json'  # files of a folder written by huggingface_hub's mixin
STATE, WEIGHTS = '{}.state', 'net_g_{}.pth'  # names of a run's files, by iteration
ABANDONED_SUFFIX = '.abandoned'

# keys of other content of training checkpoints
_OTHER_CONTENT = re.compile(
    r'optim|sched|scaler|random|rng|callback|loops|hyper_param|parts|disc|critic|^(?:net_?)?d$', re.IGNORECASE
)
_MAX_DEPTH = 4
_LFS_POINTER = b'version https://git-lfs'


@dataclass(frozen=True)
class Checkpoint:
    """Content of a weights file."""

    path: Path
    state: dict[str, Tensor]  # on the CPU, with the names in the file
    network: dict | None = None  # the network's options with its `type`, if in the file
    param_key: str | None = None  # key of the state, nested keys joined by dots; None for the whole file
    notes: tuple[str, ...] = ()  # one line for each part of the file that was ignored
    metadata: Mapping[str, str] = field(default_factory=dict)  # of safetensors, values in JSON, see `save_weights`


def read_checkpoint(path: str | os.PathLike, param_key: str | None = None) -> Checkpoint:
    """Read a weights file: safetensors, or a file of torch.save, which is always loaded with `weights_only`.

    Args:
        path: the file, or a folder written by `save_pretrained`.
        param_key: key of the state dictionary; None selects it automatically: averaged weights before plain ones, then
            in the order of `STATE_KEYS`, else the only one in the file.
    Raises:
        CheckpointError: if the file is missing, truncated, not a weights file, contains code, lacks the key, or has
            several states of which none has a known key.
    """
    config, path = Path(path, CONFIG), weights_file(path)
    if not path.is_file():
        what = f'is a folder without {PRETRAINED}' if path.is_dir() else 'does not exist'
        what = 'is a URL; download the file first' if re.match('https?:', str(path), re.IGNORECASE) else what
        raise CheckpointError(f'{path} {what}: expected a weights file (.pth or .safetensors)')
    if _is_safetensors(path):
        content, network, metadata = _read_safetensors(path)
        network = network or _network_in(config)
    else:
        content, network, metadata = _read_torch(path), None, {}
    if not isinstance(content, Mapping):
        raise CheckpointError(f'{path} holds a {type(content).__name__}, expected a dictionary of weights')
    states = dict(_find_states(content))
    key, notes = (param_key, []) if param_key is not None else _select_state(path, content, states)
    found = states.get(key or '') or _state_under(content, key or '')
    if not found:
        has = ', '.join(filter(None, states)) or (
            'weights at the top level: use no key' if states else _summarize(content)
        )
        raise CheckpointError(f'{path} has no weights under the key {key!r}; available: {has}')
    tensors = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.is_quantized or tensor.is_complex() or tensor.layout != torch.strided:
            kind = f'{tensor.dtype}, {tensor.layout}, on {tensor.device}'
            raise CheckpointError(f'{path}: {name} is a tensor of {kind}: expected plain real numbers, on the CPU')
    if others := [name for name in found if name not in tensors]:
        notes.append(f'ignored (not tensors): {_summarize(others)}')
    return Checkpoint(path, tensors, network, key, tuple(notes), metadata)


def weights_file(path: str | os.PathLike) -> Path:
    """Return the weights file in a folder written by `save_pretrained`; return any other path unchanged."""
    inside = Path(path, PRETRAINED)
    return inside if inside.is_file() else Path(path)


def _find_states(content: Mapping, where: tuple[str, ...] = ()) -> Iterator[tuple[str, Mapping]]:
    """Yield the mappings in a file that hold weights, with their keys joined by dots."""
    nested = [
        item
        for key, value in content.items()
        if isinstance(value, Mapping) and isinstance(key, (str, int)) and not _OTHER_CONTENT.search(str(key))
        if len(where) < _MAX_DEPTH
        for item in _find_states(value, (*where, str(key)))
    ]
    size = _num_weights(content)
    if size and all(size > _num_weights(state) for _, state in nested):
        yield '.'.join(where), content  # may contain a few entries that are not weights
    else:
        yield from nested


def _num_weights(state: Mapping) -> int:
    return sum(isinstance(value, Tensor) and value.ndim > 0 for name, value in state.items() if isinstance(name, str))


def _select_state(path: Path, content: Mapping, states: Mapping[str, Mapping]) -> tuple[str | None, list[str]]:
    """Return the key of the selected state, None for the whole file, and notes on the selection."""
    if not states:
        is_state = {'iter', 'optimizers'} <= content.keys()
        what = '; it is a training state whose weights are in models/net_g_*.pth' if is_state else ''
        what = ', NumPy arrays or other objects' if any(isinstance(v, _Placeholder) for v in content.values()) else what
        raise CheckpointError(f'{path} holds no weights: expected names and tensors, found {_summarize(content)}{what}')
    averaged = [key for key in states if AVERAGED.search(key)]
    known = [key for last in STATE_KEYS for key in states if key.rpartition('.')[2] == last]
    if len(states) > 1 and not averaged and not known:
        raise CheckpointError(
            f'{path} holds several states, {", ".join(states)}: select one with --param-key or path.param_key_g'
        )
    key = next(key for key in (*known, *states) if key in averaged or not averaged)
    rest = [other for other in states if other != key]
    what = 'averaged weights of' if averaged else 'weights of'
    notes = [f'using the {what} {key}; the file also has {", ".join(rest)}'] if rest else []
    if not averaged:
        nameless = [name for name, value in content.items() if _holds_list(value) and AVERAGED.search(str(name))]
        notes += [f'averaged weights under {name} have no names and are ignored' for name in nameless]
    return key or None, notes


def _holds_list(value: Any) -> bool:
    parts = [value, *value.values()] if isinstance(value, Mapping) else [value]
    return any(isinstance(part, (list, tuple)) and any(isinstance(item, Tensor) for item in part) for part in parts)


def _state_under(content: Mapping, key: str) -> Mapping:
    """Return the state under a key that `_find_states` does not list, or that is a prefix of names (`net_g.conv.…`)."""
    named = {name[len(key) + 1 :]: content[name] for name in map(str, content) if name.startswith(f'{key}.')}
    value = content.get(key, named)
    if isinstance(value, Mapping) and _num_weights(value):
        return value
    first, dot, rest = key.partition('.')
    return _state_under(content[first], rest) if dot and isinstance(content.get(first), Mapping) else {}


def save_weights(
    path: str | os.PathLike,
    state: Mapping[str, Tensor],
    network: Mapping[str, Any],
    card: Mapping[str, Any] | None = None,
) -> None:
    """Write a state dictionary as safetensors with the network's options in the metadata.

    Args:
        path: the file.
        state: names and tensors; tensors that share memory are written separately.
        network: the network's options with its `type`.
        card: further metadata; values are written as JSON.
    Raises:
        FileError: if the file cannot be written; the old file is kept.
    """
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    metadata = {key: json.dumps(value) for key, value in {**(card or {}), NETWORK_KEY: network}.items()}
    write_file(path, save(tensors, {'format': 'pt', **metadata}))


def save_torch(path: str | os.PathLike, content: Any) -> None:
    """Write a file with torch.save atomically.

    Raises:
        FileError: if the file cannot be written; the old file is kept.
    """
    buffer = io.BytesIO()  # torch.save into a file reports a full disk with an unclear error
    torch.save(content, buffer)
    write_file(path, buffer.getvalue())


def read_state(path: str | Path) -> dict[str, Any]:
    """Read a training state of the plugin or of BasicSR onto the CPU, after verifying its checksums.

    Raises:
        CheckpointError: if the file is missing, damaged, not a training state, or contains more than data.
    """
    path = Path(path)
    try:
        state = _torch_load(path)
        iteration = state.get('iter') if isinstance(state, dict) else None
        if not isinstance(iteration, int) or iteration < 0:
            raise CheckpointError(f'its iteration is {iteration!r}')
    except Exception as error:  # torch raises various types for invalid files
        raise CheckpointError(
            f'{path} is not a usable training state{_reason(error)}; set path.resume_state to another .state '
            'file, or remove this one to resume from the previous one'
        ) from error
    return state


def newest_whole(folder: str | Path) -> Path | None:
    """Return the newest readable training state in a folder, or None.

    Newer states that cannot be read are reported on stderr.
    """
    for _, path in sorted(numbered_files(Path(folder), STATE).items(), reverse=True):
        try:
            read_state(path)
            return path
        except CheckpointError as error:
            _warn(f'skipped: {error}')
    return None


@functools.cache  # folders are searched both before and at the start of a run
def _warn(line: str) -> None:
    say(f'basicsr: warning: {line}', file=sys.stderr)


def keep_newest(folder: str | Path, name: str, iteration: int, count: int) -> None:
    """Delete all but the `count` newest files up to `iteration`, and temporary files of killed processes.

    States beyond `iteration` belong to a run that was abandoned by resuming from an earlier state, or are damaged. They
    are renamed, so that no run resumes from them by mistake.

    Args:
        folder: folder of the files.
        name: `STATE` or `WEIGHTS`; other files are kept.
        iteration: iteration of the file just written.
        count: number of files to keep, at least 1.
    Raises:
        FileError: if a file cannot be deleted.
    """
    folder = Path(folder)
    numbered = numbered_files(folder, name)
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


def _is_safetensors(path: Path) -> bool:
    """Return whether a file is safetensors, by its name or by its start: length and opening brace of the header."""
    try:
        with path.open('rb') as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f'{path} cannot be read: {error.strerror}') from error
    looks_so = start[8:] == b'{' and int.from_bytes(start[:8], 'little') < path.stat().st_size
    return looks_so or path.suffix.lower() == '.safetensors'


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict | None, dict[str, str]]:
    try:
        with safe_open(path, framework='pt') as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except Exception as error:  # various types, as in `_read_torch`
        raise CheckpointError(f'{path} is truncated or not a safetensors file{_lfs_hint(path)}: {error}') from error
    network = metadata.get(NETWORK_KEY)
    with suppress(TypeError, ValueError, RecursionError):  # no text, or not JSON
        network = json.loads(network)
    if network is not None and not _has_type(network):
        raise CheckpointError(
            f'{path} describes its network as {network!r:.60}, expected options with a type: save the file without '
            f'{NETWORK_KEY} in its metadata'
        )
    return state, network, {key: text for key, text in metadata.items() if key != 'format'}


def _network_in(path: Path) -> dict | None:
    """Return the network options in the config.json next to the weights, or None if it has no `type`."""
    with suppress(OSError, ValueError):
        options = json.loads(path.read_text(encoding='utf-8'))
        return options if _has_type(options) else None


def _has_type(options: Any) -> bool:
    return isinstance(options, dict) and isinstance(options.get('type'), str)


class _Placeholder:
    """Placeholder for an object that is not a tensor; keeps the arguments of its constructor and its state."""

    def __new__(cls, *args: Any, **_: Any) -> '_Placeholder':
        self = super().__new__(cls)
        self.args = args
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def _number(kind: _Placeholder, raw: bytes | str) -> Any:
    """Placeholder for the constructor of NumPy scalars: return a Python number, or None for other types."""
    code, order = (*getattr(kind, 'args', ()), '')[0], getattr(kind, 'state', (0, '<'))[1]  # of numpy.dtype
    raw = raw.encode('latin1') if isinstance(raw, str) else raw
    if not (re.fullmatch(r'b1|[iu][1248]|f[248]', str(code)) and isinstance(raw, bytes) and len(raw) == int(code[1:])):
        return None
    return np.frombuffer(raw, order + code)[0].item()


# Globals in files other than tensors, and their placeholders: no code of theirs is executed or imported.
_PLACEHOLDERS = [
    *((_number, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
    *((_Placeholder, f'numpy.{core}.multiarray._reconstruct') for core in ('core', '_core')),
    *((_Placeholder, f'numpy.{name}') for name in ('dtype', 'ndarray')),
    *((_Placeholder, f'datetime.{name}') for name in ('datetime', 'timedelta')),
    *((_Placeholder, f'pathlib.{name}') for name in ('Path', 'PosixPath', 'WindowsPath', 'PurePosixPath')),
    *((_Placeholder, f'{name}.utilities.data.AttributeDict') for name in ('lightning_fabric', 'lightning.fabric')),
    (_Placeholder, 'argparse.Namespace'),
]


def _torch_load(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            names = [part.rpartition('/')[2] for part in file.namelist()]
            if 'constants.pkl' in names:
                raise CheckpointError('it is a TorchScript program: save the state_dict() of torch.jit.load(...)')
            if 'data.pkl' not in names:
                raise CheckpointError(f'it is an archive of {_summarize(names)}: unpack it first')
            for part in file.infolist():
                part.CRC = part.CRC or None  # 0 in files written without checksums
            damaged = file.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f'the part {damaged} is damaged')
    with warnings.catch_warnings(), torch.serialization.safe_globals(_PLACEHOLDERS):
        warnings.simplefilter('ignore')  # warnings about pickle protocols are irrelevant here
        return torch.load(path, map_location='cpu', weights_only=True)


def _read_torch(path: Path) -> Any:
    try:
        return _torch_load(path)
    except CheckpointError as error:
        raise CheckpointError(f'{path} is not a weights file: {error}') from error
    except pickle.UnpicklingError as error:
        if path.read_bytes()[:1] != pickle.PROTO and not zipfile.is_zipfile(path):
            raise CheckpointError(f'{path} is not a weights file{_lfs_hint(path) or _reason(error)}') from error
        raise CheckpointError(
            f'{path} holds more than weights and is not opened, because unpickling such a file can run code'
            f'{_reason(error)}. Ask its author for a file with tensors only'
        ) from error
    except Exception as error:  # torch raises many types for truncated or other files
        raise CheckpointError(f'{path} is truncated or not a weights file{_reason(error)}: get it again') from error


def _lfs_hint(path: Path) -> str:
    with path.open('rb') as file:
        is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    return ' but a Git LFS pointer: run `git lfs pull` to download the file' if is_pointer else ''


def _reason(error: BaseException) -> str:
    """Return the relevant sentence of torch's message in parentheses, or an empty string."""
    text = str(error).removeprefix('Weights only load failed. ')
    lines = [line.strip() for line in text.splitlines() if ' ' in line.strip()]
    reason = next((line for line in lines if 'GLOBAL' in line), lines[0] if lines else '')
    if 'weights_only' in reason:  # advice to disable the safe mode
        return ''
    return f' ({reason.split(". ")[0].rstrip(".")[:300]})' if reason else ''


def _summarize(content: Collection) -> str:
    some = list(content)[:4]
    names = [' '.join(name.split())[:60] if isinstance(name, str) else repr(name)[:60] for name in some]
    return ', '.join(names) + (f' and {len(content) - 4} more' if len(content) > 4 else '') if names else 'nothing'


def numbered_files(folder: Path, name: str) -> dict[int, Path]:
    """Return the files of a folder that match a name such as `STATE` or `WEIGHTS`, by number."""
    pattern = re.compile(re.escape(name).replace(r'\{\}', r'(\d+)'), re.ASCII)
    if not folder.is_dir():
        return {}
    matches = ((pattern.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in matches if match}
