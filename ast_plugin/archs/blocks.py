"""AST's building blocks. Modules hold parameters and state their sizes; the mathematics is in `ast_plugin.ops`.

Every block maps [B, H, W, C] to [B, H, W, C], or with `layout='nchw'` [B, C, H, W] to [B, C, H, W], of any H and W.
What `works_in` and `replaces` say is explained in `archs.mixed.block_registry`.
"""

import math
import threading
from collections.abc import Callable, Collection
from contextlib import nullcontext
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ast_plugin import ops
from ast_plugin.errors import OptionError, ShapeError
from ast_plugin.ops import Residual

LAYOUTS = ('nhwc', 'nchw')


class WindowAttention(nn.Module):
    """Self-attention within (shifted) windows, with a learned bias by relative position.

    Maps that do not divide into windows are filled up with zeros at the bottom and the right and cropped again; tokens
    of the map give those of the filling no weight at all, so that it changes nothing.

    Args:
        dim: channels.
        num_heads: heads, a divisor of `dim`.
        window_size: side of a window.
        shift_size: cyclic shift up and left before the map is cut, in [0, window_size).
        qkv_bias: whether queries, keys and values have a bias.
        topk_ratio: share of the keys that top-k attention keeps.
        layout: 'nhwc' or 'nchw', of what comes in and goes out.
    Raises:
        OptionError: if sizes contradict one another.
    Source: Zhou et al., CVPR 2024, section 3.2; state names and layout follow its release (q alone, k and v together).
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
            raise OptionError(f'{dim} channels do not divide into {num_heads} heads')
        if not isinstance(shift_size, Integral) or not 0 <= shift_size < window_size:
            raise OptionError(f'shift_size must be in [0, {window_size}), the window, not {shift_size!r}')
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
            x: [B, H, W, C] or [B, C, H, W], as `layout` says.
            mask: [B or 1, 1, h, w] of the whole image, see `ops.pair_mask`; or None.
            residual: of NHWC maps, a norm before and the sum with x after it, see `ops.Residual`.
        Raises:
            ShapeError: if x has other dimensions.
        """
        x = _to_nhwc(x, self.layout)
        _check_map(x, self.dim, type(self).__name__)
        H, W = size = tuple(x.shape[1:3])
        missing_h, missing_w = -H % self.window_size, -W % self.window_size
        if missing_h or missing_w:
            if residual is not None:  # the filling comes after the norm
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
        """Attend within windows that the caller has cut, shifted or not.

        Args:
            x: [num_windows * B, window_size**2, C].
            mask: [num_windows, window_size**2, window_size**2], added to the scores; or None.
        Raises:
            ShapeError: if the windows have another size.
        """
        side = self.window_size
        if x.ndim != 3 or x.shape[1:] != (side**2, self.dim):
            raise ShapeError(
                f'{type(self).__name__} takes windows of {side}x{side} tokens, {self.dim} channels, not {list(x.shape)}'
            )
        # Windows one below the other are a map, as many in it as the mask is for.
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
    """Adaptive sparse self-attention: a learned blend of softmax and squared ReLU."""

    kind = 'assa'


class DenseAttention(WindowAttention):
    """Window attention with softmax, as in Swin and Uformer."""

    kind = 'dense'


class SparseAttention(WindowAttention):
    """Window attention with squared ReLU alone."""

    kind = 'sparse'


class ReLUAttention(WindowAttention):
    """Window attention with ReLU alone, not squared."""

    kind = 'sparse_relu'


class TopKAttention(WindowAttention):
    """Window attention with softmax over the highest scores of each query."""

    kind = 'topk'


ATTENTIONS: dict[str, type[WindowAttention]] = {
    'assa': ASSA,
    'dense': DenseAttention,
    'sparse': SparseAttention,
    'sparse_relu': ReLUAttention,
    'topk': TopKAttention,
}


