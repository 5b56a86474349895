"""Repairs of BasicSR, once it is imported: registries, networks, optimisers, distributed start, and the training loop.

Most are a function of BasicSR's anew, which gets the one that it replaces as its first argument.
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

import cv2
import torch
import torch.distributed
from basicsr import train, utils
from basicsr.archs.srresnet_arch import MSRResNet
from basicsr.archs.swinir_arch import WindowAttention
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

WANDB_RECORD = 'wandb_run'  # in an experiment: the id of its run at W&B
_CHILD_ENDS = getattr(signal, 'SIGCHLD', signal.SIGINT)  # of which Windows has none
_FOLDERS = {'experiments_root', 'models', 'training_states', 'visualization', 'log'}
_NO_TENSORBOARD = 'what goes to TensorBoard is not written'

REPAIRS: list[Callable[[], None]] = []
"""All of them, in their order."""


def repair(function: Callable[[], None]) -> Callable[[], None]:
    """Add a function to the repairs."""
    REPAIRS.append(function)
    return function


def replace(function: Callable, name: str, *holders: Any) -> None:
    """Put a function, which gets the original before its arguments, in the place of `name` in modules or a class."""
    original = getattr(holders[0], name)

    @functools.wraps(original)
    def replacement(*args, **kwargs):
        return function(original, *args, **kwargs)

    for holder in holders:
        setattr(holder, name, replacement)


def replaces(name: str, *holders: Any) -> Callable[[Callable], Callable[[], None]]:
    """Make a repair that replaces `name` by the decorated function, see `replace`."""
    return lambda function: repair(functools.wraps(function)(lambda: replace(function, name, *holders)))


class _Content(bytes):
    """The content of a file, and its path."""

    path = 'an image'


@repair
def name_what_is_not_decoded() -> None:
    """Let `imfrombytes` name the file that is no image, and say what is wrong with it.

    Fault: OpenCV raises `!buf.empty()` for an empty file and gives None for a damaged one, which `imfrombytes` takes
    for pixels: hours into a training nothing says which file it was. BasicSR#254.
    """

    def get(original, self, filepath, client_key='default'):
        content = original(self, filepath, client_key)
        if content is None:
            raise DataError(f'{filepath}: not in the LMDB {client_key}')
        content = _Content(content)
        content.path = filepath
        return content

    def decode(original, content, flag='color', float32=False):
        image = None
        with suppress(cv2.error, AttributeError):  # an attribute of None
            image = original(content, flag, float32)
        if image is None:
            path = getattr(content, 'path', _Content.path)
            decode_rgb(content, path)
            raise DataError(f'{path}: OpenCV does not decode it: save it anew as PNG')
        return image

    replace(get, 'get', FileClient)
    modules = list(sys.modules.values())
    users = [each for each in modules if getattr(each, '__dict__', {}).get('imfrombytes') is img_util.imfrombytes]
    replace(decode, 'imfrombytes', *users)


class UnknownNameError(OptionError, KeyError):
    """A name that is not in a registry; a KeyError too, because BasicSR's callers may catch that."""

    __str__ = Exception.__str__  # KeyError's would quote the message


@replaces('get', Registry)
def explain_unknown_names(original, self, name, suffix='basicsr'):
    """Let `Registry.get` say which names there are when it has none of the asked name.

    Fault: it prints `Name X is not found, use name: X_basicsr!` even where that does not exist either, then raises a
    KeyError without a list. BasicSR#419, #506. The fallback to `X_basicsr` stays, without the print.
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
    """Start distributed runs on machines without CUDA, by gloo.

    Fault: both starters in `dist_util` divide by the number of GPUs and set the CUDA device, and nccl is the default.
    No upstream issue known; mmcv, where the code is from, had the same.
    """

    def by_torchrun(original, backend, **kwargs):
        if torch.cuda.is_available():
            return original(backend, **kwargs)
        torch.distributed.init_process_group(backend='gloo' if backend == 'nccl' else backend, **kwargs)

    def by_slurm(original, backend, port=None):
        """As BasicSR's: rank and size from SLURM, the first node as master, port 29500 if neither told nor set."""
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
    """Give each process the GPU that its launcher meant for it.

    Fault: `_init_dist_pytorch` takes GPU `rank % count` of its machine, which is another's where machines have more
    GPUs than processes. BasicSR#626 is about the older flag; torchrun tells by LOCAL_RANK.
    """
    original(backend, **kwargs)
    if torch.cuda.is_available() and 'LOCAL_RANK' in os.environ:
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']) % torch.cuda.device_count())


