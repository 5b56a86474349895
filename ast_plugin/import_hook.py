"""Do our part whenever BasicSR is imported: repairs before and after it, then registration.

A finder on `sys.meta_path` watches a few names: `basicsr`, and the modules of ours that register something. What is
found is left as it is, only its execution gets a follow-up. So it does not matter in which order a program imports
`ast_plugin`, `basicsr`, `basicsr.archs` or `ast_plugin.archs.ast_arch`, and looking for BasicSR without importing it
(`importlib.util.find_spec`, `importlib.metadata`) stays without effect. The import system's own locks make threads wait
until BasicSR is imported, repaired and registered into.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder

from ast_plugin import registration, toolbox


class _FollowedLoader(Loader):
    """A loader that does something before and after another loader has executed the module."""

    def __init__(self, loader, before, after):
        self._loader, self._before, self._after = loader, before, after

    def __getattr__(self, name):
        return getattr(self._loader, name)  # get_source, get_resource_reader, ...

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__loader__ = module.__spec__.loader = self._loader  # nobody need know that we were here
        self._before()
        self._loader.exec_module(module)
        self._after()


class _Finder(MetaPathFinder):
    """Find the watched modules as the other finders do, and follow up their execution."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == 'basicsr':
            before, after = toolbox.repair_before_import, _follow_basicsr
        elif fullname in registration.MODULES:
            before, after = _nothing, lambda: registration.follow(fullname)
        else:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, 'find_spec'))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _FollowedLoader(spec.loader, before, after)
        return spec


def _nothing() -> None:
    """Before our own modules there is nothing to do."""


def _follow_basicsr() -> None:
    toolbox.repair_after_import()
    registration.register_all()


def install() -> None:
    """Watch the imports, once a process. If BasicSR is imported already, repair and register now."""
    ours = (_Finder.__module__, _Finder.__qualname__)  # by name: after a reload of this module the class is another
    if not any((type(finder).__module__, type(finder).__qualname__) == ours for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if 'basicsr' in sys.modules:
        importlib.import_module('basicsr')  # another thread may be in the middle of importing it: wait for that
        toolbox.repair_before_import()
        _follow_basicsr()
