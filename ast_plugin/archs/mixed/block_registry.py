"""BLOCKS: registry of the blocks that can be mixed into networks, the plugin's and third-party ones.

    from ast_plugin.archs.mixed.block_registry import BLOCKS

    @BLOCKS.register_module()
    class GatedConv(nn.Module):
        works_in = 'nchw'
        replaces = ('maps', 'tokens')

        def __init__(self, dim: int) -> None: ...
        def forward(self, x: Tensor) -> Tensor: ...

The command line finds such a block if its module is an entry point of the group `basicsr.plugins`.

`works_in` is the layout of the block's input and output:

    nhwc     forward(x), x [B, H, W, C]
    nchw     forward(x), x [B, C, H, W]
    tokens   forward(x, size), x [B, H·W, C] and size (H, W)
    windows  forward(x, mask), x [num_windows·B, window², C] and mask [num_windows, window², window²] or None
    any      forward(x), x [..., C], each token independently

`replaces` lists the supported positions: 'windows', 'tokens' and 'maps'. For 'windows', a block with another layout
needs a method attend_windows(x, mask) with the signature of forward for works_in = 'windows'. Constructor parameters
with a name in `SIZES` are inferred from the replaced module; the attribute `sizes` adds further names, for example
{'width': 'dim'}.
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
SIZES = {  # name of a constructor parameter -> name of the size
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
    """Declared properties of a block; `parameters` are the parameter names of `build`, None if it accepts any."""

    name: str
    build: Callable[..., nn.Module]
    works_in: str
    replaces: tuple[str, ...]
    parameters: tuple[str, ...] | None
    sizes: Mapping[str, str]


def declaration(name: object) -> Declaration:
    """Return the declaration of a registered block.

    Raises:
        OptionError: if there is none, with a similar name, or its declaration is invalid.
    """
    build = BLOCKS.module_dict.get(name) if isinstance(name, str) else None
    if build is None:
        known = sorted(BLOCKS.module_dict)
        raise OptionError(
            f'no block is registered as {name}{did_you_mean(str(name), known)} (available: {", ".join(known)})'
        )
    works_in = getattr(build, 'works_in', None)
    if works_in not in WORKS_IN:
        raise OptionError(f'the block {name} has works_in = {works_in!r}: expected one of {", ".join(WORKS_IN)}')
    replaces = getattr(build, 'replaces', ())
    replaces = (replaces,) if isinstance(replaces, str) else tuple(replaces)
    if not replaces or not set(replaces) <= set(PLACES):
        raise OptionError(f'the block {name} has replaces = {replaces!r}: expected some of {", ".join(PLACES)}')
    parameters = inspect.signature(build).parameters
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    own = getattr(build, 'sizes', {})
    sizes = {**{key: size for key, size in SIZES.items() if key in parameters}, **own}
    names = dict.fromkeys(SIZES.values())
    if not names.keys() >= set(sizes.values()):
        raise OptionError(f'the block {name} has sizes = {own!r}: expected values among {", ".join(names)}')
    return Declaration(name, build, works_in, replaces, None if is_open else tuple(parameters), sizes)


for _block in (*blocks.ATTENTIONS.values(), *blocks.FEED_FORWARDS.values(), blocks.ASTBlock):
    BLOCKS.register_module(module=_block)
