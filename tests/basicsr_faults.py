"""Script for test_toolbox.py: probe each fault of BasicSR before and after its repair.

Prints a JSON object with, for each repair, whether the probe succeeded before and after it.
"""

# ruff: noqa: E402 (BasicSR is imported after the repairs are disabled)
import functools
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

os.environ['CUDA_VISIBLE_DEVICES'] = ''  # most faults occur on machines without CUDA

import torch
import torch.distributed as dist

from ast_plugin import toolbox


def works(probe) -> bool:
    try:
        return bool(probe())
    except Exception as error:
        print(f'{probe.__name__}: {type(error).__name__}: {error}', file=sys.stderr)
        return False


def results_of(repair, probe) -> dict[str, bool]:
    before = works(probe)
    repair()
    return {'before': before, 'after': works(probe)}


def import_torchvision():
    import torchvision  # noqa: F401

    return True


def import_functional_tensor():
    from torchvision.transforms.functional_tensor import rgb_to_grayscale  # noqa: F401

    return True


def refuse(path):
    """Simulate a torchvision library compiled for another torch."""
    raise OSError(path)


torch.ops.load_library = refuse
results = {
    'define_torchvision_operators': results_of(toolbox.define_torchvision_operators, import_torchvision),
    'provide_functional_tensor': results_of(toolbox.provide_functional_tensor, import_functional_tensor),
}
toolbox.repair_after_import = lambda: None

from basicsr import train
from basicsr.models.base_model import BaseModel
from basicsr.models.lr_scheduler import CosineAnnealingRestartLR
from basicsr.utils import MessageLogger
from basicsr.utils.dist_util import init_dist
from basicsr.utils.registry import ARCH_REGISTRY

from ast_plugin.toolbox.repairs import REPAIRS


class Ten(torch.utils.data.Dataset):
    """Ten numbers, fewer than one batch."""

    opt = {'batch_size_per_gpu': 16, 'seed': 0}

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index


def build_msrresnet_at_scale_1():
    try:
        network = ARCH_REGISTRY.get('MSRResNet')(num_feat=4, num_block=1, upscale=1)
    except AttributeError:
        return False
    return network(torch.zeros(1, 3, 7, 9)).shape == (1, 3, 7, 9)


def build_swinir_without_warning():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        torch.set_warn_always(True)
        ARCH_REGISTRY.get('SwinIR')(img_size=8, window_size=8, depths=[1], embed_dim=4, num_heads=[1])
        torch.set_warn_always(False)
    return not [warning for warning in told if 'meshgrid' in str(warning.message)]


def explain_unknown_names():
    try:
        ARCH_REGISTRY.get('MSRResNett')
    except KeyError as error:
        return 'did you mean MSRResNet?' in str(error) and 'plugin' in str(error)


def resume_anywhere():
    with tempfile.TemporaryDirectory() as folder:
        for iteration in (9, 10):
            torch.save({'iter': iteration, 'epoch': 0}, Path(folder, f'{iteration}.state'))
        paths = {'training_states': folder, 'models': folder}
        opt = {'auto_resume': True, 'name': 'run', 'path': paths, 'network_g': {}}
        state = train.load_resume_state(opt)
        return state['iter'] == 10 and opt['path']['pretrain_network_g'].endswith('net_g_10.pth')


def start_distributed_on_cpus():
    os.environ.update(RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT=sys.argv[1])
    init_dist('pytorch', backend='nccl')
    return dist.get_backend() == 'gloo'


def compute_on_the_device():
    return BaseModel({'num_gpu': 0, 'device': 'mps', 'is_train': True}).device.type == 'mps'


def wrap_networks_on_cpus():
    model = BaseModel({'num_gpu': 0, 'is_train': True, 'dist': True})
    return isinstance(model.model_to_device(torch.nn.Linear(2, 2)), torch.nn.parallel.DistributedDataParallel)


