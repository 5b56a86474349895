"""Triton's kernels compiled for devices that need not be there: what only the interpreter takes would fail here.

In a process of its own, as kernels that the interpreter runs cannot be compiled.
"""

import importlib.util
import subprocess
import sys

import pytest

if importlib.util.find_spec('triton') is None:
    pytest.skip('needs Triton: pip install "ast_plugin[triton]"', allow_module_level=True)

SCRIPT = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ast_plugin.ops import triton_assa_kernels as attention, triton_frfn_kernels as activation

FLOATS = {'weight_ptr', 'bias_ptr', 'sums_ptr', 'shares_ptr', 'mask_ptr', 'd_bias_ptr', 'd_shares_ptr'}


def check(kernel, capability, dtype, warps, **constants):
    signature, attributes, values = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(index,)] = 'constexpr', constants[name]
        elif name.endswith('_ptr'):
            signature[name] = '*fp32' if name in FLOATS else f'*{dtype}'
            attributes[(index,)] = [['tt.divisibility', 16]]
        else:
            signature[name] = 'fp32' if name == 'scale' else 'i32'
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {'num_warps': warps, 'num_stages': 1}
    compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)
    assert len(compiled.asm['cubin']) > 1000
    print(kernel.fn.__name__, capability, dtype, compiled.metadata.shared)


def attend(capability, dtype, side, queries, kind, **more):
    tokens = side**2
    given = {'HEAD': 32, 'HEAD_FULL': 32, 'SIDE': side, 'TOKENS': tokens, 'DENSE': kind[0], 'POWER': kind[1]}
    given |= {'TOKENS_FULL': 1 << (tokens - 1).bit_length(), 'QUERIES': queries, 'SHIFTED': True, 'WIDE': False}
    for kernel in (attention.forward, attention.backward):
        check(kernel, capability, dtype, 4 if tokens <= 64 else 8, **given, **more)


def activate(capability, dtype):
    for kernel in (activation.forward, activation.backward_gate, activation.backward_convolution):
        gated = {'GATED': True} if 'GATED' in kernel.arg_names else {}
        check(kernel, capability, dtype, 8, BLOCK=64, ROWS=4, COLUMNS=8, **gated)


attend(80, 'bf16', 8, 64, (True, 2), MASK=False, SCALED=False)
attend(90, 'fp16', 8, 64, (True, 2), MASK=True, SCALED=True)
attend(80, 'bf16', 10, 16, (False, 1), MASK=True, SCALED=False)
attend(90, 'fp32', 4, 16, (True, 0), MASK=False, SCALED=False)
activate(80, 'fp32')
activate(90, 'bf16')
"""


def test_kernels_compile_for_ampere_and_hopper(tmp_path, monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))  # a cache would answer for the compiler
    result = subprocess.run([sys.executable, '-c', SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    shared = [int(line.split()[-1]) for line in result.stdout.splitlines()]
    assert len(shared) == 14
    assert max(shared) <= 99 * 1024  # of which any device from capability 8.0 on has as much
