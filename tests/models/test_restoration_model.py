"""Tests of RestorationModel, called as in BasicSR's training loop, with a tiny network and random images."""

import logging
import math
from copy import deepcopy

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import ast_plugin  # noqa: F401  registers everything
from ast_plugin.checkpoints import read_checkpoint
from ast_plugin.errors import CheckpointError, DataError, OptionError
from ast_plugin.evaluation.protocols import read_protocol
from ast_plugin.metrics import psnr_rgb
from ast_plugin.models import preflight
from ast_plugin.models.training_step import Mixup
from ast_plugin.options.sections import MixupOptions

TINY = {'type': 'AST', 'img_size': 16, 'embed_dim': 4, 'depths': [1] * 9, 'num_heads': [1] * 9, 'drop_path_rate': 0.0}


class Pairs(Dataset):
    """Noisy images of several sizes, two of the same name in different folders."""

    def __init__(self, names=('a/one.png', 'b/one.png', 'three.png')):
        self.opt = {'name': 'pairs'}
        self.names = names

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        gt = torch.rand(3, 16 + 3 * index, 21, generator=generator)
        lq = gt + 0.1 * torch.randn(gt.shape, generator=generator)
        return {'lq': lq.clamp(0, 1), 'gt': gt, 'lq_path': self.names[index], 'gt_path': self.names[index]}


def options(folder, **train):
    for name in ('models', 'training_states', 'visualization', 'results'):
        (folder / name).mkdir(exist_ok=True)
    return {
        'name': 'tiny',
        'model_type': 'RestorationModel',
        'is_train': True,
        'dist': False,
        'num_gpu': 0,
        'rank': 0,
        'network_g': dict(TINY),
        'path': {
            'models': str(folder / 'models'),
            'training_states': str(folder / 'training_states'),
            'visualization': str(folder / 'visualization'),
            'results_root': str(folder / 'results'),
        },
        'train': {
            'total_iter': 8,
            'optim_g': {'type': 'AdamW', 'lr': 2e-3},
            'scheduler': {'type': 'WarmupCosineLR', 'warmup_iter': 2},
            'pixel_opt': {'type': 'ASTCharbonnierLoss'},
            **train,
        },
        'val': {
            'metrics': {
                'psnr': {'type': 'calculate_psnr', 'crop_border': 0},
                'ssim': {'type': 'calculate_ssim', 'crop_border': 0},
            }
        },
    }


def build(opt):
    from basicsr.models import build_model

    torch.manual_seed(0)
    return build_model(opt)


def batch(number=0):
    generator = torch.Generator().manual_seed(100 + number)
    gt = torch.rand(2, 3, 16, 16, generator=generator)
    return {'lq': (gt + 0.1 * torch.randn(gt.shape, generator=generator)).clamp(0, 1), 'gt': gt}


def train(model, first, last):
    for iteration in range(first, last + 1):
        model.update_learning_rate(iteration)
        model.feed_data(batch(iteration))
        model.optimize_parameters(iteration)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.get_bare_model(model.net_g).state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_loss_counts_under_its_own_name(tmp_path):
    model = build(options(tmp_path, edge_opt={'type': 'EdgeLoss', 'loss_weight': 0.05}, fft_opt={'type': 'FFTLoss'}))
    model.feed_data(batch())
    model.optimize_parameters(1)
    assert list(model.get_current_log()) == ['l_pix', 'l_edge', 'l_fft']
    with pytest.raises(OptionError, match='train has no loss'):
        build(options(tmp_path, pixel_opt=None))