def offer_torch_optimizers():
    weights = [torch.nn.Parameter(torch.zeros(2, 2))]
    names = ('Adam', 'AdamW', 'SGD', 'RMSprop', 'NAdam', 'RAdam', 'Adagrad')
    built = [BaseModel.get_optimizer(None, name, weights, 1e-3, weight_decay=0.01) for name in names]
    return [type(optimizer).__name__ for optimizer in built] == list(names)


def keep_cosine_at_its_end():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = CosineAnnealingRestartLR(optimizer, periods=[2, 2], restart_weights=[1, 0.5], eta_min=0.01)
    rates = []
    for _ in range(7):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    return rates[3:] == [0.01] * 4 and rates[0] == 0.505


def sample_full_batches():
    loader = torch.utils.data.DataLoader(Ten(), 16, sampler=train.EnlargedSampler(Ten(), 1, 0), drop_last=True)
    return len(list(loader)) > 0


def resume_within_epochs():
    """Resume ten numbers in batches of two after seven batches: three remain in the second epoch."""
    logger = SimpleNamespace(info=lambda line: None)
    loader_options = {'batch_size_per_gpu': 2, 'num_worker_per_gpu': 0, 'phase': 'train'}
    opt = {'datasets': {'train': loader_options}, 'world_size': 1, 'rank': 0, 'num_gpu': 0, 'dist': False}
    opt |= {'manual_seed': 0, 'train': {'total_iter': 10}, 'resumed_iter': 7}
    with patch.object(train, 'build_dataset', lambda options: Ten()):
        loader, sampler, *_ = train.create_train_val_dataloader(opt, logger)
        sampler.set_epoch(1)
        return len(list(loader)) == 3


def start_loading_once():
    started = []

    class Loader(list):
        def __iter__(self):
            started.append(self)
            return super().__iter__()

    prefetcher = train.CPUPrefetcher(Loader([1]))
    prefetcher.reset()
    return prefetcher.next() == 1 and len(started) == 1


