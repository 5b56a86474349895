"""Repairs of the imported BasicSR: registries, networks, optimisers, distributed launch, training loop and logging.

Most repairs replace a function of BasicSR; the replacement receives the original function as its first argument. A
docstring names the upstream issue if one is known.
"""

import functools
import itertools
import logging
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import types
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import torch
import torch.distributed
from basicsr import train, utils
from basicsr.archs.srresnet_arch import MSRResNet
from basicsr.archs.swinir_arch import WindowAttention
from basicsr.data.prefetch_dataloader import PrefetchGenerator
from basicsr.models.base_model import BaseModel
from basicsr.models.lr_scheduler import CosineAnnealingRestartLR
from basicsr.utils import check_resume, dist_util, get_root_logger, img_util, logger, misc
from basicsr.utils.dist_util import get_dist_info
from basicsr.utils.file_client import FileClient
from basicsr.utils.registry import Registry
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data._utils import signal_handling

from ast_plugin.checkpoints import newest_whole, read_state
from ast_plugin.data import workers
from ast_plugin.data.image_files import decode_rgb
from ast_plugin.data.randomness import EpochSampler, SeededSamples
from ast_plugin.errors import DataError, OptionError, did_you_mean, only_warn
from ast_plugin.files import write_file
from ast_plugin.models import run_state
from ast_plugin.models.optimizers import build_optimizer
from ast_plugin.names import printable

WANDB_RECORD = 'wandb_run'  # file in the experiment's folder with the id of its W&B run
_CHILD_SIGNAL = getattr(signal, 'SIGCHLD', signal.SIGINT)  # Windows has no SIGCHLD
_FOLDERS = {'experiments_root', 'models', 'training_states', 'visualization', 'log'}
_NO_TENSORBOARD = 'TensorBoard logs are not written'

REPAIRS: list[Callable[[], None]] = []
"""All repairs in the order in which they are applied."""


def repair(function: Callable[[], None]) -> Callable[[], None]:
    """Register a function as a repair."""
    REPAIRS.append(function)
    return function


def replace(function: Callable, name: str, *holders: Any) -> None:
    """Replace `name` in modules or a class by a function that receives the original as its first argument."""
    original = getattr(holders[0], name)

    @functools.wraps(original)
    def replacement(*args, **kwargs):
        return function(original, *args, **kwargs)

    for holder in holders:
        setattr(holder, name, replacement)


def replaces(name: str, *holders: Any) -> Callable[[Callable], Callable[[], None]]:
    """Register a repair that replaces `name` by the decorated function, see `replace`."""
    return lambda function: repair(functools.wraps(function)(lambda: replace(function, name, *holders)))


class _Content(bytes):
    """Content of a file with its path."""

    path = 'an image'


@repair
def name_what_is_not_decoded() -> None:
    """Report the name of an image file that cannot be decoded, and the reason.

    Fault: training stops, possibly after hours, with an error that does not name the file. For an empty file OpenCV
    raises `!buf.empty()`; for a damaged one it returns None, which `imfrombytes` uses as pixels. BasicSR#254.
    """

    def get(original, self, filepath, client_key='default'):
        content = original(self, filepath, client_key)
        if content is None:
            raise DataError(f'{filepath}: not found in the LMDB {client_key}')
        content = _Content(content)
        content.path = filepath
        return content

    def decode(original, content, flag='color', float32=False):
        image = None
        with suppress(cv2.error, AttributeError):  # `original` accesses an attribute of None
            image = original(content, flag, float32)
        if image is None:
            path = getattr(content, 'path', _Content.path)
            decode_rgb(content, path)
            raise DataError(f'{path}: OpenCV cannot decode it; save it again as PNG')
        return image

    replace(get, 'get', FileClient)
    modules = list(sys.modules.values())
    users = [each for each in modules if getattr(each, '__dict__', {}).get('imfrombytes') is img_util.imfrombytes]
    replace(decode, 'imfrombytes', *users)


class UnknownNameError(OptionError, KeyError):
    """A name that is not in a registry; also a KeyError, which callers of BasicSR's registries may catch."""

    __str__ = Exception.__str__  # that of KeyError puts the message in quotes


@replaces('get', Registry)
def explain_unknown_names(original, self, name, suffix='basicsr'):
    """Suggest similar names when `Registry.get` does not find a name.

    Fault: `Registry.get` prints `Name X is not found, use name: X_basicsr!` even if `X_basicsr` does not exist, then
    raises a KeyError without any hint. The fallback to `X_basicsr` is kept, without the print. BasicSR#419, #506.
    """
    for candidate in (name, f'{name}_{suffix}'):
        if candidate in self:
            return self._obj_map[candidate]
    raise UnknownNameError(
        f'no {self._name} named {name!r} is registered (is its plugin installed? `basicsr list` '
        f'prints every name){did_you_mean(str(name), self.keys())}'
    )


