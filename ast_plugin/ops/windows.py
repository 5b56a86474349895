"""Window partitioning, masks and indices for window attention, and padding."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache, wraps

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ast_plugin.errors import ShapeError

MASKED = -100.0  # added to the scores of masked pairs; the official implementation's value, kept for parity


def check_size(H: int, W: int, window: int) -> None:
    """Raise ShapeError unless H and W are positive multiples of the window size."""
    if not H or not W or H % window or W % window:
        raise ShapeError(f'a {H}x{W} feature map is not divisible into windows of {window}x{window}: pad it first')


def check_shapes(expected: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Raise ShapeError, with the name, for a tensor that is None or does not have its expected shape."""
    for name, (tensor, shape) in expected.items():
        found = None if tensor is None else list(tensor.shape)
        if found != list(shape):
            raise ShapeError(f'{name}: expected shape {list(shape)}, got {found}')


def _cache_sizes(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Cache a function of sizes, except under compilation, tracing, torch.func and CUDA graph capture.

    Tensors created there belong to the compiler, trace, transform or graph and must not be reused elsewhere.
    """
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
    """Partition a feature map into non-overlapping windows.

    Args:
        x: [B, H, W, C].
        window: side length of a window.
    Returns:
        [B * num_windows, window**2, C], windows and their tokens in row-major order.
    Raises:
        ShapeError: if H or W is not a multiple of `window`.
    """
    check_size(*x.shape[1:3], window)
    return rearrange(x, 'b (h y) (w x) c -> (b h w) (y x) c', y=window, x=window)


def merge_windows(windows: Tensor, window: int, size: tuple[int, int]) -> Tensor:
    """Merge windows into a feature map of size (H, W); the inverse of `partition_windows`."""
    counts = {'h': size[0] // window, 'w': size[1] // window, 'y': window}
    return rearrange(windows, '(b h w) (y x) c -> b (h y) (w x) c', **counts)


@_cache_sizes
def relative_position_index(window: int, device: torch.device | str = 'cpu') -> Tensor:
    """Index into the relative position bias table for every pair of tokens in a window.

    Returns:
        int64, [window**2, window**2]. The tensor is cached and shared between calls; do not modify it.
    Source: Swin Transformer (Liu et al., ICCV 2021), section 3.2.
    """
    with torch.inference_mode(False):
        position = torch.arange(window, device=device)
        offset = position[:, None] - position[None, :] + window - 1
        index = offset[:, None, :, None] * (2 * window - 1) + offset[None, :, None, :]
        return rearrange(index, 'i j k l -> (i j) (k l)')


def shift_mask(size: tuple[int, int], window: int, shift: int, device: torch.device) -> Tensor:
    """Attention mask for cyclically shifted windows.

    Args:
        size: (H, W) of the feature map, multiples of `window`.
        window: side length of a window.
        shift: cyclic shift up and left, 0 < shift < window.
        device: device of the mask.
    Returns:
        float32, [num_windows, window**2, window**2]: `MASKED` where two tokens come from different regions, else 0.
    Source: Swin Transformer (Liu et al., ICCV 2021), section 3.2.
    """
    below, beside = ((torch.arange(count, device=device) == count - 1).long() for count in (s // window for s in size))
    return edge_masks(window, shift, device).index_select(0, (2 * below[:, None] + beside).flatten())


@_cache_sizes
def edge_masks(window: int, shift: int, device: torch.device) -> Tensor:
    """Masks of `shift_mask` for windows inside the map, in its last column, in its last row, and in its corner.

    Returns:
        float32, [4, window**2, window**2]. The tensor is cached and shared between calls; do not modify it.
    """
    with torch.inference_mode(False):
        # 0: windows before the last one; in the last window, 1: its original rows, 2: rows wrapped around by the shift
        position = torch.arange(2 * window, device=device)
        stripe = (position >= window).long() + (position >= 2 * window - shift).long()
        region = 3 * stripe[:, None] + stripe[None, :]
        tokens = partition_windows(region[None, :, :, None], window)[..., 0]
        return MASKED * (tokens[:, :, None] != tokens[:, None, :]).float()


def pair_mask(mask: Tensor, size: tuple[int, int], window: int) -> Tensor:
    """Convert the network's optional input mask into an attention mask for one level.

    Args:
        mask: [B or 1, 1, H, W] at the size of the image; resized to the level by nearest neighbour.
        size: (H, W) of the level's feature map.
        window: side length of a window.
    Returns:
        [(B or 1) * num_windows, window**2, window**2]: `MASKED` where the mask is nonzero for both tokens, else 0.
        As in the official implementation, marked tokens do not attend to one another, but do attend to all other
        tokens and are attended to by them.
    """
    level = F.interpolate(mask.float(), size=size).permute(0, 2, 3, 1)
    marked = partition_windows(level, window)[..., 0] != 0
    return MASKED * (marked[:, :, None] & marked[:, None, :]).float()


def padding_mask(size: tuple[int, int], window: int, shift: int, device: torch.device) -> Tensor:
    """Attention mask that hides padding at the bottom and right of a feature map from its other tokens.

    Args:
        size: (H, W) of the feature map before it was padded to multiples of the window size.
        window, shift, device: see `shift_mask`; they refer to the padded feature map.
    Returns:
        float32, [num_windows, window**2, window**2]: -inf where a query inside the map meets a padding key, else 0.
        Padding queries attend to all keys, so that no row is fully masked and softmax and its gradient stay finite;
        their results are cropped.
    """
    H, W = size
    rows = torch.arange(H + -H % window, device=device).roll(-shift, 0) >= H
    columns = torch.arange(W + -W % window, device=device).roll(-shift, 0) >= W
    padding = partition_windows((rows[:, None] | columns[None, :])[None, :, :, None], window)[..., 0]
    hidden = padding[:, None, :] & ~padding[:, :, None]
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float('-inf'))


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad an image [B, C, H, W] with `pad_image` so that H and W are multiples of a number."""
    H, W = x.shape[-2:]
    return pad_image(x, -H % multiple, -W % multiple)


def pad_image(x: Tensor, bottom: int, right: int) -> Tensor:
    """Pad an image at the bottom and right by reflection, repeated if the padding exceeds the image.

    Args:
        x: [B, C, H, W], with H and W at least 1.
        bottom, right: number of pixels to add, 0 or more.
    Returns:
        [B, C, H + bottom, W + right]; `x` itself if nothing is added. A side of one pixel is replicated.
    """
    H, W = x.shape[-2:]
    if not torch.jit.is_tracing():  # a trace must compute the padding from the size, to support other sizes
        if not bottom and not right:
            return x
        if bottom < H and right < W:
            return F.pad(x, (0, right, 0, bottom), mode='reflect')
    rows = _reflect_positions(H, H + bottom, x.device)
    columns = _reflect_positions(W, W + right, x.device)
    return x.index_select(-2, rows).index_select(-1, columns)


def _reflect_positions(size: int, target: int, device: torch.device) -> Tensor:
    period = 2 * size - 2
    period = period.clamp(min=1) if isinstance(period, Tensor) else max(period, 1)  # a tensor during tracing
    position = torch.arange(target, device=device) % period
    return torch.minimum(position, period - position)


def keep_shape_in_trace(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Insert a shape check into a torch.jit trace; outside of tracing, return x unchanged.

    Code that records sizes as constants during tracing needs this, for example networks that build masks for the size
    of their input: with another size, the trace would silently return wrong results.

    Args:
        x: any tensor.
        shape: required shape; -1 accepts any size.
    """
    if not torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():  # ONNX declares its input shapes itself
        return x
    return _script(_check_shape)(x, [int(side) for side in shape])


_script = cache(torch.jit.script)


def _check_shape(x: Tensor, shape: list[int]) -> Tensor:
    same = x.dim() == len(shape)
    for side, wanted in zip(x.shape, shape):  # noqa: B905 - TorchScript does not support `strict`
        same = same and (wanted == -1 or side == wanted)
    if not same:
        raise RuntimeError(f'this network was traced for {shape} only, got {x.shape}: trace it for that shape, too')
    return x
