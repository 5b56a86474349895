"""Window attention on CUDA: linear layers by PyTorch, what lies between them by one kernel, forward and backward.

Computes what `assa.window_attention` does. The kernels take q, k and v from one map where a window's tokens lie, also
in a shifted map, and put the result there: there are no rolled or cut copies and no matrices of scores. For the
backward pass the map of q, k and v is kept, and scores are computed again.

Numerics: scores and weights in float32, and all sums; for half types weights are rounded to the type of the values they
are multiplied with, in float16 after each row is brought into its range. Sums over windows have an order that shapes
determine.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ast_plugin.errors import ShapeError
from ast_plugin.ops.assa import Affine, attention_weights
from ast_plugin.ops.fused_cpu_kernels import gradients_of
from ast_plugin.ops.residual import Residual, with_residual
from ast_plugin.ops.triton_launch import is_interpreted, next_power_of_2, on_device, packed
from ast_plugin.ops.windows import check_windows, merge_windows, partition_windows, relative_position_index, shift_mask

# Whether there is a softmax, and the power of the sparse branch's relu or 0.
KINDS = {'assa': (True, 2), 'dense': (True, 0), 'sparse': (False, 2), 'sparse_relu': (False, 1)}
_LEAST = 16  # of every side of a matrix product
# More tokens than this, and a program takes `_LEAST` queries at a time: its matrices then stay in registers.
_MOST_TOKENS = 64
# Groups of windows keep what is the same for all windows of a head; with fewer programs a large device would idle.
# Fixed, not read off the device, so that the order of sums is the same everywhere.
_PROGRAMS = 2048


class Settings(NamedTuple):
    """What is no tensor; see `assa.window_attention`."""

    num_heads: int
    window: int
    shift: int
    kind: str


def window_attention(
    x: Tensor,
    q: Affine,
    kv: Affine,
    proj: Affine,
    position_bias: Tensor,
    *,
    num_heads: int,
    window: int,
    shift: int,
    kind: str,
    gate: Tensor | None,
    mask: Tensor | None,
    topk_ratio: float,
    residual: Residual | None,
) -> Tensor:
    """See `assa.window_attention`; `topk` is not among the kinds."""
    check_windows(x.shape, num_heads, window, shift)
    settings = Settings(num_heads, window, shift, kind)

    def branch(x: Tensor) -> Tensor:
        qkv = F.linear(x, torch.cat([q[0], kv[0]]), _joined_bias(q, kv))
        bias = position_bias.float()[_index_on(window, x.device)].permute(2, 0, 1)
        return F.linear(attend(settings, qkv, bias, gate, mask), *proj)

    return with_residual(branch, x, residual)


def attend(settings: Settings, qkv: Tensor, bias: Tensor, gate: Tensor | None, mask: Tensor | None) -> Tensor:
    """Attention of q, k and v, [B, H, W, 3C] side by side: [B, H, W, C]; bias [heads, window**2, window**2].

    Raises:
        ShapeError: if the sizes do not go together; a kernel would read what is not there.
    """
    B, H, W, channels = qkv.shape
    heads, side, tokens = settings.num_heads, settings.window, settings.window**2
    if H % side or W % side or channels % (3 * heads):
        raise ShapeError(f'q, k and v are {list(qkv.shape)}: expected multiples of {side}, {side} and 3·{heads}')
    if bias.shape != (heads, tokens, tokens):
        raise ShapeError(f'the position bias is {list(bias.shape)}: expected {[heads, tokens, tokens]}')
    num_windows = (H // side) * (W // side)
    if mask is not None and mask.shape not in ((num_windows, tokens, tokens), (B * num_windows, tokens, tokens)):
        expected = f'[{num_windows} or {B * num_windows}, {tokens}, {tokens}]'
        raise ShapeError(f'the mask is {list(mask.shape)}: expected {expected}')
    return _Attention.apply(settings, qkv, bias, gate if settings.kind == 'assa' else None, mask)


def plain_attend(settings: Settings, qkv: Tensor, bias: Tensor, gate: Tensor | None, mask: Tensor | None) -> Tensor:
    """As `attend`, by PyTorch's operators: for gradients of gradients, and what the kernels are checked against."""
    B, H, W, _ = qkv.shape
    num_heads, window, shift, kind = settings
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    x = qkv.to(dtype).roll((-shift, -shift), dims=(1, 2))
    parts = partition_windows(x, window).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    queries, keys, values = parts
    scores = queries @ keys.transpose(-2, -1) * queries.shape[-1] ** -0.5 + bias
    scores = scores.unflatten(0, (B, -1))
    if shift:
        scores = scores + shift_mask((H, W), window, shift, qkv.device).to(dtype)[:, None]
    if mask is not None:
        scores = scores + mask.to(dtype).reshape(-1, scores.shape[1], 1, *mask.shape[1:])
    y = attention_weights(scores.flatten(0, 1), kind, gate) @ values
    y = merge_windows(y.transpose(1, 2).flatten(2), window, (H, W))
    return y.roll((shift, shift), dims=(1, 2)).to(qkv.dtype)


