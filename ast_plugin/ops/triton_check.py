"""A comparison of Triton's kernels with plain operators, before they are trusted on a device.

Once in a process for each device, dtype and variant of a kernel, on a map of a few windows, forward, and backward
before the first call that needs it. What it costs is the compilation, which the call needs in any case, and that of the
variant without or with a shift; Triton keeps what it compiled on the disk. Nothing is drawn from the global random
generators.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ast_plugin.ops import triton_assa, triton_frfn

if TYPE_CHECKING:
    from ast_plugin.ops.backend import Call

NEAR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # of ‖got − want‖ / ‖want‖
_found: dict[tuple, str | None] = {}


def fault(call: Call) -> str | None:
    """What is wrong with the kernels of a call on its device, or None; the same answer for the rest of the process."""
    if call.function == 'window_attention':
        heads = call.details.get('num_heads', 1)
        variant = (
            call.details.get('kind', 'assa'),
            call.details.get('window', 8),
            max(1, call.shape[-1] // heads),
            bool(call.details.get('masked')),
        )
    else:
        variant = ()
    key = (call.function, call.device, call.dtype, call.needs_grad, variant)
    if key not in _found:
        if call.device.type == 'cuda' and torch.cuda.is_current_stream_capturing():
            return 'its kernels were not run before a CUDA graph is captured: call the network once first'
        # A thread has none of the caller's modes: no autocast, inference mode, hooks or counters.
        with ThreadPoolExecutor(1) as thread:
            _found[key] = thread.submit(_fault, *key).result()
    return _found[key]


def _fault(function: str, device: torch.device, dtype: torch.dtype, needs_grad: bool, variant: tuple) -> str | None:
    try:
        if variant:
            errors = attention_errors(device, dtype, needs_grad, *variant)
        else:
            errors = activation_errors(device, dtype, needs_grad, function)
    # Whatever the compiler, the driver or the device says: the reference computes instead, and the reason is told.
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), '')
        return f'its kernels fail on {device} ({type(error).__name__}: {first[:200]})'
    wrong = {name: error for name, error in errors.items() if not error < NEAR[dtype]}
    if wrong:
        found = ', '.join(f'{name} is off by {error:.0e}' for name, error in wrong.items())
        return f'its kernels do not compute on {device} what the reference does: {found}'
    return None


def attention_errors(
    device: torch.device, dtype: torch.dtype, needs_grad: bool, kind: str, window: int, head: int, masked: bool
) -> dict[str, float]:
    """Relative errors of attention's output and gradients, without and with a shift, over 2×3 windows of 2 images."""
    heads, H, W = 2, 2 * window, 3 * window
    draw = _Waves(device)
    qkv = draw(2, H, W, 3 * heads * head).to(dtype)
    bias, gate = draw(heads, window**2, window**2), draw(2) if kind == 'assa' else None
    mask = (draw(6, window**2, window**2) > 0).float() * -100.0 if masked else None
    grad = draw(2, H, W, heads * head).to(dtype) if needs_grad else None
    errors = {}
    for shift in (0, window // 2) if window > 1 else (0,):
        settings = triton_assa.Settings(heads, window, shift, kind)
        functions = [
            lambda *tensors, settings=settings, attend=attend: attend(settings, *tensors, mask)
            for attend in (triton_assa.attend, triton_assa.plain_attend)
        ]
        named = zip(
            ('the output', "q's, k's and v's gradient", "the bias's gradient", "the gate's gradient"),
            _errors(functions, (qkv, bias, gate), grad),
            strict=False,
        )
        errors |= {f'{name} (shift {shift})': error for name, error in named}
    return errors


def activation_errors(device: torch.device, dtype: torch.dtype, needs_grad: bool, function: str) -> dict[str, float]:
    """Relative errors of the activations' output and gradients, of 2 images of 11×13 with 80 channels."""
    draw, channels = _Waves(device), 80
    z = draw(2, 11, 13, channels if function == 'leff' else 2 * channels).to(dtype)
    tensors = (z, draw(channels, 1, 3, 3), draw(channels))
    grad = draw(2, 11, 13, channels).to(dtype) if needs_grad else None
    names = ('the output', "the map's gradient", "the weight's gradient", "the bias's gradient")
    return dict(zip(names, _errors((triton_frfn.activate, triton_frfn.plain_activate), tensors, grad), strict=False))


def _errors(functions: Sequence, tensors: tuple[Tensor | None, ...], grad: Tensor | None) -> list[float]:
    """Relative errors of a function's output, and of gradients where asked, against another in float64."""
    results = []
    for function, exact in zip(functions, (False, True), strict=True):
        leaves = [
            None if t is None else (t.double() if exact else t).detach().clone().requires_grad_() for t in tensors
        ]
        out = function(*leaves)
        results.append([out.detach()])
        if grad is not None:
            given = [leaf for leaf in leaves if leaf is not None]
            results[-1] += torch.autograd.grad(out, given, grad.to(out.dtype))
    return [float((got.double() - want).norm() / want.norm()) for got, want in zip(*results, strict=True)]


class _Waves:
    """Numbers like normally distributed ones, the same each time, and from no generator."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.count = device, 0

    def __call__(self, *shape: int) -> Tensor:
        self.count += 1
        size = torch.Size(shape).numel()
        steps = torch.arange(1, size + 1, dtype=torch.float64) * (12.9898 + self.count)
        x = (steps.sin() * 43758.5453).frac()  # in (-1, 1), without visible order
        return (1.7 * x).float().reshape(shape).to(self.device)
