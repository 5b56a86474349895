"""How a map of tokens lies in a tensor: 'nhwc' is [B, H, W, C], 'nchw' is [B, C, H, W]."""

from torch import Tensor

from ast_plugin.errors import OptionError, ShapeError

LAYOUTS = ('nhwc', 'nchw')


def check_layout(layout: str) -> str:
    """`layout`, if it is one.

    Raises:
        OptionError: otherwise.
    """
    if layout not in LAYOUTS:
        raise OptionError(f'layout must be {" or ".join(LAYOUTS)}, not {layout!r}')
    return layout


def to_nhwc(x: Tensor, layout: str) -> Tensor:
    """A map of `layout` as NHWC; a view."""
    if layout == 'nchw':
        if x.ndim != 4:
            raise ShapeError(f'expected a map [B, C, H, W], not {list(x.shape)}')
        return x.permute(0, 2, 3, 1)
    return x


def from_nhwc(x: Tensor, layout: str) -> Tensor:
    """An NHWC map as one of `layout`; a view, so that NCHW comes out in torch's memory format channels_last."""
    return x.permute(0, 3, 1, 2) if layout == 'nchw' else x


def check_map(x: Tensor, dim: int, name: str) -> None:
    """See that x is [B, H, W, dim] with no side of 0.

    Raises:
        ShapeError: otherwise, beginning with `name`.
    """
    if x.ndim != 4 or x.shape[-1] != dim or 0 in x.shape:
        raise ShapeError(f'{name} takes maps of {dim} channels, [B, H, W, {dim}] inside, not {list(x.shape)}')
