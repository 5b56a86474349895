"""What this plugin registers, and where: an explicit list, no scan of folders and no decorators."""

import importlib
import sys
from types import ModuleType

from ast_plugin.errors import PluginError

REGISTERED: dict[str, tuple[str, ...]] = {
    'ARCH_REGISTRY': (
        'ast_plugin.archs.ast_arch:AST',
        'ast_plugin.archs.ast_arch:AST_XS',
        'ast_plugin.archs.ast_arch:AST_T',
        'ast_plugin.archs.ast_arch:AST_B',
        'ast_plugin.archs.mixed.mixed_arch:Mixed',
        'ast_plugin.archs.spandrel_arch:Spandrel',
    ),
    'MODEL_REGISTRY': ('ast_plugin.models.restoration_model:RestorationModel',),
    'DATASET_REGISTRY': (
        'ast_plugin.data.pairs_dataset:PairsDataset',
        'ast_plugin.data.synthetic_dataset:SyntheticPairsDataset',
    ),
    'LOSS_REGISTRY': (
        'ast_plugin.losses.restoration_loss:ASTCharbonnierLoss',
        'ast_plugin.losses.restoration_loss:TVLoss',
        'ast_plugin.losses.restoration_loss:EdgeLoss',
        'ast_plugin.losses.restoration_loss:FFTLoss',
        'ast_plugin.losses.restoration_loss:PSNRLoss',
    ),
    'METRIC_REGISTRY': (
        'ast_plugin.metrics.registered_metrics:calculate_psnr_matlab',
        'ast_plugin.metrics.registered_metrics:calculate_ssim_matlab',
        'ast_plugin.metrics.registered_metrics:calculate_psnr_skimage',
        'ast_plugin.metrics.registered_metrics:calculate_ssim_skimage',
        'ast_plugin.metrics.registered_metrics:calculate_psnr_y_float',
        'ast_plugin.metrics.registered_metrics:pyiqa',
    ),
}
"""By registry of `basicsr.utils.registry`, `module:name` of each object; it is registered under that name."""

MODULES: tuple[str, ...] = tuple(
    dict.fromkeys(entry.partition(':')[0] for entries in REGISTERED.values() for entry in entries)
)
"""The modules of the list, each once."""

_started = False


class RegistrationError(PluginError):
    """A name of ours is taken in BasicSR's registry."""


def register_all() -> None:
    """Register everything in the list. Doing it again changes nothing.

    A module that is being imported while this runs (it imports BasicSR itself, and was imported first) is left out here
    and followed up by the import hook once it is complete.

    Raises:
        RegistrationError: if a name is taken by another object.
    """
    global _started
    _started = True
    for name in MODULES:
        module = importlib.import_module(name)
        if not getattr(module.__spec__, '_initializing', False):
            _register_module(module)


def follow(name: str) -> None:
    """Register the objects of one module that has just been imported, if registration has begun."""
    if _started:
        _register_module(sys.modules[name])


def _register_module(module: ModuleType) -> None:
    registries = importlib.import_module('basicsr.utils.registry')
    for registry, entries in REGISTERED.items():
        for entry in entries:
            module_name, _, name = entry.partition(':')
            if module_name == module.__name__:
                add(getattr(registries, registry), name, getattr(module, name))


def add(registry, name: str, item) -> None:
    """Put an object into a registry of BasicSR's, and do nothing else to either.

    The same object again is no fault; nor is its successor after `importlib.reload`, which takes its place.

    Raises:
        RegistrationError: if the name is taken, naming both modules.
    """
    present = registry._obj_map.get(name)
    if present is item:
        return
    if present is not None and (present.__module__, present.__qualname__) != (item.__module__, item.__qualname__):
        raise RegistrationError(
            f'{item.__module__} registers {name} in the {registry._name} registry, where {present.__module__} has '
            f'registered that name already; rename one of the two, or uninstall one of the plugins'
        )
    registry._obj_map[name] = item
