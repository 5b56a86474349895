"""The switches of `train` in RestorationModel, each as an option file sets it."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ast_plugin  # noqa: F401  registers everything
from ast_plugin.errors import OptionError, TrainingError
from ast_plugin.models.training_step import Mixup
from ast_plugin.options.sections import MixupOptions
from tests.models.test_restoration_model import batch, build, options, same, train, weights

ADAMW = {'type': 'AdamW', 'lr': 2e-3}


def trained(folder, iterations=3, **switches):
    model = build(options(folder, **switches))
    train(model, 1, iterations)
    return model


def distance(model, other):
    """Of two models' weights, relative to how far training has moved them."""
    start, a, b = (torch.cat([w.flatten() for w in each.values()]) for each in (START, weights(model), weights(other)))
    return ((a - b).norm() / (a - start).norm()).item()


START = {}


@pytest.fixture(scope='module', autouse=True)
def _start(tmp_path_factory):
    START.update(weights(build(options(tmp_path_factory.mktemp('start')))))


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    return trained(tmp_path_factory.mktemp('plain'))


@pytest.mark.parametrize(
    ('switches', 'tolerance'),
    [
        ({'precision': 'fp32', 'on_nonfinite': 'skip'}, 0),
        ({'gradient_checkpointing': True}, 0),
        ({'accumulate': 2}, 1e-2),
        ({'channels_last': True}, 1e-2),
        ({'optim_g': {**ADAMW, 'fused': True}}, 1e-2),
        ({'compile': 'eager'}, 1e-2),
        ({'precision': 'bf16'}, 0.5),
        ({'precision': 'fp16'}, 0.2),
        ({'precision': 'fp16', 'accumulate': 2, 'gradient_checkpointing': True, 'channels_last': True}, 0.2),
        ({'precision': 'bf16', 'compile': 'eager', 'gradient_checkpointing': True, 'ema_decay': 0.5}, 0.5),
    ],
    ids=lambda value: '-'.join(value) if isinstance(value, dict) else '',
)
def test_a_switch_changes_the_way_and_not_the_end(switches, tolerance, plain, tmp_path):
    model = trained(tmp_path, **switches)
    assert weights(model).keys() == weights(plain).keys()
    assert distance(plain, model) <= tolerance
    assert model.get_current_log()['l_pix'] == pytest.approx(plain.get_current_log()['l_pix'], rel=0.02)
    model.feed_data(batch())
    model.test()
    assert model.output.dtype == torch.float32  # validation measures in float32


def test_mixing_reaches_the_network(tmp_path):
    mixing = {'type': 'mixup', 'start_epoch': 2}
    opt = options(tmp_path, mixing=mixing, iters_per_epoch=2)
    opt.update(manual_seed=7, rank=3)
    model = build(opt)
    for iteration in (2, 3):
        model.feed_data(batch())
        lq, gt = model.lq, model.gt
        model.optimize_parameters(iteration)
        if iteration == 2:
            assert model.lq is lq
            continue
        want = Mixup(MixupOptions(type='mixup', start_epoch=2), 7, 3, iters_per_epoch=2)(lq, gt, 3)
        assert torch.equal(model.lq, want[0]) and torch.equal(model.gt, want[1])
        assert not torch.equal(model.lq, lq)
    with pytest.raises(OptionError, match='iters_per_epoch'):
        build(options(tmp_path, mixing=mixing))


class NanAt:
    """A loss that goes wrong on one occasion."""

    def __init__(self, loss, occasion):
        self.loss, self.occasion, self.count = loss, occasion, 0

    def __call__(self, output, target):
        self.count += 1
        return self.loss(output, target) * (math.nan if self.count == self.occasion else 1)


def test_nan_loss_stops_and_names_the_images(tmp_path):
    model = build(options(tmp_path))
    model.losses['l_pix'] = NanAt(model.losses['l_pix'], 3)
    with pytest.raises(TrainingError, match=r'iteration 3: the loss l_pix is nan; images: a/3\.png, b/3\.png'):
        for iteration in range(1, 5):
            model.feed_data({**batch(iteration), 'lq_path': [f'{folder}/{iteration}.png' for folder in 'ab']})
            before = weights(model)
            model.optimize_parameters(iteration)
    assert same(weights(model), before)


def test_skipped_step_changes_nothing(tmp_path):
    model = build(options(tmp_path, on_nonfinite='skip', ema_decay=0.5))
    model.losses['l_pix'] = NanAt(model.losses['l_pix'], 2)
    states = []
    for iteration in range(1, 4):
        model.update_learning_rate(iteration)
        model.feed_data(batch(iteration))
        model.optimize_parameters(iteration)
        states.append((weights(model), {k: v.clone() for k, v in model.net_g_ema.state_dict().items()}))
    assert same(states[1][0], states[0][0]) and same(states[1][1], states[0][1])
    assert not same(states[2][0], states[1][0]) and not same(states[2][1], states[1][1])
    assert model.schedulers[0].last_epoch == 2


