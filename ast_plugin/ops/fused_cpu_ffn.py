"""Feed-forward networks on a CPU in strips of rows, which stay in the caches from the norm to the sum.

Each function computes what its namesake in `frfn.py` does. Between strips nothing is handed on: the rows that a 3×3
convolution needs from its neighbours are computed twice, which at some tens of rows is a few percent. For the backward
pass of a large map only the input is kept; strips are computed again. Beside its input and output a call holds a few
strips, and in the backward pass one more map of C channels: never a whole large map of hidden channels. Of small maps,
up to `KEPT_BYTES`, what the GELUs are given is kept: there it costs little.

Numerics: oneDNN accumulates in float32, and its GELU is exact up to 4e-7; gradients of parameters add up in float32
over strips, also for bfloat16. The order of all sums depends on shapes and the number of threads alone. oneDNN adds
up the products of thousands of hidden channels in one go, MKL in pieces, with half the error: with gradients, which of
attention's gate are small differences of large sums, small maps are projected in pieces as well.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ast_plugin.ops.assa import Affine
from ast_plugin.ops.frfn import frfn as plain_frfn
from ast_plugin.ops.frfn import leff as plain_leff
from ast_plugin.ops.frfn import mlp as plain_mlp
from ast_plugin.ops.frozen_weights import made_of
from ast_plugin.ops.fused_cpu_ffn_backward import Backward
from ast_plugin.ops.fused_cpu_ffn_forward import Hidden, Settings, Weights, forward_keeping, forward_strips
from ast_plugin.ops.fused_cpu_kernels import gradients_of, without_autocast
from ast_plugin.ops.residual import Residual

# Largest map of hidden channels whose like are kept for the backward pass, four of them a block.
KEPT_BYTES = 8 * 2**20


def frfn(
    x: Tensor, partial_conv: Tensor, expand: Affine, depthwise: Affine, project: Affine, residual: Residual | None
) -> Tensor:
    """See `frfn.frfn`."""
    return _run(x, partial_conv, expand, depthwise, project, residual)


def leff(x: Tensor, expand: Affine, depthwise: Affine, project: Affine, residual: Residual | None) -> Tensor:
    """See `frfn.leff`."""
    return _run(x, None, expand, depthwise, project, residual)


def mlp(x: Tensor, expand: Affine, project: Affine, residual: Residual | None) -> Tensor:
    """See `frfn.mlp`."""
    return _run(x, None, expand, (None, None), project, residual)


def _run(
    x: Tensor,
    partial_conv: Tensor | None,
    expand: Affine,
    depthwise: tuple[Tensor | None, Tensor | None],
    project: Affine,
    residual: Residual | None,
) -> Tensor:
    norm = (None, None) if residual is None else (residual.weight, residual.bias)
    weights = Weights(*norm, partial_conv, *expand, *depthwise, *project)
    scale = None if residual is None else residual.scale
    autocast = torch.is_autocast_enabled('cpu') and x.dtype is not torch.float64
    dtype = torch.get_autocast_dtype('cpu') if autocast else x.dtype
    settings = Settings(dtype, 0.0 if residual is None else residual.eps, residual is not None)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, scale, *weights)):
        return _FeedForward.apply(settings, x, scale, *weights)
    with without_autocast():
        return forward_strips(settings, x, scale, made_of(lambda: weights.to(dtype), weights, Weights, dtype))


class _FeedForward(torch.autograd.Function):
    """Keeps what a small map's GELUs are given; of a large one its input alone. `scale` is a constant."""

    @staticmethod
    def forward(ctx: FunctionCtx, settings: Settings, x: Tensor, scale: Tensor | None, *weights: Tensor | None):
        ctx.settings = settings
        w = Weights(*weights).to(settings.dtype)
        with without_autocast():
            if x[..., 0].numel() * w.hidden * settings.dtype.itemsize > KEPT_BYTES:
                out, hidden = forward_strips(settings, x, scale, w), ()
            else:
                out, hidden = forward_keeping(settings, x, scale, w)
        ctx.save_for_backward(x, scale, *weights, *hidden)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor):
        x, scale, *tensors = ctx.saved_tensors
        weights, kept = Weights(*tensors[: len(Weights._fields)]), tensors[len(Weights._fields) :]
        needed = (ctx.needs_input_grad[1], *ctx.needs_input_grad[3:])
        if torch.is_grad_enabled():
            # Gradients of gradients are asked for: autograd has the formulas of the plain reference.
            grad_x, *rest = _differentiable(ctx.settings, grad, x, scale, weights, needed)
        else:
            with without_autocast():
                grad_x, *rest = Backward(ctx.settings, x, scale, weights, needed).run(
                    grad, Hidden(*kept) if kept else None
                )
        return None, grad_x, None, *rest


def _differentiable(
    settings: Settings, grad: Tensor, x: Tensor, scale: Tensor | None, w: Weights, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    residual = Residual(w.norm_weight, w.norm_bias, settings.eps, scale) if settings.is_residual else None
    expand, depthwise, project = (w.expand, w.expand_bias), (w.depthwise, w.depthwise_bias), (w.project, w.project_bias)
    autocast = settings.dtype is not x.dtype or settings.dtype is not w.expand.dtype
    with torch.autocast('cpu', settings.dtype) if autocast else without_autocast():
        if w.partial is not None:
            out = plain_frfn(x, w.partial, expand, depthwise, project, residual)
        elif w.depthwise is not None:
            out = plain_leff(x, expand, depthwise, project, residual)
        else:
            out = plain_mlp(x, expand, project, residual)
    return gradients_of(out, grad, (x, *w), needed)