@pytest.mark.parametrize('better', ['higher', 'lower'])
def test_best_weights_describe_themselves(tmp_path, better):
    opt = options(tmp_path)
    opt['val']['best_metric'] = 'own'
    opt['val']['metrics']['own'] = {'type': 'calculate_psnr', 'crop_border': 0, 'better': better}
    model = build(opt)
    states = []
    for iteration in (1, 2):
        model.validation(DataLoader(Pairs()), iteration, None, save_img=True)
        assert (tmp_path / 'visualization' / 'one_2' / f'one_2_{iteration}.png').is_file()
        states.append(weights(model))
        with torch.no_grad():
            model.net_g.output_proj.bias.add_(5)  # much worse
    best = ('higher', 'lower').index(better)
    assert model.best_metric_results['pairs']['own']['iter'] == best + 1
    files = [read_checkpoint(tmp_path / 'models' / f'net_g_best{suffix}') for suffix in ('.pth', '.safetensors')]
    assert all(same(file.state, states[best]) for file in files)
    assert files[1].network == opt['network_g']


def test_best_value_follows_its_weights(tmp_path, monkeypatch):
    """A state saved after a failure must not claim weights that were not written."""
    model = build(options(tmp_path))
    monkeypatch.setattr(model, 'save_best', lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.validation(DataLoader(Pairs()), 1, None)
    assert model.best_metric_results['pairs']['psnr']['iter'] == -1


def test_the_last_iteration_is_validated_once(tmp_path, monkeypatch):
    model = build(options(tmp_path))
    calls = []
    measure = model.measure
    monkeypatch.setattr(model, 'measure', lambda *a, **k: calls.append(a) or measure(*a, **k))
    for iteration in (4, 8, 9, 11):  # BasicSR's counter passes the end, once per epoch
        model.validation(DataLoader(Pairs()), iteration, None)
    assert [call[1] for call in calls] == [4, 8]
    with pytest.raises(DataError, match='pairs holds no images'):
        model.validation(DataLoader(Pairs(())), 9, None)


def test_hooks_of_basicsr_are_called(tmp_path):
    from ast_plugin.models.restoration_model import RestorationModel

    called = []

    class Own(RestorationModel):
        def setup_schedulers(self):
            called.append('schedule')
            super().setup_schedulers()

        def nondist_validation(self, *args):
            called.append('validation')

    Own(options(tmp_path)).validation(DataLoader(Pairs()), 3, None)
    assert called == ['schedule', 'validation']


def test_moving_average(tmp_path):
    model = build(options(tmp_path, ema_decay=0.5))
    start = weights(model)
    train(model, 1, 1)
    for name, average in model.net_g_ema.state_dict().items():
        torch.testing.assert_close(average, (start[name] + weights(model)[name]) / 2)
    assert model.evaluated_network is model.net_g_ema
    model.save(0, 1)
    model.validation(DataLoader(Pairs()), 1, None)
    both = read_checkpoint(tmp_path / 'models' / 'net_g_1.pth')
    assert both.param_key == 'params_ema'
    assert same(read_checkpoint(tmp_path / 'models' / 'net_g_best.safetensors').state, both.state)
    assert not same(read_checkpoint(tmp_path / 'models' / 'net_g_1.pth', 'params').state, both.state)
    assert not any(parameter.requires_grad for parameter in model.net_g_ema.parameters())


def test_weights_load_whatever_their_kind(tmp_path):
    model = build(options(tmp_path))
    train(model, 1, 1)
    model.validation(DataLoader(Pairs()), 1, None)
    official = {'state_dict': {f'module.{name}': tensor for name, tensor in weights(model).items()}, 'epoch': 1}
    torch.save(official, tmp_path / 'model_best.pth')
    for path, key in [
        (tmp_path / 'model_best.pth', 'state_dict'),
        (tmp_path / 'models' / 'net_g_best.pth', 'params'),
        (tmp_path / 'models' / 'net_g_best.safetensors', None),
    ]:
        opt = options(tmp_path)
        opt['path'].update(pretrain_network_g=str(path), param_key_g=key)
        assert same(weights(build(opt)), weights(model)), path
    opt['network_g']['embed_dim'] = 8
    with pytest.raises(CheckpointError, match='embed_dim: 4'):
        build(opt)


@pytest.mark.parametrize(
    ('val', 'end'),
    [
        ({'protocol': 'basicsr'}, ', and protocol basicsr defines none\n'),
        ({'metrics': None}, ', and protocol basicsr defines none\n'),
        ({'protocol': 'whole', 'metrics': {}}, '\n'),
        ({'protocol': 'whole'}, None),
    ],
)
def test_nothing_to_measure_is_reported_first(caplog, monkeypatch, val, end):
    monkeypatch.setattr(logging.getLogger('basicsr'), 'propagate', True)
    preflight._check_metrics(val, 'my.yml')
    assert ('nothing is measured' in caplog.text) == (end is not None)
    assert f'my.yml: nothing is measured: val.metrics has no metric{end}' in caplog.text or end is None


def test_testing_by_a_protocol(tmp_path, capsys):
    """Test with the protocol's own metrics, unrounded, and its own restoration."""
    protocol = {'type': 'tiled', 'tile': 16, 'overlap': 4, 'self_ensemble': True}
    model = build({**options(tmp_path), 'is_train': False, 'val': {'protocol': protocol, 'suffix': None}})
    results = model.measure(DataLoader(Pairs()))
    sample = Pairs()[2]
    restored = read_protocol(protocol).restore(model.net_g, sample['lq'][None])
    assert results.restored['three']['psnr'] == pytest.approx(psnr_rgb(restored, sample['gt']), abs=1e-6)
    assert results.degraded['three']['psnr'] == pytest.approx(psnr_rgb(sample['lq'], sample['gt']), abs=1e-6)
    assert list(results.mean()) == ['psnr', 'ssim']
    assert len(results.examples()) == 3 and results.thumbnails['three'][1].shape == (22, 21, 3)
    model.validation(DataLoader(Pairs()), 'tiny', None, save_img=True)
    table = capsys.readouterr().out
    assert '| mean ' in table and 'input psnr' in table
    assert 'tiles of 16, overlap 4, ramp; self-ensemble of eight flips and rotations; not rounded' in table
    assert (tmp_path / 'results' / 'pairs.md').read_text().strip() in table
    header = (tmp_path / 'results' / 'pairs.csv').read_text().partition('\n')[0]
    assert header.startswith('image,input psnr,psnr,input ssim,ssim,protocol,')
    assert (tmp_path / 'visualization' / 'pairs' / 'one_2_tiny.png').is_file()


def test_what_val_leaves_out_is_put_in(tmp_path):
    opt = options(tmp_path)
    opt['val'] = {'protocol': 'spad'}
    model = build(opt)
    assert model.opt['val']['metrics']['psnr'] == {'type': 'calculate_psnr_matlab'}
    model.validation(DataLoader(Pairs()), 1, None)
    assert model.best_metric_results['pairs']['psnr']['better'] == 'higher'
    opt['val'] = {'metrics': {'niqe': {'type': 'calculate_niqe', 'crop_border': 0}}}
    assert build(opt).opt['val']['metrics']['niqe']['better'] == 'lower'


def test_added_metric_begins_anew(tmp_path):
    opt = options(tmp_path)
    opt['datasets'] = {'val': {'name': 'real, without gt'}, 'val_2': {'name': 'pairs'}}
    opt['val']['best_metric'] = 'psnr'
    model = build(opt)
    model.validation(DataLoader(Pairs()), 1, None)
    model.save(0, 1)
    state = torch.load(tmp_path / 'training_states' / '1.state', weights_only=True)
    build({**opt, 'val': None, 'datasets': {}}).resume_training(deepcopy(state))
    opt['val']['metrics']['niqe'] = {'type': 'calculate_psnr', 'crop_border': 0, 'better': 'lower'}
    resumed = build(opt)
    resumed.resume_training(state)
    resumed.validation(DataLoader(Pairs()), 2, None)
    best = resumed.best_metric_results['pairs']
    assert best['niqe'] == {'better': 'lower', 'val': best['psnr']['val'], 'iter': 2}
    assert best['psnr']['val'] == model.best_metric_results['pairs']['psnr']['val']


# Switches of `train`, set as in an option file

ADAMW = {'type': 'AdamW', 'lr': 2e-3}


def trained(folder, iterations=3, **switches):
    model = build(options(folder, **switches))
    train(model, 1, iterations)
    return model


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """Three steps without any switch."""
    return trained(tmp_path_factory.mktemp('plain'))


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    return weights(build(options(tmp_path_factory.mktemp('start'))))


def vector(state):
    return torch.cat([weight.flatten() for weight in state.values()])


@pytest.mark.parametrize(
    ('switches', 'tolerance'),
    [
        ({'precision': 'fp32', 'on_nonfinite': 'skip', 'gradient_checkpointing': True}, 0),
        ({'accumulate': 2, 'channels_last': True, 'optim_g': {**ADAMW, 'fused': True}}, 1e-2),
        ({'precision': 'fp16', 'accumulate': 2, 'gradient_checkpointing': True, 'channels_last': True}, 0.2),
        ({'precision': 'bf16', 'compile': 'eager', 'gradient_checkpointing': True, 'ema_decay': 0.5}, 0.5),
    ],
    ids=lambda value: '-'.join(value) if isinstance(value, dict) else '',
)
def test_switches_change_the_way_not_the_end(switches, tolerance, start, plain, tmp_path):
    model = trained(tmp_path, **switches)
    assert weights(model).keys() == weights(plain).keys()
    begin, want, got = map(vector, (start, weights(plain), weights(model)))
    assert (got - want).norm() / (want - begin).norm() <= tolerance  # relative to the distance trained
    assert model.get_current_log()['l_pix'] == pytest.approx(plain.get_current_log()['l_pix'], rel=0.02)
    model.feed_data(batch())
    model.test()
    assert model.output.dtype == torch.float32  # validation measures in float32


def test_mixing_reaches_the_network(tmp_path):
    opt = options(tmp_path, mixing={'type': 'mixup', 'start_epoch': 2}, iters_per_epoch=2)
    model = build({**opt, 'manual_seed': 7, 'rank': 3})
    model.feed_data(batch())
    lq, gt = model.lq, model.gt
    model.optimize_parameters(3)
    want = Mixup(MixupOptions(type='mixup', start_epoch=2), 7, 3, iters_per_epoch=2)(lq, gt, 3)
    assert torch.equal(model.lq, want[0]) and torch.equal(model.gt, want[1]) and not torch.equal(model.lq, lq)


def test_skipped_step_changes_nothing(tmp_path):
    model = build(options(tmp_path, on_nonfinite='skip', ema_decay=0.5))
    loss, factors = model.losses['l_pix'], iter((1, math.nan, 1))
    model.losses['l_pix'] = lambda output, target: loss(output, target) * next(factors)
    states = []
    for iteration in range(1, 4):
        train(model, iteration, iteration)
        states.append((weights(model), {k: v.clone() for k, v in model.net_g_ema.state_dict().items()}))
    assert same(states[1][0], states[0][0]) and same(states[1][1], states[0][1])
    assert not same(states[2][0], states[1][0]) and not same(states[2][1], states[1][1])
    assert model.schedulers[0].last_epoch == 2


def test_warm_up_over_a_stepwise_schedule(tmp_path):
    """BasicSR alone would keep the last warm-up rate and skip milestones during the warm-up."""
    opt = options(tmp_path, scheduler={'type': 'MultiStepLR', 'milestones': [2, 6], 'gamma': 0.5})
    model = build(opt)
    rates = []
    for iteration in range(1, 9):
        model.update_learning_rate(iteration, warmup_iter=4)
        rates.append(model.get_current_learning_rate()[0] / 2e-3)
        model.optimizer_g.step()
    assert rates == pytest.approx([0.25, 0.5, 0.75, 0.5, 0.5, 0.5, 0.25, 0.25])


def test_resuming_with_all_switches_is_exact(tmp_path):
    """Resume with loss scaling after an overflow, mixup, moving average, fused optimiser and channels_last."""
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