def _joined_bias(q: Affine, kv: Affine) -> Tensor | None:
    if q[1] is None and kv[1] is None:
        return None
    return torch.cat([weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in (q, kv)])


@lru_cache(maxsize=32)
def _index_on(window: int, device: torch.device) -> Tensor:
    """`relative_position_index` on a device; shared, do not write to it."""
    with torch.inference_mode(False):
        return relative_position_index(window).to(device)


class _Attention(torch.autograd.Function):
    """`mask` is a constant."""

    @staticmethod
    def forward(ctx: FunctionCtx, settings: Settings, qkv: Tensor, bias: Tensor, gate: Tensor | None, mask):
        ctx.settings = settings
        ctx.save_for_backward(qkv, bias, gate, mask)
        return _Launch(settings, qkv, bias, gate, mask).forward()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor):
        qkv, bias, gate, mask = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Gradients of gradients are asked for: autograd has the formulas of plain operators.
            with torch.autocast(qkv.device.type, enabled=False):
                out = plain_attend(ctx.settings, qkv, bias, gate, mask)
            found = gradients_of(out, grad, (qkv, bias, gate), ctx.needs_input_grad[1:4])
        elif ctx.settings.window**2 > _MOST_TOKENS and len(qkv) > 1:
            found = _image_by_image(ctx.settings, qkv, bias, gate, mask, grad)
        else:
            found = _Launch(ctx.settings, qkv, bias, gate, mask).backward(grad)
        return None, *found, None


