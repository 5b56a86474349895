"""Repairs of BasicSR's registries, networks, optimisers and distributed start."""

import functools
import os
import subprocess
import sys
import warnings
from contextlib import suppress

import cv2
import torch
import torch.distributed
from basicsr.archs.srresnet_arch import MSRResNet
from basicsr.archs.swinir_arch import WindowAttention
from basicsr.models.base_model import BaseModel
from basicsr.models.lr_scheduler import CosineAnnealingRestartLR
from basicsr.utils import dist_util, img_util
from basicsr.utils.file_client import FileClient
from basicsr.utils.registry import Registry
from torch.nn.parallel import DistributedDataParallel

from ast_plugin.data.image_files import decode_rgb
from ast_plugin.errors import DataError, OptionError, did_you_mean
from ast_plugin.models.optimizers import build_optimizer


class UnknownNameError(OptionError, KeyError):
    """A name that is not in a registry; a KeyError too, because BasicSR's callers may catch that."""

    __str__ = Exception.__str__  # KeyError's would quote the message


def explain_unknown_names() -> None:
    """Let `Registry.get` say which names there are when it has none of the asked name.

    Fault: it prints `Name X is not found, use name: X_basicsr!` even where that does not exist either, then raises a
    KeyError without a list. BasicSR#419, #506. The fallback to `X_basicsr` stays, without the print.
    """

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


def start_distributed_on_cpus() -> None:
    """Start distributed runs on machines without CUDA, by gloo.

    Fault: both starters in `dist_util` divide by the number of GPUs and set the CUDA device, and nccl is the default.
    No upstream issue known; mmcv, where the code is from, had the same.
    """

    by_torchrun, by_slurm = dist_util._init_dist_pytorch, dist_util._init_dist_slurm

    @functools.wraps(by_torchrun)
    def init_dist_pytorch(backend, **kwargs):
        if torch.cuda.is_available():
            return by_torchrun(backend, **kwargs)
        torch.distributed.init_process_group(backend='gloo' if backend == 'nccl' else backend, **kwargs)

    @functools.wraps(by_slurm)
    def init_dist_slurm(backend, port=None):
        """As BasicSR's: rank and size from SLURM, the first node as master, port 29500 if neither told nor set."""
        if torch.cuda.is_available():
            return by_slurm(backend, port)
        environ = os.environ
        environ['MASTER_PORT'] = str(port) if port is not None else environ.get('MASTER_PORT', '29500')
        hosts = subprocess.check_output(['scontrol', 'show', 'hostname', environ['SLURM_NODELIST']], text=True)
        environ['MASTER_ADDR'] = hosts.split()[0]
        environ['WORLD_SIZE'], environ['RANK'] = environ['SLURM_NTASKS'], environ['SLURM_PROCID']
        environ['LOCAL_RANK'] = environ.get('SLURM_LOCALID', '0')
        torch.distributed.init_process_group(backend='gloo' if backend == 'nccl' else backend)

    dist_util._init_dist_pytorch, dist_util._init_dist_slurm = init_dist_pytorch, init_dist_slurm


def place_by_local_rank() -> None:
    """Give each process the GPU that its launcher meant for it.

    Fault: `_init_dist_pytorch` takes GPU `rank % count` of its machine, which is another's where machines have more
    GPUs than processes. BasicSR#626 is about the older flag; torchrun tells by LOCAL_RANK.
    """
    original = dist_util._init_dist_pytorch

    @functools.wraps(original)
    def start(backend, **kwargs):
        original(backend, **kwargs)
        if torch.cuda.is_available() and 'LOCAL_RANK' in os.environ:
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']) % torch.cuda.device_count())

    dist_util._init_dist_pytorch = start


def compute_on_the_device() -> None:
    """Let models compute on the device of the options, where they name one.

    Fault: `BaseModel` knows CUDA and, without GPUs, the CPU; MPS it cannot be told of. No upstream issue known.
    """
    original = BaseModel.__init__

    @functools.wraps(original)
    def __init__(self, opt):
        original(self, opt)
        self.device = torch.device(opt.get('device') or self.device)

    BaseModel.__init__ = __init__