class FeedForwardNetwork(nn.Module):
    """Feed-forward network over the tokens of a map; a subclass says of what parts.

    Args:
        dim: channels; with a partial convolution at least 4, as that convolves a quarter of them.
        mlp_ratio: hidden channels as a multiple of `dim`.
        layout: 'nhwc' or 'nchw', of what comes in and goes out.
    Raises:
        OptionError: if sizes contradict one another.
    """

    works_in = 'nhwc'
    replaces = ('tokens', 'maps')
    is_refining = False  # a partial convolution before, and half of the hidden channels gate the others
    has_depthwise = True

    def __init__(self, dim: int, mlp_ratio: float = 4.0, layout: str = 'nhwc') -> None:
        super().__init__()
        check_choice('layout', layout, LAYOUTS)
        _check_counts(dim=dim)
        if isinstance(mlp_ratio, bool) or not isinstance(mlp_ratio, Real) or not 1 <= dim * mlp_ratio < math.inf:
            raise OptionError(
                f'mlp_ratio must be a number that gives {dim} channels at least 1 hidden one, not {mlp_ratio!r}'
            )
        if self.is_refining and dim < 4:
            raise OptionError(f'FRFN convolves a quarter of the channels and needs at least 4 of them, not {dim}')
        hidden = int(dim * mlp_ratio)
        self.layout = layout
        self.partial_conv = nn.Conv2d(dim // 4, dim // 4, 3, padding=1, bias=False) if self.is_refining else None
        self.expand = nn.Linear(dim, 2 * hidden if self.is_refining else hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden) if self.has_depthwise else None
        self.project = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, residual: Residual | None = None) -> Tensor:
        """Run the network over x, [B, H, W, C] or [B, C, H, W] as `layout` says; an MLP takes [..., C], too."""
        x = _to_nhwc(x, self.layout)
        if self.has_depthwise:
            _check_map(x, self.expand.in_features, type(self).__name__)
        elif x.shape[-1] != self.expand.in_features:
            raise ShapeError(f'MLP takes {self.expand.in_features} channels, not {list(x.shape)}')
        y = x.unsqueeze(1) if x.ndim == 3 else x  # tokens are a map of one row, which all backends take
        partial_conv = None if self.partial_conv is None else self.partial_conv.weight
        op = ops.FeedForward(*_weights(self.expand, self.project, self.depthwise), partial_conv)
        return _from_nhwc(ops.feed_forward(y, op, residual).reshape(x.shape), self.layout)


class FRFN(FeedForwardNetwork):
    """Feature refinement feed-forward network (Zhou et al., CVPR 2024, section 3.3)."""

    is_refining = True


class LeFF(FeedForwardNetwork):
    """Locally-enhanced feed-forward network of Uformer (Wang et al., CVPR 2022)."""


class MLP(FeedForwardNetwork):
    """Two linear layers with a GELU between, each token for itself."""

    works_in = 'any'
    replaces = ('windows', 'tokens', 'maps')
    has_depthwise = False


FEED_FORWARDS: dict[str, type[FeedForwardNetwork]] = {'frfn': FRFN, 'leff': LeFF, 'mlp': MLP}


