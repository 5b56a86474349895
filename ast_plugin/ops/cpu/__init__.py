"""AST's functions on CPUs: branches stay in the caches from the norm to the sum, in strips of rows or of windows."""

import torch

from ast_plugin.ops.backend import Call
from ast_plugin.ops.cpu.attention import window_attention
from ast_plugin.ops.cpu.ffn import feed_forward

__all__ = ['feed_forward', 'why_not', 'window_attention']

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def why_not(call: Call) -> str | None:
    """Why this backend cannot run a call, or None."""
    if call.device.type != 'cpu':
        return f'it computes on CPUs, the map is on {call.device.type}'
    return call.why_not(DTYPES)
