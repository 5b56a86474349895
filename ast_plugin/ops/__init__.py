"""AST's mathematics as functions of tensors: plain PyTorch, images NHWC, no parameters held."""

from ast_plugin.ops.assa import ATTENTION_KINDS, attention_weights, window_attention
from ast_plugin.ops.frfn import frfn, leff, mlp
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
    'attention_weights',
    'frfn',
    'leff',
    'merge_windows',
    'mlp',
    'pad_to_multiple',
    'pair_mask',
    'partition_windows',
    'relative_position_index',
    'shift_mask',
    'window_attention',
]