class DropPath(nn.Module):
    """Stochastic depth: in training, leave out a residual branch sample by sample and scale up what stays.

    Args:
        rate: probability of leaving a sample's branch out, in [0, 1).
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
        """Draw a factor for each sample of x, [B, 1, ..., 1]; None where all stay as they are."""
        if not self.training or self.rate == 0:
            return None
        keep = 1 - self.rate
        return x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep) / keep

    def extra_repr(self) -> str:
        return f'{self.rate:.3f}'


class ASTBlock(nn.Module):
    """Residual block: attention (where there is one), then a feed-forward network, each after a LayerNorm.

    Args:
        attention: the attention module, or None as in AST's encoder.
        ffn: the feed-forward module.
        dim: channels.
        drop_path_rate: see `DropPath`, for both branches.
        layout: 'nhwc' or 'nchw', of what comes in and goes out; the parts work in NHWC.
    """

    works_in = 'nhwc'
    replaces = ('tokens', 'maps')

    def __init__(
        self,
        attention: WindowAttention | None,
        ffn: nn.Module,
        dim: int,
        drop_path_rate: float = 0.0,
        layout: str = 'nhwc',
    ) -> None:
        super().__init__()
        check_choice('layout', layout, LAYOUTS)
        self.layout = layout
        self.norm1 = nn.LayerNorm(dim) if attention is not None else None
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = ffn
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = _to_nhwc(x, self.layout)
        if self.attn is not None:
            x = self._add(x, self.norm1, self.attn, mask)
        return _from_nhwc(self._add(x, self.norm2, self.ffn), self.layout)

    def _add(self, x: Tensor, norm: nn.Module, branch: nn.Module, *args: Tensor | None) -> Tensor:
        """x + drop_path(branch(norm(x), *args)); our own branches do it in one, without passes over the map between."""
        is_ours = isinstance(branch, (WindowAttention, FeedForwardNetwork)) and branch.layout == 'nhwc'
        is_watched = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks
        if is_ours and type(norm) is nn.LayerNorm and not is_watched:
            return branch(x, *args, residual=Residual(norm.weight, norm.bias, norm.eps, self.drop_path.draw(x)))
        return x + self.drop_path(branch(norm(x), *args))


def ast_block(
    dim: int,
    num_heads: int,
    window_size: int = 8,
    shift_size: int = 0,
    mlp_ratio: float = 4.0,
    attention: str = 'assa',
    ffn: str = 'frfn',
    qkv_bias: bool = True,
    drop_path_rate: float = 0.0,
    topk_ratio: float = 0.5,
    layout: str = 'nhwc',
) -> ASTBlock:
    """A whole AST block out of its sizes; see `WindowAttention`, `FRFN` and `ASTBlock` for them and their errors."""
    check_choice('attention', attention, ATTENTIONS)
    check_choice('ffn', ffn, FEED_FORWARDS)
    attn = ATTENTIONS[attention](dim, num_heads, window_size, shift_size, qkv_bias, topk_ratio)
    return ASTBlock(attn, FEED_FORWARDS[ffn](dim, mlp_ratio), dim, drop_path_rate, layout)


ast_block.works_in, ast_block.replaces = ASTBlock.works_in, ASTBlock.replaces


token_sizes = threading.local()
"""(H, W) that a network's modules tell the blocks mixed into it, see `mixed.adapters`.

Each thread has its own, and torch.compile sees through it (it does not see through a ContextVar).
"""


def run_checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function whose backward pass computes it again instead of keeping what it needs (gradient checkpointing).

    It is computed again with the backend and the tokens' sizes of the first time, in whatever thread.
    """
    # torch.compile recomputes in a graph of its own, where backend and sizes are constants; it takes no `context_fn`.
    own = {} if torch.compiler.is_compiling() else {'context_fn': lambda: (nullcontext(), _Surroundings())}
    return checkpoint(function, *args, use_reentrant=False, **own, **kwargs)


class _Surroundings:
    """Context with the backend and the tokens' sizes of when it was made; entered once in each backward pass."""

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
    """Draw the weights of linear layers as AST and Swin do, for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_choice(key: str, value: str, choices: Collection[str]) -> None:
    """Raise an OptionError unless a value is one of the choices."""
    if value not in choices:
        raise OptionError(f'{key} must be one of {", ".join(choices)}, not {value!r}')


def _check_counts(**counts: int) -> None:
    for key, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise OptionError(f'{key} must be a whole number of 1 or more, not {value!r}')


def _check_map(x: Tensor, dim: int, name: str) -> None:
    if x.ndim != 4 or x.shape[-1] != dim or 0 in x.shape:
        raise ShapeError(f'{name} takes maps of {dim} channels, [B, H, W, {dim}] inside, not {list(x.shape)}')


def _to_nhwc(x: Tensor, layout: str) -> Tensor:
    if layout == 'nhwc':
        return x
    if x.ndim != 4:
        raise ShapeError(f'expected a map [B, C, H, W], not {list(x.shape)}')
    return x.permute(0, 2, 3, 1)


def _from_nhwc(x: Tensor, layout: str) -> Tensor:
    # A view, so that NCHW comes out in torch's memory format channels_last.
    return x if layout == 'nhwc' else x.permute(0, 3, 1, 2)


def _weights(*layers: nn.Linear | nn.Conv2d | None) -> list[Tensor | None]:
    """Weight and bias of layers, one after another, as `ops` takes them."""
    return [getattr(layer, name, None) for layer in layers for name in ('weight', 'bias')]
