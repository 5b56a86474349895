"""The losses that a run adds up: built from every option of `train` that ends in `_opt`, and named as in the log."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from basicsr.losses import build_loss
from torch import Tensor, nn

from ast_plugin.errors import OptionError


def build(train: Mapping[str, Any], device: torch.device) -> dict[str, nn.Module]:
    """Build the losses, by their names in the log: `pixel_opt` is `l_pix`, any other `NAME_opt` is `l_NAME`.

    Raises:
        OptionError: if there is none.
    """
    losses = {
        f'l_{key.removesuffix("_opt").replace("pixel", "pix")}': build_loss(options).to(device)
        for key, options in train.items()
        if key.endswith('_opt') and options
    }
    if not losses:
        raise OptionError('train names no loss: set pixel_opt, for instance to {type: ASTCharbonnierLoss}')
    return losses


def check_reductions(train: Mapping[str, Any], losses: Mapping[str, nn.Module]) -> None:
    """Refuse losses that do not add up over micro-batches.

    Raises:
        OptionError: if one is a sum over the batch, and not a mean.
    """
    sums = [name for name, criterion in losses.items() if getattr(criterion, 'reduction', 'mean') != 'mean']
    if sums and (train.get('accumulate') or 1) > 1:
        raise OptionError(f'train.accumulate needs losses with reduction: mean, which {", ".join(sums)} is not')


def compute(losses: Mapping[str, nn.Module], output: Tensor, target: Tensor) -> OrderedDict[str, Tensor]:
    """Return the value of every loss. BasicSR's perceptual loss comes in two parts, either may be None."""
    values = OrderedDict()
    for name, criterion in losses.items():
        value = criterion(output, target)
        if isinstance(value, tuple):
            content, style = value
            values.update({k: v for k, v in ((name, content), ('l_style', style)) if v is not None})
        else:
            values[name] = value
    return values
