"""Building blocks of AST as modules; their computation is in `ast_plugin.ops`.

Every block maps [B, H, W, C] to [B, H, W, C], or [B, C, H, W] to [B, C, H, W] with `layout='nchw'`, for any H and W.
The attributes `works_in` and `replaces` are explained in `archs.mixed.block_registry`.
"""

import math
import threading
from collections.abc import Callable, Collection
from contextlib import nullcontext
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.checkpoint import checkpoint

from ast_plugin import ops
from ast_plugin.errors import OptionError, ShapeError
from ast_plugin.ops import Residual

LAYOUTS = ('nhwc', 'nchw')
_WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)


class WindowAttention(nn.Module):
    """Self-attention within (shifted) windows, with a learned relative position bias.

    Feature maps that are not divisible into windows are zero-padded at the bottom and right, and the result is cropped.
    Padding tokens are masked, so that they do not affect the result.

    Args:
        dim: number of channels.
        num_heads: number of heads, a divisor of `dim`.
        window_size: side length of a window.
        shift_size: cyclic shift up and left before windows are partitioned, in [0, window_size).
        qkv_bias: whether queries, keys and values have a bias.
        topk_ratio: fraction of the keys kept by top-k attention.
        layout: layout of input and output, 'nhwc' or 'nchw'.
    Raises:
        OptionError: if an option is out of range or options contradict one another.
    Source: Zhou et al., CVPR 2024, section 3.2; separate q and joint kv layers as in the released code.
    """

    kind: str  # set by the subclasses, see ops.attention_weights
    works_in = 'nhwc'
    replaces = ('windows', 'tokens', 'maps')

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 8,
        shift_size: int = 0,
        qkv_bias: bool = True,
        topk_ratio: float = 0.5,
        layout: str = 'nhwc',
    ) -> None:
        super().__init__()
        check_choice('layout', layout, LAYOUTS)
        self.layout = layout
        _check_counts(dim=dim, num_heads=num_heads, window_size=window_size)
        if dim % num_heads:
            raise OptionError(f'{dim} channels are not divisible by {num_heads} heads')
        if not isinstance(shift_size, Integral) or not 0 <= shift_size < window_size:
            raise OptionError(f'shift_size must be in [0, {window_size}), the window size, not {shift_size!r}')
        if not isinstance(qkv_bias, bool):
            raise OptionError(f'qkv_bias must be true or false, not {qkv_bias!r}')
        if not isinstance(topk_ratio, Real) or not 0 < topk_ratio <= 1:
            raise OptionError(f'topk_ratio must be in (0, 1], not {topk_ratio!r}')
        self.dim, self.num_heads = dim, num_heads
        self.window_size, self.shift_size, self.topk_ratio = window_size, shift_size, topk_ratio
        self.position_bias = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.position_bias, std=0.02)
        self.gate = nn.Parameter(torch.ones(2)) if self.kind == 'assa' else None
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None, residual: Residual | None = None) -> Tensor:
        """Attend within windows.

        Args:
            x: [B, H, W, C] or [B, C, H, W], depending on `layout`.
            mask: [B or 1, 1, h, w] at the size of the image, see `ops.pair_mask`; or None.
            residual: LayerNorm before the attention and sum with x after it, for layout 'nhwc', see `ops.Residual`.
        Returns:
            Tensor with the shape of x.
        Raises:
            ShapeError: if x has other dimensions.
        """
        x = _to_nhwc(x, self.layout)
        _check_map(x, self.dim, type(self).__name__)
        H, W = size = tuple(x.shape[1:3])
        missing_h, missing_w = -H % self.window_size, -W % self.window_size
        if missing_h or missing_w:
            if residual is not None:  # padding follows the norm
                return ops.with_residual(lambda normed: self.forward(normed, mask), x, residual)
            x = nn.functional.pad(x, (0, 0, 0, missing_w, 0, missing_h))
        if mask is not None:
            mask = nn.functional.interpolate(mask.float(), size=size)
            mask = ops.pair_mask(nn.functional.pad(mask, (0, missing_w, 0, missing_h)), x.shape[1:3], self.window_size)
        if missing_h or missing_w:
            padding = ops.padding_mask(size, self.window_size, self.shift_size, x.device)
            mask = padding if mask is None else (mask.reshape(-1, *padding.shape) + padding).flatten(0, 1)
        return _from_nhwc(self._attend(x, mask, self.shift_size, residual)[:, :H, :W], self.layout)

    def attend_windows(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within windows that the caller has partitioned, shifted or not.

        Args:
            x: [num_windows * B, window_size**2, C].
            mask: [num_windows, window_size**2, window_size**2], added to the scores; or None.
        Returns:
            Tensor with the shape of x.
        Raises:
            ShapeError: if x has other dimensions.
        """
        side = self.window_size
        if x.ndim != 3 or x.shape[1:] != (side**2, self.dim):
            raise ShapeError(
                f'{type(self).__name__} expects windows [B, {side**2}, {self.dim}] of {side}x{side} tokens, '
                f'got {list(x.shape)}'
            )
        # Stack the windows vertically into feature maps, with as many windows per map as the mask has.
        count = 1 if mask is None else mask.shape[0]
        columns = x.reshape(-1, count * side, side, self.dim)
        return self._attend(columns, mask, 0).reshape(x.shape)

    def _attend(self, x: Tensor, mask: Tensor | None, shift: int, residual: Residual | None = None) -> Tensor:
        settings = self.num_heads, self.window_size, shift, self.kind, self.topk_ratio
        op = ops.Attention(*_weights(self.q, self.kv, self.proj), self.position_bias, self.gate, *settings)
        return ops.window_attention(x, op, mask, residual)

    def extra_repr(self) -> str:
        return f'heads={self.num_heads}, window={self.window_size}, shift={self.shift_size}'


class ASSA(WindowAttention):
    """Adaptive sparse self-attention: a learned weighting of softmax and squared ReLU."""

    kind = 'assa'


class DenseAttention(WindowAttention):
    """Window attention with softmax, as in Swin and Uformer."""

    kind = 'dense'


class SparseAttention(WindowAttention):
    """Window attention with squared ReLU instead of softmax."""

    kind = 'sparse'


class ReLUAttention(WindowAttention):
    """Window attention with ReLU instead of softmax."""

    kind = 'sparse_relu'


class TopKAttention(WindowAttention):
    """Window attention with softmax over the highest scores of each query."""

    kind = 'topk'


ATTENTIONS: dict[str, type[WindowAttention]] = {
    attention.kind: attention for attention in (ASSA, DenseAttention, SparseAttention, ReLUAttention, TopKAttention)
}


class FeedForwardNetwork(nn.Module):
    """Base class of feed-forward networks on feature maps.

    Args:
        dim: number of channels; at least 4 for FRFN, which convolves a quarter of them.
        mlp_ratio: ratio of hidden channels to `dim`.
        layout: layout of input and output, 'nhwc' or 'nchw'.
    Raises:
        OptionError: if an option is out of range or options contradict one another.
    """

    works_in = 'nhwc'
    replaces = ('tokens', 'maps')
    is_refining = False  # whether there is a partial convolution and a gate, as in FRFN
    has_depthwise = True  # whether there is a depthwise convolution

    def __init__(self, dim: int, mlp_ratio: float = 4.0, layout: str = 'nhwc') -> None:
        super().__init__()
        check_choice('layout', layout, LAYOUTS)
        _check_counts(dim=dim)
        if isinstance(mlp_ratio, bool) or not isinstance(mlp_ratio, Real) or not 1 <= dim * mlp_ratio < math.inf:
            raise OptionError(
                f'mlp_ratio must be a number that gives at least 1 hidden channel for {dim} channels, not {mlp_ratio!r}'
            )
        if self.is_refining and dim < 4:
            raise OptionError(f'FRFN convolves a quarter of the channels and needs at least 4 channels, not {dim}')
        hidden = int(dim * mlp_ratio)
        self.layout = layout
        self.partial_conv = nn.Conv2d(dim // 4, dim // 4, 3, padding=1, bias=False) if self.is_refining else None
        self.expand = nn.Linear(dim, 2 * hidden if self.is_refining else hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden) if self.has_depthwise else None
        self.project = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, residual: Residual | None = None) -> Tensor:
        """Apply the network to x, [B, H, W, C] or [B, C, H, W] depending on `layout`; an MLP also accepts [..., C]."""
        x = _to_nhwc(x, self.layout)
        if self.has_depthwise:
            _check_map(x, self.expand.in_features, type(self).__name__)
        elif x.shape[-1] != self.expand.in_features:
            raise ShapeError(f'MLP expects {self.expand.in_features} channels, got {list(x.shape)}')
        y = x.unsqueeze(1) if x.ndim == 3 else x  # tokens as a map of one row, which all backends support
        op = ops.FeedForward(*_weights(self.expand, self.project, self.depthwise, self.partial_conv)[:-1])
        return _from_nhwc(ops.feed_forward(y, op, residual).reshape(x.shape), self.layout)


class FRFN(FeedForwardNetwork):
    """Feature refinement feed-forward network (Zhou et al., CVPR 2024, section 3.3)."""

    is_refining = True


class LeFF(FeedForwardNetwork):
    """Locally-enhanced feed-forward network of Uformer (Wang et al., CVPR 2022)."""


class MLP(FeedForwardNetwork):
    """Two linear layers with a GELU between them, applied to each token independently."""

    works_in = 'any'
    replaces = ('windows', 'tokens', 'maps')
    has_depthwise = False


def mlp_ratio_of(dim: int, hidden: int) -> float:
    """Return the `mlp_ratio` with which a `FeedForwardNetwork` of `dim` channels has this number of hidden channels."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


FEED_FORWARDS: dict[str, type[FeedForwardNetwork]] = {'frfn': FRFN, 'leff': LeFF, 'mlp': MLP}


class DropPath(nn.Module):
    """Stochastic depth: randomly drop a residual branch per sample in training, and scale up the remaining ones.

    Args:
        rate: probability of dropping the branch of a sample, in [0, 1).
    Source: Huang et al., ECCV 2016.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise OptionError(f'drop_path_rate must be in [0, 1), not {rate}')
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        scale = self.draw(x)
        return x if scale is None else x * scale

    def draw(self, x: Tensor) -> Tensor | None:
        """Sample a factor for each sample of x, [B, 1, ..., 1]; return None if nothing is dropped."""
        if not self.training or self.rate == 0:
            return None
        keep = 1 - self.rate
        return x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep) / keep

    def extra_repr(self) -> str:
        return f'{self.rate:.3f}'


class ASTBlock(nn.Module):
    """Transformer block with pre-norm residual branches: optional attention, then a feed-forward network.

    Args:
        dim, num_heads, window_size, shift_size, qkv_bias, topk_ratio, layout: see `WindowAttention`.
        mlp_ratio: see `FeedForwardNetwork`.
        attention: a key of `ATTENTIONS`, or None as in AST's encoder.
        ffn: a key of `FEED_FORWARDS`.
        drop_path_rate: stochastic depth rate of both branches, see `DropPath`.
    Raises:
        OptionError: if an option is out of range or options contradict one another.
    """

    works_in = 'nhwc'
    replaces = ('tokens', 'maps')

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 8,
        shift_size: int = 0,
        mlp_ratio: float = 4.0,
        attention: str | None = 'assa',
        ffn: str = 'frfn',
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        topk_ratio: float = 0.5,
        layout: str = 'nhwc',
    ) -> None:
        super().__init__()
        check_choice('layout', layout, LAYOUTS)
        check_choice('ffn', ffn, FEED_FORWARDS)
        attn = None
        if attention is not None:
            check_choice('attention', attention, ATTENTIONS)
            attn = ATTENTIONS[attention](dim, num_heads, window_size, shift_size, qkv_bias, topk_ratio)
        feed_forward = FEED_FORWARDS[ffn](dim, mlp_ratio)
        self.layout = layout
        self.norm1 = None if attn is None else nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = feed_forward
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = _to_nhwc(x, self.layout)
        if self.attn is not None:
            x = self._add(x, self.norm1, self.attn, mask)
        return _from_nhwc(self._add(x, self.norm2, self.ffn), self.layout)

    def _add(self, x: Tensor, norm: nn.Module, branch: nn.Module, *args: Tensor | None) -> Tensor:
        """Return x + drop_path(branch(norm(x), *args)), fused for the plugin's own branches."""
        is_ours = isinstance(branch, (WindowAttention, FeedForwardNetwork)) and branch.layout == 'nhwc'
        is_watched = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks
        if is_ours and type(norm) is nn.LayerNorm and not is_watched:
            return branch(x, *args, residual=Residual(norm.weight, norm.bias, norm.eps, self.drop_path.draw(x)))
        return x + self.drop_path(branch(norm(x), *args))


ast_block = ASTBlock  # earlier name


token_sizes = threading.local()
"""(H, W) of tokens, passed from modules of a network to the blocks mixed into it, see `mixed.adapters`.

Thread-local storage, because torch.compile supports it, but not a ContextVar.
"""


def run_checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function with gradient checkpointing.

    The recomputation uses the backend and the token sizes of the forward pass, in whichever thread it runs.
    """
    # In a compiled graph backend and token sizes are constants, and torch.compile does not support `context_fn`.
    own = {} if torch.compiler.is_compiling() else {'context_fn': lambda: (nullcontext(), _Surroundings())}
    return checkpoint(function, *args, use_reentrant=False, **own, **kwargs)


class _Surroundings:
    """Context that restores the backend and the token sizes of its creation; entered once per backward pass."""

    def __init__(self) -> None:
        self.backend, self.sizes = ops.requested_backend(), dict(vars(token_sizes))

    def __enter__(self) -> None:
        self.before = dict(vars(token_sizes))
        vars(token_sizes).update(self.sizes)
        self.entered = ops.use_backend(self.backend)
        self.entered.__enter__()

    def __exit__(self, *error: object) -> None:
        self.entered.__exit__(*error)
        vars(token_sizes).clear()
        vars(token_sizes).update(self.before)


def init_weights(module: nn.Module) -> None:
    """Initialise linear layers as AST and Swin do; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_choice(key: str, value: str, choices: Collection[str]) -> None:
    """Raise OptionError unless a value is one of the choices."""
    if value not in choices:
        raise OptionError(f'{key} must be one of {", ".join(choices)}, not {value!r}')


def _check_counts(**counts: int) -> None:
    for key, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise OptionError(f'{key} must be a whole number of 1 or more, not {value!r}')


def _check_map(x: Tensor, dim: int, name: str) -> None:
    if x.ndim != 4 or x.shape[-1] != dim or 0 in x.shape:
        raise ShapeError(f'{name} expects feature maps of {dim} channels ([B, H, W, {dim}] in NHWC), got {[*x.shape]}')


def _to_nhwc(x: Tensor, layout: str) -> Tensor:
    if layout == 'nhwc':
        return x
    if x.ndim != 4:
        raise ShapeError(f'expected a feature map [B, C, H, W], got {list(x.shape)}')
    return x.permute(0, 2, 3, 1)


def _from_nhwc(x: Tensor, layout: str) -> Tensor:
    # A view, so that NCHW outputs are in PyTorch's channels_last memory format.
    return x if layout == 'nhwc' else x.permute(0, 3, 1, 2)


def _weights(*layers: nn.Linear | nn.Conv2d | None) -> list[Tensor | None]:
    """Return the weights and biases of layers as a flat list, in the order that `ops` expects.

    Layers are never called, so hooks that compute a weight (weight and spectral normalisation, pruning) run here.
    """
    for layer in layers:
        if layer is None:
            continue
        if type(layer).forward not in (nn.Linear.forward, nn.Conv2d.forward):
            raise OptionError(
                f'{type(layer).__name__} cannot replace a linear layer or convolution inside a block, which uses only '
                "the layer's weight and bias and never calls it: merge adapters such as LoRA into the weights"
            )
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, _WEIGHT_HOOKS):
                hook(layer, ())
    return [getattr(layer, name, None) for layer in layers for name in ('weight', 'bias')]