@repair
def start_distributed_on_cpus() -> None:
    """Initialize distributed runs with gloo on machines without CUDA.

    Fault: distributed runs fail without CUDA, because both initializers in `dist_util` divide by the number of GPUs,
    set the CUDA device and default to nccl. The code's origin, mmcv, had the same fault.
    """

    def by_torchrun(original, backend, **kwargs):
        if torch.cuda.is_available():
            return original(backend, **kwargs)
        torch.distributed.init_process_group(backend='gloo' if backend == 'nccl' else backend, **kwargs)

    def by_slurm(original, backend, port=None):
        """Initialize like BasicSR: rank and size from SLURM, the first node as master, default port 29500."""
        if torch.cuda.is_available():
            return original(backend, port)
        environ = os.environ
        environ['MASTER_PORT'] = str(port) if port is not None else environ.get('MASTER_PORT', '29500')
        hosts = subprocess.check_output(['scontrol', 'show', 'hostname', environ['SLURM_NODELIST']], text=True)
        environ['MASTER_ADDR'] = hosts.split()[0]
        environ['WORLD_SIZE'], environ['RANK'] = environ['SLURM_NTASKS'], environ['SLURM_PROCID']
        environ['LOCAL_RANK'] = environ.get('SLURM_LOCALID', '0')
        torch.distributed.init_process_group(backend='gloo' if backend == 'nccl' else backend)

    replace(by_torchrun, '_init_dist_pytorch', dist_util)
    replace(by_slurm, '_init_dist_slurm', dist_util)


@replaces('_init_dist_pytorch', dist_util)
def place_by_local_rank(original, backend, **kwargs):
    """Select the GPU that the launcher assigned to each process.

    Fault: with several machines and fewer processes than GPUs on each, processes use the wrong GPUs, because
    `_init_dist_pytorch` selects GPU `rank % count` by the global rank. The repair uses LOCAL_RANK, which torchrun sets.
    BasicSR#626 reports the same for the older `--local_rank` flag.
    """
    original(backend, **kwargs)
    if torch.cuda.is_available() and 'LOCAL_RANK' in os.environ:
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']) % torch.cuda.device_count())


@replaces('__init__', BaseModel)
def compute_on_the_device(original, self, opt):
    """Place models on the device given by the option `device`, if any.

    Fault: models cannot run on MPS, because `BaseModel` selects CUDA or, with `num_gpu: 0`, the CPU.
    """
    original(self, opt)
    self.device = torch.device(opt.get('device') or self.device)


@replaces('model_to_device', BaseModel)
def wrap_networks_on_cpus(original, self, net):
    """Wrap networks in DistributedDataParallel on CPUs.

    Fault: distributed training on CPUs fails, because `BaseModel.model_to_device` passes the current CUDA device to
    DistributedDataParallel regardless of the model's device.
    """
    if self.opt['dist'] and self.device.type == 'cpu':
        unused = self.opt.get('find_unused_parameters', False)
        return DistributedDataParallel(net.to(self.device), find_unused_parameters=unused)
    return original(self, net)


@replaces('get_optimizer', BaseModel)
def offer_torch_optimizers(original, self, optim_type, params, lr, **kwargs):
    """Provide every optimiser of `torch.optim` and of the extra `pytorch_optimizer` by name.

    Fault: `BaseModel.get_optimizer` of the 1.4.2 release accepts Adam only; the repository, which has the same version
    number, accepts seven optimisers.
    """
    return build_optimizer(optim_type, params, lr, **kwargs)


@replaces('get_lr', CosineAnnealingRestartLR)
def keep_cosine_at_its_end(original, self):
    """Keep the learning rate of `CosineAnnealingRestartLR` at `eta_min` after its last period.

    Fault: training past the last period raises TypeError, because no period is found for the iteration and
    `restart_weights` is indexed with None. Reported in projects built on BasicSR, e.g. AlexZou14/Wave-Mamba#6.
    """
    if self.last_epoch > self.cumulative_period[-1]:
        return [self.eta_min for _ in self.base_lrs]
    return original(self)


