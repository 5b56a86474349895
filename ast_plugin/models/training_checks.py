"""What the switches of `train` would stumble over, found before a run has begun."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ast_plugin.models import batch_mixing, network_switches, training_losses, training_step
from ast_plugin.models.precision import Precision
from ast_plugin.models.training_step import TrainingStep


def check(opt: Mapping[str, Any], network: nn.Module, losses: Mapping[str, nn.Module]) -> None:
    """Try the switches out on a network that is not trained afterwards; it needs no memory behind its weights.

    Args:
        opt: options prepared for BasicSR.
        network: changed in place.
        losses: by their keys in `train`.
    Raises:
        OptionError: naming the first switch that does not apply to network, losses, batch or device.
    """
    train = opt['train']
    training_losses.check_reductions(train, losses)
    network_switches.apply(network, train)
    batch_mixing.from_options(train, seed=0, rank=0)
    # A GPU is left alone: each process takes its own later, and would take memory of the first one now.
    precision = Precision((train.get('precision') or 'fp32') if opt['num_gpu'] == 0 else 'fp32', torch.device('cpu'))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    TrainingStep(network, optimizer, precision, train, batch=training_step.batch_size(opt))
