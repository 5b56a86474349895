"""BLOCKS: what can be mixed into networks, ours and other people's, and what each block says of itself.

    from ast_plugin.archs.mixed.block_registry import BLOCKS

    @BLOCKS.register_module()
    class GatedConv(nn.Module):
        works_in = 'nchw'
        replaces = ('maps', 'tokens')

        def __init__(self, dim: int) -> None: ...
        def forward(self, x: Tensor) -> Tensor: ...

A module that does so, named as an entry point of the group `basicsr.plugins`, makes it known to the command.

`works_in` is how the block takes what it works on, the same way as it gives it back:

    nhwc     forward(x), x [B, H, W, C]
    nchw     forward(x), x [B, C, H, W]
    tokens   forward(x, size), x [B, H·W, C] and size (H, W)
    windows  forward(x, mask), x [num_windows·B, window², C] and mask [num_windows, window², window²] or None
    any      forward(x), x [..., C], each token for itself

`replaces` is where it can stand: in 'windows' (a block that works in nhwc needs attend_windows(x, mask) for that, which
is as forward of one that works in windows), among 'tokens', on 'maps'. Its sizes are the parameters of its constructor
that have a name of `SIZES`; other names are given in `sizes`, for instance {'width': 'dim'}.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mmengine.registry import Registry
from torch import nn

from ast_plugin.archs import blocks
from ast_plugin.errors import OptionError, did_you_mean

WORKS_IN = ('nhwc', 'nchw', 'tokens', 'windows', 'any')
PLACES = ('windows', 'tokens', 'maps')
SIZES = {  # the name of a constructor's parameter -> the size that it is
    'dim': 'dim',
    'channels': 'dim',
    'in_channels': 'dim',
    'in_chans': 'dim',
    'embed_dim': 'dim',
    'num_feat': 'dim',
    'num_heads': 'num_heads',
    'heads': 'num_heads',
    'window_size': 'window_size',
    'window': 'window_size',
    'shift_size': 'shift_size',
    'mlp_ratio': 'mlp_ratio',
    'qkv_bias': 'qkv_bias',
}

BLOCKS = Registry('block')


@dataclass(frozen=True)
class Declaration:
    """What a block says of itself: `parameters` are the names that `build` takes, None if it takes any."""

    name: str
    build: Callable[..., nn.Module]
    works_in: str
    replaces: tuple[str, ...]
    parameters: tuple[str, ...] | None
    sizes: Mapping[str, str]


def declaration(name: object) -> Declaration:
    """What the registered block `name` says of itself.

    Raises:
        OptionError: if there is none, with the nearest name, or it says something that makes no sense.
    """
    build = BLOCKS.module_dict.get(name) if isinstance(name, str) else None
    if build is None:
        known = sorted(BLOCKS.module_dict)
        raise OptionError(
            f'no block is registered as {name}{did_you_mean(str(name), known)} (there are {", ".join(known)})'
        )
    works_in = getattr(build, 'works_in', None)
    if works_in not in WORKS_IN:
        raise OptionError(f'the block {name} says works_in = {works_in!r}: expected one of {", ".join(WORKS_IN)}')
    replaces = getattr(build, 'replaces', ())
    replaces = (replaces,) if isinstance(replaces, str) else tuple(replaces)
    if not replaces or not set(replaces) <= set(PLACES):
        raise OptionError(f'the block {name} says replaces = {replaces!r}: expected some of {", ".join(PLACES)}')
    parameters = inspect.signature(build).parameters
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    own = getattr(build, 'sizes', {})
    sizes = {**{key: size for key, size in SIZES.items() if key in parameters}, **own}
    if not set(sizes.values()) <= set(SIZES.values()):
        raise OptionError(f'the block {name} says sizes = {own!r}: expected values among {", ".join(SIZES)}')
    return Declaration(name, build, works_in, replaces, None if is_open else tuple(parameters), sizes)


for _block in (*blocks.ATTENTIONS.values(), *blocks.FEED_FORWARDS.values()):
    BLOCKS.register_module(module=_block)
BLOCKS.register_module(name='ASTBlock', module=blocks.ast_block)
