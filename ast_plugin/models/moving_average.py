"""The moving average of a network's weights."""

from itertools import chain

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


@torch.no_grad()
def update(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move an average towards a network: average = decay · average + (1 − decay) · network.

    Parameters and buffers of numbers (BatchNorm's means and variances) are averaged, counters and indices copied.

    Args:
        average: a copy of `network`, changed in place.
        network: without the wrappers of parallel training.
        decay: in [0, 1]; 0 copies.
    """
    pairs = list(
        zip(
            chain(average.parameters(), average.buffers()),
            chain(network.parameters(), network.buffers()),
            strict=True,
        )
    )
    numbers = [(old, new) for old, new in pairs if old.is_floating_point()]
    if numbers:
        old, new = zip(*numbers, strict=True)
        # By old + (1 − decay)(new − old): what does not change, such as a mask among the buffers, stays to the bit.
        get_ema_multi_avg_fn(decay)(list(old), list(new), None)
    for old, new in pairs:
        if not old.is_floating_point():
            old.copy_(new)