def raise_errors_of_prefetching():
    from basicsr.data.prefetch_dataloader import PrefetchGenerator

    batches = PrefetchGenerator((1 // count for count in (1, 0)), 1)
    batches.queue.get = functools.partial(batches.queue.get, timeout=1)
    try:
        return next(batches) == 1 and next(batches) is None
    except ZeroDivisionError:
        return True


def archive_under_free_names():
    from basicsr.utils import misc

    folder = Path(sys.argv[2], 'experiment')
    with patch.object(misc, 'get_time_str', lambda: 'now'):
        for _ in range(3):
            train.mkdir_and_rename(str(folder))
            (folder / 'file').touch()
    return len(list(folder.parent.glob('experiment_archived_now*'))) >= 2


def purge_tensorboard():
    """Log four steps; the resumed state contains the first two."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    opt = {'name': 'resumed', 'logger': {'use_tb_logger': True}, 'root_path': tempfile.mkdtemp(dir=sys.argv[2])}
    for number, (first, last) in enumerate([(1, 3), (3, 4)]):
        tb_logger = train.init_tb_loggers({**opt, 'resumed_iter': 2} if number else opt)
        for step in range(first, last + 1):
            tb_logger.add_scalar('loss', number, step)
        tb_logger.close()
    events = EventAccumulator(tb_logger.log_dir).Reload().Scalars('loss')
    return [(event.step, event.value) for event in events] == [(1, 0), (2, 0), (3, 1), (4, 1)]


def count_down_to_zero():
    lines = logged_at_the_end_of(1, None)
    return '[eta: 0:00:00,' in lines[0]


def show_rates_in_tensorboard():
    scalars = []
    logged_at_the_end_of(1, SimpleNamespace(add_scalar=lambda *scalar: scalars.append(scalar)))
    return ('lr/group_0', 0.5, 1) in scalars and ('losses/l_pix', 0.25, 1) in scalars


def logged_at_the_end_of(total_iter, tb_logger) -> list[str]:
    opt = {'name': 'run', 'train': {'total_iter': total_iter}, 'logger': {'print_freq': 1, 'use_tb_logger': tb_logger}}
    message_logger = MessageLogger(opt, 0, tb_logger)
    message_logger.start_time -= 10
    lines = []
    message_logger.logger = SimpleNamespace(info=lines.append)
    message_logger({'epoch': 0, 'iter': total_iter, 'lrs': [0.5], 'time': 1.0, 'data_time': 0.0, 'l_pix': 0.25})
    return lines


def resume_with_other_options():
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2])
    state = {'iter': 1, 'optimizers': [optimizer.state_dict()], 'schedulers': [schedule.state_dict()]}
    recorded = {'train': {'optim_g': {'type': 'AdamW', 'lr': 0.3}}}
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=0.3)
    model = BaseModel({'num_gpu': 0, 'is_train': True})
    model.optimizers, model.schedulers = [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [2])]
    model.resume_training({**state, 'recorded': recorded})
    return optimizer.param_groups[0]['lr'] == 0.3


def spare_runs_from_tensorboard():
    from torch.utils.tensorboard import SummaryWriter

    opt = {'name': 'spared', 'logger': {'use_tb_logger': True}, 'root_path': sys.argv[2]}
    for broken in ('add_scalar', '__init__'):
        with patch.object(SummaryWriter, broken, lambda self, *args, **kwargs: 1 / 0):
            train.init_tb_loggers(opt).add_scalar('loss', 1.0, 1)
    return True


def write_every_name():
    from basicsr.utils import logger

    file, folder = Path(sys.argv[2], 'odd.yml'), Path(sys.argv[2], 'odd')
    file.write_text('name: odd\n')
    folder.mkdir(exist_ok=True)
    with patch.object(sys, 'argv', [*sys.argv, 'mu\udcf1oz', '\n']):
        train.copy_opt_file(str(file), str(folder))
    log = logger.get_root_logger('odd', log_file=str(folder / 'odd.log'))
    log.info('mu\udcf1oz \u96e8')
    logger.initialized_logger.pop('odd')
    log.handlers.clear()
    lines = (folder / 'odd.yml').read_text(encoding='utf-8').splitlines()
    is_right = '\\udcf1' in lines[2] and lines[-1] == 'name: odd' and all(line[:1] in '#n' for line in lines)
    return is_right and 'mu\\udcf1oz \u96e8' in (folder / 'odd.log').read_text(encoding='utf-8')


def name_what_is_not_decoded():
    from basicsr.data.single_image_dataset import SingleImageDataset

    folder = Path(sys.argv[2], 'images')
    folder.mkdir(exist_ok=True)
    (folder / 'empty.png').write_bytes(b'')
    try:
        SingleImageDataset({'dataroot_lq': str(folder), 'io_backend': {'type': 'disk'}})[0]
    except Exception as error:
        return str(error) == f'{folder / "empty.png"}: the file is empty'


def start_wandb_of_any_age():
    calls = []
    sys.modules['wandb'] = SimpleNamespace(init=lambda **options: calls.append(options), util=SimpleNamespace())
    opt = {'name': 'run', 'logger': {'use_tb_logger': True, 'wandb': {'project': 'rain'}}, 'root_path': sys.argv[2]}
    for resumed_iter in (None, 4, 8):
        train.init_tb_loggers({**opt, 'resumed_iter': resumed_iter}).close()
    first, *others = calls
    is_begun = first['project'] == 'rain' and first['sync_tensorboard'] and len(first['id']) == 8
    return is_begun and [(call['id'], call['resume']) for call in others] == [(first['id'], 'allow')] * 2


def place_by_local_rank():
    """The first of two processes on the second machine, with four GPUs per machine, uses GPU 0."""
    placed = []
    gpus = {'is_available': lambda: True, 'device_count': lambda: 4, 'set_device': placed.append}
    with (
        patch.dict(os.environ, RANK='2', LOCAL_RANK='0'),
        patch.multiple(torch.cuda, **gpus),
        patch.object(dist, 'init_process_group'),
    ):
        init_dist('pytorch')
    return placed[-1] == 0


if __name__ == '__main__':
    results |= {repair.__name__: results_of(repair, globals()[repair.__name__]) for repair in REPAIRS}
    dist.destroy_process_group()
    sys.__stdout__.write('\n' + json.dumps(results))
