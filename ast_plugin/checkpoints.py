"""Weights and training states on disk: read without running what lies in them, written whole or not at all.

Weights are official files, BasicSR's, or safetensors. A training state is what torch.save writes, a zip file in which
each part has its checksum. Reading by torch does not look at those; here they are looked at.
"""

import functools
import io
import json
import os
import pickle
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ast_plugin.errors import CheckpointError, FileError
from ast_plugin.files import PARTIAL_SUFFIX, write_file
from ast_plugin.names import say

AVERAGED = re.compile(r'(?:^|[._-])(?:\w*ema|swa|avg|averaged?)(?:$|[._-])', re.IGNORECASE)
# where the states of the field's files lie, in the order in which they are looked for
STATE_KEYS = (
    *('params', 'state_dict', 'model_state_dict', 'model', 'generator', 'gen'),
    *('net_g', 'netG', 'G', 'net', 'network'),
)
NETWORK_KEY = 'network'  # of safetensors' metadata: the network's options as JSON
PRETRAINED, CONFIG = 'model.safetensors', 'config.json'  # of a folder that huggingface_hub's mixin wrote
STATE, WEIGHTS = '{}.state', 'net_g_{}.pth'  # the names of a run's files, by iteration
ABANDONED_SUFFIX = '.abandoned'

# of what training leaves beside a network's weights
_NOT_OF_A_NETWORK = re.compile(
    r'optim|sched|scaler|random|rng|callback|loops|hyper_param|parts|disc|critic|^(?:net_?)?d$', re.IGNORECASE
)
_MOST_NESTED = 4
_LFS_POINTER = b'version https://git-lfs'


@dataclass(frozen=True)
class Checkpoint:
    """What a weights file holds."""

    path: Path
    state: dict[str, Tensor]  # on the CPU, the names as the file has them
    network: dict | None = None  # the network's options with its `type`, where the file carries them
    param_key: str | None = None  # under which the state lay, nested keys joined by dots; None for the whole file
    notes: tuple[str, ...] = ()  # a line for each thing in the file that another reader may have expected to be taken
    metadata: Mapping[str, str] = field(default_factory=dict)  # of safetensors, each value JSON; see `save_weights`


def read_checkpoint(path: str | os.PathLike, param_key: str | None = None) -> Checkpoint:
    """Read a weights file: safetensors, or what torch.save wrote, with weights_only and nothing else.

    Args:
        path: the file; or a folder that `save_pretrained` wrote.
        param_key: the key of the state, and no other; None finds the state: averaged weights before plain ones, then
            the order of `STATE_KEYS`, else the only one there is.
    Raises:
        CheckpointError: if the file is missing, cut, not a weights file, holds code, has no such key, or several states
            of which none is known by its key.
    """
    config, path = Path(path, CONFIG), weights_file(path)
    if not path.is_file():
        what = f'is a folder without {PRETRAINED}' if path.is_dir() else 'does not exist'
        what = 'is an address, download it' if re.match('https?:', str(path), re.IGNORECASE) else what
        raise CheckpointError(f'{path} {what}: expected a weights file (.pth or .safetensors)')
    if _is_safetensors(path):
        content, network, metadata = _read_safetensors(path)
        network = network or _network_in(config)
    else:
        content, network, metadata = _read_torch(path), None, {}
    if not isinstance(content, Mapping):
        raise CheckpointError(f'{path} holds a {type(content).__name__}, expected a dictionary of weights')
    states = dict(_find_states(content))
    key, notes = (param_key, []) if param_key is not None else _choose(path, content, states)
    found = states.get(key or '') or _below(content, key or '')
    if not found:
        has = ', '.join(filter(None, states)) or ('weights under no key: give none' if states else _some(content))
        raise CheckpointError(f'{path} has no weights under the key {key!r}; it has {has}')
    tensors = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.is_quantized or tensor.is_complex() or tensor.layout != torch.strided:
            kind = f'{tensor.dtype}, {tensor.layout}, on {tensor.device}'
            raise CheckpointError(f'{path}: {name} is a tensor of {kind}: expected plain real numbers, on the CPU')
    if others := [name for name in found if name not in tensors]:
        notes.append(f'left out, being no tensors: {_some(others)}')
    return Checkpoint(path, tensors, network, key, tuple(notes), metadata)


def weights_file(path: str | os.PathLike) -> Path:
    """The file of the weights in a folder that `save_pretrained` wrote; any other path as it is."""
    inside = Path(path, PRETRAINED)
    return inside if inside.is_file() else Path(path)


def _find_states(content: Mapping, where: tuple[str, ...] = ()) -> Iterator[tuple[str, Mapping]]:
    """The mappings in a file that hold weights, by their keys joined by dots."""
    nested = [
        item
        for key, value in content.items()
        if isinstance(value, Mapping) and isinstance(key, (str, int)) and not _NOT_OF_A_NETWORK.search(str(key))
        if len(where) < _MOST_NESTED
        for item in _find_states(value, (*where, str(key)))
    ]
    size = _num_weights(content)
    if size and all(size > _num_weights(state) for _, state in nested):
        yield '.'.join(where), content  # with a few things in it that are no weights of its own
    else:
        yield from nested


