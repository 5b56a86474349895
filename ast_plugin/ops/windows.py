"""Cutting maps into windows, the masks and indices that window attention needs, and padding."""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache, wraps

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ast_plugin.errors import ShapeError

MASKED = -100.0  # added to the score of a pair that must not attend; the official network's value, kept for parity


def check_size(H: int, W: int, window: int) -> None:
    """Raise ShapeError unless a map divides into windows."""
    if not H or not W or H % window or W % window:
        raise ShapeError(f'a {H}x{W} map does not divide into windows of {window}x{window}: pad it first')


def _cache_sizes(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Cache a function of sizes, but where compilers, traces, transforms or captures watch: those own its tensors."""
    cached = lru_cache(maxsize=32)(function)

    @wraps(function)
    def call(*args: object) -> Tensor:
        is_watched = (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch._C._functorch.peek_interpreter_stack() is not None
            or type(torch.empty(0, device='cpu')) is not Tensor  # fake tensors
            or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
        )
        return (function if is_watched else cached)(*args)

    return call


def partition_windows(x: Tensor, window: int) -> Tensor:
    """Cut a map [B, H, W, C] into windows [B * num_windows, window**2, C]; windows row by row, tokens row by row.

    Raises:
        ShapeError: if H or W is not a multiple of `window`, the side of a window.
    """
    check_size(*x.shape[1:3], window)
    return rearrange(x, 'b (h y) (w x) c -> (b h w) (y x) c', y=window, x=window)


def merge_windows(windows: Tensor, window: int, size: tuple[int, int]) -> Tensor:
    """Put windows back into a map of size (H, W): the inverse of `partition_windows`."""
    counts = {'h': size[0] // window, 'w': size[1] // window, 'y': window}
    return rearrange(windows, '(b h w) (y x) c -> b (h y) (w x) c', **counts)


@_cache_sizes
def relative_position_index(window: int, device: torch.device | str = 'cpu') -> Tensor:
    """Row of the position bias table for every pair of tokens of a window, int64, [window**2, window**2].

    Shared between calls, do not write to it.
    Source: Swin Transformer (Liu et al., ICCV 2021), section 3.2.
    """
    with torch.inference_mode(False):
        position = torch.arange(window, device=device)
        offset = position[:, None] - position[None, :] + window - 1
        index = offset[:, None, :, None] * (2 * window - 1) + offset[None, :, None, :]
        return rearrange(index, 'i j k l -> (i j) (k l)')


@_cache_sizes
def shift_mask(size: tuple[int, int], window: int, shift: int, device: torch.device) -> Tensor:
    """Mask that keeps apart what a cyclic shift brought together.

    Args:
        size: (H, W) of the map, multiples of `window`.
        window: side of a window.
        shift: how far the map was rolled up and left, 0 < shift < window.
        device: where the mask shall lie.
    Returns:
        float32, [num_windows, window**2, window**2]: 0, or `MASKED` where two tokens come from different regions.
        Shared between calls, do not write to it.
    Source: Swin Transformer (Liu et al., ICCV 2021), section 3.2.
    """

    def stripe(length: int) -> Tensor:
        # 0 for the untouched part, 1 for the last window's own rows, 2 for those rolled in from the other side
        position = torch.arange(length, device=device)
        return (position >= length - window).long() + (position >= length - shift).long()

    H, W = size
    with torch.inference_mode(False):
        region = 3 * stripe(H)[:, None] + stripe(W)[None, :]
        tokens = partition_windows(region[None, :, :, None], window)[..., 0]
        return MASKED * (tokens[:, :, None] != tokens[:, None, :]).float()


def pair_mask(mask: Tensor, size: tuple[int, int], window: int) -> Tensor:
    """The network's optional input mask as an addition to the scores of one level.

    Args:
        mask: [B or 1, 1, H, W] of the whole image, resized to the level by nearest neighbour.
        size: (H, W) of the level's map.
        window: side of a window.
    Returns:
        [(B or 1) * num_windows, window**2, window**2]: `MASKED` where both tokens of a pair have a mask other than 0.
        The official sense: the marked tokens do not see one another, yet see and are seen by all others.
    """
    level = F.interpolate(mask.float(), size=size).permute(0, 2, 3, 1)
    marked = partition_windows(level, window)[..., 0] != 0
    return MASKED * (marked[:, :, None] & marked[:, None, :]).float()


def padding_mask(size: tuple[int, int], window: int, shift: int, device: torch.device) -> Tensor:
    """Mask that hides from the tokens of a map those it was padded with at the bottom and the right.

    Args:
        size: (H, W) of the map before it was padded to multiples of the window.
        window, shift, device: see `shift_mask`, of the padded map.
    Returns:
        float32, [num_windows, window**2, window**2]: minus infinity where a token of the map meets one of the padding,
        else 0. Tokens of the padding see everything: no row is empty, so that softmax and its gradient stay finite,
        and their results are cropped.
    """
    H, W = size
    rows = torch.arange(H + -H % window, device=device).roll(-shift, 0) >= H
    columns = torch.arange(W + -W % window, device=device).roll(-shift, 0) >= W
    padding = partition_windows((rows[:, None] | columns[None, :])[None, :, :, None], window)[..., 0]
    hidden = padding[:, None, :] & ~padding[:, :, None]
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float('-inf'))


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad an image [B, C, H, W] by `pad_image` until both sides are multiples of a number."""
    H, W = x.shape[-2:]
    return pad_image(x, -H % multiple, -W % multiple)


def pad_image(x: Tensor, bottom: int, right: int) -> Tensor:
    """Pad an image at the bottom and the right by reflection, over and over if it is small.

    Args:
        x: [B, C, H, W], H and W at least 1.
        bottom, right: pixels to add, 0 or more.
    Returns:
        [B, C, H + bottom, W + right]; `x` itself where nothing is added. A side of one pixel is repeated.
    """
    H, W = x.shape[-2:]
    if not torch.jit.is_tracing():  # a trace is to pad images of other sizes, too, by what it computes from them
        if not bottom and not right:
            return x
        if bottom < H and right < W:
            return F.pad(x, (0, right, 0, bottom), mode='reflect')
    rows = _reflect_positions(H, H + bottom, x.device)
    columns = _reflect_positions(W, W + right, x.device)
    return x.index_select(-2, rows).index_select(-1, columns)


def _reflect_positions(size: int, target: int, device: torch.device) -> Tensor:
    period = 2 * size - 2
    period = period.clamp(min=1) if isinstance(period, Tensor) else max(period, 1)  # a tensor while it is traced
    position = torch.arange(target, device=device) % period
    return torch.minimum(position, period - position)


def keep_shape_in_trace(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Let a trace of torch.jit raise for other shapes than that which it was made with; else return x as it is.

    Needed by whatever fixes numbers of the shape while it is traced, as networks do that make masks of their input's
    size: at another size such a trace would compute something else, and not say so.

    Args:
        x: any tensor.
        shape: what it has to have; -1 where any number will do.
    """
    if not torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():  # ONNX states the shapes of its inputs
        return x
    return _script(_check_shape)(x, [int(side) for side in shape])


_script = cache(torch.jit.script)


def _check_shape(x: Tensor, shape: list[int]) -> Tensor:
    same = x.dim() == len(shape)
    for side, wanted in zip(x.shape, shape):  # noqa: B905 - TorchScript knows no `strict`
        same = same and (wanted == -1 or side == wanted)
    if not same:
        raise RuntimeError(f'this network was traced for {shape} alone, and got {x.shape}: trace it for that, too')
    return x
