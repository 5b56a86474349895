"""Feed-forward networks over NHWC maps: FRFN and those it is compared with. The plain reference."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_plugin.ops.assa import Affine
from ast_plugin.ops.residual import Residual, with_residual


def frfn(
    x: Tensor,
    partial_conv: Tensor,
    expand: Affine,
    depthwise: Affine,
    project: Affine,
    residual: Residual | None = None,
) -> Tensor:
    """Feature refinement feed-forward network.

        a = [conv3×3(x[:C/4]), x[C/4:]];  u₁, u₂ = GELU(expand(a));  out = project(GELU(depthwise3×3(u₁)) · u₂)

    Args:
        x: [B, H, W, C].
        partial_conv: [C // 4, C // 4, 3, 3], without bias.
        expand: linear layer C -> 2h.
        depthwise: convolution over h channels, weight [h, 1, 3, 3].
        project: linear layer h -> C.
        residual: a norm before and the sum with x after it, see `Residual`.
    Returns:
        [B, H, W, C].
    Source: Zhou et al., CVPR 2024, section 3.3. As in the released code and weights, there is no GELU after the last
        linear layer, which the paper's equation 8 has.
    """

    def branch(x: Tensor) -> Tensor:
        refined = partial_conv.shape[0]
        head, tail = x.split([refined, x.shape[-1] - refined], dim=-1)
        a = torch.cat([_conv3x3(head, partial_conv, None), tail.to(head.dtype)], dim=-1)
        u1, u2 = F.gelu(F.linear(a, *expand)).chunk(2, dim=-1)
        return F.linear(F.gelu(_conv3x3(u1, *depthwise, groups=u1.shape[-1])) * u2, *project)

    return with_residual(branch, x, residual)


def leff(x: Tensor, expand: Affine, depthwise: Affine, project: Affine, residual: Residual | None = None) -> Tensor:
    """Locally-enhanced feed-forward network: project(GELU(depthwise3×3(GELU(expand(x))))).

    Args:
        x: [B, H, W, C].
        expand: linear layer C -> h.
        depthwise: convolution over h channels, weight [h, 1, 3, 3].
        project: linear layer h -> C.
        residual: a norm before and the sum with x after it, see `Residual`.
    Returns:
        [B, H, W, C].
    Source: Uformer (Wang et al., CVPR 2022), section 3.2.
    """

    def branch(x: Tensor) -> Tensor:
        u = F.gelu(F.linear(x, *expand))
        return F.linear(F.gelu(_conv3x3(u, *depthwise, groups=u.shape[-1])), *project)

    return with_residual(branch, x, residual)


def mlp(x: Tensor, expand: Affine, project: Affine, residual: Residual | None = None) -> Tensor:
    """Two linear layers with a GELU between: project(GELU(expand(x))), on the last dimension of `x`."""
    return with_residual(lambda x: F.linear(F.gelu(F.linear(x, *expand)), *project), x, residual)


def _conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
    """3×3 convolution of an NHWC map; the permuted views are channels_last, so nothing is copied."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=groups).permute(0, 2, 3, 1)