def _num_weights(state: Mapping) -> int:
    return sum(isinstance(value, Tensor) and value.ndim > 0 for name, value in state.items() if isinstance(name, str))


def _choose(path: Path, content: Mapping, states: Mapping[str, Mapping]) -> tuple[str | None, list[str]]:
    """The key of the state to take, None for the whole file, and what to say about the choice."""
    if not states:
        is_state = {'iter', 'optimizers'} <= content.keys()
        what = ', as a training state that has its weights in models/net_g_*.pth' if is_state else ''
        what = ', NumPy arrays or other objects' if any(isinstance(v, _Inert) for v in content.values()) else what
        raise CheckpointError(f'{path} holds no weights: expected names and tensors, found {_some(content)}{what}')
    ranks = {key: STATE_KEYS.index(last) if (last := key.rpartition('.')[2]) in STATE_KEYS else None for key in states}
    averaged = [key for key in states if AVERAGED.search(key)]
    candidates = averaged or [key for key in states if ranks[key] is not None] or list(states)
    if len(candidates) > 1 and not averaged and ranks[candidates[0]] is None:
        raise CheckpointError(
            f'{path} holds several states, {", ".join(states)}: name one by --param-key or path.param_key_g'
        )
    key = min(candidates, key=lambda name: (ranks[name] is None, ranks[name] or 0))
    rest = [other for other in states if other != key]
    what = 'averaged weights of' if averaged else 'weights of'
    notes = [f'the {what} {key} are taken; the file has {", ".join(rest)}, too'] if rest else []
    if not averaged:
        nameless = [name for name, value in content.items() if _holds_list(value) and AVERAGED.search(str(name))]
        notes += [f'averaged weights under {name} have no names, and are not taken' for name in nameless]
    return key or None, notes


def _holds_list(value: Any) -> bool:
    parts = [value, *value.values()] if isinstance(value, Mapping) else [value]
    return any(isinstance(part, (list, tuple)) and any(isinstance(item, Tensor) for item in part) for part in parts)


def _below(content: Mapping, key: str) -> Mapping:
    """What lies under a key that `_find_states` does not count as weights, or is the start of names: `net_g.conv.…`."""
    named = {name[len(key) + 1 :]: content[name] for name in map(str, content) if name.startswith(f'{key}.')}
    value = content.get(key, named)
    if isinstance(value, Mapping) and _num_weights(value):
        return value
    first, dot, rest = key.partition('.')
    return _below(content[first], rest) if dot and isinstance(content.get(first), Mapping) else {}


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
        state = _torch_load(path)
        iteration = state.get('iter') if isinstance(state, dict) else None
        if not isinstance(iteration, int) or iteration < 0:
            raise CheckpointError(f'it says that its iteration is {iteration!r}')
    except Exception as error:  # torch raises half a dozen kinds for files that are not what they should be
        raise CheckpointError(
            f'{path} is no training state that can be resumed from{_reason(error)}; name another .state '
            'file in path.resume_state, or remove this one to resume from the one before'
        ) from error
    return state


def newest_whole(folder: str | Path) -> Path | None:
    """The state of the highest iteration in an experiment's `training_states` that can be read; None if there is none.

    Each newer one that cannot be read is a line on stderr.
    """
    for _, path in sorted(numbered_files(Path(folder), STATE).items(), reverse=True):
        try:
            read_state(path)
            return path
        except CheckpointError as error:
            _warn(f'passed over: {error}')
    return None


@functools.cache  # a folder is looked through before a run starts and once more when it does
def _warn(line: str) -> None:
    say(f'basicsr: warning: {line}', file=sys.stderr)


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
    """By the name, or by the brace that a header begins with behind its length."""
    try:
        with path.open('rb') as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f'{path} cannot be read: {error.strerror}') from error
    looks_so = start[8:] == b'{' and not start.startswith((b'PK', pickle.PROTO))
    return looks_so or path.suffix == '.safetensors'


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict | None, dict[str, str]]:
    try:
        with safe_open(path, framework='pt') as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        network = json.loads(metadata[NETWORK_KEY]) if NETWORK_KEY in metadata else None
    except Exception as error:  # as with torch's readers below
        raise CheckpointError(f'{path} is cut or not a safetensors file{_lfs(path)}: {error}') from error
    if network is not None and not _has_type(network):
        raise CheckpointError(f'{path} describes its network as {network!r}, expected options with a type')
    return state, network, {key: text for key, text in metadata.items() if key != 'format'}


def _network_in(path: Path) -> dict | None:
    """The options of a network in the config.json beside its weights, where it says of which type they are."""
    with suppress(OSError, ValueError):
        options = json.loads(path.read_text(encoding='utf-8'))
        return options if _has_type(options) else None


def _has_type(options: Any) -> bool:
    return isinstance(options, dict) and isinstance(options.get('type'), str)