@replaces('__init__', MSRResNet)
def build_msrresnet_at_scale_1(original, self, num_in_ch=3, num_out_ch=3, num_feat=64, num_block=16, upscale=4):
    """Support `upscale: 1` (restoration) in `MSRResNet`, as in EDSR, RCAN and SwinIR.

    Fault: the constructor raises AttributeError at scale 1, because it initializes `upconv1`, which exists for scales
    2, 3 and 4 only. Its `forward` supports scale 1.
    """
    original(self, num_in_ch, num_out_ch, num_feat, num_block, 2 if upscale == 1 else upscale)
    if upscale == 1:
        self.upscale = 1
        del self.upconv1, self.pixel_shuffle


@replaces('__init__', WindowAttention)
def build_swinir_without_warning(original, self, *args, **kwargs):
    """Suppress the warning about `torch.meshgrid` when SwinIR is built.

    Fault: building SwinIR emits a UserWarning, because its `WindowAttention` calls `torch.meshgrid` without `indexing`,
    which torch 1.10 introduced. The default indexing is the intended one.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'torch.meshgrid: in an upcoming release', UserWarning)
        original(self, *args, **kwargs)


@repair
def sample_full_batches() -> None:
    """Replace BasicSR's `EnlargedSampler` by `ast_plugin.data.randomness.EpochSampler`.

    Fault: `EnlargedSampler` shuffles by the epoch alone and ignores the seed. The loader drops the last partial batch,
    so a dataset smaller than one batch is never trained on, without any message.
    """
    train.EnlargedSampler = EpochSampler


@replaces('load_resume_state', train)
def resume_anywhere(original, opt):
    """Resume on any device, from the newest intact state in the experiment's own folder.

    Return the state without its weights, on the CPU. In the options, set `path.resume_state` to its file,
    `resumed_iter` to its iteration, and the pretrained paths of the networks to the state itself or to the files that
    `check_resume` selects.

    Fault: `load_resume_state` fails without CUDA, because it always calls `torch.cuda.current_device()`. With
    `--auto_resume` it searches `experiments/` in the working directory regardless of the root path, and selects the
    state with the highest number even if the file is truncated.
    """
    path = opt['path'].get('resume_state')
    if opt['auto_resume']:
        path = newest_whole(opt['path']['training_states']) or path
        opt['path']['resume_state'] = path and str(path)
    if path is None:
        return None
    state = read_state(path)
    opt['resumed_iter'] = state['iter']
    has_weights = state.pop('params', None) is not None and 'network_g' in opt
    has_weights = has_weights and 'network_g' not in (opt['path'].get('ignore_resume_networks') or ())
    state.pop('params_ema', None)
    state['recorded'] = run_state.record(opt)
    # `check_resume` sets paths only for the networks that it is given.
    check_resume({key: value for key, value in opt.items() if not (has_weights and key == 'network_g')}, state['iter'])
    if has_weights:
        opt['path'].update(pretrain_network_g=str(path), param_key_g='params')
    # The state may belong to another experiment, so the run's folders may be missing.
    for key in _FOLDERS & opt['path'].keys():
        Path(opt['path'][key]).mkdir(parents=True, exist_ok=True)
    return state


@replaces('resume_training', BaseModel)
def resume_with_other_options(original, self, resume_state):
    """Apply the current options when a resumed run's options differ from those in the training state.

    Fault: changed options have no effect on a resumed run, because `resume_training` restores learning rates, other
    optimiser settings and the scheduler from the state. If the scheduler's type has changed, the result mixes both. No
    upstream issue known.
    """
    run_state.restore(self, resume_state, resume_state.get('recorded'))


@repair
def resume_within_epochs() -> None:
    """Resume in the middle of an epoch, with the samples that an uninterrupted run would have seen.

    Fault: the training loop restarts an interrupted epoch, so some images are used twice and others not at all. Random
    augmentation depends on all earlier random numbers and on the number of workers.
    """

    def build_dataset(original, opt):
        """Build a training set whose samples depend on seed, epoch and position alone, as the plugin's datasets do."""
        dataset = original(opt)
        is_read_beside_training = opt.get('prefetch_mode') == 'cpu' and not opt.get('num_worker_per_gpu')
        # Loading in a thread must not seed the global generators that training uses.
        if opt['phase'] != 'train' or getattr(dataset, 'index_carries_epoch', False) or is_read_beside_training:
            return dataset
        return SeededSamples(dataset)

    def create_loaders(original, opt, logger):
        loader, sampler, val_loaders, _, total_iters = original(opt, logger)
        sampler.fill(loader.batch_size)  # of all GPUs of this process; BasicSR's sampler ignores their number
        opt['train']['iters_per_epoch'] = len(loader)
        # Seeds of workers must not be drawn from the generator that training uses.
        loader.generator = torch.Generator().manual_seed(opt['manual_seed'] + opt['rank'])
        loader.worker_init_fn = functools.partial(workers.start_apart, loader.worker_init_fn)
        loader.collate_fn = getattr(loader.dataset, 'collate', loader.collate_fn)
        if isinstance(loader.dataset, SeededSamples):
            sampler.seed = loader.dataset.seed = opt['manual_seed']
        if opt.get('resumed_iter'):
            sampler.resume(opt['resumed_iter'], loader.batch_size)
        return loader, sampler, val_loaders, math.ceil(total_iters / len(loader)), total_iters

    replace(build_dataset, 'build_dataset', train)
    replace(create_loaders, 'create_train_val_dataloader', train)


