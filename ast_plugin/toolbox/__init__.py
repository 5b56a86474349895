"""BasicSR 1.4.2, unmodified on disk, on today's torch and torchvision, with and without a GPU.

One function a repair. Each says in its docstring what the fault is and where it was reported, looks first whether the
fault is there, and answers whether it mended anything; a BasicSR that has no such fault, or that somebody else has
mended already, is left alone. What BasicSR does on CUDA stays as it is, but for
which GPU a process gets. The import hook calls `repair_before_import`
and `repair_after_import` around the import of `basicsr`, so nobody else need.
"""

import functools
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from ast_plugin.errors import OptionError, did_you_mean
from ast_plugin.toolbox import networks, resume, runs

_applied: dict[str, bool] = {}
_libraries: list = []  # operators defined by torch.library live as long as its Library objects do


class UnknownNameError(OptionError, KeyError):
    """A name that is not in a registry; a KeyError too, because BasicSR's callers may catch that."""

    __str__ = Exception.__str__  # KeyError's would quote the message


# Before BasicSR is imported


def define_torchvision_operators() -> bool:
    """Define the operators `torchvision::nms` and `qnms` where torchvision's compiled library cannot be loaded.

    Fault: beside a torch of another build (a CPU torch and the package index's torchvision, say) `import torchvision`
    raises `operator torchvision::nms does not exist`, though BasicSR never calls it. pytorch#122494.
    """
    spec = None if 'torchvision' in sys.modules else importlib.util.find_spec('torchvision')
    if spec is None or not spec.submodule_search_locations:
        return False
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
    return bool(missing)


def provide_functional_tensor() -> bool:
    """Let `torchvision.transforms.functional_tensor` be imported under its former name.

    Fault: `basicsr.data.degradations` imports it, and torchvision 0.17 renamed it to `_functional_tensor`.
    BasicSR#663, #711.
    """
    name = 'torchvision.transforms.functional_tensor'
    if importlib.util.find_spec('torchvision') is None or name in sys.modules or importlib.util.find_spec(name):
        return False
    module = importlib.import_module('torchvision.transforms._functional_tensor')
    sys.modules[name] = sys.modules['torchvision.transforms'].functional_tensor = module
    return True


# After BasicSR is imported


def explain_unknown_names() -> bool:
    """Let `Registry.get` say which names there are when it has none of the asked name.

    Fault: it prints `Name X is not found, use name: X_basicsr!` even where that does not exist either, then raises a
    KeyError without a list. BasicSR#419, #506. The fallback to `X_basicsr` stays, without the print.
    """
    from basicsr.utils.registry import Registry

    if 'print' not in Registry.get.__code__.co_names:
        return False

    def get(self, name, suffix='basicsr'):
        """The object registered as `name`, or else as `name_suffix`."""
        for candidate in (name, f'{name}_{suffix}'):
            if candidate in self:
                return self._obj_map[candidate]
        raise UnknownNameError(
            f'no {self._name} named {name!r} is registered (is its plugin installed? `basicsr list` '
            f'prints every name){did_you_mean(str(name), self.keys())}'
        )

    Registry.get = get
    return True


def start_distributed_on_cpus() -> bool:
    """Start distributed runs on machines without CUDA, by gloo.

    Fault: both starters in `dist_util` divide by the number of GPUs and set the CUDA device, and nccl is the default.
    No upstream issue known; mmcv, where the code is from, had the same.
    """
    from basicsr.utils import dist_util

    if 'is_available' in dist_util._init_dist_pytorch.__code__.co_names:
        return False
    dist_util._init_dist_pytorch = _without_cuda(_start_by_torchrun, dist_util._init_dist_pytorch)
    dist_util._init_dist_slurm = _without_cuda(_start_by_slurm, dist_util._init_dist_slurm)
    return True


def _without_cuda(starter, original):
    """`starter` by gloo where there is no CUDA, `original` unchanged where there is."""

    @functools.wraps(original)
    def start(backend, **kwargs):
        import torch

        if torch.cuda.is_available():
            return original(backend, **kwargs)
        return starter('gloo' if backend == 'nccl' else backend, **kwargs)

    return start


def _start_by_torchrun(backend: str, **kwargs) -> None:
    import torch.distributed as dist

    dist.init_process_group(backend=backend, **kwargs)


def _start_by_slurm(backend: str, port: int | None = None) -> None:
    """As BasicSR's: rank and size from SLURM, the first node as master, port 29500 if neither told nor set."""
    import torch.distributed as dist

    environ = os.environ
    if port is not None:
        environ['MASTER_PORT'] = str(port)
    environ.setdefault('MASTER_PORT', '29500')
    environ['MASTER_ADDR'] = subprocess.check_output(
        ['scontrol', 'show', 'hostname', environ['SLURM_NODELIST']], text=True
    ).split()[0]
    environ['WORLD_SIZE'] = environ['SLURM_NTASKS']
    environ['RANK'] = environ['SLURM_PROCID']
    environ['LOCAL_RANK'] = environ.get('SLURM_LOCALID', '0')
    dist.init_process_group(backend=backend)


