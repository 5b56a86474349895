"""When Triton's kernels are chosen. Needs neither Triton nor a GPU: what there would be is pretended."""

from types import SimpleNamespace

import pytest
import torch

from ast_plugin import ops
from ast_plugin.errors import BackendUnavailable
from ast_plugin.ops import backend, triton_check, triton_launch

ATTENTION = {'kind': 'assa', 'window': 8, 'num_heads': 2, 'masked': False}


def call(device='cuda:0', dtype=torch.bfloat16, shape=(1, 16, 16, 64), function='window_attention', **details):
    details = {**ATTENTION, **details} if function == 'window_attention' else {}
    return backend.Call(function, torch.device(device), dtype, frozenset([dtype]), shape, True, None, details)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A device of capability 9.0, Triton, and kernels that are right; checks that were made are listed."""
    checked = []
    monkeypatch.delenv('AST_BACKEND', raising=False)
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    monkeypatch.setattr(triton_launch, 'is_installed', lambda: True)
    monkeypatch.setattr(torch.version, 'hip', None)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    monkeypatch.setattr(triton_check, '_found', {})
    monkeypatch.setattr(triton_check, '_fault', lambda *key: checked.append(key))
    return SimpleNamespace(checked=checked)


@pytest.mark.parametrize('kind', ['assa', 'dense', 'sparse', 'sparse_relu'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_auto_takes_it_on_a_cuda_device(kind, dtype):
    choice = backend.choose(call(kind=kind, dtype=dtype))
    assert choice == backend.Choice('triton', 'auto', {})


@pytest.mark.parametrize(
    ('given', 'reason'),
    [
        ({'device': 'cpu'}, 'computes on CUDA devices, the map is on cpu'),
        ({'device': 'meta'}, 'computes on CUDA devices, the map is on meta'),
        ({'dtype': torch.float64}, 'computes in float32, bfloat16, float16, not in float64'),
        ({'kind': 'topk'}, 'kinds assa, dense, sparse, sparse_relu, not topk'),
        ({'window': 17}, 'sides up to 16, not 17'),
        ({'num_heads': 1, 'shape': (1, 16, 16, 65)}, 'up to 64 channels, not 65'),
        ({'shape': (1, 0, 16, 64)}, r'nothing to compute in \[1, 0, 16, 64\]'),
        ({'shape': (16, 16, 64)}, r'a map is \[B, H, W, C\], not \[16, 16, 64\]'),
    ],
)
def test_what_it_cannot_run_is_named(machine, given, reason):
    with ops.use_backend('triton'), pytest.raises(BackendUnavailable, match=reason):
        backend.choose(call(**given))
    assert not machine.checked


@pytest.mark.parametrize(
    ('target', 'name', 'value', 'reason'),
    [
        (triton_launch, 'is_installed', lambda: False, r'not installed: pip install "ast_plugin\[triton\]"'),
        (torch.version, 'hip', '6.2', 'devices of NVIDIA'),
        (torch.cuda, 'get_device_capability', lambda device: (7, 5), 'capability 8.0, this one has 7.5'),
        (torch.cuda, 'is_current_stream_capturing', lambda: True, 'before a CUDA graph is captured'),
        (triton_check, '_fault', lambda *key: 'its kernels fail on cuda:0', 'its kernels fail on cuda:0'),
    ],
)
def test_machines_that_cannot_are_named_and_auto_goes_on(monkeypatch, target, name, value, reason):
    monkeypatch.setattr(target, name, value)
    with ops.use_backend('triton'), pytest.raises(BackendUnavailable, match=reason):
        backend.choose(call())
    choice = backend.choose(call())
    assert choice.backend == 'reference' and set(choice.rejected) == {'triton'}


def test_kernels_are_checked_once_for_each_variant(machine):
    calls = [call(), call(), call(shape=(2, 64, 64, 64)), call(dtype=torch.float32), call(masked=True)]
    calls += [call(window=4), call(function='frfn'), call(function='mlp'), call(device='cuda:1')]
    for each in calls:
        backend.choose(each)
    assert [key[0] for key in machine.checked] == ['window_attention'] * 4 + ['frfn', 'window_attention']


def test_auto_does_not_speak_of_devices_that_are_not_there():
    assert backend.choose(call(device='cpu', dtype=torch.float32)) == backend.Choice('fused', 'auto', {})
    assert backend.choose(call(device='meta')) == backend.Choice('reference', 'auto', {})


def test_auto_leaves_the_interpreter_to_those_who_ask(monkeypatch):
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    assert triton_launch.why_not(call(device='cpu')) is None
    assert set(backend.choose(call(device='cpu', dtype=torch.float16)).rejected) == {'fused'}


def test_mixed_types_need_autocast(monkeypatch):
    mixed = call()
    mixed = backend.Call(**{**vars(mixed), 'dtypes': frozenset([torch.bfloat16, torch.float32])})
    assert 'tensors are bfloat16, float32' in backend.choose(mixed).rejected['triton']
    monkeypatch.setattr(torch, 'is_autocast_enabled', lambda kind: True)
    assert backend.choose(mixed).backend == 'triton'
