"""Repairs of what BasicSR writes while it runs (lines, TensorBoard, W&B), and of where it runs. See `toolbox`."""

import functools
import inspect
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace


def count_down_to_zero() -> bool:
    """Let the remaining time in log lines end at zero.

    Fault: `MessageLogger` takes one iteration too many off, and prints `-1 day, 23:59:53` at the last one.
    No upstream issue known.
    """
    from basicsr.utils.logger import MessageLogger

    if '-1 day' not in _last_line(MessageLogger):
        return False
    original = MessageLogger.__init__

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.max_iters += 1

    MessageLogger.__init__ = __init__
    return True


def _last_line(kind: type) -> str:
    """What a MessageLogger says at the last iteration of a run of one, ten seconds after its start."""
    lines = []
    opt = {'name': '', 'train': {'total_iter': 1}, 'logger': {'print_freq': 1, 'use_tb_logger': False}}
    logger = kind.__new__(kind)
    with _root_logger(SimpleNamespace(info=lines.append)):
        kind.__init__(logger, opt, 0)
    logger.start_time = time.time() - 10
    inspect.unwrap(kind.__call__)(logger, {'epoch': 0, 'iter': 1, 'lrs': [], 'time': 1.0, 'data_time': 0.0})
    return lines[0]


@contextmanager
def _root_logger(stand_in) -> Iterator[None]:
    """Keep BasicSR from giving its root logger handlers, which must not happen before it knows its file."""
    from basicsr.utils import logger

    original = logger.get_root_logger
    logger.get_root_logger = lambda *args, **kwargs: stand_in
    try:
        yield
    finally:
        logger.get_root_logger = original


def show_rates_in_tensorboard() -> bool:
    """Write learning rates to TensorBoard beside the losses.

    Fault: `MessageLogger` takes them out of what it writes there. No upstream issue known.
    """
    from basicsr.utils.logger import MessageLogger

    original = MessageLogger.__call__
    if 'lr/' in ''.join(map(str, original.__code__.co_consts)):
        return False

    @functools.wraps(original)
    def __call__(self, log_vars):
        if self.use_tb_logger and self.tb_logger is not None and 'debug' not in self.exp_name:
            for number, rate in enumerate(log_vars['lrs']):
                self.tb_logger.add_scalar(f'lr/group_{number}', rate, log_vars['iter'])
        original(self, log_vars)

    MessageLogger.__call__ = __call__
    return True


def start_wandb_of_any_age() -> bool:
    """Start a run of Weights & Biases without `wandb.util.generate_id`.

    Fault: `init_wandb_logger` asks it for the run's id, and wandb 0.28.2 removed it (slime#2332).
    """
    from basicsr import train, utils
    from basicsr.utils import logger

    if 'generate_id' not in logger.init_wandb_logger.__wrapped__.__code__.co_names:
        return False
    for module in (logger, utils, train):
        module.init_wandb_logger = logger.master_only(init_wandb_logger)
    return True


def init_wandb_logger(opt: dict) -> None:
    """Start, or by `logger.wandb.resume_id` resume, a run that takes over what goes to TensorBoard."""
    import wandb
    from basicsr.utils import get_root_logger

    project, resume_id = opt['logger']['wandb']['project'], opt['logger']['wandb'].get('resume_id')
    run_id = resume_id or uuid.uuid4().hex[:8]
    wandb.init(
        id=run_id,
        resume='allow' if resume_id else 'never',
        name=opt['name'],
        config=opt,
        project=project,
        sync_tensorboard=True,
    )
    get_root_logger().info(f'Use wandb logger with id={run_id}; project={project}.')


def place_by_local_rank() -> bool:
    """Give each process the GPU that its launcher meant for it.

    Fault: `_init_dist_pytorch` takes GPU `rank % count` of its machine, which is another's where machines have more
    GPUs than processes. BasicSR#626 is about the older flag; torchrun tells by LOCAL_RANK.
    """
    from basicsr.utils import dist_util

    original = dist_util._init_dist_pytorch
    if hasattr(original, 'places_by_local_rank'):
        return False

    @functools.wraps(original)
    def start(backend, **kwargs):
        original(backend, **kwargs)
        import torch

        if torch.cuda.is_available() and 'LOCAL_RANK' in os.environ:
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']) % torch.cuda.device_count())

    start.places_by_local_rank = True
    dist_util._init_dist_pytorch = start
    return True


REPAIRS = (
    count_down_to_zero,
    show_rates_in_tensorboard,
    start_wandb_of_any_age,
    place_by_local_rank,
)
