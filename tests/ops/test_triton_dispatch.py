"""Selection of the Triton kernels, with Triton and GPU simulated."""

import pytest
import torch

from ast_plugin import ops
from ast_plugin.errors import BackendUnavailable
from ast_plugin.ops import dispatch, triton
from ast_plugin.ops.backend import Call

FRFN = ops.FeedForward(*[torch.zeros(1, 1)] * 7)
MLP = ops.FeedForward(*[torch.zeros(1, 1)] * 4)


def attention(kind='assa', window=8, num_heads=2):
    return ops.Attention(*[None] * 8, num_heads, window, 0, kind)


def call(op=None, device='cuda:0', dtype=torch.bfloat16, shape=(1, 16, 16, 64), **options):
    return Call(op or attention(), torch.device(device), dtype, frozenset([dtype]), shape, True, **options)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Simulate a device of capability 9.0, Triton, and correct kernels; return the list of their checks."""
    checked = []
    monkeypatch.delenv('AST_BACKEND', raising=False)
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    monkeypatch.setattr(triton, 'is_installed', lambda: True)
    monkeypatch.setattr(torch.version, 'hip', None)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    monkeypatch.setattr(triton, '_checked', {})
    monkeypatch.setattr(triton, 'find_fault', lambda *key: checked.append(key))
    return checked


@pytest.mark.parametrize(
    ('given', 'backend'),
    [
        *(({'op': attention(kind)}, 'triton') for kind in ('assa', 'dense', 'sparse', 'sparse_relu')),
        *(({'dtype': dtype}, 'triton') for dtype in (torch.float16, torch.float32)),
        ({'device': 'cpu', 'dtype': torch.float32}, 'fused'),
        ({'device': 'meta'}, 'reference'),
        ({'device': 'mps'}, 'reference'),
    ],
)
def test_auto_takes_the_devices_backend(given, backend):
    assert dispatch.choose(call(**given)) == dispatch.Choice(backend, 'auto', {})


@pytest.mark.parametrize(
    ('given', 'reason'),
    [
        ({'device': 'cpu'}, 'runs on CUDA devices, the input is on cpu'),
        ({'device': 'meta'}, 'runs on CUDA devices, the input is on meta'),
        ({'dtype': torch.float64}, 'supports float32, bfloat16, float16, not float64'),
        ({'op': attention('topk')}, 'supports attention assa, dense, sparse, sparse_relu, not topk'),
        ({'op': attention(window=17)}, 'window sizes up to 16, not 17'),
        ({'op': attention(num_heads=1), 'shape': (1, 16, 16, 65)}, 'up to 64 channels, not 65'),
        ({'shape': (1, 0, 16, 64)}, r'the feature map \[1, 0, 16, 64\] is empty'),
        ({'shape': (16, 16, 64)}, r'a feature map \[B, H, W, C\], not \[16, 16, 64\]'),
    ],
)
def test_reasons_in_the_call(machine, given, reason):
    with ops.use_backend('triton'), pytest.raises(BackendUnavailable, match=reason):
        dispatch.choose(call(**given))
    assert not machine


@pytest.mark.parametrize(
    ('target', 'name', 'value', 'reason'),
    [
        (triton, 'is_installed', lambda: False, r'not installed: pip install "ast_plugin\[triton\]"'),
        (torch.version, 'hip', '6.2', 'only NVIDIA'),
        (torch.cuda, 'get_device_capability', lambda device: (7, 5), 'capability 8.0 or higher, got 7.5'),
        (torch.cuda, 'is_current_stream_capturing', lambda: True, 'before a CUDA graph is captured'),
        (triton, 'find_fault', lambda *key: 'its kernels fail on cuda:0', 'its kernels fail on cuda:0'),
    ],
)
def test_reasons_in_the_machine(monkeypatch, target, name, value, reason):
    monkeypatch.setattr(target, name, value)
    with ops.use_backend('triton'), pytest.raises(BackendUnavailable, match=reason):
        dispatch.choose(call())
    choice = dispatch.choose(call())
    assert choice.backend == 'reference' and set(choice.rejected) == {'triton'}


def test_each_variant_is_checked_once(machine):
    calls = [call(), call(), call(shape=(2, 64, 64, 64)), call(dtype=torch.float32), call(is_masked=True)]
    calls += [call(attention(window=4)), call(FRFN), call(MLP), call(device='cuda:1')]
    for each in calls:
        dispatch.choose(each)
    assert [len(key[-1]) for key in machine] == [4] * 4 + [1, 0, 4]


def test_interpreter_is_taken_by_name_alone(monkeypatch):
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    assert triton.why_not(call(device='cpu')) is None
    assert set(dispatch.choose(call(device='cpu', dtype=torch.float16)).rejected) == {'fused'}


def test_mixed_types_need_autocast(monkeypatch):
    mixed = call()._replace(dtypes=frozenset([torch.bfloat16, torch.float32]))
    assert 'tensors are bfloat16, float32' in dispatch.choose(mixed).rejected['triton']
    monkeypatch.setattr(torch, 'is_autocast_enabled', lambda kind: True)
    assert dispatch.choose(mixed).backend == 'triton'
