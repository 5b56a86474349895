"""Mixed: any registered network with modules replaced or extended by blocks."""

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.archs.mixed.adapters import MixedIn, record_calls
from ast_plugin.archs.networks import Trial, build_network, check_runs, input_channels, try_sizes
from ast_plugin.archs.pretrained import Pretrained
from ast_plugin.archs.state import load_into
from ast_plugin.checkpoints import read_checkpoint
from ast_plugin.errors import CheckpointError, OptionError, PluginError, ShapeError, first_line, tell_place
from ast_plugin.faults import Fault, Where
from ast_plugin.ops.tiles import run_padded

_COMPILED = 'basicsr.ops.'


class Mixed(Pretrained):
    """Registered network in which rules replace or extend modules by blocks of `block_registry.BLOCKS`.

        network_g:
          type: Mixed
          base: {type: SwinIR, upscale: 1, window_size: 8, ...}
          mix:
            - {match: 'layers.*.residual_group.blocks.*.attn', with: {type: ASSA}, keep_weights: true}
            - {match: 'layers.*.residual_group.blocks.*.mlp', with: {type: FRFN, mlp_ratio: 2}}

    Images of any size are padded by reflection to a size that the base accepts, and the result is cropped.

    Args:
        base: `type`, the registered name of a network, and its arguments.
        mix: rules, see `rules.Rule`. A module must not match more than one rule.
        base_weights: weights file of the base, loaded before modules are replaced: official, BasicSR's or safetensors,
            read without executing code. Only used to initialise training; weights files of the mixed network are
            complete.
        base_param_key: key of the weights in that file; by default the first of the usual ones.
        size_multiple: number that H and W must be multiples of for the base; by default found by trial.
        nominal_size: typical side length of images in pixels, such as the size of training patches: windows larger than
            the corresponding feature map are rejected.
    Raises:
        OptionError: if a rule, the base or a file is invalid; the message suggests similar names.
        ShapeError: if a block does not fit its position; the message includes the shapes.
        CheckpointError: if the weights do not match the base.
    """

    takes_any_size = True
    network_options = ('base',)  # arguments that are options of a network, and are checked as such
    transient_options = ('base_weights', 'base_param_key')  # not needed to load weights of the mixed network

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
        # Imported here because mmengine, used for the registry of blocks, is slow to import.
        from ast_plugin.archs.mixed import rules

        for key, value in (('size_multiple', size_multiple), ('nominal_size', nominal_size)):
            if value is not None and (type(value) is not int or value < 1):
                raise OptionError(f'{key}: expected a whole number of 1 or more, got {value!r}')
        read = rules.read_rules(mix)
        # Networks compute values in their constructors, which fails on the meta device.
        without_values = torch.get_default_device().type == 'meta'
        with torch.device('cpu') if without_values else nullcontext():
            self.base = build_base(base)
            if base_weights is not None:
                with tell_place('base_weights'):
                    load_into(self.base, read_checkpoint(Path(os.path.expanduser(base_weights)), base_param_key))
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
        """Return the faults in the rules of options located at `where` in an option file."""
        from ast_plugin.archs.mixed import rules

        return rules.rule_faults(options['mix'], (*where, 'mix')) if 'mix' in options else []

    def forward(self, x: Tensor) -> Tensor:
        """Restore images.

        Args:
            x: [B, C, H, W], with any H and W >= 1.
        Returns:
            [B, D, s·H, s·W], where s is `scale`.
        Raises:
            ShapeError: if x has other dimensions, or the base does not return a tensor, as some networks in training.
        """
        if x.ndim != 4 or 0 in x.shape:
            raise ShapeError(f'Mixed expects non-empty images [B, C, H, W], got {list(x.shape)}')
        H, W = x.shape[-2:]
        return run_padded(self.base, x, -H % self.size_multiple, -W % self.size_multiple)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False):
        """Load a state dict of the mixed network.

        Raises:
            CheckpointError: if it belongs to the base alone; use `base_weights` for such weights.
        """
        if strict and state_dict and not any(name.startswith(('base.', 'module.base.')) for name in state_dict):
            raise CheckpointError(
                f'expected weights of a Mixed network, with names that start with base., got {next(iter(state_dict))}; '
                'specify weights of the base alone as network_g.base_weights'
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def build_base(options: Mapping[str, Any]) -> nn.Module:
    """Build the base of a mixed network.

    Args:
        options: `type` and arguments.
    Raises:
        OptionError: if it cannot be built, is or contains a Mixed, or needs compiled operators.
    """
    if not isinstance(options, Mapping) or not isinstance(options.get('type'), str):
        raise OptionError(f'base: expected {{type: NAME, ...}}, got {options!r:.60}')
    name = options['type']
    if name == Mixed.__name__:
        raise OptionError('base.type: Mixed cannot be the base of a Mixed: combine the rules of both in one list')
    with tell_place('base'):
        base = build_network(options)
    for module in base.modules():
        if isinstance(module, Mixed):
            raise OptionError(f'base.type: {name} contains a Mixed, which cannot be mixed again')
        compiled = next((kind for kind in type(module).__mro__ if kind.__module__.startswith(_COMPILED)), None)
        if compiled is not None:
            raise OptionError(
                f'base.type: {name} needs operators compiled for CUDA ({compiled.__module__}, {compiled.__name__}), '
                'but Mixed must be able to run its base on any device: use a network without them'
            )
    return base


def _check_mixed(base: nn.Module, trial: Trial) -> None:
    try:
        calls = check_runs(base, trial, record_calls)
    except PluginError as error:
        raise type(error)(f'the mixed network does not run: {error}') from error
    except Exception as error:  # third-party networks may raise anything if a module is replaced
        raise OptionError(
            f'{type(base).__name__} does not run with these blocks, it uses the modules in other ways than calling '
            f'them: {type(error).__name__}: {first_line(error)}'
        ) from error
    for name, module in base.named_modules():
        if isinstance(module, MixedIn) and len(calls.get(name, ())) < len(trial.records[1][module.site.name]):
            raise OptionError(
                f'{type(base).__name__} does not use the block at {module.site.name}: it calls the original through a '
                'plain list or another reference that is no registered submodule'
            )
