"""Networks of the package spandrel as baselines: NAFNet, Uformer, Restormer (in spandrel_extra_arches) and others.

    network_g: {type: Spandrel, name: NAFNet, width: 16, enc_blk_nums: [1, 1, 1, 4], dec_blk_nums: [1, 1, 1, 1]}

Requires the extra `baselines`: pip install "ast_plugin[baselines]". The networks in spandrel_extra_arches, including
Restormer, have licences that restrict their use; read them before any use beyond comparisons.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ast_plugin.errors import BackendUnavailable, OptionError, did_you_mean, one_line
from ast_plugin.ops.tiles import run_padded

_EXTRA = 'pip install "ast_plugin[baselines]"'
_PREFIX = 'network.'
# Networks of spandrel_extra_arches, which may be missing although spandrel is installed.
_IN_SECOND_PACKAGE = ('Restormer', 'MPRNet', 'MIRNet_v2', 'M3SNet', 'SRFormer')
# Hyperparameters that affect results, but not names and shapes.
_NOT_IN_WEIGHTS = {'Uformer': ('img_size',)}


class Spandrel(nn.Module):
    """Network of spandrel, selected by name, on images of any size.

    Images are padded by reflection as the network requires, and the result is cropped. The names of the weights are
    those of the original network: released weights load unchanged, and weights trained here load in any program that
    uses spandrel.

    Args:
        name: class name of the network, such as Restormer, NAFNet or Uformer; the error for an unknown name lists all.
        options: hyperparameters of the network; the others have its defaults.
    Shapes:
        [B, C, H, W] in [0, 1] to [B, C, s·H, s·W], where s is 1 for restoration.
    Raises:
        BackendUnavailable: if spandrel is not installed.
        OptionError: if there is no such network, or it does not have these hyperparameters.
    """

    takes_any_size = True

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        architecture, network_type = _row(name)
        known = inspect.signature(network_type).parameters
        for key in options:
            if key not in known:
                known = f'{did_you_mean(key, known)} (expected {", ".join(known)})'
                raise OptionError(f'Spandrel: {name} has no option {key}{known}')
        self.network = network_type(**options)
        # spandrel derives the size requirements from the hyperparameters when it loads a state dict.
        descriptor = architecture.load(self.network.state_dict())
        if not isinstance(descriptor, import_spandrel().ImageModelDescriptor):
            raise OptionError(f'Spandrel: {name} is an inpainting network, expected a restoration network')
        self.scale = descriptor.scale
        self.sizes = descriptor.size_requirements
        self._call = getattr(descriptor, '_call_fn', nn.Module.__call__)
        self.register_load_state_dict_pre_hook(_add_prefix)
        self.register_state_dict_post_hook(_remove_prefix)

    def forward(self, image: Tensor) -> Tensor:
        """Restore a batch of images."""
        height, width = image.shape[-2:]
        right, below = self.sizes.get_padding(width, height)
        return run_padded(functools.partial(self._call, self.network), image, below, right)

    @staticmethod
    def class_for(options: Mapping[str, Any]) -> type[nn.Module]:
        """Return the network class whose signature defines the options except `name`, for checking option files.

        Raises:
            OptionError, BackendUnavailable: see the class.
        """
        return _row(options.get('name'))[1]


def recognise(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    """Recognise a network and its hyperparameters from the names and shapes of its weights.

    Returns:
        The options of `Spandrel` (`type`, `name` and hyperparameters), and a line for each that had to be assumed.
    Raises:
        OptionError: if spandrel does not recognise the network.
        BackendUnavailable: if spandrel is not installed.
    """
    spandrel = import_spandrel()
    try:
        descriptor = spandrel.MAIN_REGISTRY.load(dict(state))
    except spandrel.UnsupportedModelError:
        raise OptionError('spandrel does not recognise the network of these weights') from None
    except (RuntimeError, KeyError, ValueError, AssertionError) as error:
        raise OptionError(f'spandrel cannot infer the hyperparameters of these weights: {one_line(error)}') from error
    network = descriptor.model
    name = type(network).__name__
    if _rows().get(name, (None, None))[1] is not type(network):
        raise OptionError(f'{name} of spandrel cannot be built by name')
    known = inspect.signature(type(network)).parameters
    stored = {key: value for key, value in network.hyperparameters.items() if key in known and _is_plain(value)}
    assumed = [
        f'{key} cannot be inferred from weights: assuming {stored[key]}' for key in _NOT_IN_WEIGHTS.get(name, ())
    ]
    return {'type': 'Spandrel', 'name': name, **stored}, assumed


def import_spandrel() -> Any:
    """Import spandrel, and register the networks of spandrel_extra_arches if that is installed.

    Raises:
        BackendUnavailable: if spandrel is not installed.
    """
    # Importing BasicSR first applies the repair that makes torchvision, which spandrel imports, work with any torch.
    import basicsr  # noqa: F401

    try:
        import spandrel
    except ImportError as error:
        if (error.name or '').partition('.')[0] not in ('spandrel', 'einops'):
            raise
        raise BackendUnavailable(f'Spandrel needs the package {error.name}, which is not installed: {_EXTRA}') from None
    try:
        import spandrel_extra_arches
    except ImportError:
        return spandrel
    spandrel_extra_arches.install(ignore_duplicates=True)
    return spandrel


def _rows() -> dict[str, tuple[Any, type[nn.Module]]]:
    """Map class names of networks to architecture and class, which is the generic parameter of the architecture."""
    spandrel = import_spandrel()
    rows = {}
    for support in spandrel.MAIN_REGISTRY:
        for base in getattr(type(support.architecture), '__orig_bases__', ()):
            if typing.get_origin(base) is spandrel.Architecture:
                (built,) = typing.get_args(base)
                for network_type in typing.get_args(built) or (built,):
                    rows.setdefault(network_type.__name__, (support.architecture, network_type))
    return rows


def _row(name: Any) -> tuple[Any, type[nn.Module]]:
    rows = _rows()
    if name in rows:
        return rows[name]
    if name in _IN_SECOND_PACKAGE:
        raise BackendUnavailable(f'{name} is in the package spandrel_extra_arches, which is not installed: {_EXTRA}')
    known = did_you_mean(str(name), rows) or f'; available: {", ".join(sorted(rows))}'
    raise OptionError(f'Spandrel: expected the name of a network, got {name!r}{known}')


def _is_plain(value: Any) -> bool:
    """Whether an option file can hold a value."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _add_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[f'{prefix}{_PREFIX}{key[len(prefix) :]}'] = state.pop(key)


def _remove_prefix(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    long = f'{prefix}{_PREFIX}'
    for key in [key for key in state if key.startswith(long)]:
        state[f'{prefix}{key[len(long) :]}'] = state.pop(key)
