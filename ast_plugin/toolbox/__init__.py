"""Runtime repairs that make BasicSR 1.4.2 work with current torch and torchvision, with and without a GPU.

BasicSR's files are not modified. Each repair is one function; its docstring describes the fault, its cause, and where
it was reported. BasicSR's behaviour on CUDA is unchanged, except for the GPU that a process selects. The import hook
calls `repair_before_import` and `repair_after_import` around the import of `basicsr`, which runs within
`deferred_imports`; no other code needs to.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ast_plugin.errors import PluginError

VERSION = '1.4.2'

_DEFERRED = {'torch._dynamo.utils': ('is_compile_supported',), 'scipy.stats': ('multivariate_normal',)}
"""Objects that `import basicsr` takes from modules that are slow to import, and does not use, by module."""

_libraries: list = []  # keeps alive the operators defined through them
_repaired = False


def define_torchvision_operators() -> None:
    """Define the operators `torchvision::nms` and `qnms` if torchvision cannot be imported without them.

    Fault: `import torchvision` raises `operator torchvision::nms does not exist` if torch and torchvision are of
    different builds, for example a CPU build of torch and torchvision from PyPI. BasicSR never calls the operator.
    pytorch#122494.
    """
    try:
        # Only torchvision knows its libraries; an operator that one of them defines later ends the process.
        import torchvision
    except ImportError:
        return  # BasicSR reports it
    except RuntimeError as error:
        if 'torchvision::' not in str(error):
            raise
        import torch

        definitions = torch.library.Library('torchvision', 'FRAGMENT')
        for name in ('nms', 'qnms'):
            definitions.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        _libraries.append(definitions)


def provide_functional_tensor() -> None:
    """Provide `torchvision.transforms.functional_tensor` under its former name.

    Fault: `import basicsr` raises ModuleNotFoundError, because `basicsr.data.degradations` imports this module, which
    torchvision 0.17 renamed to `_functional_tensor`. BasicSR#663, #711.
    """
    name = 'torchvision.transforms.functional_tensor'
    if importlib.util.find_spec('torchvision') is None or name in sys.modules or importlib.util.find_spec(name):
        return
    module = importlib.import_module('torchvision.transforms._functional_tensor')
    sys.modules[name] = sys.modules['torchvision.transforms'].functional_tensor = module


class _Deferred:
    """Object of a module that is imported when the object is first used."""

    def __init__(self, module: str, name: str) -> None:
        self._place = module, name

    def _load(self) -> Any:
        module, name = self._place
        return getattr(_import_deferred(module), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._load()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        return getattr(self._load(), name)


class _StandIn(ModuleType):
    """Module with some deferred objects; any other attribute imports the real module."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        return getattr(_import_deferred(self.__name__), name)


def _import_deferred(name: str) -> ModuleType:
    if isinstance(sys.modules.get(name), _StandIn):
        del sys.modules[name]
    return importlib.import_module(name)


@contextmanager
def deferred_imports() -> Iterator[None]:
    """Defer imports that `import basicsr` does not need until they are used.

    Fault: `import basicsr` takes more than twice the processor time of `import torch`, and half of it goes into
    `torch._dynamo`, for one function that torchvision's RoI align calls, and into `scipy.stats`, for one distribution
    that `basicsr.data.degradations` uses in kernels of super-resolution.
    """
    names = [name for name in _DEFERRED if name not in sys.modules]
    for name in names:
        sys.modules[name] = stand_in = _StandIn(name)
        vars(stand_in).update({key: _Deferred(name, key) for key in _DEFERRED[name]})
    try:
        yield
    finally:
        for name in names:
            if isinstance(sys.modules.get(name), _StandIn):
                del sys.modules[name]


def repair_before_import() -> None:
    """Apply the repairs that `import basicsr` needs. Repeated calls have no effect."""
    define_torchvision_operators()
    provide_functional_tensor()


def repair_after_import() -> None:
    """Apply the repairs to the imported BasicSR. Repeated calls have no effect.

    Raises:
        PluginError: if the version of BasicSR is not the supported one.
    """
    global _repaired
    if _repaired:
        return
    version = sys.modules['basicsr'].__version__
    if version != VERSION:
        raise PluginError(
            f'ast_plugin repairs and extends BasicSR {VERSION}, but {version} is installed: '
            f'pip install basicsr=={VERSION}'
        )
    _repaired = True
    importlib.import_module('basicsr')  # first: an import by the repairs would wait for this one
    from ast_plugin.toolbox.repairs import REPAIRS

    for repair in REPAIRS:
        repair()