@replaces('__init__', BaseModel)
def compute_on_the_device(original, self, opt):
    """Let models compute on the device of the options, where they name one.

    Fault: `BaseModel` knows CUDA and, without GPUs, the CPU; MPS it cannot be told of. No upstream issue known.
    """
    original(self, opt)
    self.device = torch.device(opt.get('device') or self.device)


@replaces('model_to_device', BaseModel)
def wrap_networks_on_cpus(original, self, net):
    """Wrap networks for distributed training on CPUs.

    Fault: `BaseModel.model_to_device` gives DistributedDataParallel the current CUDA device, whatever the model's is.
    No upstream issue known.
    """
    if self.opt['dist'] and self.device.type == 'cpu':
        unused = self.opt.get('find_unused_parameters', False)
        return DistributedDataParallel(net.to(self.device), find_unused_parameters=unused)
    return original(self, net)


@replaces('get_optimizer', BaseModel)
def offer_torch_optimizers(original, self, optim_type, params, lr, **kwargs):
    """Offer every optimiser of `torch.optim`, and of the extra `pytorch_optimizer`, by its name.

    Fault: `BaseModel.get_optimizer` of the release knows Adam alone; the repository, of the same number, knows seven.
    """
    return build_optimizer(optim_type, params, lr, **kwargs)


@replaces('get_lr', CosineAnnealingRestartLR)
def keep_cosine_at_its_end(original, self):
    """Let `CosineAnnealingRestartLR` stay at `eta_min` when training goes on past its last period.

    Fault: no period is found there, and `restart_weights[None]` raises TypeError.
    Seen in projects built on BasicSR, AlexZou14/Wave-Mamba#6 for one.
    """
    if self.last_epoch > self.cumulative_period[-1]:
        return [self.eta_min for _ in self.base_lrs]
    return original(self)


@replaces('__init__', MSRResNet)
def build_msrresnet_at_scale_1(original, self, num_in_ch=3, num_out_ch=3, num_feat=64, num_block=16, upscale=4):
    """Let `MSRResNet` be built with `upscale: 1`, for restoration, as EDSR, RCAN and SwinIR can be.

    Fault: its constructor sets the first weights of `upconv1`, which it makes for scales 2, 3 and 4 only, and raises
    AttributeError; its `forward` knows what to do at scale 1. No upstream issue known.
    """
    original(self, num_in_ch, num_out_ch, num_feat, num_block, 2 if upscale == 1 else upscale)
    if upscale == 1:
        self.upscale = 1
        del self.upconv1, self.pixel_shuffle


@replaces('__init__', WindowAttention)
def build_swinir_without_warning(original, self, *args, **kwargs):
    """Let SwinIR be built without a warning of torch's about `torch.meshgrid`.

    Fault: its `WindowAttention` does not say which indexing it wants, which torch 1.10 began to ask for; what it gets
    is what it means. No upstream issue known.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'torch.meshgrid: in an upcoming release', UserWarning)
        original(self, *args, **kwargs)


@repair
def sample_full_batches() -> None:
    """Train with `ast_plugin.data.randomness.EpochSampler` in the place of BasicSR's `EnlargedSampler`.

    Fault: it shuffles by the epoch alone, whatever the seed, and the loader drops the last partial batch, so that a set
    smaller than a batch trains on nothing, in silence. No upstream issue known.
    """
    train.EnlargedSampler = EpochSampler


@replaces('load_resume_state', train)
def resume_anywhere(original, opt):
    """Resume on a CPU, from the newest state that is whole, and below the experiment's own root.

    The state comes without the weights, on the CPU; `path.resume_state` becomes its file, `resumed_iter` its iteration,
    and the networks are pointed at their weights: in the state itself, or where `check_resume` looks for them.

    Fault: `load_resume_state` calls `torch.cuda.current_device()` on any machine, and `--auto_resume` looks under
    `experiments/` of the working directory, whatever root path the options have; it takes the state of the highest
    number, even if it is cut. No upstream issue known.
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
    # Networks that are not told of are not pointed anywhere.
    check_resume({key: value for key, value in opt.items() if not (has_weights and key == 'network_g')}, state['iter'])
    if has_weights:
        opt['path'].update(pretrain_network_g=str(path), param_key_g='params')
    # The state may be of another experiment.
    for key in _FOLDERS & opt['path'].keys():
        Path(opt['path'][key]).mkdir(parents=True, exist_ok=True)
    return state