def wrap_networks_on_cpus() -> None:
    """Wrap networks for distributed training on CPUs.

    Fault: `BaseModel.model_to_device` gives DistributedDataParallel the current CUDA device, whatever the model's is.
    No upstream issue known.
    """
    original = BaseModel.model_to_device

    @functools.wraps(original)
    def model_to_device(self, net):
        if self.opt['dist'] and self.device.type == 'cpu':
            unused = self.opt.get('find_unused_parameters', False)
            return DistributedDataParallel(net.to(self.device), find_unused_parameters=unused)
        return original(self, net)

    BaseModel.model_to_device = model_to_device


def offer_torch_optimizers() -> None:
    """Offer every optimiser of `torch.optim`, and of the extra `pytorch_optimizer`, by its name.

    Fault: `BaseModel.get_optimizer` of the release knows Adam alone; the repository, of the same number, knows seven.
    """

    def get_optimizer(self, optim_type, params, lr, **kwargs):
        return build_optimizer(optim_type, params, lr, **kwargs)

    BaseModel.get_optimizer = get_optimizer


def keep_cosine_at_its_end() -> None:
    """Let `CosineAnnealingRestartLR` stay at `eta_min` when training goes on past its last period.

    Fault: no period is found there, and `restart_weights[None]` raises TypeError.
    Seen in projects built on BasicSR, AlexZou14/Wave-Mamba#6 for one.
    """
    original = CosineAnnealingRestartLR.get_lr

    @functools.wraps(original)
    def get_lr(self):
        if self.last_epoch > self.cumulative_period[-1]:
            return [self.eta_min for _ in self.base_lrs]
        return original(self)

    CosineAnnealingRestartLR.get_lr = get_lr


def build_msrresnet_at_scale_1() -> None:
    """Let `MSRResNet` be built with `upscale: 1`, for restoration, as EDSR, RCAN and SwinIR can be.

    Fault: its constructor sets the first weights of `upconv1`, which it makes for scales 2, 3 and 4 only, and raises
    AttributeError; its `forward` knows what to do at scale 1. No upstream issue known.
    """
    original = MSRResNet.__init__

    @functools.wraps(original)
    def __init__(self, num_in_ch=3, num_out_ch=3, num_feat=64, num_block=16, upscale=4):
        original(self, num_in_ch, num_out_ch, num_feat, num_block, 2 if upscale == 1 else upscale)
        if upscale == 1:
            self.upscale = 1
            del self.upconv1, self.pixel_shuffle

    MSRResNet.__init__ = __init__


def build_swinir_without_warning() -> None:
    """Let SwinIR be built without a warning of torch's about `torch.meshgrid`.

    Fault: its `WindowAttention` does not say which indexing it wants, which torch 1.10 began to ask for; what it gets
    is what it means. No upstream issue known.
    """
    original = WindowAttention.__init__

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'torch.meshgrid: in an upcoming release', UserWarning)
            original(self, *args, **kwargs)

    WindowAttention.__init__ = __init__


class _Content(bytes):
    """The content of a file, and its path."""

    path = 'an image'


def name_what_is_not_decoded() -> None:
    """Let `imfrombytes` name the file that is no image, and say what is wrong with it.

    Fault: OpenCV raises `!buf.empty()` for an empty file and gives None for a damaged one, which `imfrombytes` takes
    for pixels: hours into a training nothing says which file it was. BasicSR#254.
    """
    get, decode = FileClient.get, img_util.imfrombytes

    @functools.wraps(get)
    def get_named(self, filepath, client_key='default'):
        content = get(self, filepath, client_key)
        if content is None:
            raise DataError(f'{filepath}: not in the LMDB {client_key}')
        content = _Content(content)
        content.path = filepath
        return content

    @functools.wraps(decode)
    def imfrombytes(content, flag='color', float32=False):
        image = None
        with suppress(cv2.error, AttributeError):  # an attribute of None
            image = decode(content, flag, float32)
        if image is None:
            path = getattr(content, 'path', _Content.path)
            decode_rgb(content, path)
            raise DataError(f'{path}: OpenCV does not decode it: save it anew as PNG')
        return image

    FileClient.get = get_named
    for module in list(sys.modules.values()):
        if getattr(module, '__dict__', {}).get('imfrombytes') is decode:
            module.imfrombytes = imfrombytes


REPAIRS = (
    name_what_is_not_decoded,
    explain_unknown_names,
    start_distributed_on_cpus,
    place_by_local_rank,
    compute_on_the_device,
    wrap_networks_on_cpus,
    offer_torch_optimizers,
    keep_cosine_at_its_end,
    build_msrresnet_at_scale_1,
    build_swinir_without_warning,
)
