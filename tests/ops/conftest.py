"""Fixtures for the fast backends: `fused` on the CPU, `triton` on CUDA or in Triton's interpreter on the CPU.

Without a GPU: pip install triton==3.7.1 && python -m pytest tests/ops -k triton
"""

import importlib.util
import os
from importlib.metadata import version
from typing import NamedTuple

import pytest
import torch

from ast_plugin import ops

INTERPRETED = not torch.cuda.is_available()


class Fast(NamedTuple):
    """A fast backend with the device, dtype and tolerance of its tests."""

    name: str
    device: torch.device
    dtype: torch.dtype
    near: float


def load_kernels():
    """Import the Triton kernels, or skip the test if Triton is not installed."""
    if importlib.util.find_spec('triton') is None:
        pytest.skip('needs Triton: pip install "ast_plugin[triton]"', allow_module_level=True)
    if INTERPRETED and tuple(map(int, version('triton').split('.')[:2])) < (3, 7):
        pytest.skip('older interpreters are incompatible with current NumPy', allow_module_level=True)
    before = os.environ.get('TRITON_INTERPRET', '0')
    # Triton reads the variable when a kernel is defined, that is, on import.
    os.environ['TRITON_INTERPRET'] = str(int(INTERPRETED))
    from ast_plugin.ops.triton import attention, ffn, norm

    os.environ['TRITON_INTERPRET'] = before
    return attention, ffn, norm


@pytest.fixture
def place(monkeypatch, device):
    """Device on which the Triton kernels run."""
    load_kernels()
    monkeypatch.setenv('TRITON_INTERPRET', str(int(INTERPRETED)))
    # Convolutions use TF32 by default, which is less precise than the tolerances.
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    return torch.device('cpu') if INTERPRETED else torch.device('cuda') if device.type != 'cuda' else device


@pytest.fixture(params=['fused', 'triton'])
def fast(request):
    """A fast backend, which is selected for the test."""
    if request.param == 'fused':
        backend = Fast('fused', torch.device('cpu'), torch.float64, 1e-9)
    else:
        backend = Fast('triton', request.getfixturevalue('place'), torch.float32, 1e-4)
    with ops.use_backend(request.param):
        yield backend


@pytest.fixture(params=['reference', 'auto'])
def _backend(request):
    """Run a test with the reference and with the fastest backend."""
    with ops.use_backend(request.param):
        yield
