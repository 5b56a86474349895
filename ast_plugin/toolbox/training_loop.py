"""Repairs of BasicSR's training loop: what it samples, how it goes on after an interruption, and what it reports."""

import functools
import itertools
import logging
import math
import re
import shlex
import signal
import sys
import threading
import time
import types
import uuid
from pathlib import Path

import torch
from basicsr import train, utils
from basicsr.models.base_model import BaseModel
from basicsr.utils import check_resume, get_root_logger, logger, misc
from basicsr.utils.dist_util import get_dist_info
from torch.utils.data._utils import signal_handling

from ast_plugin.checkpoints import newest_whole, read_state
from ast_plugin.data import workers
from ast_plugin.data.randomness import EpochSampler, SeededSamples
from ast_plugin.errors import only_warn
from ast_plugin.files import write_file
from ast_plugin.models import run_state
from ast_plugin.names import printable

WANDB_RECORD = 'wandb_run'  # in an experiment: the id of its run at W&B
_CHILD_ENDS = getattr(signal, 'SIGCHLD', signal.SIGINT)  # of which Windows has none
_FOLDERS = {'experiments_root', 'models', 'training_states', 'visualization', 'log'}


def sample_full_batches() -> None:
    """Train with `ast_plugin.data.randomness.EpochSampler` in the place of BasicSR's `EnlargedSampler`.

    Fault: it shuffles by the epoch alone, whatever the seed, and the loader drops the last partial batch, so that a set
    smaller than a batch trains on nothing, in silence. No upstream issue known.
    """
    train.EnlargedSampler = EpochSampler


def resume_anywhere() -> None:
    """Resume on a CPU, from the newest state that is whole, and below the experiment's own root.

    Fault: `load_resume_state` calls `torch.cuda.current_device()` on any machine, and `--auto_resume` looks under
    `experiments/` of the working directory, whatever root path the options have; it takes the state of the highest
    number, even if it is cut. No upstream issue known.
    """
    train.load_resume_state = load_resume_state


def load_resume_state(opt: dict) -> dict | None:
    """Read the training state that the options name, or under `auto_resume` the newest one of the experiment.

    Args:
        opt: BasicSR's options; `path.resume_state` is set to the file found, `resumed_iter` to its iteration, and the
            networks are pointed at their weights: in the state itself, or where `check_resume` looks for them.
    Returns:
        The state, on the CPU, without the weights; None to start afresh.
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


def resume_with_other_options() -> None:
    """Let a run that is resumed follow its options where they differ from those of the state.

    Fault: `resume_training` puts the state's rates, other numbers of the optimiser, and the whole schedule in the place
    of the options', or a mixture where the schedule is of another kind. No upstream issue known.
    """

    def resume_training(self, resume_state):
        """Take up optimisers and schedules where a state left them."""
        run_state.restore(self, resume_state, resume_state.get('recorded'))

    BaseModel.resume_training = resume_training


def resume_within_epochs() -> None:
    """Go on in the middle of an epoch.

    Fault: the loop begins an interrupted epoch again, so that some images are seen twice and others not at all. What is
    drawn at random in loading depends on everything drawn before, and on the number of workers.
    No upstream issue known.
    """
    build, create = train.build_dataset, train.create_train_val_dataloader

    @functools.wraps(build)
    def build_dataset(opt):
        """A training set whose samples depend on seed, epoch and position alone, as ours do by themselves."""
        dataset = build(opt)
        is_read_beside_training = opt.get('prefetch_mode') == 'cpu' and not opt.get('num_worker_per_gpu')
        # A thread that seeds global generators would disturb those that training draws from.
        if opt['phase'] != 'train' or getattr(dataset, 'index_carries_epoch', False) or is_read_beside_training:
            return dataset
        return SeededSamples(dataset)

    @functools.wraps(create)
    def create_train_val_dataloader(opt, logger):
        loader, sampler, val_loaders, _, total_iters = create(opt, logger)
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

    train.build_dataset, train.create_train_val_dataloader = build_dataset, create_train_val_dataloader


def _is_of_torch(handler) -> bool:
    """Whether a handler of signals is one of torch's data loaders, or, as that of None, written in C."""
    return handler is None or getattr(handler, '__module__', '') == signal_handling.__name__


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


