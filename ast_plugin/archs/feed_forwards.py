"""Feed-forward networks of AST's blocks: FRFN, and those that its ablation compares. See `blocks`."""

from numbers import Real

from torch import Tensor, nn

from ast_plugin import ops
from ast_plugin.archs.layouts import check_layout, check_map, from_nhwc, to_nhwc
from ast_plugin.archs.sizes import check_counts
from ast_plugin.errors import OptionError, ShapeError
from ast_plugin.ops.assa import Affine
from ast_plugin.ops.residual import Residual


class FRFN(nn.Module):
    """Feature refinement feed-forward network.

    Args:
        dim: channels, at least 4: a quarter of them goes through the partial convolution.
        mlp_ratio: hidden channels as a multiple of `dim`.
        layout: 'nhwc' or 'nchw', of what comes in and goes out.
    Source: Zhou et al., CVPR 2024, section 3.3.
    """

    works_in = 'nhwc'
    replaces = ('tokens', 'maps')

    def __init__(self, dim: int, mlp_ratio: float = 4.0, layout: str = 'nhwc') -> None:
        super().__init__()
        self.layout = check_layout(layout)
        if dim < 4:
            raise OptionError(f'FRFN convolves a quarter of the channels and needs at least 4 of them, not {dim}')
        hidden = _hidden(dim, mlp_ratio)
        self.partial_conv = nn.Conv2d(dim // 4, dim // 4, 3, padding=1, bias=False)
        self.expand = nn.Linear(dim, 2 * hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.project = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, residual: Residual | None = None) -> Tensor:
        x = to_nhwc(x, self.layout)
        check_map(x, self.expand.in_features, 'FRFN')
        layers = affine(self.expand), affine(self.depthwise), affine(self.project)
        return from_nhwc(ops.frfn(x, self.partial_conv.weight, *layers, residual), self.layout)


class LeFF(nn.Module):
    """Locally-enhanced feed-forward network of Uformer (Wang et al., CVPR 2022).

    Args:
        dim: channels.
        mlp_ratio: hidden channels as a multiple of `dim`.
        layout: 'nhwc' or 'nchw', of what comes in and goes out.
    """

    works_in = 'nhwc'
    replaces = ('tokens', 'maps')

    def __init__(self, dim: int, mlp_ratio: float = 4.0, layout: str = 'nhwc') -> None:
        super().__init__()
        self.layout = check_layout(layout)
        hidden = _hidden(dim, mlp_ratio)
        self.expand = nn.Linear(dim, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.project = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, residual: Residual | None = None) -> Tensor:
        x = to_nhwc(x, self.layout)
        check_map(x, self.expand.in_features, 'LeFF')
        layers = affine(self.expand), affine(self.depthwise), affine(self.project)
        return from_nhwc(ops.leff(x, *layers, residual), self.layout)


class MLP(nn.Module):
    """Two linear layers with a GELU between.

    Args:
        dim: channels.
        mlp_ratio: hidden channels as a multiple of `dim`.
        layout: 'nhwc' or 'nchw', of what comes in and goes out.
    """

    works_in = 'any'
    replaces = ('windows', 'tokens', 'maps')

    def __init__(self, dim: int, mlp_ratio: float = 4.0, layout: str = 'nhwc') -> None:
        super().__init__()
        self.layout = check_layout(layout)
        hidden = _hidden(dim, mlp_ratio)
        self.expand = nn.Linear(dim, hidden)
        self.project = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, residual: Residual | None = None) -> Tensor:
        x = to_nhwc(x, self.layout)
        if x.shape[-1] != self.expand.in_features:
            raise ShapeError(f'MLP takes {self.expand.in_features} channels, not {list(x.shape)}')
        y = x.unsqueeze(1) if x.ndim == 3 else x  # tokens are a map of one row, which all backends take
        y = ops.mlp(y, affine(self.expand), affine(self.project), residual)
        return from_nhwc(y.reshape(x.shape), self.layout)


FEED_FORWARDS: dict[str, type[nn.Module]] = {'frfn': FRFN, 'leff': LeFF, 'mlp': MLP}


def _hidden(dim: int, mlp_ratio: float) -> int:
    """Hidden channels of a feed-forward network."""
    check_counts(dim=dim)
    if isinstance(mlp_ratio, bool) or not isinstance(mlp_ratio, Real) or not 1 <= dim * mlp_ratio < float('inf'):
        raise OptionError(
            f'mlp_ratio must be a number that gives {dim} channels at least 1 hidden one, not {mlp_ratio!r}'
        )
    return int(dim * mlp_ratio)


def affine(layer: nn.Linear | nn.Conv2d) -> Affine:
    """Weight and bias of a layer, as `ops` takes them."""
    return layer.weight, layer.bias