@replaces('resume_training', BaseModel)
def resume_with_other_options(original, self, resume_state):
    """Let a run that is resumed follow its options where they differ from those of the state.

    Fault: `resume_training` puts the state's rates, other numbers of the optimiser, and the whole schedule in the place
    of the options', or a mixture where the schedule is of another kind. No upstream issue known.
    """
    run_state.restore(self, resume_state, resume_state.get('recorded'))


@repair
def resume_within_epochs() -> None:
    """Go on in the middle of an epoch.

    Fault: the loop begins an interrupted epoch again, so that some images are seen twice and others not at all. What is
    drawn at random in loading depends on everything drawn before, and on the number of workers.
    No upstream issue known.
    """

    def build_dataset(original, opt):
        """A training set whose samples depend on seed, epoch and position alone, as ours do by themselves."""
        dataset = original(opt)
        is_read_beside_training = opt.get('prefetch_mode') == 'cpu' and not opt.get('num_worker_per_gpu')
        # A thread that seeds global generators would disturb those that training draws from.
        if opt['phase'] != 'train' or getattr(dataset, 'index_carries_epoch', False) or is_read_beside_training:
            return dataset
        return SeededSamples(dataset)

    def create_loaders(original, opt, logger):
        loader, sampler, val_loaders, _, total_iters = original(opt, logger)
        sampler.fill(loader.batch_size)  # one process may feed several GPUs, which BasicSR forgets in its sampler
        opt['train']['iters_per_epoch'] = len(loader)
        # What a loader draws for its workers must not come out of what training draws from.
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


def _is_of_torch(handler) -> bool:
    """Whether a handler of signals is one of torch's data loaders, or, as that of None, written in C."""
    return handler is None or getattr(handler, '__module__', '') == signal_handling.__name__


@repair
def start_loading_once() -> None:
    """Let the training loop start loading when it knows the epoch, and hear of dead workers when it awaits a batch.

    Fault: its prefetchers start the workers when they are made, before `set_epoch`; the loop resets them at once, and
    all of that is thrown away. That a worker was killed is raised by torch wherever the loop is, as within a step that
    has changed half of the weights. No upstream issue known.
    """

    def started_by_reset(kind):
        class Prefetcher(kind):
            """BasicSR's, with nothing to give before `reset`."""

            def __init__(self, loader, *args):
                super().__init__((), *args)
                self.ori_loader = loader

            def reset(self):
                """Load the epoch that the sampler was told of."""
                handler = signal.getsignal(_CHILD_ENDS)
                with workers.block_signals():
                    super().reset()
                is_main = threading.current_thread() is threading.main_thread()
                if is_main and _is_of_torch(signal.getsignal(_CHILD_ENDS)):  # it sets its own once a process
                    signal.signal(_CHILD_ENDS, signal.SIG_DFL if _is_of_torch(handler) else handler)

            def next(self):
                """Give the next batch; what is raised has the attribute `is_of_loading`."""
                try:
                    torch._C._error_if_any_worker_fails()
                    return super().next()
                except Exception as error:
                    error.is_of_loading = True
                    raise

        return Prefetcher

    train.CPUPrefetcher = started_by_reset(train.CPUPrefetcher)
    train.CUDAPrefetcher = started_by_reset(train.CUDAPrefetcher)


@replaces('mkdir_and_rename', misc, train)
def archive_under_free_names(original, path):
    """Rename an older run's folder to a name that is free.

    Fault: `mkdir_and_rename` knows names by the second; of two runs started in one second the later one fails, or
    moves the first one's folder into the archive of another. No upstream issue known.
    """
    time_string = misc.get_time_str

    def free_name():
        name = time_string()
        names = itertools.chain([name], (f'{name}_{number}' for number in itertools.count(2)))
        return next(name for name in names if not Path(f'{path}_archived_{name}').exists())

    misc.get_time_str = free_name
    try:
        original(path)
    finally:
        misc.get_time_str = time_string


@replaces('init_tb_loggers', train)
def purge_tensorboard(original, opt):
    """Let TensorBoard forget what a run wrote after the state that is resumed.

    Fault: the loop writes the same steps once more, into another file, and both are shown. No upstream issue known.
    """
    tb_logger = original(opt)
    if tb_logger is not None and opt.get('resumed_iter'):
        # What SummaryWriter does with `purge_step`, which BasicSR does not give it.
        from torch.utils.tensorboard.writer import Event, SessionLog

        start = Event(step=opt['resumed_iter'] + 1, session_log=SessionLog(status=SessionLog.START))
        tb_logger.file_writer.add_event(start)
    return tb_logger