def archive_under_free_names() -> None:
    """Rename an older run's folder to a name that is free.

    Fault: `mkdir_and_rename` knows names by the second; of two runs started in one second the later one fails, or
    moves the first one's folder into the archive of another. No upstream issue known.
    """
    original = misc.mkdir_and_rename

    @functools.wraps(original)
    def mkdir_and_rename(path):
        time_string = misc.get_time_str
        misc.get_time_str = lambda: _free(f'{path}_archived_', time_string())
        try:
            original(path)
        finally:
            misc.get_time_str = time_string

    misc.mkdir_and_rename = train.mkdir_and_rename = mkdir_and_rename


def _free(prefix: str, name: str) -> str:
    names = itertools.chain([name], (f'{name}_{number}' for number in itertools.count(2)))
    return next(name for name in names if not Path(prefix + name).exists())


def purge_tensorboard() -> None:
    """Let TensorBoard forget what a run wrote after the state that is resumed.

    Fault: the loop writes the same steps once more, into another file, and both are shown. No upstream issue known.
    """
    original = train.init_tb_loggers

    @functools.wraps(original)
    def init_tb_loggers(opt):
        tb_logger = original(opt)
        if tb_logger is not None and opt.get('resumed_iter'):
            # What SummaryWriter does with `purge_step`, which BasicSR does not give it.
            from torch.utils.tensorboard.writer import Event, SessionLog

            start = Event(step=opt['resumed_iter'] + 1, session_log=SessionLog(status=SessionLog.START))
            tb_logger.file_writer.add_event(start)
        return tb_logger

    train.init_tb_loggers = init_tb_loggers


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


_NO_TENSORBOARD = 'what goes to TensorBoard is not written'


def spare_runs_from_tensorboard() -> None:
    """Let a run go on where TensorBoard's files cannot be written, or its package cannot be imported.

    Fault: whatever the writer raises, on a full disk for one, ends the training. No upstream issue known.
    """
    original = train.init_tb_loggers

    @functools.wraps(original)
    def init_tb_loggers(opt):
        is_wanted = opt['logger'].get('use_tb_logger') and 'debug' not in opt['name'] and not opt.get('rank')
        tb_logger = None
        with only_warn(_NO_TENSORBOARD):
            tb_logger = original(opt)
        return SparedWriter(tb_logger) if is_wanted else tb_logger

    train.init_tb_loggers = init_tb_loggers


def _show_names(record: logging.LogRecord) -> bool:
    """Show what names in a line of the log hold besides text by its escapes: a filter that lets all lines pass."""
    record.msg = re.sub(r'[^\n\t]+', lambda part: printable(part[0]), record.getMessage())
    record.args = ()
    return True


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


def count_down_to_zero() -> None:
    """Let the remaining time in log lines end at zero.

    Fault: `MessageLogger` takes one iteration too many off, and prints `-1 day, 23:59:53` at the last one.
    No upstream issue known.
    """
    original = logger.MessageLogger.__init__

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.max_iters += 1

    logger.MessageLogger.__init__ = __init__


def show_rates_in_tensorboard() -> None:
    """Write learning rates to TensorBoard beside the losses.

    Fault: `MessageLogger` takes them out of what it writes there. No upstream issue known.
    """
    original = logger.MessageLogger.__call__

    @functools.wraps(original)
    def __call__(self, log_vars):
        if self.use_tb_logger and self.tb_logger is not None and 'debug' not in self.exp_name:
            for number, rate in enumerate(log_vars['lrs']):
                self.tb_logger.add_scalar(f'lr/group_{number}', rate, log_vars['iter'])
        original(self, log_vars)

    logger.MessageLogger.__call__ = __call__


def start_wandb_of_any_age() -> None:
    """Start a run of Weights & Biases without `wandb.util.generate_id`, and go on with it when training is resumed.

    Fault: `init_wandb_logger` asks it for the run's id, and wandb 0.28.2 removed it (slime#2332); it begins another run
    at every resumption that does not name one, and what wandb raises ends the training.
    """

    @logger.master_only
    def init_wandb_logger(opt):
        """Start a run that takes over what goes to TensorBoard, or go on with that of the experiment.

        It is the one of `logger.wandb.resume_id`, or where the training is resumed the one that the experiment's file
        `wandb_run` names.
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

    for module in (logger, utils, train):
        module.init_wandb_logger = init_wandb_logger


REPAIRS = (
    sample_full_batches,
    resume_anywhere,
    resume_with_other_options,
    resume_within_epochs,
    start_loading_once,
    archive_under_free_names,
    purge_tensorboard,
    spare_runs_from_tensorboard,
    write_every_name,
    count_down_to_zero,
    show_rates_in_tensorboard,
    start_wandb_of_any_age,
)
