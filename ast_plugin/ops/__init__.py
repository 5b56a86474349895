"""AST's mathematics as functions of tensors: images NHWC, no parameters held.

`frfn`, `leff`, `mlp` and `window_attention` are computed by the fastest backend that can; see `backend`.
"""

from ast_plugin.ops.assa import ATTENTION_KINDS, attention_weights
from ast_plugin.ops.backend import BACKENDS, explain, use_backend
from ast_plugin.ops.frozen_weights import frozen_weights
from ast_plugin.ops.functions import frfn, leff, mlp, window_attention
from ast_plugin.ops.residual import Residual
from ast_plugin.ops.windows import (
    merge_windows,
    pad_to_multiple,
    pair_mask,
    partition_windows,
    relative_position_index,
    shift_mask,
)

__all__ = [
    'ATTENTION_KINDS',
    'BACKENDS',
    'Residual',
    'attention_weights',
    'explain',
    'frfn',
    'frozen_weights',
    'leff',
    'merge_windows',
    'mlp',
    'pad_to_multiple',
    'pair_mask',
    'partition_windows',
    'relative_position_index',
    'shift_mask',
    'use_backend',
    'window_attention',
]
