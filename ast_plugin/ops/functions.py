"""AST's functions of tensors, each computed by the backend that is chosen for the call; see `backend`."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ast_plugin.ops import backend, fused_cpu_assa, fused_cpu_ffn, triton_assa, triton_frfn
from ast_plugin.ops.assa import Affine
from ast_plugin.ops.assa import window_attention as plain_window_attention
from ast_plugin.ops.frfn import frfn as plain_frfn
from ast_plugin.ops.frfn import leff as plain_leff
from ast_plugin.ops.frfn import mlp as plain_mlp
from ast_plugin.ops.residual import Residual

# One function of the same arguments for each backend of `backend.BACKENDS`.
IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Tensor]]] = {
    'frfn': {'fused': fused_cpu_ffn.frfn, 'triton': triton_frfn.frfn, 'reference': plain_frfn},
    'leff': {'fused': fused_cpu_ffn.leff, 'triton': triton_frfn.leff, 'reference': plain_leff},
    # Two products and a GELU, which PyTorch's own kernels do as well as any.
    'mlp': {'fused': fused_cpu_ffn.mlp, 'triton': plain_mlp, 'reference': plain_mlp},
    'window_attention': {
        'fused': fused_cpu_assa.window_attention,
        'triton': triton_assa.window_attention,
        'reference': plain_window_attention,
    },
}


def frfn(
    x: Tensor,
    partial_conv: Tensor,
    expand: Affine,
    depthwise: Affine,
    project: Affine,
    residual: Residual | None = None,
) -> Tensor:
    """Feature refinement feed-forward network; see `ops.frfn.frfn`, the reference."""
    tensors = (partial_conv, *expand, *depthwise, *project)
    return _implementation('frfn', x, tensors, residual)(x, partial_conv, expand, depthwise, project, residual)


def leff(x: Tensor, expand: Affine, depthwise: Affine, project: Affine, residual: Residual | None = None) -> Tensor:
    """Locally-enhanced feed-forward network; see `ops.frfn.leff`, the reference."""
    tensors = (*expand, *depthwise, *project)
    return _implementation('leff', x, tensors, residual)(x, expand, depthwise, project, residual)


def mlp(x: Tensor, expand: Affine, project: Affine, residual: Residual | None = None) -> Tensor:
    """Two linear layers with a GELU between; see `ops.frfn.mlp`, the reference."""
    return _implementation('mlp', x, (*expand, *project), residual)(x, expand, project, residual)


def window_attention(
    x: Tensor,
    q: Affine,
    kv: Affine,
    proj: Affine,
    position_bias: Tensor,
    *,
    num_heads: int,
    window: int,
    shift: int = 0,
    kind: str = 'assa',
    gate: Tensor | None = None,
    mask: Tensor | None = None,
    topk_ratio: float = 0.5,
    residual: Residual | None = None,
) -> Tensor:
    """Multi-head self-attention within (shifted) windows of a map; see `ops.assa.window_attention`, the reference."""
    tensors = (*q, *kv, *proj, position_bias, gate)
    constants = () if mask is None else (mask,)
    details = {'kind': kind, 'window': window, 'num_heads': num_heads, 'masked': mask is not None}
    return _implementation('window_attention', x, tensors, residual, constants, details)(
        x,
        q,
        kv,
        proj,
        position_bias,
        num_heads=num_heads,
        window=window,
        shift=shift,
        kind=kind,
        gate=gate,
        mask=mask,
        topk_ratio=topk_ratio,
        residual=residual,
    )


def _implementation(
    function: str,
    x: Tensor,
    tensors: tuple[Tensor | None, ...],
    residual: Residual | None,
    constants: tuple[Tensor, ...] = (),
    details: Mapping[str, object] | None = None,
) -> Callable[..., Tensor]:
    """What computes a call. `constants` are tensors that fused paths give no gradient, like a residual's scale."""
    if torch.compiler.is_compiling():
        # The compiler is to see plain operators, which it fuses itself. What is asked for by name is left out of the
        # graph, and chosen when it runs.
        if backend.asked() in (backend.AUTO, 'reference'):
            return IMPLEMENTATIONS[function]['reference']
        # An export without dynamo gives fake tensors, which what is asked for by name says it cannot run.
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(globals()[function])
    if residual is not None:
        tensors = (*tensors, residual.weight, residual.bias)
        constants = constants if residual.scale is None else (*constants, residual.scale)
    call = backend.describe(function, x, tensors, constants, details)
    choice = backend.choose(call)
    if choice.rejected:
        backend.say_once(choice)
    return IMPLEMENTATIONS[function][choice.backend]
