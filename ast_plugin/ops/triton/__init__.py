"""AST's functions on CUDA devices by Triton's kernels, which are compared with plain operators before they are trusted.

The comparison is made once in a process for each device, dtype and variant of a kernel, on a map of a few windows,
forward, and backward before the first call that needs it. What it costs is the compilation, which the call needs in any
case, and that of the variant without or with a shift; Triton keeps what it compiled on the disk. Nothing is drawn from
the global random generators. Triton itself is imported when the first kernel starts.
"""

import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_plugin.errors import first_line
from ast_plugin.ops import attention as plain_attention
from ast_plugin.ops import ffn as plain_ffn
from ast_plugin.ops.attention import Attention
from ast_plugin.ops.backend import Call, Residual, with_residual
from ast_plugin.ops.ffn import FeedForward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ('assa', 'dense', 'sparse', 'sparse_relu')
LARGEST_HEAD, LARGEST_WINDOW = 64, 16
NEAR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # of ‖got − want‖ / ‖want‖
_CAPABILITY = (8, 0)  # below it, products of half types are computed without tensor cores, and bfloat16 not at all
_checked: dict[tuple, str | None] = {}


def _load_kernels() -> tuple[ModuleType, ModuleType, ModuleType]:
    from ast_plugin.ops.triton import attention, ffn, norm

    return attention, ffn, norm


def window_attention(x: Tensor, op: Attention, mask: Tensor | None = None, residual: Residual | None = None) -> Tensor:
    """See `ops.window_attention`."""
    attention, _, norm = _load_kernels()
    return with_residual(lambda x: attention.window_attention(x, op, mask), x, residual, norm.layer_norm)


def feed_forward(x: Tensor, op: FeedForward, residual: Residual | None = None) -> Tensor:
    """See `ops.feed_forward`."""
    _, ffn, norm = _load_kernels()
    return with_residual(lambda x: ffn.feed_forward(x, op), x, residual, norm.layer_norm)


def why_not(call: Call) -> str | None:
    """Why Triton's kernels cannot run a call, or None; on a CUDA device they are compared first."""
    reason, op = _device_reason(call.device) or call.why_not(DTYPES), call.op
    if reason is not None:
        return reason
    if isinstance(op, Attention):
        head = call.shape[-1] // op.num_heads
        if op.kind not in KINDS:
            return f'it has attention of the kinds {", ".join(KINDS)}, not {op.kind}'
        if op.window > LARGEST_WINDOW:
            return f'windows have sides up to {LARGEST_WINDOW}, not {op.window}'
        if head > LARGEST_HEAD:
            return f'heads have up to {LARGEST_HEAD} channels, not {head}'
    # The interpreter is for tests, which compare themselves.
    return check_kernels(call) if call.device.type == 'cuda' else None


@lru_cache(maxsize=1)
def is_installed() -> bool:
    """Whether there is a package of that name; whether it works, the first kernel shows."""
    return importlib.util.find_spec('triton') is not None


def _device_reason(device: torch.device) -> str | None:
    is_interpreted = os.environ.get('TRITON_INTERPRET') == '1'  # on the CPU, statement by statement
    if device.type != 'cuda' and not (device.type == 'cpu' and is_interpreted):
        return f'it computes on CUDA devices, the map is on {device.type}'
    if not is_installed():
        return 'the package triton is not installed: pip install "ast_plugin[triton]"'
    if device.type == 'cuda':
        if torch.version.hip is not None:
            return 'it was written for devices of NVIDIA'
        capability = torch.cuda.get_device_capability(device)
        if capability < _CAPABILITY:
            needed, present = ('.'.join(map(str, version)) for version in (_CAPABILITY, capability))
            return f'it needs a device of compute capability {needed}, this one has {present}'
    return None


