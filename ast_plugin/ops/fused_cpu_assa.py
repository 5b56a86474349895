"""Window attention on a CPU over groups of windows, read from the map and written to it where they lie.

Computes what `assa.window_attention` does. Rows of windows go together from the norm to the sum and stay in the caches;
a shift takes the rows and columns from where they are, without a rolled copy of the map. Of all windows of a shifted
map only those of the last row and column are masked, with masks that any map shares. For the backward pass only the
input is kept; windows do not depend on one another and are computed again group by group.

Numerics: scores, weights and their product with the values in float32 for bfloat16, as in the reference; gradients of
parameters add up in float32 over groups, in an order that shapes and the number of threads determine.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ast_plugin.ops.assa import Affine
from ast_plugin.ops.assa import window_attention as plain_window_attention
from ast_plugin.ops.frozen_weights import made_of
from ast_plugin.ops.fused_cpu_assa_backward import Backward
from ast_plugin.ops.fused_cpu_assa_forward import Attention, Layers, Settings, Weights
from ast_plugin.ops.fused_cpu_kernels import gradients_of, without_autocast
from ast_plugin.ops.residual import Residual
from ast_plugin.ops.windows import check_windows


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
    """See `assa.window_attention`."""
    check_windows(x.shape, num_heads, window, shift)
    norm = (None, None) if residual is None else (residual.weight, residual.bias)
    weights = Weights(*norm, *q, *kv, *proj, position_bias, gate)
    scale = None if residual is None else residual.scale
    autocast = torch.is_autocast_enabled('cpu') and x.dtype is not torch.float64
    settings = Settings(
        torch.get_autocast_dtype('cpu') if autocast else x.dtype,
        0.0 if residual is None else residual.eps,
        residual is not None,
        num_heads,
        window,
        shift,
        kind,
        topk_ratio,
    )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights)):
        return _WindowAttention.apply(settings, x, mask, scale, *weights)
    with without_autocast():
        layers = made_of(lambda: Layers.of(settings, weights), weights, Layers, settings.dtype, num_heads, window)
        return Attention(settings, x, mask, scale, weights, layers).forward()


class _WindowAttention(torch.autograd.Function):
    """Keeps the input alone, and computes groups again in the backward pass. `mask` and `scale` are constants."""

    @staticmethod
    def forward(ctx: FunctionCtx, settings: Settings, x: Tensor, mask: Tensor | None, scale: Tensor | None, *weights):
        ctx.settings = settings
        ctx.save_for_backward(x, mask, scale, *weights)
        with without_autocast():
            w = Weights(*weights)
            return Attention(settings, x, mask, scale, w, Layers.of(settings, w)).forward()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor):
        x, mask, scale, *tensors = ctx.saved_tensors
        weights, needed = Weights(*tensors), (ctx.needs_input_grad[1], *ctx.needs_input_grad[4:])
        if torch.is_grad_enabled():
            # Gradients of gradients are asked for: autograd has the formulas of the plain reference.
            grad_x, *rest = _differentiable(ctx.settings, grad, x, mask, scale, weights, needed)
        else:
            with without_autocast():
                grad_x, *rest = Backward(ctx.settings, x, mask, scale, weights, needed).run(grad)
        return None, grad_x, None, None, *rest


def _differentiable(
    settings: Settings,
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    w: Weights,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    residual = Residual(w.norm_weight, w.norm_bias, settings.eps, scale) if settings.is_residual else None
    autocast = settings.dtype is not x.dtype or settings.dtype is not w.q.dtype
    with torch.autocast('cpu', settings.dtype) if autocast else without_autocast():
        out = plain_window_attention(
            x,
            (w.q, w.q_bias),
            (w.kv, w.kv_bias),
            (w.proj, w.proj_bias),
            w.position_bias,
            num_heads=settings.num_heads,
            window=settings.window,
            shift=settings.shift,
            kind=settings.kind,
            gate=w.gate,
            mask=mask,
            topk_ratio=settings.topk_ratio,
            residual=residual,
        )
    return gradients_of(out, grad, (x, *w), needed)
