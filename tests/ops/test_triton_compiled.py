"""Triton kernels compiled with the arguments of real calls, for devices that need not be present.

Code that only the interpreter accepts fails here. Everything except the launch is done, in a separate process, because
kernels defined for the interpreter cannot be compiled.
"""

import importlib.util
import subprocess
import sys

import pytest

if importlib.util.find_spec('triton') is None:
    pytest.skip('needs Triton: pip install "ast_plugin[triton]"', allow_module_level=True)

SCRIPT = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from ast_plugin.ops import Attention
from ast_plugin.ops.triton import attention, ffn, norm


class PretendedDriver:
    capability = 80

    def get_current_target(self):
        return GPUTarget('cuda', self.capability, 32)

    def get_current_device(self):
        return self.capability  # compiled kernels are cached by device

    def get_current_stream(self, device):
        return 0


def compile_only(self, *args, grid, warmup, **options):
    compiled = run(self, *args, grid=grid, warmup=True, **options)
    assert len(compiled.asm['cubin']) > 1000
    print(self.fn.__name__, PretendedDriver.capability, compiled.metadata.shared)


def draw(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def attend(capability, dtype, window, kind, masked=False):
    PretendedDriver.capability = capability
    mask = torch.zeros(6, window**2, window**2) if masked else None
    op, gate = Attention(*[None] * 8, 2, window, window // 2, kind), draw(2) if kind == 'assa' else None
    qkv = draw(1, 2 * window, 3 * window, 192, dtype=dtype)
    attention.attend(qkv, draw(2, window**2, window**2), gate, mask, op).sum().backward()


def activate(capability, dtype, hidden):
    PretendedDriver.capability = capability
    ffn.activate(draw(2, 7, 9, hidden, dtype=dtype), draw(80, 1, 3, 3), draw(80)).sum().backward()


def normalise(capability, dtype, channels):
    PretendedDriver.capability = capability
    x, weight, bias = draw(2, 7, 9, channels, dtype=dtype), draw(channels), draw(channels)
    norm.layer_norm(x, [channels], weight, bias, 1e-5).sum().backward()


driver.set_active(PretendedDriver())
run, JITFunction.run = JITFunction.run, compile_only
attend(80, torch.bfloat16, 8, 'assa')
attend(90, torch.float16, 8, 'assa', masked=True)
attend(80, torch.bfloat16, 10, 'sparse_relu', masked=True)
attend(90, torch.float32, 4, 'dense')
activate(80, torch.float32, 160)
activate(90, torch.bfloat16, 80)
normalise(80, torch.bfloat16, 64)
normalise(90, torch.float32, 512)
"""


def test_kernels_compile_for_ampere_and_hopper(tmp_path, monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))  # so that the compiler runs
    result = subprocess.run([sys.executable, '-c', SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    shared = [int(line.split()[-1]) for line in result.stdout.splitlines()]
    assert len(shared) == 22
    assert max(shared) <= 99 * 1024  # available on every device of capability 8.0 or higher
