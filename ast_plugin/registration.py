"""What this plugin registers, and when: around every import of BasicSR, repairs first, then an explicit list.

A finder on `sys.meta_path` watches a few names: `basicsr`, and the modules of ours that register something. What is
found is left as it is, only its execution gets a follow-up. So it does not matter in which order a program imports
`ast_plugin`, `basicsr`, `basicsr.archs` or `ast_plugin.archs.ast_arch`, and looking for BasicSR without importing it
(`importlib.util.find_spec`, `importlib.metadata`) stays without effect. The import system's own locks make threads wait
until BasicSR is imported, repaired and registered into.
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
"""By module, the registry of `basicsr.utils.registry` and the names of the objects that are registered under them."""

_started = False


class RegistrationError(PluginError):
    """A name of ours is taken in BasicSR's registry."""


def install() -> None:
    """Watch the imports, once a process. If BasicSR is imported already, repair and register now."""
    if not any(type(finder).__module__ == __name__ for finder in sys.meta_path):  # as a reload makes another class
        sys.meta_path.insert(0, _Finder())
    if 'basicsr' in sys.modules:
        importlib.import_module('basicsr')  # another thread may be in the middle of importing it: wait for that
        toolbox.repair_before_import()
        _follow('basicsr')


class _Finder:
    """Finds the watched modules as the other finders do, and lets their loader do something around the execution."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != 'basicsr' and fullname not in REGISTERED:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, 'find_spec'))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader:
    """A loader, or a class of them, that does something around the execution of a watched module."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)  # create_module, get_source, get_resource_reader, ...

    def exec_module(self, module):
        module.__loader__ = module.__spec__.loader = self._loader  # nobody need know that we were here
        name = module.__spec__.name
        if name == 'basicsr':
            toolbox.repair_before_import()
        self._loader.exec_module(module)
        _follow(name)


def _follow(name: str) -> None:
    """What a module that has just been imported brings about."""
    if name == 'basicsr':
        toolbox.repair_after_import()
        register_all()
    elif _started:
        _register(sys.modules[name])


def register_all() -> None:
    """Import our modules and put what they hold into BasicSR's registries.

    A module that is being imported while this runs (it imports BasicSR itself, and was imported first) is left out here
    and followed up once it is complete.

    Raises:
        RegistrationError: if a name is taken by another object.
    """
    global _started
    _started = True
    for name in REGISTERED:
        module = importlib.import_module(name)
        if not getattr(module.__spec__, '_initializing', False):
            _register(module)


def _register(module: ModuleType) -> None:
    registry, names = REGISTERED[module.__name__]
    for name in names:
        add(getattr(importlib.import_module('basicsr.utils.registry'), registry), name, getattr(module, name))


def add(registry, name: str, item) -> None:
    """Put an object into a registry of BasicSR's, and do nothing else to either.

    The same object again is no fault; nor is its successor after `importlib.reload`, which takes its place.

    Raises:
        RegistrationError: if the name is taken, naming both modules.
    """
    present = registry._obj_map.get(name, item)
    if (present.__module__, present.__qualname__) != (item.__module__, item.__qualname__):
        raise RegistrationError(
            f'{item.__module__} registers {name} in the {registry._name} registry, where {present.__module__} has '
            f'registered that name already; rename one of the two, or uninstall one of the plugins'
        )
    registry._obj_map[name] = item