def test_warm_up_over_a_stepwise_schedule(tmp_path):
    """BasicSR's own stays for ever at the last rate of the warm-up, and forgets milestones that fall into it."""
    opt = options(tmp_path, scheduler={'type': 'MultiStepLR', 'milestones': [2, 6], 'gamma': 0.5})
    model = build(opt)
    rates = []
    for iteration in range(1, 9):
        model.update_learning_rate(iteration, warmup_iter=4)
        rates.append(model.get_current_learning_rate()[0] / 2e-3)
        model.optimizer_g.step()
    assert rates == pytest.approx([0.25, 0.5, 0.75, 0.5, 0.5, 0.5, 0.25, 0.25])


def test_resuming_with_all_switches_is_exact(tmp_path):
    """A scale that fell at an overflow and grows again, mixing, an average, a fused optimiser, another layout."""
    switches = {
        'precision': 'fp16',
        'accumulate': 2,
        'channels_last': True,
        'ema_decay': 0.9,
        'mixing': {'type': 'mixup', 'start_epoch': 2},
        'iters_per_epoch': 2,
        'optim_g': {**ADAMW, 'fused': True},
    }
    straight = build(options(tmp_path, **switches))
    scaler = straight.step.precision.scaler
    scaler.load_state_dict({**scaler.state_dict(), 'scale': 2.0**40, 'growth_interval': 3})
    train(straight, 1, 3)
    assert scaler.get_scale() < 2.0**40
    scaler.load_state_dict({**scaler.state_dict(), 'scale': 1024.0})
    straight.save(0, 3)
    train(straight, 4, 7)
    assert scaler.get_scale() == 2048

    opt = options(tmp_path, **switches)
    opt['path']['pretrain_network_g'] = str(tmp_path / 'models' / 'net_g_3.pth')
    resumed = build(opt)
    resumed.resume_training(torch.load(tmp_path / 'training_states' / '3.state', weights_only=True))
    train(resumed, 4, 7)
    assert same(weights(resumed), weights(straight))
    assert same(resumed.net_g_ema.state_dict(), straight.net_g_ema.state_dict())
    assert resumed.step.precision.scaler.state_dict() == scaler.state_dict()


WORKER = """
import os
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from ast_plugin.errors import TrainingError
from ast_plugin.models.training_step import Precision, TrainingStep

store, out = sys.argv[1:]
rank = 0 if os.fork() else 1  # the imports above take longest
dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
generator = torch.Generator().manual_seed(0)
lq, gt = torch.rand(2, 8, 3, 6, 6, generator=generator)

def step_of(network, **train):
    torch.manual_seed(0)
    network = network(torch.nn.Conv2d(3, 3, 3, padding=1))
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    return TrainingStep(network, optimizer, Precision('fp32', torch.device('cpu')), train)

def losses(output, target):
    return {'l_pix': (output - target).square().mean()}

def tell(*words):
    with open(f'{out}{rank}', 'a') as file:
        print(*words, file=file)

def main():
    mine = slice(4 * rank, 4 * rank + 4)
    together, alone = step_of(DistributedDataParallel, accumulate=2), step_of(lambda network: network)
    values = [together(lq[mine], gt[mine], losses, 1)[0], alone(lq, gt, losses, 1)[0]]
    torch.testing.assert_close(values[0], values[1])
    for a, b in zip(together.parameters, alone.parameters):
        torch.testing.assert_close(a, b)
    bad = lq.clone()
    bad[1] = float('nan')
    for policy in ('skip', 'stop'):
        step = step_of(DistributedDataParallel, on_nonfinite=policy)
        before = [parameter.clone() for parameter in step.parameters]
        try:
            tell(policy, step(bad[mine], gt[mine], losses, 3, [f'{rank}.png'])[1])
        except TrainingError as error:
            tell(policy, str(error).partition('.png')[0])
        assert all(map(torch.equal, before, step.parameters))

main()  # in a function, whose networks are gone when gloo ends: its threads would abort the process
dist.destroy_process_group()
if rank == 0:
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_processes_decide_alike(tmp_path):
    """Micro-batches of two processes add up to the whole batch; a loss that is NaN in one stops both."""
    arguments = [sys.executable, '-c', WORKER, str(tmp_path / 'store'), str(tmp_path / 'out')]
    root = Path(__file__).parents[2]
    done = subprocess.run(arguments, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in '01':
        told = (tmp_path / f'out{rank}').read_text()
        assert told == 'skip False\nstop iteration 3: the loss l_pix is nan; images: 0\n'
