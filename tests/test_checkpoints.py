"""Tests of weights files and training states: reading all formats, rejecting bad files, keeping the newest."""

import os
import pickle
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ast_plugin.checkpoints import (
    NETWORK_KEY,
    STATE,
    WEIGHTS,
    keep_newest,
    newest_whole,
    read_checkpoint,
    read_state,
    save_torch,
    save_weights,
)
from ast_plugin.errors import CheckpointError

WEIGHT = {'conv.weight': torch.rand(400, 3), 'conv.bias': torch.rand(4)}


def write(path, content, **options):
    torch.save(content, path, **options)
    return path


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_weights_files_are_read_back(tmp_path):
    checkpoint = read_checkpoint(write(tmp_path / 'old.pth', WEIGHT, _use_new_zipfile_serialization=False))
    assert same(checkpoint.state, WEIGHT) and checkpoint.param_key is None
    shared, network = {**WEIGHT, 'again': WEIGHT['conv.bias']}, {'type': 'AST', 'depths': [1] * 9}
    save_weights(tmp_path / 'w.safetensors', shared, network)
    checkpoint = read_checkpoint(tmp_path / 'w.safetensors')
    assert same(checkpoint.state, shared) and checkpoint.network == network
    for length in range(16, 272, 8):  # of the header: a first byte of 80 hexadecimal could be that of a pickle
        save_file(WEIGHT, tmp_path / 'w.pth', {'text': ' ' * length})
        assert same(read_checkpoint(tmp_path / 'w.pth').state, WEIGHT)


def test_metadata_that_are_no_network(tmp_path):
    for described in ('[1]', '{"embed_dim": 4}', 'AST'):
        save_file({'a': torch.zeros(1)}, tmp_path / 'w.safetensors', {NETWORK_KEY: described})
        with pytest.raises(CheckpointError, match='describes its network as'):
            read_checkpoint(tmp_path / 'w.safetensors')


class Code:
    """Object that creates a folder when it is unpickled unsafely."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def bad_files(folder):
    whole = write(folder / 'whole.pth', {'params': WEIGHT}).read_bytes()
    legacy = write(folder / 'old.pth', {'params': WEIGHT}, _use_new_zipfile_serialization=False).read_bytes()
    save_weights(folder / 'w.safetensors', WEIGHT, {'type': 'AST'})
    tensors = (folder / 'w.safetensors').read_bytes()
    proof = folder / 'the code ran'
    return {
        'half.pth': (whole[: len(whole) // 2], 'truncated or not a weights file'),
        'almost.pth': (whole[:-1], 'truncated or not a weights file'),
        'half_legacy.pth': (legacy[: len(legacy) // 2], 'truncated or not a weights file'),
        'empty.pth': (b'', 'truncated or not a weights file'),
        'text.pth': (b'hello, world\n', 'not a weights file'),
        'half.safetensors': (tensors[: len(tensors) // 2], 'truncated or not a safetensors file'),
        'empty.safetensors': (b'', 'truncated or not a safetensors file'),
        'pth.safetensors': (whole, 'truncated or not a safetensors file'),
        'code.pth': (pickle.dumps(Code(proof)), 'can run code'),
        'old_code.pth': (pickle.dumps(Code(proof), protocol=2), 'can run code'),
        'zipped_code.pth': (write(folder / 'code', {'state_dict': Code(proof)}).read_bytes(), 'can run code.*mkdir'),
        'array.pth': (pickle.dumps(np.zeros(3)), 'can run code'),
        'list.pth': (write(folder / 'list', [1, 2]).read_bytes(), 'a list, expected a dictionary'),
        'numbers.pth': (write(folder / 'numbers', {'params': {'a': 1}}).read_bytes(), 'holds no weights.*params'),
        'nothing.pth': (write(folder / 'nothing', {}).read_bytes(), 'holds no weights.*nothing'),
    }


def test_bad_files(tmp_path):
    for name, (content, words) in bad_files(tmp_path).items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=words) as caught:
            read_checkpoint(path)
        message = str(caught.value)
        assert str(path) in message and '\n' not in message, name
        assert 'weights_only' not in message, name
    assert not (tmp_path / 'the code ran').exists()


def test_missing_files_and_keys(tmp_path, monkeypatch):
    path = write(tmp_path / 'x.pth', {'generator': WEIGHT, 'epoch': 1})
    for missing, key, words in (
        (tmp_path / 'none.pth', None, r'none\.pth does not exist: expected a weights file'),
        (tmp_path, None, r'is a folder without model\.safetensors'),
        ('https://a.b/x.pth', None, 'is a URL; download the file first'),
        (path, 'params', "key 'params'; available: generator"),
    ):
        with pytest.raises(CheckpointError, match=words):
            read_checkpoint(missing, key)
    assert same(read_checkpoint(path, 'generator').state, WEIGHT)
    monkeypatch.setattr(Path, 'open', Mock(side_effect=PermissionError(13, 'Permission denied')))
    with pytest.raises(CheckpointError, match=r'x\.pth cannot be read: Permission denied'):
        read_checkpoint(path)


# ---- training states


def flip_a_bit(content):
    return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]


@pytest.mark.parametrize('damage', [flip_a_bit, lambda content: content[:-100], lambda content: b''])
def test_newest_whole_state(tmp_path, damage, capsys):
    def spoil(name):
        (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))

    for iteration in (5, 10, 9):
        save_torch(tmp_path / f'{iteration}.state', {'iter': iteration, 'tensor': torch.rand(2000)})
    for name in ('other.state', '.11.state.abc.part', '12.state.abandoned'):
        (tmp_path / name).touch()
    assert newest_whole(tmp_path) == tmp_path / '10.state'
    spoil('10.state')
    for _ in range(2):  # reported once
        assert newest_whole(tmp_path) == tmp_path / '9.state'
    (line,) = capsys.readouterr().err.splitlines()
    assert '10.state is not a usable training state' in line
    if damage is flip_a_bit:
        assert 'is damaged' in line
        torch.load(tmp_path / '10.state', weights_only=True)  # torch does not see it
    spoil('9.state')
    spoil('5.state')
    assert newest_whole(tmp_path) is None
    assert newest_whole(tmp_path / 'missing') is None


def test_what_is_no_state(tmp_path):
    for content in ({'iter': '5'}, {'iter': -1}, {}, [5]):
        save_torch(tmp_path / '5.state', content)
        with pytest.raises(CheckpointError, match=r'5\.state is not a usable training state \(its iteration is'):
            read_state(tmp_path / '5.state')
    torch.save({'iter': 3}, tmp_path / '3.state', _use_new_zipfile_serialization=False)
    assert read_state(tmp_path / '3.state') == {'iter': 3}


@pytest.mark.parametrize(
    ('name', 'iteration', 'count', 'before', 'after'),
    [
        (STATE, 20, 2, '5.state 15.state 20.state .25.state.abc.part net_g_5.pth', '15.state 20.state net_g_5.pth'),
        (STATE, 6, 3, '5.state 6.state 10.state', '5.state 6.state 10.state.abandoned'),
        (WEIGHTS, 10, 1, '5.state net_g_5.pth net_g_10.pth net_g_11.pth', '5.state net_g_10.pth net_g_11.pth'),
    ],
)
def test_keep_newest(tmp_path, name, iteration, count, before, after):
    others = 'notes.txt', 'net_g_best.pth', '100.state.abandoned'
    for file in (*before.split(), *others):
        (tmp_path / file).touch()
    keep_newest(tmp_path, name, iteration, count)
    assert {path.name for path in tmp_path.iterdir()} == {*after.split(), *others}
