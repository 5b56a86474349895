"""Repairs of how BasicSR goes on with a run that was interrupted. See `toolbox`."""

import functools
import math
from pathlib import Path

_FOLDERS = ('experiments_root', 'models', 'training_states', 'visualization', 'log')


def resume_anywhere() -> bool:
    """Resume on a CPU, from the newest state that is whole, and below the experiment's own root.

    Fault: `load_resume_state` calls `torch.cuda.current_device()` on any machine, and `--auto_resume` looks under
    `experiments/` of the working directory, whatever root path the options have; it takes the state of the highest
    number, even if it is cut. No upstream issue known.
    """
    from basicsr import train

    if 'experiments' not in train.load_resume_state.__code__.co_consts:
        return False
    train.load_resume_state = load_resume_state
    return True


def load_resume_state(opt: dict) -> dict | None:
    """Read the training state that the options name, or under `auto_resume` the newest one of the experiment.

    Args:
        opt: BasicSR's options; `path.resume_state` is set to the file found, `resumed_iter` to its iteration, and the
            networks are pointed at their weights: those in the state itself, or for a state without any at the files
            that `check_resume` looks for.
    Returns:
        The state, on the CPU, without the weights; None to start afresh.
    Raises:
        CheckpointError: if the file is missing or damaged, or holds anything but data.
    """
    from basicsr.utils import check_resume

    from ast_plugin import checkpoints

    path = opt['path'].get('resume_state')
    if opt['auto_resume']:
        path = checkpoints.newest_whole(opt['path']['training_states']) or path
        opt['path']['resume_state'] = path and str(path)
    if path is None:
        return None
    state = checkpoints.read_state(path)
    opt['resumed_iter'] = state['iter']
    has_weights = state.pop('params', None) is not None and 'network_g' in opt
    has_weights = has_weights and 'network_g' not in (opt['path'].get('ignore_resume_networks') or ())
    state.pop('params_ema', None)
    # Networks that are not told of are not pointed anywhere.
    check_resume({key: value for key, value in opt.items() if not (has_weights and key == 'network_g')}, state['iter'])
    if has_weights:
        opt['path'].update(pretrain_network_g=str(path), param_key_g='params')
    # The state may be of another experiment.
    for key in _FOLDERS:
        if key in opt['path']:
            Path(opt['path'][key]).mkdir(parents=True, exist_ok=True)
    return state


def resume_within_epochs() -> bool:
    """Go on in the middle of an epoch.

    Fault: the loop begins an interrupted epoch again, so that some images are seen twice and others not at all. What is
    drawn at random in loading depends on everything drawn before, and on the number of workers.
    No upstream issue known.
    """
    from basicsr import train

    if hasattr(train.create_train_val_dataloader, '__wrapped__') or not hasattr(train.EnlargedSampler, 'resume'):
        return False
    train.build_dataset = _draw_by_position(train.build_dataset)
    train.create_train_val_dataloader = _begin_where_interrupted(train.create_train_val_dataloader)
    return True


def _draw_by_position(original):
    """Of a training set the samples that depend on seed, epoch and position alone, as ours do by themselves."""

    @functools.wraps(original)
    def build_dataset(opt):
        from ast_plugin.data.random_states import SeededSamples

        dataset = original(opt)
        is_read_beside_training = opt.get('prefetch_mode') == 'cpu' and not opt.get('num_worker_per_gpu')
        # A thread that seeds global generators would disturb those that training draws from.
        if opt['phase'] != 'train' or getattr(dataset, 'index_carries_epoch', False) or is_read_beside_training:
            return dataset
        return SeededSamples(dataset)

    return build_dataset


def _begin_where_interrupted(original):
    @functools.wraps(original)
    def create_train_val_dataloader(opt, logger):
        import torch

        from ast_plugin.data.random_states import SeededSamples
        from ast_plugin.data.workers import start_apart

        loader, sampler, val_loaders, _, total_iters = original(opt, logger)
        sampler.fill(loader.batch_size)  # one process may feed several GPUs, which BasicSR forgets in its sampler
        opt['train']['iters_per_epoch'] = len(loader)
        # What a loader draws for its workers must not come out of what training draws from.
        loader.generator = torch.Generator().manual_seed(opt['manual_seed'] + opt['rank'])
        loader.worker_init_fn = functools.partial(start_apart, loader.worker_init_fn)
        loader.collate_fn = getattr(loader.dataset, 'collate', loader.collate_fn)
        if isinstance(loader.dataset, SeededSamples):
            sampler.seed = loader.dataset.seed = opt['manual_seed']
        if opt.get('resumed_iter'):
            sampler.resume(opt['resumed_iter'], loader.batch_size)
        return loader, sampler, val_loaders, math.ceil(total_iters / len(loader)), total_iters

    return create_train_val_dataloader


def start_loading_once() -> bool:
    """Let the training loop start loading when it knows the epoch.

    Fault: its prefetchers start the workers when they are made, before `set_epoch`; the loop resets them at once, and
    all of that is thrown away. No upstream issue known.
    """
    from basicsr import train

    if hasattr(train.CPUPrefetcher, 'starts_by_reset'):
        return False
    train.CPUPrefetcher = _started_by_reset(train.CPUPrefetcher)
    train.CUDAPrefetcher = _started_by_reset(train.CUDAPrefetcher)
    return True


def _started_by_reset(kind: type) -> type:
    class Prefetcher(kind):
        """BasicSR's, with nothing to give before `reset`."""

        starts_by_reset = True

        def __init__(self, loader, *args):
            super().__init__((), *args)
            self.ori_loader = loader

        def reset(self):
            """Load the epoch that the sampler was told of."""
            from ast_plugin.data import workers

            with workers.block_signals():
                super().reset()

    return Prefetcher


def archive_under_free_names() -> bool:
    """Rename an older run's folder to a name that is free.

    Fault: `mkdir_and_rename` knows names by the second; of two runs started in one second the later one fails, or
    moves the first one's folder into the archive of another. No upstream issue known.
    """
    from basicsr import train
    from basicsr.utils import misc

    if hasattr(misc.mkdir_and_rename, '__wrapped__'):
        return False
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
    return True


def _free(prefix: str, name: str) -> str:
    number = 1
    candidate = name
    while Path(prefix + candidate).exists():
        number += 1
        candidate = f'{name}_{number}'
    return candidate


def purge_tensorboard() -> bool:
    """Let TensorBoard forget what a run wrote after the state that is resumed.

    Fault: the loop writes the same steps once more, into another file, and both are shown. No upstream issue known.
    """
    from basicsr import train

    original = train.init_tb_loggers
    if hasattr(original, '__wrapped__'):
        return False

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
    return True


REPAIRS = (resume_anywhere, resume_within_epochs, start_loading_once, archive_under_free_names, purge_tensorboard)