def _image_by_image(settings: Settings, qkv: Tensor, bias: Tensor, gate: Tensor | None, mask: Tensor | None, grad):
    """As `_Launch.backward`: large windows have a part of the gradient for each block of queries."""
    num_windows = (qkv.shape[1] // settings.window) * (qkv.shape[2] // settings.window)
    found = []
    for image in range(len(qkv)):
        own = slice(image, image + 1)
        masks = mask
        if mask is not None and len(mask) != num_windows:
            masks = mask[image * num_windows : (image + 1) * num_windows]
        found.append(_Launch(settings, qkv[own], bias, gate, masks).backward(grad[own]))
    d_qkv, d_bias, d_gate = zip(*found, strict=True)
    return torch.cat(d_qkv), sum(d_bias), None if gate is None else sum(d_gate)


class _Launch:
    """One call's tensors as the kernels take them, and the kernels' settings."""

    def __init__(self, settings: Settings, qkv: Tensor, bias: Tensor, gate: Tensor | None, mask: Tensor | None) -> None:
        self.settings, self.qkv, self.gate = settings, packed(qkv), gate
        self.num_images, self.height, self.width, channels = qkv.shape
        self.channels = channels // 3
        self.bias = bias.detach().to(torch.float32).contiguous()
        # What is not used is not read: any tensor may stand there.
        self.shares = self.bias if gate is None else gate.detach().float().softmax(0)
        self.mask = self.bias if mask is None else mask.detach().to(torch.float32).contiguous()
        self.num_masks = 1 if mask is None else mask.shape[0]
        tokens, head = settings.window**2, self.channels // settings.num_heads
        full = max(_LEAST, next_power_of_2(tokens))
        self.queries = full if full <= _MOST_TOKENS else _LEAST
        self.num_blocks = -(-tokens // self.queries)
        self.num_windows = self.num_images * (self.height // settings.window) * (self.width // settings.window)
        groups = max(1, _PROGRAMS // (settings.num_heads * self.num_blocks))
        self.per_program = max(1, -(-self.num_windows // groups))
        self.grid = (settings.num_heads, -(-self.num_windows // self.per_program), self.num_blocks)
        has_softmax, power = KINDS[settings.kind]
        self.constants = {
            'HEAD': head,
            'HEAD_FULL': max(_LEAST, next_power_of_2(head)),
            'SIDE': settings.window,
            'TOKENS': tokens,
            'TOKENS_FULL': full,
            'QUERIES': self.queries,
            'DENSE': has_softmax,
            'POWER': power,
            'SHIFTED': settings.shift > 0,
            'MASK': mask is not None,
            'SCALED': qkv.dtype == torch.float16,
            'WIDE': qkv.dtype == torch.bfloat16 and is_interpreted(),
            # float32 is multiplied without tensor cores, with more in registers.
            'num_warps': 4 if full <= _MOST_TOKENS and qkv.dtype != torch.float32 else 8,
            'num_stages': 1,
        }

    def sizes(self) -> tuple:
        return (
            self.height,
            self.width,
            self.settings.shift,
            self.channels,
            self.num_windows,
            self.per_program,
            self.num_masks,
            float((self.channels // self.settings.num_heads) ** -0.5),
        )

    def forward(self) -> Tensor:
        from ast_plugin.ops import triton_assa_kernels as kernels

        out = self.qkv.new_empty(*self.qkv.shape[:3], self.channels)
        if out.numel():
            with on_device(out):
                kernels.forward[self.grid](
                    self.qkv,
                    self.bias,
                    self.shares,
                    self.mask,
                    out,
                    *self.sizes(),
                    *self.qkv.stride()[:3],
                    *out.stride()[:3],
                    **self.constants,
                )
        return out

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of the map of q, k and v, of the bias and of the gate."""
        from ast_plugin.ops import triton_assa_kernels as kernels

        tokens, full = self.constants['TOKENS'], self.constants['TOKENS_FULL']
        if not grad.numel():
            d_gate = None if self.gate is None else torch.zeros_like(self.gate)
            return torch.zeros_like(self.qkv), torch.zeros_like(self.bias), d_gate
        grad = packed(grad)
        d_qkv = torch.empty(self.qkv.shape, dtype=self.qkv.dtype, device=self.qkv.device)
        whole = d_qkv[..., self.channels :]
        d_kv = whole[None]
        if self.num_blocks > 1:  # each block of queries has its part of the keys' and values' gradient
            d_kv = self.bias.new_empty(self.num_blocks, *whole.shape)
        heads, groups, blocks = self.grid
        d_bias = self.bias.new_empty(groups, heads, blocks, self.queries, full)
        d_shares = self.bias.new_empty(groups, heads, blocks, 2)
        with on_device(d_qkv):
            kernels.backward[self.grid](
                self.qkv,
                self.bias,
                self.shares,
                self.mask,
                grad,
                d_qkv,
                d_kv,
                d_bias,
                d_shares,
                *self.sizes(),
                *self.qkv.stride()[:3],
                *grad.stride()[:3],
                *d_qkv.stride()[:3],
                *d_kv.stride()[:4],
                **self.constants,
            )
        if self.num_blocks > 1:
            whole.copy_(d_kv.sum(0))
        d_bias = d_bias.sum(0).reshape(heads, -1, full)[:, :tokens, :tokens]
        d_gate = None
        if self.gate is not None:
            # A small difference of large sums.
            totals, shares = d_shares.double().sum((0, 1, 2)), self.shares.double()
            d_gate = (shares * (totals - (shares * totals).sum())).to(self.gate.dtype)
        return d_qkv, d_bias, d_gate
