"""How many multiplications a network takes, as mmengine's analysis counts them."""

import logging
import warnings

import torch
from torch import Tensor, nn

from ast_plugin.ops import use_backend

# Counted with the operator that they belong to, or nothing but views and copies: no multiplications are missing for
# want of them.
_FREE_OPERATORS = ('aten::pad', 'aten::rsub', 'aten::unflatten', 'aten::alias', 'aten::unbind', 'aten::movedim')
_SMALL = ((128, 128), (128, 256))


def count_macs(network: nn.Module, image: Tensor) -> tuple[int, dict[str, int]]:
    """Count the multiplications (with their additions) of one pass in evaluation mode, by a trace.

    Args:
        network: on the device of `image`; left as it was.
        image: [1, C, H, W].
    Returns:
        The count, and by name how often operators were called that the analysis does not count.
    """
    from mmengine.analysis import FlopAnalyzer

    logging.getLogger('mmengine').setLevel(logging.ERROR)
    training = network.training
    frozen = [parameter for parameter in network.parameters() if not parameter.requires_grad]
    try:
        # Faster forms of a network, of operators that the analysis has never heard of, are for inference.
        network.eval().requires_grad_(True)
        with warnings.catch_warnings(), use_backend('reference'):
            warnings.simplefilter('ignore')  # what torch.jit says of constants in a trace
            analyzer = FlopAnalyzer(network, (image,))
            analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings('none')
            total = int(analyzer.total())
            uncounted = dict(analyzer.unsupported_ops())
    finally:
        network.train(training)
        for parameter in frozen:
            parameter.requires_grad_(False)
    return total, {name: count for name, count in sorted(uncounted.items()) if name not in _FREE_OPERATORS}


def count_macs_of_size(
    network: nn.Module, channels: int, size: tuple[int, int], multiple: int = 1
) -> tuple[int, dict[str, int], bool]:
    """`count_macs` for a picture of a size (height, width); of a large one on a line through two smaller ones.

    The trace keeps all that it computes. Convolutions, layers of tokens and attention within windows take as much for
    every pixel, so that the line is right for them; attention among all tokens takes more than it says.

    Args:
        multiple: what the network pads sides to.
    Returns:
        The count, the operators left out, and whether it is from the line.
    """

    def count(size: tuple[int, int]) -> tuple[int, dict[str, int]]:
        return count_macs(network, torch.zeros(1, channels, *size))

    asked, *small = (padded_pixels(each, multiple) for each in (size, *_SMALL))
    if asked <= small[1]:
        return (*count(size), False)
    (first, _), (second, uncounted) = map(count, _SMALL)
    return round(on_line(asked, *zip(small, (first, second), strict=True))), uncounted, True


def padded_pixels(size: tuple[int, int], multiple: int) -> int:
    """How many pixels a picture of a size has once its sides are padded to a multiple."""
    height, width = (-(-side // multiple) * multiple for side in size)
    return height * width


def on_line(x: float, first: tuple[float, float], second: tuple[float, float]) -> float:
    """The value at x of the line through two points."""
    return first[1] + (second[1] - first[1]) / (second[0] - first[0]) * (x - first[0])
