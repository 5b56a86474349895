"""What Triton's kernels need of a call: whether they can run it at all, the tensor's device, maps without gaps.

Triton itself is imported when the first kernel starts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ast_plugin.ops.backend import Call

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ('assa', 'dense', 'sparse', 'sparse_relu')
LARGEST_HEAD, LARGEST_WINDOW = 64, 16
_CAPABILITY = (8, 0)  # below it, products of half types are computed without tensor cores, and bfloat16 not at all


def why_not(call: Call) -> str | None:
    """Why Triton's kernels cannot run a call, or None.

    On a CUDA device the first call of a kind is preceded by a comparison with plain operators; see `triton_check`.
    """
    reason = _device_reason(call.device) or call.special or _shape_reason(call)
    if reason is not None or call.function == 'mlp' or call.device.type != 'cuda':
        return reason
    from ast_plugin.ops import triton_check

    return triton_check.fault(call)


@lru_cache(maxsize=1)
def is_installed() -> bool:
    """Whether there is a package of that name; whether it works, the first kernel shows."""
    return importlib.util.find_spec('triton') is not None


def is_interpreted() -> bool:
    """Whether kernels run on the CPU, statement by statement, to be tested."""
    return os.environ.get('TRITON_INTERPRET') == '1'


def _device_reason(device: torch.device) -> str | None:
    if device.type != 'cuda' and not (device.type == 'cpu' and is_interpreted()):
        return f'it computes on CUDA devices, the map is on {device.type}'
    if not is_installed():
        return 'the package triton is not installed: pip install "ast_plugin[triton]"'
    if device.type == 'cuda':
        if torch.version.hip is not None:
            return 'it was written for devices of NVIDIA'
        found = torch.cuda.get_device_capability(device)
        if found < _CAPABILITY:
            expected = '.'.join(map(str, _CAPABILITY))
            return f'it needs a device of compute capability {expected}, this one has {found[0]}.{found[1]}'
    return None


def _shape_reason(call: Call) -> str | None:
    if call.dtype not in DTYPES:
        return f'it computes in {", ".join(map(_name, DTYPES))}, not in {_name(call.dtype)}'
    # Autocast casts what is given in float32.
    autocast = torch.is_autocast_enabled(call.device.type)
    if not call.dtypes <= ({call.dtype, torch.float32} if autocast else {call.dtype}):
        return f'it computes in {_name(call.dtype)}, and tensors are {", ".join(sorted(map(_name, call.dtypes)))}'
    if len(call.shape) != 4:
        return f'a map is [B, H, W, C], not {list(call.shape)}'
    if 0 in call.shape[1:]:
        return f'there is nothing to compute in {list(call.shape)}'
    details = call.details
    if details.get('kind', KINDS[0]) not in KINDS:
        return f'it has attention of the kinds {", ".join(KINDS)}, not {details["kind"]}'
    if details.get('window', 1) > LARGEST_WINDOW:
        return f'windows have sides up to {LARGEST_WINDOW}, not {details["window"]}'
    head = call.shape[-1] // details.get('num_heads', call.shape[-1] or 1)
    return f'heads have up to {LARGEST_HEAD} channels, not {head}' if head > LARGEST_HEAD else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's device the current one, where kernels start; nothing on a CPU."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def packed(x: Tensor) -> Tensor:
    """A map [B, H, W, C] whose channels lie side by side: itself, or a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def next_power_of_2(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()
