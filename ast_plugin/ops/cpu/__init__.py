"""CPU backend: fused residual branches, processed in strips of rows or windows that fit in the caches."""

import torch

from ast_plugin.ops.backend import Call
from ast_plugin.ops.cpu.attention import window_attention
from ast_plugin.ops.cpu.ffn import feed_forward

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def why_not(call: Call) -> str | None:
    """Return why this backend cannot run a call, or None if it can."""
    if call.device.type != 'cpu':
        return f'it runs on CPUs, the input is on {call.device.type}'
    return call.why_not(DTYPES)
