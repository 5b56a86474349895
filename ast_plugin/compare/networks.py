"""Networks that are compared: built, loaded, and brought to take pictures of any size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ast_plugin.archs.networks import build_network, infer_network, stated_channels
from ast_plugin.checkpoints import load_into, read_checkpoint
from ast_plugin.errors import BackendUnavailable, CheckpointError, OptionError

_MULTIPLES = (1, 2, 4, 8, 16, 32, 64)


class AnySize(nn.Module):
    """A network that takes sizes of some multiple only, on pictures of any size.

    Pictures are padded right and below by reflection, where that does not reach by repetition, and cropped back.

    Args:
        network: maps [B, C, H, W] to [B, D, s·H, s·W].
        multiple: of which H and W must be.
    """

    def __init__(self, network: nn.Module, multiple: int) -> None:
        super().__init__()
        self.network, self.multiple = network, multiple

    def forward(self, image: Tensor) -> Tensor:
        """Pad, run the network, crop."""
        height, width = image.shape[-2:]
        below, right = -height % self.multiple, -width % self.multiple
        if not (below or right):
            return self.network(image)
        mirrored = min(right, width - 1), min(below, height - 1)
        padded = functional.pad(image, (0, mirrored[0], 0, mirrored[1]), mode='reflect')
        padded = functional.pad(padded, (0, right - mirrored[0], 0, below - mirrored[1]), mode='replicate')
        output = self.network(padded)
        scale = output.shape[-1] // padded.shape[-1]
        return output[..., : height * scale, : width * scale]


def load_network(options: Mapping[str, Any], weights: str | None, param_key: str | None = None) -> nn.Module:
    """Build a registered network in evaluation mode, with weights where they are given.

    Raises:
        OptionError: if it cannot be built.
        CheckpointError: if the weights cannot be read, or are of another network.
    """
    network = build_network(options)
    if weights is not None:
        load_into(network, read_checkpoint(weights, param_key))
    return network.eval().requires_grad_(False)


def network_of(weights: str | Path, param_key: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """The options of the network that a weights file is of, from its metadata or from names and shapes.

    Returns:
        The options, and a line for each that had to be assumed.
    Raises:
        CheckpointError: if the file does not tell.
    """
    checkpoint = read_checkpoint(weights, param_key)
    if checkpoint.network is not None:
        return checkpoint.network, []
    try:
        return infer_network(checkpoint.state)
    except CheckpointError as error:
        raise CheckpointError(f'{weights} does not tell its network, name it by network_g: {error}') from error


def required_multiple(network: nn.Module, channels: int = 3) -> int:
    """Of what height and width must be for a network to give a result of its input's size, found by trying.

    Raises:
        OptionError: if it works on no size up to a few times 64, or a backend is asked for that there is not.
        BackendUnavailable: if one is asked for by name that cannot run here.
    """
    device = next((parameter.device for parameter in network.parameters()), torch.device('cpu'))
    last: Exception | None = None
    for multiple in _MULTIPLES:
        # Odd numbers of it, and neither equal nor multiples of one another.
        height, width = (count * multiple for count in _counts(multiple))
        with torch.inference_mode():
            try:
                output = network(torch.rand(1, channels, height, width, device=device))
            except (BackendUnavailable, OptionError):
                raise  # of no size's making
            except (RuntimeError, AssertionError, ValueError, IndexError) as error:
                last = error
                continue
        if output.shape[-2:] == (height, width):
            return multiple
        last = OptionError(f'{width}x{height} gave {output.shape[-1]}x{output.shape[-2]}: expected the same size')
    reason = ' '.join(str(last).split())[:200]
    raise OptionError(f'the network works on no size that is a multiple of {_MULTIPLES[-1]} or less: {reason}')


def _counts(multiple: int) -> tuple[int, int]:
    """Small pictures, but not so small that a window or a level of a U is larger than them."""
    if multiple >= 32:
        return 3, 1
    least = -(-33 // multiple) | 1
    return least, least + 2


def input_channels(options: Mapping[str, Any]) -> int:
    """How many channels a network's options say that it takes; 3 if they do not."""
    return next(iter(stated_channels(options)), 3)