class SparedWriter:
    """A writer of TensorBoard whose failures end no run: the first is warned of. Without a writer nothing is done."""

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
    """Let a run go on where TensorBoard's files cannot be written, or its package cannot be imported.

    Fault: whatever the writer raises, on a full disk for one, ends the training. No upstream issue known.
    """
    is_wanted = opt['logger'].get('use_tb_logger') and 'debug' not in opt['name'] and not opt.get('rank')
    tb_logger = None
    with only_warn(_NO_TENSORBOARD):
        tb_logger = original(opt)
    return SparedWriter(tb_logger) if is_wanted else tb_logger


def _show_names(record: logging.LogRecord) -> bool:
    """Show what names in a line of the log hold besides text by its escapes: a filter that lets all lines pass."""
    record.msg = re.sub(r'[^\n\t]+', lambda part: printable(part[0]), record.getMessage())
    record.args = ()
    return True


@repair
def write_every_name() -> None:
    """Write log files and copies of option files in UTF-8, with escapes for what is no text.

    Fault: both have the encoding of the locale. A line of the log with a name that it lacks is lost under a traceback,
    and `copy_opt_file`, which puts the command line into the copy, ends the run. What names hold for a terminal's
    control reaches it. No upstream issue known.
    """
    logging.getLogger('basicsr').addFilter(_show_names)
    file_handler = functools.partial(logging.FileHandler, encoding='utf-8', errors='backslashreplace')
    logger.logging = types.SimpleNamespace(**{**vars(logging), 'FileHandler': file_handler})

    def copy_opt_file(opt_file, experiments_root):
        """Copy an option file into the experiment, below the time and the command line."""
        head = f'# GENERATE TIME: {time.asctime()}\n# CMD:\n# {printable(shlex.join(sys.argv))}\n\n'
        source = Path(opt_file)
        if get_dist_info()[0] == 0:  # the others may come before the folder is there
            write_file(Path(experiments_root, source.name), head.encode() + source.read_bytes())

    train.copy_opt_file = copy_opt_file


@replaces('__init__', logger.MessageLogger)
def count_down_to_zero(original, self, *args, **kwargs):
    """Let the remaining time in log lines end at zero.

    Fault: `MessageLogger` takes one iteration too many off, and prints `-1 day, 23:59:53` at the last one.
    No upstream issue known.
    """
    original(self, *args, **kwargs)
    self.max_iters += 1


@replaces('__call__', logger.MessageLogger)
def show_rates_in_tensorboard(original, self, log_vars):
    """Write learning rates to TensorBoard beside the losses.

    Fault: `MessageLogger` takes them out of what it writes there. No upstream issue known.
    """
    if self.use_tb_logger and self.tb_logger is not None and 'debug' not in self.exp_name:
        for number, rate in enumerate(log_vars['lrs']):
            self.tb_logger.add_scalar(f'lr/group_{number}', rate, log_vars['iter'])
    original(self, log_vars)


@replaces('init_wandb_logger', logger, utils, train)
@logger.master_only
def start_wandb_of_any_age(original, opt):
    """Start a run of Weights & Biases without `wandb.util.generate_id`, and go on with it when training is resumed.

    It goes on with the run of `logger.wandb.resume_id`, or where training is resumed the one that the experiment's file
    `wandb_run` names.

    Fault: `init_wandb_logger` asks it for the run's id, and wandb 0.28.2 removed it (slime#2332); it begins another run
    at every resumption that does not name one, and what wandb raises ends the training.
    """
    import wandb

    settings = opt['logger']['wandb']
    record = Path(opt.get('path', {}).get('experiments_root', opt['root_path']), WANDB_RECORD)
    resume_id = settings.get('resume_id')
    if not resume_id and opt.get('resumed_iter') and record.is_file():
        resume_id = record.read_text(encoding='utf-8').strip()
    run_id = resume_id or uuid.uuid4().hex[:8]
    resume = 'allow' if resume_id else 'never'
    with only_warn('nothing goes to W&B'):
        project = settings['project']
        wandb.init(id=run_id, resume=resume, name=opt['name'], config=opt, project=project, sync_tensorboard=True)
        write_file(record, f'{run_id}\n'.encode())
        get_root_logger().info(f'Use wandb logger with id={run_id}; project={project}.')