def _is_torch_handler(handler) -> bool:
    """Return whether a signal handler was set by torch's data loader, or in C (None)."""
    return handler is None or getattr(handler, '__module__', '') == signal_handling.__name__


@repair
def start_loading_once() -> None:
    """Start workers once the epoch is set, and report dead workers only while waiting for a batch.

    Fault: BasicSR's prefetchers start the workers on construction, before `set_epoch`; the loop then resets them and
    discards the loaded data. If a worker is killed, torch raises at an arbitrary point of the loop, for example when an
    optimiser step has updated half of the weights.
    """

    def started_by_reset(kind):
        class Prefetcher(kind):
            """Prefetcher that loads nothing before `reset`."""

            def __init__(self, loader, *args):
                super().__init__((), *args)
                self.ori_loader = loader

            def reset(self):
                """Start loading the epoch that is set in the sampler."""
                handler = signal.getsignal(_CHILD_SIGNAL)
                with workers.block_signals():
                    super().reset()
                is_main = threading.current_thread() is threading.main_thread()
                if is_main and _is_torch_handler(signal.getsignal(_CHILD_SIGNAL)):  # torch sets it once per process
                    signal.signal(_CHILD_SIGNAL, signal.SIG_DFL if _is_torch_handler(handler) else handler)

            def next(self):
                """Return the next batch; exceptions get the attribute `is_of_loading`."""
                try:
                    torch._C._error_if_any_worker_fails()
                    return super().next()
                except Exception as error:
                    error.is_of_loading = True
                    raise

        return Prefetcher

    train.CPUPrefetcher = started_by_reset(train.CPUPrefetcher)
    train.CUDAPrefetcher = started_by_reset(train.CUDAPrefetcher)


@repair
def raise_errors_of_prefetching() -> None:
    """Raise an error of the thread that loads batches with `prefetch_mode: cpu` in the training loop.

    Fault: after such an error, for example a damaged image, training waits forever, because the thread ends without
    putting anything into the queue.
    """

    def run(original, self):
        try:
            original(self)
        except Exception as error:
            self.queue.put(error)

    def get_next(original, self):
        batch = original(self)
        if isinstance(batch, Exception):
            raise batch
        return batch

    replace(run, 'run', PrefetchGenerator)
    replace(get_next, '__next__', PrefetchGenerator)


@replaces('mkdir_and_rename', misc, train)
def archive_under_free_names(original, path):
    """Archive the folder of an older run under an unused name.

    Fault: `mkdir_and_rename` appends the time in seconds. If two runs start within the same second, the second one
    fails or moves the first one's folder into another archive.
    """
    time_string = misc.get_time_str

    def free_name():
        name = time_string()
        names = itertools.chain([name], (f'{name}_{number}' for number in itertools.count(2)))
        return next(name for name in names if not Path(f'{path}_archived_{name}').exists())

    with patch.object(misc, 'get_time_str', free_name):
        original(path)


@replaces('init_tb_loggers', train)
def purge_tensorboard(original, opt):
    """Purge the TensorBoard events that a run wrote after the resumed state.

    Fault: after resuming, the same steps are logged again into another file, and TensorBoard shows both.
    """
    tb_logger = original(opt)
    if tb_logger is not None and opt.get('resumed_iter'):
        # Equivalent to `purge_step` of SummaryWriter, which BasicSR does not pass.
        from torch.utils.tensorboard.writer import Event, SessionLog

        start = Event(step=opt['resumed_iter'] + 1, session_log=SessionLog(status=SessionLog.START))
        tb_logger.file_writer.add_event(start)
    return tb_logger


