"""Import hook that repairs BasicSR and registers the plugin's objects when BasicSR is imported.

A finder on `sys.meta_path` intercepts `basicsr` and the plugin's modules in `REGISTERED`. The modules themselves are
loaded unchanged; the hook only runs code before and after their execution. A program can therefore import
`ast_plugin`, `basicsr`, `basicsr.archs` and `ast_plugin.archs.ast_arch` in any order, and looking BasicSR up without
importing it (`importlib.util.find_spec`, `importlib.metadata`) has no side effect. The import system's locks make other
threads wait until BasicSR is imported, repaired and extended.
"""

import importlib
import sys
from types import ModuleType

from ast_plugin import toolbox
from ast_plugin.errors import PluginError

REGISTERED: dict[str, tuple[str, tuple[str, ...]]] = {
    'ast_plugin.archs.ast_arch': ('ARCH_REGISTRY', ('AST', 'AST_XS', 'AST_T', 'AST_B')),
    'ast_plugin.archs.mixed.mixed_arch': ('ARCH_REGISTRY', ('Mixed',)),
    'ast_plugin.archs.spandrel_arch': ('ARCH_REGISTRY', ('Spandrel',)),
    'ast_plugin.models.restoration_model': ('MODEL_REGISTRY', ('RestorationModel',)),
    'ast_plugin.data.pairs_dataset': ('DATASET_REGISTRY', ('PairsDataset', 'SyntheticPairsDataset')),
    'ast_plugin.losses': (
        'LOSS_REGISTRY',
        ('ASTCharbonnierLoss', 'TVLoss', 'EdgeLoss', 'FFTLoss', 'PSNRLoss'),
    ),
    'ast_plugin.metrics.registered_metrics': (
        'METRIC_REGISTRY',
        (
            'calculate_psnr_matlab',
            'calculate_ssim_matlab',
            'calculate_psnr_skimage',
            'calculate_ssim_skimage',
            'calculate_psnr_y_float',
            'pyiqa',
        ),
    ),
}
"""By module: the registry in `basicsr.utils.registry`, and the names of the objects to register."""


class RegistrationError(PluginError):
    """A name that the plugin registers is already used in BasicSR's registry."""


def install() -> None:
    """Install the import hook, once per process. If BasicSR is already imported, repair and register at once."""
    if not any(type(finder).__module__ == __name__ for finder in sys.meta_path):  # by name: reload creates a new class
        sys.meta_path.insert(0, _Finder())
    if 'basicsr' in sys.modules:
        importlib.import_module('basicsr')  # wait for another thread that may be importing it
        toolbox.repair_before_import()
        _follow('basicsr')


class _Finder:
    """Finder that delegates to the other finders and wraps the loader of the intercepted modules."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != 'basicsr' and fullname not in REGISTERED:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, 'find_spec'))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader:
    """Wrapper of a loader that runs the repairs before and after the execution of a module."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)  # create_module, get_source, get_resource_reader, ...

    def exec_module(self, module):
        module.__loader__ = module.__spec__.loader = self._loader  # the module shows its original loader
        name = module.__spec__.name
        if name == 'basicsr':
            with toolbox.deferred_imports():
                toolbox.repair_before_import()
                self._loader.exec_module(module)
        else:
            self._loader.exec_module(module)
        _follow(name)


def _follow(name: str) -> None:
    """Repair or register after a module has been executed."""
    if name == 'basicsr':
        toolbox.repair_after_import()
        register_all()
    elif 'basicsr' in sys.modules:
        _register(sys.modules[name])


def register_all() -> None:
    """Import the modules in `REGISTERED` and register their objects with BasicSR.

    A module whose import is still in progress (it was imported first and imports BasicSR itself) is skipped here and
    registered once its import is complete.

    Raises:
        RegistrationError: if a name is already used by another object.
    """
    for name in REGISTERED:
        module = importlib.import_module(name)
        if not getattr(module.__spec__, '_initializing', False):
            _register(module)


def _register(module: ModuleType) -> None:
    registry, names = REGISTERED[module.__name__]
    for name in names:
        add(getattr(importlib.import_module('basicsr.utils.registry'), registry), name, getattr(module, name))


def add(registry, name: str, item) -> None:
    """Add an object to one of BasicSR's registries without modifying either.

    Adding an object again has no effect; after `importlib.reload`, the new object replaces the old one.

    Raises:
        RegistrationError: if the name is already used by another object; the message names both modules.
    """
    present = registry._obj_map.get(name, item)
    if (present.__module__, present.__qualname__) != (item.__module__, item.__qualname__):
        raise RegistrationError(
            f'{item.__module__} registers {name} in the {registry._name} registry, where {present.__module__} has '
            f'already registered that name; rename one of the two, or uninstall one of the plugins'
        )
    registry._obj_map[name] = item
