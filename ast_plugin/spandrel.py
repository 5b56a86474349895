"""AST as an architecture of spandrel, for programs that load networks through it, such as chaiNNer and ComfyUI.

    import ast_plugin.spandrel
    ast_plugin.spandrel.install()
    model = spandrel.ModelLoader().load_from_file('AST_derain.safetensors')

Requires the extra `baselines`: pip install "ast_plugin[baselines]". The opposite direction, spandrel's networks in
option files, is `archs.spandrel_arch`.
"""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ast_plugin.archs.ast_arch import AST, VARIANTS
from ast_plugin.archs.networks import build_network
from ast_plugin.archs.spandrel_arch import import_spandrel
from ast_plugin.archs.state import infer_options
from ast_plugin.checkpoints import read_checkpoint
from ast_plugin.errors import CheckpointError, OptionError

spandrel = import_spandrel()
# No other network has these names; `infer_options` rejects Uformer, whose official names start alike.
_NAMES = ('bottleneck.blocks.0.attn.position_bias', 'conv.blocks.0.attn.relative_position_bias_table')


class _State(dict):
    """State dictionary with the network options of its file, as names and shapes do not determine all of them."""

    network: Mapping[str, Any]


class ASTArchitecture(spandrel.Architecture[AST]):
    """Spandrel architecture that recognises an AST state dictionary and builds its network.

    The network's options are read from the file's metadata. If the host passes the weights alone, as ComfyUI does, they
    are inferred from names and shapes; `img_size` is then 128, and attention without gates is taken as dense.
    """

    def __init__(self) -> None:
        super().__init__(id='AST', name='AST', detect=_is_ast)

    def load(self, state_dict: Mapping[str, Tensor]) -> spandrel.ImageModelDescriptor[AST]:
        """Build the network of a state dictionary with official or plugin names, and load it."""
        shown, _ = infer_options(state_dict)
        options = getattr(state_dict, 'network', {'type': 'AST', **shown})
        network = build_network(options)
        sizes = shown['embed_dim'], tuple(shown['depths'])
        variants = [name for name, row in VARIANTS.items() if (row['embed_dim'], row['depths']) == sizes]
        return spandrel.ImageModelDescriptor(
            network,
            dict(state_dict),
            self,
            purpose='Restoration',
            tags=[*variants, f'{shown["embed_dim"]}dim', options.get('attention', shown['attention']), shown['ffn']],
            supports_half=True,
            supports_bfloat16=True,
            scale=1,
            input_channels=network.in_chans,
            output_channels=network.out_chans,
        )


def install(registry: Any = None) -> None:
    """Add AST to a spandrel registry; repeated calls have no effect.

    Args:
        registry: None selects `spandrel.MAIN_REGISTRY`, which `spandrel.ModelLoader` uses.
    Raises:
        OptionError: if the registry has another architecture of this name.
    """
    registry = spandrel.MAIN_REGISTRY if registry is None else registry
    present = registry.get('AST')
    if present is None:
        registry.add(spandrel.ArchSupport.from_architecture(ASTArchitecture(), before=('Uformer',)))
    elif not isinstance(present.architecture, ASTArchitecture):
        raise OptionError(f'spandrel already has another architecture named AST: {type(present.architecture).__name__}')
    if not hasattr(spandrel.ModelLoader.load_state_dict_from_file, '__wrapped__'):
        spandrel.ModelLoader.load_state_dict_from_file = _keep_options(spandrel.ModelLoader.load_state_dict_from_file)


def _is_ast(state: Mapping[str, Any]) -> bool:
    if not any(name in state for name in _NAMES):
        return False
    try:
        infer_options(state)
    except CheckpointError:
        return False
    return True


def _keep_options(load: Callable[..., dict]) -> Callable[..., dict]:
    """Wrap spandrel's file loader to attach the network options found in a file's metadata."""

    @functools.wraps(load)
    def load_state_dict_from_file(self: spandrel.ModelLoader, path: str | os.PathLike) -> dict:
        state = load(self, path)
        if str(path).lower().endswith('.safetensors') and _is_ast(state):
            options = read_checkpoint(path).network
            if options is not None and options['type'] in ('AST', *VARIANTS):
                state = _State(state)
                state.network = options
        return state

    return load_state_dict_from_file