class _Inert:
    """Stands for an object that is no weights: takes whatever a file gives it, and does nothing with it."""

    def __new__(cls, *_: Any, **__: Any) -> '_Inert':
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _NumpyType(_Inert):
    """Stands for numpy.dtype: remembers of which type and byte order."""

    def __new__(cls, code: Any = '', *_: Any) -> '_NumpyType':
        self = super().__new__(cls)
        self.code, self.order = str(code), '<'
        return self

    def __setstate__(self, state: Any) -> None:
        self.order = '>' if state[1] == '>' else '<'


def _number(kind: Any, raw: Any = b'') -> Any:
    """Stands for the function that makes NumPy's scalars: a plain number, or None for another type than a number."""
    code = getattr(kind, 'code', '')
    raw = raw.encode('latin1') if isinstance(raw, str) else raw
    if not re.fullmatch(r'b1|[iu][1248]|f[248]', code) or not isinstance(raw, bytes) or len(raw) != int(code[1:]):
        return None
    letter = {'b1': '?', 'f2': 'e', 'f4': 'f', 'f8': 'd'}.get(code) or ' bh i   q'[int(code[1:])]
    return struct.unpack(kind.order + (letter.upper() if code[0] == 'u' else letter), raw)[0]


# Globals that files name beside tensors, and what is called in their place: nothing of theirs is run, or imported.
_STAND_INS = [
    *((_number, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
    *((_Inert, f'numpy.{core}.multiarray._reconstruct') for core in ('core', '_core')),
    *((_Inert, name) for name in ('numpy.ndarray', 'argparse.Namespace', 'datetime.datetime', 'datetime.timedelta')),
    *((_Inert, f'pathlib.{name}') for name in ('Path', 'PosixPath', 'WindowsPath', 'PurePosixPath')),
    *((_Inert, f'{name}.utilities.data.AttributeDict') for name in ('lightning_fabric', 'lightning.fabric')),
    (_NumpyType, 'numpy.dtype'),
]


def _torch_load(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            names = [part.rpartition('/')[2] for part in file.namelist()]
            if 'constants.pkl' in names:
                raise CheckpointError('it is a TorchScript program: save the state_dict() of torch.jit.load(...)')
            if 'data.pkl' not in names:
                raise CheckpointError(f'it is an archive with {_some(names)}: unpack it')
            for part in file.infolist():
                part.CRC = part.CRC or None  # 0 in files that torch was told to write without checksums
            damaged = file.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f'the part {damaged} is damaged')
    with warnings.catch_warnings(), torch.serialization.safe_globals(_STAND_INS):
        warnings.simplefilter('ignore')  # what torch has to say about pickle protocols helps nobody here
        return torch.load(path, map_location='cpu', weights_only=True)


def _read_torch(path: Path) -> Any:
    try:
        return _torch_load(path)
    except CheckpointError as error:
        raise CheckpointError(f'{path} is not a weights file: {error}') from error
    except pickle.UnpicklingError as error:
        if path.read_bytes()[:1] != pickle.PROTO and not zipfile.is_zipfile(path):
            raise CheckpointError(f'{path} is not a weights file{_lfs(path) or _reason(error)}') from error
        raise CheckpointError(
            f'{path} holds more than weights and is not opened, because unpickling such a file can run code'
            f'{_reason(error)}. Ask its author for a file of tensors alone'
        ) from error
    except Exception as error:  # torch's readers raise a dozen kinds on files that are cut or of another kind
        raise CheckpointError(f'{path} is cut or not a weights file{_reason(error)}: fetch it again') from error


def _lfs(path: Path) -> str:
    with path.open('rb') as file:
        is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    return ' but a pointer of Git LFS: `git lfs pull` fetches what it points to' if is_pointer else ''


def _reason(error: BaseException) -> str:
    """The sentence of torch's long message that says what is wrong, in brackets; nothing if there is none."""
    text = str(error).removeprefix('Weights only load failed. ')
    lines = [line.strip() for line in text.splitlines() if ' ' in line.strip()]
    reason = next((line for line in lines if 'GLOBAL' in line), lines[0] if lines else '')
    if 'weights_only' in reason:  # advice to switch the safety off
        return ''
    return f' ({reason.split(". ")[0].rstrip(".")[:300]})' if reason else ''


def _some(content: Collection) -> str:
    some = list(content)[:4]
    names = [' '.join(name.split())[:60] if isinstance(name, str) else repr(name)[:60] for name in some]
    return ', '.join(names) + (f' and {len(content) - 4} more' if len(content) > 4 else '') if names else 'nothing'


def numbered_files(folder: Path, name: str) -> dict[int, Path]:
    """The files of a folder that bear a name such as `STATE` or `WEIGHTS`, by their numbers."""
    pattern = re.compile(re.escape(name).replace(r'\{\}', r'(\d+)'), re.ASCII)
    if not folder.is_dir():
        return {}
    matches = ((pattern.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in matches if match}
