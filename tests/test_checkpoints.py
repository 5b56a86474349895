import os
import pickle

import numpy as np
import pytest
import torch

from ast_plugin import weights_files
from ast_plugin.archs.ast_arch import AST
from ast_plugin.checkpoints import infer_network, read_checkpoint, save_torch, save_weights
from ast_plugin.errors import CheckpointError

OPTIONS = {'embed_dim': 4, 'depths': [1] * 9, 'num_heads': [1] * 9}


@pytest.fixture(scope='module')
def state():
    return AST(**OPTIONS).state_dict()


def write(path, content, **options):
    torch.save(content, path, **options)
    return path


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_official_files(tmp_path, state):
    content = {'epoch': 3, 'state_dict': {f'module.{k}': v for k, v in state.items()}, 'optimizer': {'state': {}}}
    checkpoint = read_checkpoint(write(tmp_path / 'model_best.pth', content), 'state_dict')
    assert same(checkpoint.state, state)
    assert (checkpoint.param_key, checkpoint.network) == ('state_dict', None)


def test_toolbox_files_prefer_the_moving_average(tmp_path, state):
    average = {name: tensor + 1 for name, tensor in state.items()}
    path = write(tmp_path / 'net_g_latest.pth', {'params': state, 'params_ema': average})
    assert same(read_checkpoint(path).state, average)
    assert same(read_checkpoint(path, 'params').state, state)
    only = write(tmp_path / 'plain.pth', {'params': state})
    assert read_checkpoint(only, 'params_ema').param_key == 'params'


@pytest.mark.parametrize('zipped', [True, False])
def test_bare_states(tmp_path, state, zipped):
    path = write(tmp_path / 'bare.pth', state, _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(path, 'params')
    assert same(checkpoint.state, state)
    assert checkpoint.param_key is None


def test_weights_carry_their_network(tmp_path, state):
    shared = {**state, 'again': state['input_proj.weight']}
    save_weights(tmp_path / 'w.safetensors', shared, {'type': 'AST', **OPTIONS})
    checkpoint = read_checkpoint(tmp_path / 'w.safetensors')
    assert same(checkpoint.state, shared)
    assert checkpoint.network == {'type': 'AST', **OPTIONS}


def test_infer_network(state):
    options, assumed = infer_network(state)
    assert options['type'] == 'AST' and options['embed_dim'] == 4
    assert any('img_size' in line for line in assumed)


class Code:
    """Unpickled by a careless reader, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def bad_files(folder, state):
    whole = write(folder / 'whole.pth', {'params': state}).read_bytes()
    legacy = write(folder / 'old.pth', {'params': state}, _use_new_zipfile_serialization=False).read_bytes()
    save_weights(folder / 'w.safetensors', state, {'type': 'AST'})
    tensors = (folder / 'w.safetensors').read_bytes()
    proof = folder / 'the code ran'
    return {
        'half.pth': (whole[: len(whole) // 2], 'cut or not a weights file'),
        'almost.pth': (whole[:-1], 'cut or not a weights file'),
        'half_legacy.pth': (legacy[: len(legacy) // 2], 'cut or not a weights file'),
        'empty.pth': (b'', 'cut or not a weights file'),
        'text.pth': (b'hello, world\n', 'not a weights file'),
        'half.safetensors': (tensors[: len(tensors) // 2], 'cut or not a safetensors file'),
        'empty.safetensors': (b'', 'cut or not a safetensors file'),
        'pth.safetensors': (whole, 'cut or not a safetensors file'),
        'code.pth': (pickle.dumps(Code(proof)), 'can run code'),
        'old_code.pth': (pickle.dumps(Code(proof), protocol=2), 'can run code'),
        'zipped_code.pth': (write(folder / 'code', {'state_dict': Code(proof)}).read_bytes(), 'can run code.*mkdir'),
        'array.pth': (pickle.dumps(np.zeros(3)), 'can run code'),
        'list.pth': (write(folder / 'list', [1, 2]).read_bytes(), 'a list, expected a dictionary'),
        'numbers.pth': (write(folder / 'numbers', {'params': {'a': 1}}).read_bytes(), 'holds no weights.*params'),
        'nothing.pth': (write(folder / 'nothing', {}).read_bytes(), 'holds no weights.*nothing'),
    }


def test_bad_files_are_named_and_run_nothing(tmp_path, state):
    for name, (content, words) in bad_files(tmp_path, state).items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=words) as caught:
            read_checkpoint(path)
        message = str(caught.value)
        assert str(path) in message and '\n' not in message, name
        assert 'weights_only' not in message, name
    assert not (tmp_path / 'the code ran').exists()


def test_missing_files_and_keys(tmp_path, state):
    with pytest.raises(CheckpointError, match='does not exist'):
        read_checkpoint(tmp_path / 'none.pth')
    with pytest.raises(CheckpointError, match='is a folder'):
        read_checkpoint(tmp_path)
    path = write(tmp_path / 'x.pth', {'generator': state, 'epoch': 1})
    assert same(read_checkpoint(path, 'generator').state, state)
    with pytest.raises(CheckpointError, match="no 'params'; it has generator, epoch"):
        read_checkpoint(path, 'params')


@pytest.mark.parametrize('described', ['[1]', '{"embed_dim": 4}', 'AST'])
def test_metadata_that_are_no_network(tmp_path, described):
    from safetensors.torch import save_file

    save_file({'a': torch.zeros(1)}, tmp_path / 'w.safetensors', {weights_files.NETWORK_KEY: described})
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / 'w.safetensors')


@pytest.mark.parametrize('failing', ['fsync', 'replace'])
def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch, failing):
    path = tmp_path / 'net_g_latest.pth'
    save_torch(path, {'params': {'a': torch.zeros(2)}})

    def fail(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync' if failing == 'fsync' else 'rename', fail)
    monkeypatch.setattr(weights_files.Path, 'replace', fail) if failing == 'replace' else None
    with pytest.raises(CheckpointError, match='No space left on device'):
        save_torch(path, {'params': {'a': torch.ones(2)}})
    monkeypatch.undo()
    assert torch.equal(read_checkpoint(path).state['a'], torch.zeros(2))
    assert [file.name for file in tmp_path.iterdir()] == ['net_g_latest.pth']


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs the full device of Linux')
def test_a_full_disk_is_an_error(monkeypatch, tmp_path):
    real = weights_files.tempfile.NamedTemporaryFile

    def on_a_full_disk(**options):
        file = real(**options)
        os.dup2(os.open('/dev/full', os.O_WRONLY), file.fileno())
        return file

    monkeypatch.setattr(weights_files.tempfile, 'NamedTemporaryFile', on_a_full_disk)
    for save in (
        lambda p: save_torch(p, {'a': torch.zeros(9999)}),
        lambda p: save_weights(p, {'a': torch.zeros(9999)}, {}),
    ):
        with pytest.raises(CheckpointError, match='cannot be written'):
            save(tmp_path / 'full')
    assert list(tmp_path.iterdir()) == []


def test_files_are_readable_by_others_as_the_umask_says(tmp_path):
    old = os.umask(0o027)
    try:
        save_torch(tmp_path / 'a.pth', {'a': torch.zeros(1)})
    finally:
        os.umask(old)
    assert (tmp_path / 'a.pth').stat().st_mode & 0o777 == 0o640
