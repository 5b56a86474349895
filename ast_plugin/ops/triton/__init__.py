"""CUDA backend: Triton kernels, which are checked against the reference before use.

The check runs once per process for each device, dtype and kernel variant, on a feature map of a few windows. It covers
the forward pass, and the backward pass before the first call that needs gradients. Its main cost is compilation, which
the call needs anyway, plus that of the variant with or without shift; Triton caches compiled kernels on disk. The
global random generators are not used. Triton is imported when the first kernel starts.
"""

import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
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
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # for ‖got − want‖ / ‖want‖
_CAPABILITY = (8, 0)  # lower ones compute half-precision products without tensor cores, and lack bfloat16
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
    """Return why the Triton kernels cannot run a call, or None if they can; check them first on CUDA devices."""
    reason, op = _device_reason(call.device) or call.why_not(DTYPES), call.op
    if reason is not None:
        return reason
    if isinstance(op, Attention):
        head = call.shape[-1] // op.num_heads
        if op.kind not in KINDS:
            return f'it supports attention {", ".join(KINDS)}, not {op.kind}'
        if op.window > LARGEST_WINDOW:
            return f'it supports window sizes up to {LARGEST_WINDOW}, not {op.window}'
        if head > LARGEST_HEAD:
            return f'it supports heads of up to {LARGEST_HEAD} channels, not {head}'
    # The interpreter is only used in tests, which make their own comparisons.
    return check_kernels(call) if call.device.type == 'cuda' else None


@lru_cache(maxsize=1)
def is_installed() -> bool:
    """Whether the package triton is installed; the first kernel shows whether it works."""
    return importlib.util.find_spec('triton') is not None


def _device_reason(device: torch.device) -> str | None:
    is_interpreted = os.environ.get('TRITON_INTERPRET') == '1'  # runs kernels on the CPU
    if device.type != 'cuda' and not (device.type == 'cpu' and is_interpreted):
        return f'it runs on CUDA devices, the input is on {device.type}'
    if not is_installed():
        return 'the package triton is not installed: pip install "ast_plugin[triton]"'
    if device.type == 'cuda':
        if torch.version.hip is not None:
            return 'it supports only NVIDIA GPUs'
        capability = torch.cuda.get_device_capability(device)
        if capability < _CAPABILITY:
            needed, present = ('.'.join(map(str, version)) for version in (_CAPABILITY, capability))
            return f'it needs compute capability {needed} or higher, got {present}'
    return None


def check_kernels(call: Call) -> str | None:
    """Check the kernels that a call needs on its device; return the problem or None, cached per process."""
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
            return 'its kernels must run once before a CUDA graph is captured: call the network once first'
        # A new thread has none of the caller's modes: no autocast, inference mode, hooks or counters.
        with ThreadPoolExecutor(1) as thread:
            _checked[key] = thread.submit(find_fault, *key).result()
    return _checked[key]


def find_fault(device: torch.device, dtype: torch.dtype, needs_grad: bool, variant: tuple) -> str | None:
    """Check a variant of the kernels against the reference; return the problem or None."""
    try:
        errors = kernel_errors(device, dtype, needs_grad, variant)
    # The compiler, driver or device may raise anything: the reference is used instead, and the reason is logged.
    except Exception as error:
        return f'its kernels fail on {device} ({type(error).__name__}: {first_line(error)[:200]})'
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCES[dtype]}
    if wrong:
        described = ', '.join(f'{name} is off by {error:.0e}' for name, error in wrong.items())
        return f'its kernels differ from the reference on {device}: {described}'
    return None


def kernel_errors(device: torch.device, dtype: torch.dtype, needs_grad: bool, variant: tuple) -> dict[str, float]:
    """Return the relative errors of the output and, if needed, of each gradient of the kernels of a variant.

    Norm and activation are computed for 2 maps of 11×13 with 80 channels, attention for 2 maps of 2×3 windows.
    """
    attention, ffn, norm = _load_kernels()
    waves = partial(_waves, device)
    norms = [partial(_norm, function) for function in (norm.layer_norm, F.layer_norm)]
    tensors = {'map': waves(2, 11, 13, 80).to(dtype), 'weight': waves(80), 'bias': waves(80)}
    errors = _errors(' (norm)', *norms, tensors, needs_grad)
    if len(variant) == 1:
        (is_gated,) = variant
        z = waves(2, 11, 13, 160 if is_gated else 80).to(dtype)
        tensors = {'map': z, 'weight': waves(80, 1, 3, 3), 'bias': waves(80)}
        errors |= _errors('', ffn.activate, plain_ffn.activate, tensors, needs_grad)
    elif variant:
        kind, window, head, is_masked = variant
        heads, tokens = 2, window**2
        qkv = waves(2, 2 * window, 3 * window, 3 * heads * head).to(dtype)
        tensors = {'qkv': qkv, 'bias': waves(heads, tokens, tokens), 'gate': waves(2) if kind == 'assa' else None}
        mask = (waves(6, tokens, tokens) > 0).float() * -100.0 if is_masked else None
        for shift in sorted({0, window // 2}):
            settings = {'mask': mask, 'op': Attention(*[None] * 8, heads, window, shift, kind)}
            functions = (partial(module.attend, **settings) for module in (attention, plain_attention))
            errors |= _errors(f' (shift {shift})', *functions, tensors, needs_grad)
    return errors


def _norm(function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return function(x, weight.shape, weight, bias, 1e-5)


def _errors(
    where: str,
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    tensors: dict[str, Tensor | None],
    needs_grad: bool,
) -> dict[str, float]:
    """Relative errors of a function's output, and of its gradients if needed, against a reference in float64."""
    results = []
    for compute, dtype in ((function, None), (reference, torch.float64)):
        leaves = [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in tensors.values()]
        out = compute(*leaves)
        results.append([out.detach()])
        if needs_grad:
            grad = _waves(out.device, *out.shape).to(next(iter(tensors.values())).dtype).to(out.dtype)
            results[-1] += torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], grad)
    names = 'the output', *(f'the gradient of the {name}' for name, tensor in tensors.items() if tensor is not None)
    return {
        name + where: float((got.double() - want).norm() / want.norm())
        for name, got, want in zip(names, *results, strict=needs_grad)
    }


def _waves(device: torch.device, *shape: int) -> Tensor:
    """Return pseudo-random numbers in (-1.7, 1.7) that depend only on the shape, without a random generator."""
    steps = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64) * (12.9898 + sum(shape))
    return (1.7 * (steps.sin() * 43758.5453).frac()).float().reshape(shape).to(device)
