"""Any registered network with blocks exchanged by rules."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.archs.mixed.adapters import record_calls
from ast_plugin.archs.networks import Trial, build_network, check_runs, input_channels, try_sizes
from ast_plugin.archs.pretrained import Pretrained
from ast_plugin.archs.state import load_into
from ast_plugin.checkpoints import read_checkpoint
from ast_plugin.errors import CheckpointError, OptionError, PluginError, ShapeError, first_line, tell_place
from ast_plugin.faults import Fault, Where
from ast_plugin.ops.tiles import run_padded

_COMPILED = 'basicsr.ops.'


class Mixed(Pretrained):
    """A registered network in which rules have exchanged modules for blocks of `block_registry.BLOCKS`.

        network_g:
          type: Mixed
          base: {type: SwinIR, upscale: 1, window_size: 8, ...}
          mix:
            - {match: 'layers.*.residual_group.blocks.*.attn', with: {type: ASSA}, keep_weights: true}
            - {match: 'layers.*.residual_group.blocks.*.mlp', with: {type: FRFN, mlp_ratio: 2}}

    Images of any size are padded by reflection to what the base takes, and the result is cropped.

    Args:
        base: `type`, the registered name of a network, and its arguments.
        mix: rules, see `rules.Rule`. A module may be meant by one rule only.
        base_weights: a weights file of the base, loaded before anything is exchanged: official, BasicSR's or
            safetensors, read without running anything in it. It says where training starts; a file of the mixed
            network's own weights holds all of them.
        base_param_key: the key of the weights in that file; by default the first of the usual ones.
        size_multiple: what both sides of an image must be multiples of for the base; found out by default.
        nominal_size: side of the images that it is meant for, in pixels, such as the training patch: windows larger
            than the map that such an image has at a place are refused.
    Raises:
        OptionError: for a rule, a base or a file that cannot be used; says which, and what is near.
        ShapeError: for a block that cannot stand where a rule puts it, with the shapes.
        CheckpointError: if the weights are not those of the base.
    """

    takes_any_size = True
    network_options = ('base',)  # arguments that are a network's options themselves: option files are checked with it
    transient_options = ('base_weights', 'base_param_key')  # not needed to build the network for weights of its own

    def __init__(
        self,
        base: dict,
        mix: list,
        base_weights: str | None = None,
        base_param_key: str | None = None,
        size_multiple: int | None = None,
        nominal_size: int = 64,
    ) -> None:
        super().__init__()
        # mmengine, which holds the registry of blocks, is heavy: only who builds a Mixed pays for it.
        from ast_plugin.archs.mixed import rules

        for key, value in (('size_multiple', size_multiple), ('nominal_size', nominal_size)):
            if value is not None and (type(value) is not int or value < 1):
                raise OptionError(f'{key}: expected a whole number of 1 or more, got {value!r}')
        read = rules.read_rules(mix)
        # Bases compute while they are built, which cannot be done without values.
        without_values = torch.get_default_device().type == 'meta'
        with torch.device('cpu') if without_values else nullcontext():
            self.base = build_base(base)
            if base_weights is not None:
                with tell_place('base_weights'):
                    load_into(self.base, read_checkpoint(Path(base_weights).expanduser(), base_param_key))
            assigned = rules.assign(self.base, read)
            first = [module.in_channels for module in self.base.modules() if isinstance(module, nn.Conv2d)][:1]
            channels = [input_channels(base, self.base), 3, 1, *first]
            trial = try_sizes(self.base, channels, nominal_size, size_multiple, record_calls)
            self.exchanges = rules.exchange(self.base, assigned, trial)
            _check_mixed(self.base, trial)
        self.in_channels = trial.channels
        self.size_multiple, self.scale = trial.multiple, trial.scale
        if hasattr(self.base, 'block_classes'):
            self.block_classes = self.base.block_classes

    @staticmethod
    def find_faults(options: Mapping[str, Any], where: Where) -> list[Fault]:
        """What is wrong with the rules of options that stand at `where` in an option file."""
        from ast_plugin.archs.mixed import rules

        return rules.rule_faults(options['mix'], (*where, 'mix')) if 'mix' in options else []

    def forward(self, x: Tensor) -> Tensor:
        """Restore images.

        Args:
            x: [B, C, H, W], any H and W from 1 up.
        Returns:
            [B, D, s·H, s·W], s being `scale`.
        Raises:
            ShapeError: if x has other dimensions, or the base gives no tensor, as some networks do in training.
        """
        if x.ndim != 4 or 0 in x.shape:
            raise ShapeError(f'Mixed takes images [B, C, H, W] with no side of 0, not {list(x.shape)}')
        H, W = x.shape[-2:]
        return run_padded(self.base, x, -H % self.size_multiple, -W % self.size_multiple)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False):
        """Load the mixed network's own weights.

        Raises:
            CheckpointError: if they are of the base alone: those are given as `base_weights`.
        """
        if strict and state_dict and not any(name.startswith(('base.', 'module.base.')) for name in state_dict):
            raise CheckpointError(
                f'these are not weights of a Mixed, whose names begin with base. (here is {next(iter(state_dict))}); '
                'weights of the base alone are given as network_g.base_weights'
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def build_base(options: Mapping[str, Any]) -> nn.Module:
    """Build the network that blocks are to be mixed into.

    Args:
        options: `type` and arguments.
    Raises:
        OptionError: if it cannot be built, is a Mixed or has one in it, or needs compiled operators.
    """
    if not isinstance(options, Mapping) or not isinstance(options.get('type'), str):
        raise OptionError(f'base: expected {{type: NAME, ...}}, got {options!r:.60}')
    name = options['type']
    if name == Mixed.__name__:
        raise OptionError('base.type: Mixed cannot be the base of a Mixed: put the rules of both into one list')
    with tell_place('base'):
        base = build_network(options)
    for module in base.modules():
        if isinstance(module, Mixed):
            raise OptionError(f'base.type: {name} has a Mixed in it, which cannot be mixed again')
        compiled = next((kind for kind in type(module).__mro__ if kind.__module__.startswith(_COMPILED)), None)
        if compiled is not None:
            raise OptionError(
                f'base.type: {name} needs operators compiled for CUDA ({compiled.__module__}, {compiled.__name__}), '
                'and Mixed has to run its base anywhere: take a network without them'
            )
    return base


def _check_mixed(base: nn.Module, trial: Trial) -> None:
    try:
        check_runs(base, trial)
    except PluginError as error:
        raise type(error)(f'the mixed network does not run: {error}') from error
    except Exception as error:  # whatever somebody's network raises about a module that is not its own
        raise OptionError(
            f'{type(base).__name__} does not run with these blocks in it, it does more with the modules than calling '
            f'them: {type(error).__name__}: {first_line(error)}'
        ) from error
