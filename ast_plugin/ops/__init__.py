"""Functional operators of AST on NHWC feature maps, without parameters or state.

`window_attention` and `feed_forward` run on the fastest backend that supports the call; see `dispatch`.
"""

from ast_plugin.ops.attention import ATTENTION_KINDS, Attention, attention_weights
from ast_plugin.ops.backend import Residual, frozen_weights, with_residual
from ast_plugin.ops.dispatch import BACKENDS, explain, feed_forward, requested_backend, use_backend, window_attention
from ast_plugin.ops.ffn import FeedForward
from ast_plugin.ops.windows import (
    merge_windows,
    pad_to_multiple,
    padding_mask,
    pair_mask,
    partition_windows,
    relative_position_index,
    shift_mask,
)

__all__ = [
    'ATTENTION_KINDS',
    'BACKENDS',
    'Attention',
    'FeedForward',
    'Residual',
    'attention_weights',
    'explain',
    'feed_forward',
    'frozen_weights',
    'merge_windows',
    'pad_to_multiple',
    'padding_mask',
    'pair_mask',
    'partition_windows',
    'relative_position_index',
    'requested_backend',
    'shift_mask',
    'use_backend',
    'window_attention',
    'with_residual',
]