class SparedWriter:
    """TensorBoard writer that reports its first failure as a warning; does nothing if `writer` is None."""

    def __init__(self, writer) -> None:
        self.writer = writer

    def __getattr__(self, name):
        try:
            attribute = getattr(self.writer, name)
        except AttributeError:
            if self.writer is not None:
                raise
            return lambda *args, **kwargs: None
        if not callable(attribute):
            return attribute

        def call(*args, **kwargs):
            with only_warn(_NO_TENSORBOARD):
                return attribute(*args, **kwargs)

        return call


@replaces('init_tb_loggers', train)
def spare_runs_from_tensorboard(original, opt):
    """Continue a run when TensorBoard's files cannot be written or its package cannot be imported.

    Fault: any exception of the TensorBoard writer, for example on a full disk, stops the training.
    """
    is_wanted = opt['logger'].get('use_tb_logger') and 'debug' not in opt['name'] and not opt.get('rank')
    tb_logger = None
    with only_warn(_NO_TENSORBOARD):
        tb_logger = original(opt)
    return SparedWriter(tb_logger) if is_wanted else tb_logger


def _escape_names(record: logging.LogRecord) -> bool:
    """Escape unprintable characters in a log record; a logging filter that accepts every record."""
    record.msg = re.sub(r'[^\n\t]+', lambda part: printable(part[0]), record.getMessage())
    record.args = ()
    return True


@repair
def write_every_name() -> None:
    """Write log files and copies of option files in UTF-8, with escapes for unprintable characters.

    Fault: both use the locale's encoding. A log line with a file name that it cannot encode is lost with a traceback;
    `copy_opt_file`, which adds the command line to the copy, stops the run. Terminal control sequences in names are
    written to the terminal unescaped.
    """
    logging.getLogger('basicsr').addFilter(_escape_names)
    file_handler = functools.partial(logging.FileHandler, encoding='utf-8', errors='backslashreplace')
    logger.logging = types.SimpleNamespace(**{**vars(logging), 'FileHandler': file_handler})

    def copy_opt_file(opt_file, experiments_root):
        """Copy an option file into the experiment, preceded by the time and the command line."""
        head = f'# GENERATE TIME: {time.asctime()}\n# CMD:\n# {printable(shlex.join(sys.argv))}\n\n'
        source = Path(opt_file)
        if get_dist_info()[0] == 0:  # only the first process knows that the folder exists
            write_file(Path(experiments_root, source.name), head.encode() + source.read_bytes())

    train.copy_opt_file = copy_opt_file


@replaces('__init__', logger.MessageLogger)
def count_down_to_zero(original, self, *args, **kwargs):
    """Make the estimated remaining time in log lines end at zero.

    Fault: the last log line shows `-1 day, 23:59:53`, because `MessageLogger` subtracts one iteration too many. No
    upstream issue known.
    """
    original(self, *args, **kwargs)
    self.max_iters += 1


@replaces('__call__', logger.MessageLogger)
def show_rates_in_tensorboard(original, self, log_vars):
    """Write learning rates to TensorBoard in addition to the losses.

    Fault: TensorBoard shows no learning rates, because `MessageLogger` removes them from the logged values.
    """
    if self.use_tb_logger and self.tb_logger is not None and 'debug' not in self.exp_name:
        for number, rate in enumerate(log_vars['lrs']):
            self.tb_logger.add_scalar(f'lr/group_{number}', rate, log_vars['iter'])
    original(self, log_vars)


@replaces('init_wandb_logger', logger, utils, train)
@logger.master_only
def start_wandb_of_any_age(original, opt):
    """Start a Weights & Biases run with any version of wandb, and continue it when training is resumed.

    The continued run is the one in `logger.wandb.resume_id`; if that is not set, a resumed training continues the run
    whose id is in the experiment's file `wandb_run`.

    Fault: `init_wandb_logger` calls `wandb.util.generate_id`, which wandb 0.28.2 removed (slime#2332). Every resumed
    training without `resume_id` starts a new run, and any exception of wandb stops the training.
    """
    import wandb

    settings = opt['logger']['wandb']
    record = Path(opt.get('path', {}).get('experiments_root', opt['root_path']), WANDB_RECORD)
    resume_id = settings.get('resume_id')
    if not resume_id and opt.get('resumed_iter') and record.is_file():
        resume_id = record.read_text(encoding='utf-8').strip()
    run_id = resume_id or uuid.uuid4().hex[:8]
    resume = 'allow' if resume_id else 'never'
    with only_warn('W&B logs are not written'):
        project = settings['project']
        wandb.init(id=run_id, resume=resume, name=opt['name'], config=opt, project=project, sync_tensorboard=True)
        write_file(record, f'{run_id}\n'.encode())
        get_root_logger().info(f'Use wandb logger with id={run_id}; project={project}.')
