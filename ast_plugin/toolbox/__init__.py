"""BasicSR 1.4.2, unmodified on disk, on today's torch and torchvision, with and without a GPU.

One function a repair. Each says in its docstring what the fault is and where it was reported. What BasicSR does on CUDA
stays as it is, but for which GPU a process gets. The import hook calls `repair_before_import` and `repair_after_import`
around the import of `basicsr`, so nobody else need.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

from ast_plugin.errors import PluginError

VERSION = '1.4.2'

_libraries: list = []  # operators defined by torch.library live as long as its Library objects do
_repaired = False


def define_torchvision_operators() -> None:
    """Define the operators `torchvision::nms` and `qnms` where torchvision's compiled library cannot be loaded.

    Fault: beside a torch of another build (a CPU torch and the package index's torchvision, say) `import torchvision`
    raises `operator torchvision::nms does not exist`, though BasicSR never calls it. pytorch#122494.
    """
    spec = None if 'torchvision' in sys.modules else importlib.util.find_spec('torchvision')
    if spec is None or not spec.submodule_search_locations:
        return
    import torch

    for library in Path(spec.submodule_search_locations[0]).glob('_C.*'):
        try:
            torch.ops.load_library(str(library))  # as torchvision itself will do; loading twice is harmless
        except OSError:
            continue
    missing = [name for name in ('nms', 'qnms') if not hasattr(torch.ops.torchvision, name)]
    if missing:
        definitions = torch.library.Library('torchvision', 'FRAGMENT')
        for name in missing:
            definitions.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        _libraries.append(definitions)


def provide_functional_tensor() -> None:
    """Let `torchvision.transforms.functional_tensor` be imported under its former name.

    Fault: `basicsr.data.degradations` imports it, and torchvision 0.17 renamed it to `_functional_tensor`.
    BasicSR#663, #711.
    """
    name = 'torchvision.transforms.functional_tensor'
    if importlib.util.find_spec('torchvision') is None or name in sys.modules or importlib.util.find_spec(name):
        return
    module = importlib.import_module('torchvision.transforms._functional_tensor')
    sys.modules[name] = sys.modules['torchvision.transforms'].functional_tensor = module


def repair_before_import() -> None:
    """What `import basicsr` itself needs. Doing it again changes nothing."""
    define_torchvision_operators()
    provide_functional_tensor()


def repair_after_import() -> None:
    """What the imported BasicSR needs. Doing it again changes nothing.

    Raises:
        PluginError: if it is another BasicSR than the one that the repairs are for.
    """
    global _repaired
    if _repaired:
        return
    version = sys.modules['basicsr'].__version__
    if version != VERSION:
        raise PluginError(
            f'ast_plugin repairs and extends BasicSR {VERSION}, and {version} is installed: '
            f'pip install basicsr=={VERSION}'
        )
    _repaired = True
    importlib.import_module('basicsr')  # at first: what imports it there must not be what this module waits for
    from ast_plugin.toolbox.repairs import REPAIRS

    for repair in REPAIRS:
        repair()
