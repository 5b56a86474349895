"""Runtime repairs that make BasicSR 1.4.2 work with current torch and torchvision, with and without a GPU.

BasicSR's files are not modified. Each repair is one function; its docstring describes the fault, its cause, and where
it was reported. BasicSR's behaviour on CUDA is unchanged, except for the GPU that a process selects. The import hook
calls `repair_before_import` and `repair_after_import` around the import of `basicsr`; no other code needs to.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

from ast_plugin.errors import PluginError

VERSION = '1.4.2'

_libraries: list = []  # keeps alive the operators defined through them
_repaired = False


def define_torchvision_operators() -> None:
    """Define the operators `torchvision::nms` and `qnms` if torchvision's compiled library cannot be loaded.

    Fault: `import torchvision` raises `operator torchvision::nms does not exist` if torch and torchvision are of
    different builds, for example a CPU build of torch and torchvision from PyPI. BasicSR never calls the operator.
    pytorch#122494.
    """
    spec = None if 'torchvision' in sys.modules else importlib.util.find_spec('torchvision')
    if spec is None or not spec.submodule_search_locations:
        return
    import torch

    for library in Path(spec.submodule_search_locations[0]).glob('_C.*'):
        try:
            torch.ops.load_library(str(library))  # torchvision loads it again, which is harmless
        except OSError:
            continue
    missing = [name for name in ('nms', 'qnms') if not hasattr(torch.ops.torchvision, name)]
    if missing:
        definitions = torch.library.Library('torchvision', 'FRAGMENT')
        for name in missing:
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