def wrap_networks_on_cpus() -> bool:
    """Wrap networks for distributed training on CPUs.

    Fault: `BaseModel.model_to_device` gives DistributedDataParallel the current CUDA device, whatever the model's is.
    No upstream issue known.
    """
    from basicsr.models.base_model import BaseModel
    from torch.nn.parallel import DistributedDataParallel

    original = BaseModel.model_to_device
    if 'current_device' not in original.__code__.co_names:
        return False

    @functools.wraps(original)
    def model_to_device(self, net):
        if self.opt['dist'] and self.device.type == 'cpu':
            unused = self.opt.get('find_unused_parameters', False)
            return DistributedDataParallel(net.to(self.device), find_unused_parameters=unused)
        return original(self, net)

    BaseModel.model_to_device = model_to_device
    return True


def offer_torch_optimizers() -> bool:
    """Offer every optimiser of `torch.optim` by its name.

    Fault: `BaseModel.get_optimizer` of the release knows Adam alone; the repository, of the same number, knows seven.
    """
    from basicsr.models.base_model import BaseModel

    known = BaseModel.get_optimizer.__code__.co_consts
    if 'Adam' not in known or 'AdamW' in known:
        return False
    BaseModel.get_optimizer = get_optimizer
    return True


def get_optimizer(self, optim_type: str, params, lr: float, **kwargs):
    """Build an optimiser of `torch.optim`, or of the extra `pytorch_optimizer`, by its class name; a method of models.

    Raises:
        OptionError: if there is none of that name that this loop can serve, or it refuses the arguments.
    """
    from ast_plugin.models.optimizers import build_optimizer

    return build_optimizer(optim_type, params, lr, **kwargs)


def keep_cosine_at_its_end() -> bool:
    """Let `CosineAnnealingRestartLR` stay at `eta_min` when training goes on past its last period.

    Fault: no period is found there, and `restart_weights[None]` raises TypeError.
    Seen in projects built on BasicSR, AlexZou14/Wave-Mamba#6 for one.
    """
    from basicsr.models.lr_scheduler import CosineAnnealingRestartLR, get_position_from_periods

    if get_position_from_periods(2, [1]) is not None or hasattr(CosineAnnealingRestartLR.get_lr, '__wrapped__'):
        return False
    original = CosineAnnealingRestartLR.get_lr

    @functools.wraps(original)
    def get_lr(self):
        if self.last_epoch > self.cumulative_period[-1]:
            return [self.eta_min for _ in self.base_lrs]
        return original(self)

    CosineAnnealingRestartLR.get_lr = get_lr
    return True


def sample_full_batches() -> bool:
    """Train with `ast_plugin.data.sampler.EpochSampler` in the place of BasicSR's `EnlargedSampler`.

    Fault: it shuffles by the epoch alone, whatever the seed, and the loader drops the last partial batch, so that a set
    smaller than a batch trains on nothing, in silence. No upstream issue known.
    """
    from basicsr import train
    from basicsr.data.data_sampler import EnlargedSampler

    if train.EnlargedSampler is not EnlargedSampler:
        return False
    from ast_plugin.data.sampler import EpochSampler

    train.EnlargedSampler = EpochSampler
    return True


BEFORE_IMPORT = (define_torchvision_operators, provide_functional_tensor)
AFTER_IMPORT = (
    explain_unknown_names,
    start_distributed_on_cpus,
    wrap_networks_on_cpus,
    offer_torch_optimizers,
    keep_cosine_at_its_end,
    sample_full_batches,
    *runs.REPAIRS,
    *resume.REPAIRS,
    *networks.REPAIRS,
)


def repair_before_import() -> None:
    """What `import basicsr` itself needs. Doing it again changes nothing."""
    _repair(BEFORE_IMPORT)


def repair_after_import() -> None:
    """What the imported BasicSR needs. Doing it again changes nothing."""
    _repair(AFTER_IMPORT)


def _repair(repairs) -> None:
    for repair in repairs:
        _applied[repair.__name__] = repair() or _applied.get(repair.__name__, False)


def report() -> list[tuple[str, str, bool]]:
    """Of each repair its name, what it does, and whether it was needed in this process."""
    return [
        (repair.__name__, repair.__doc__.splitlines()[0], _applied.get(repair.__name__, False))
        for repair in (*BEFORE_IMPORT, *AFTER_IMPORT)
    ]