def check_kernels(call: Call) -> str | None:
    """What is wrong with the kernels of a call on its device, or None; the same answer for the rest of the process."""
    op = call.op
    if isinstance(op, Attention):
        variant = op.kind, op.window, max(1, call.shape[-1] // op.num_heads), call.is_masked
    elif op is None:
        return None
    else:
        variant = () if op.depthwise is None else (op.is_gated,)
    key = call.device, call.dtype, call.needs_grad, variant
    if key not in _checked:
        if torch.cuda.is_current_stream_capturing():
            return 'its kernels were not run before a CUDA graph is captured: call the network once first'
        # A thread has none of the caller's modes: no autocast, inference mode, hooks or counters.
        with ThreadPoolExecutor(1) as thread:
            _checked[key] = thread.submit(find_fault, *key).result()
    return _checked[key]


def find_fault(device: torch.device, dtype: torch.dtype, needs_grad: bool, variant: tuple) -> str | None:
    """Compare a variant of the kernels with plain operators: what is wrong, or None."""
    try:
        errors = norm_errors(device, dtype, needs_grad)
        if variant:
            others = attention_errors if len(variant) > 1 else activation_errors
            errors |= others(device, dtype, needs_grad, *variant)
    # Whatever the compiler, the driver or the device says: the reference computes instead, and the reason is told.
    except Exception as error:
        return f'its kernels fail on {device} ({type(error).__name__}: {first_line(error)[:200]})'
    wrong = {name: error for name, error in errors.items() if not error < NEAR[dtype]}
    if wrong:
        described = ', '.join(f'{name} is off by {error:.0e}' for name, error in wrong.items())
        return f'its kernels do not compute on {device} what the reference does: {described}'
    return None


def norm_errors(device: torch.device, dtype: torch.dtype, needs_grad: bool) -> dict[str, float]:
    """Relative errors of the norm's output and gradients, of 2 images of 11×13 with 80 channels."""
    tensors = {'map': _waves(device, 2, 11, 13, 80).to(dtype), 'weight': _waves(device, 80), 'bias': _waves(device, 80)}
    functions = (
        lambda x, weight, bias, norm=norm: norm(x, [80], weight, bias, 1e-5)
        for norm in (_load_kernels()[2].layer_norm, F.layer_norm)
    )
    return {f'{name} (norm)': error for name, error in _errors(*functions, tensors, needs_grad).items()}


def attention_errors(
    device: torch.device, dtype: torch.dtype, needs_grad: bool, kind: str, window: int, head: int, is_masked: bool
) -> dict[str, float]:
    """Relative errors of attention's output and gradients, without and with a shift, over 2×3 windows of 2 images."""
    heads, tokens = 2, window**2
    qkv = _waves(device, 2, 2 * window, 3 * window, 3 * heads * head).to(dtype)
    tensors = {'qkv': qkv, 'bias': _waves(device, heads, tokens, tokens)}
    tensors['gate'] = _waves(device, 2) if kind == 'assa' else None
    mask = (_waves(device, 6, tokens, tokens) > 0).float() * -100.0 if is_masked else None
    errors = {}
    for shift in sorted({0, window // 2}):
        op = Attention(*[None] * 8, heads, window, shift, kind)
        functions = (
            lambda *tensors, attend=module.attend, op=op: attend(*tensors, mask, op)
            for module in (_load_kernels()[0], plain_attention)
        )
        found = _errors(*functions, tensors, needs_grad)
        errors |= {f'{name} (shift {shift})': error for name, error in found.items()}
    return errors


def activation_errors(device: torch.device, dtype: torch.dtype, needs_grad: bool, is_gated: bool) -> dict[str, float]:
    """Relative errors of the activations' output and gradients, of 2 images of 11×13 with 80 channels."""
    z = _waves(device, 2, 11, 13, 160 if is_gated else 80).to(dtype)
    tensors = {'map': z, 'weight': _waves(device, 80, 1, 3, 3), 'bias': _waves(device, 80)}
    return _errors(_load_kernels()[1].activate, plain_ffn.activate, tensors, needs_grad)


def _errors(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    tensors: dict[str, Tensor | None],
    needs_grad: bool,
) -> dict[str, float]:
    """Relative errors of a function's output, and of gradients where needed, against another in float64."""
    results = []
    for compute, dtype in ((function, None), (reference, torch.float64)):
        leaves = [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in tensors.values()]
        out = compute(*leaves)
        results.append([out.detach()])
        if needs_grad:
            grad = _waves(out.device, *out.shape).to(tensors[next(iter(tensors))].dtype).to(out.dtype)
            results[-1] += torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], grad)
    names = 'the output', *(f'the gradient of the {name}' for name, tensor in tensors.items() if tensor is not None)
    return {
        name: float((got.double() - want).norm() / want.norm())
        for name, got, want in zip(names, *results, strict=needs_grad)
    }


def _waves(device: torch.device, *shape: int) -> Tensor:
    """Numbers in (-1.7, 1.7) without visible order, the same for the same shape, and from no generator."""
    steps = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64) * (12.9898 + sum(shape))
    return (1.7 * (steps.sin() * 43758.5453).frac()).float().reshape(shape).to(device)
