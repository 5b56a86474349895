"""Run by test_toolbox.py in a process of its own: each fault of BasicSR's before and after the repair that mends it.

Prints a JSON object: of each repair whether things worked before and after it, whether it said that it was needed, and
what it said when called once more.
"""

# ruff: noqa: E402 (BasicSR is imported when the repairs are held back)
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ['CUDA_VISIBLE_DEVICES'] = ''  # most faults are those of machines without CUDA

from ast_plugin import toolbox

repairs = {repair.__name__: repair for repair in toolbox.AFTER_IMPORT}
toolbox.AFTER_IMPORT = ()

import torch
import torch.distributed as dist
from basicsr import train
from basicsr.models.base_model import BaseModel
from basicsr.models.lr_scheduler import CosineAnnealingRestartLR
from basicsr.utils.dist_util import init_dist
from basicsr.utils.registry import ARCH_REGISTRY


class Ten(torch.utils.data.Dataset):
    """Ten numbers, fewer than a batch."""

    opt = {'batch_size_per_gpu': 16, 'seed': 0}

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index


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


def works(probe) -> bool:
    try:
        return bool(probe())
    except Exception as error:
        print(f'{probe.__name__}: {type(error).__name__}: {error}', file=sys.stderr)
        return False


def main():
    results = {}
    for name, repair in repairs.items():
        probe = globals()[name]
        results[name] = {'before': works(probe), 'needed': repair(), 'after': works(probe), 'again': repair()}
    dist.destroy_process_group()
    sys.__stdout__.write('\n' + json.dumps(results))


if __name__ == '__main__':
    main()
