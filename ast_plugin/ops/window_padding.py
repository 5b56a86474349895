"""The mask of windows over a map that was filled up to a multiple of the window."""

import torch
from torch import Tensor

from ast_plugin.ops.windows import partition_windows


def padding_mask(size: tuple[int, int], window: int, shift: int, device: torch.device) -> Tensor:
    """Mask that hides from the tokens of a map those it was filled up with at the bottom and the right.

    Args:
        size: (H, W) of the map as it was.
        window: side of a window, up to a multiple of which both sides were filled.
        shift: how far the filled map is rolled up and left before it is cut.
        device: where the mask shall lie.
    Returns:
        float32, [num_windows, window**2, window**2]: minus infinity where a token of the map meets one of the filling,
        else 0. Tokens of the filling see everything: no row is empty, so that softmax and its gradient stay finite,
        and their results are cropped.
    """
    H, W = size
    rows = torch.arange(H + -H % window, device=device).roll(-shift) >= H
    columns = torch.arange(W + -W % window, device=device).roll(-shift) >= W
    filled = rows[:, None] | columns[None, :]
    tokens = partition_windows(filled[None, :, :, None], window)[..., 0]
    hidden = tokens[:, None, :] & ~tokens[:, :, None]
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float('-inf'))
