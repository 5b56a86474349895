"""Resuming with changed options: supported changes apply, others are rejected by name before the run starts."""

import os
import re
import shutil
import signal
import sys
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

import ast_plugin  # noqa: F401  registers everything

# isort: split
from basicsr.models.sr_model import SRModel

from ast_plugin import checkpoints
from ast_plugin.cli.main import main
from ast_plugin.errors import FileError
from ast_plugin.models import run_state
from ast_plugin.models.restoration_model import RestorationModel
from tests import tiny_run
from tests.models.test_restoration_model import build, options, train

ADAMW = {'type': 'AdamW', 'lr': 2e-3}
COSINE = {'type': 'WarmupCosineLR', 'warmup_iter': 2}
OTHERS = {
    'longer': {'total_iter': 24},
    'shorter': {'total_iter': 6},
    'lr': {'optim_g': {**ADAMW, 'lr': 5e-4}},
    'weight_decay': {'optim_g': {**ADAMW, 'weight_decay': 0.3}},
    'betas': {'optim_g': {**ADAMW, 'betas': [0.8, 0.9], 'eps': 1e-6}},
    'eta_min': {'scheduler': {**COSINE, 'eta_min': 1e-4}},
    'warm_up': {'scheduler': {**COSINE, 'warmup_iter': 6}},
    'stepwise': {'scheduler': {'type': 'MultiStepLR', 'milestones': [3, 6], 'gamma': 0.5}},
    'restarts': {'scheduler': {'type': 'CosineAnnealingRestartLR', 'periods': [8], 'eta_min': 1e-5}},
    'all': {'total_iter': 12, 'optim_g': {**ADAMW, 'lr': 1e-3, 'weight_decay': 0}, 'scheduler': {**COSINE}},
}


def resumed(folder, state, **switches):
    opt = options(folder, **switches)
    (folder / 'models').mkdir(exist_ok=True)
    opt['path']['pretrain_network_g'] = str(folder / 'models' / 'net_g_4.pth')
    torch.save({'params': state['params']}, folder / 'models' / 'net_g_4.pth')
    model = build(opt)
    model.resume_training(deepcopy(state))
    return model


def rates(model, first, last) -> list[tuple]:
    found = []
    for iteration in range(first, last + 1):
        model.update_learning_rate(iteration)
        model.optimizer_g.step()
        found.append(tuple(model.get_current_learning_rate()))
    return found


@pytest.fixture(scope='module')
def state(tmp_path_factory) -> dict:
    """Return the training state of iteration 4."""
    folder = tmp_path_factory.mktemp('begun')
    model = build(options(folder))
    train(model, 1, 4)
    model.save(0, 4)
    return torch.load(folder / 'training_states' / '4.state', weights_only=True)


def without_options(state) -> dict:
    """Convert a state to the format of earlier versions."""
    return {key: value for key, value in state.items() if key != 'options'}


@pytest.mark.parametrize('other', OTHERS)
def test_other_options_are_followed(state, tmp_path, other):
    model = resumed(tmp_path, without_options(state) if other == 'all' else state, **OTHERS[other])
    fresh = build(options(tmp_path, **OTHERS[other]))
    groups = [each.optimizer_g.param_groups[0] for each in (model, fresh)]
    for key in ('initial_lr', 'betas', 'eps', 'weight_decay'):
        assert groups[0][key] == groups[1][key]
    moments = model.optimizer_g.state[next(model.net_g.parameters())]
    assert torch.equal(moments['exp_avg'], state['optimizers'][0]['state'][0]['exp_avg'])
    rates(fresh, 1, 4)
    assert rates(model, 5, 8) == rates(fresh, 5, 8)


def test_equal_options_change_nothing(state, tmp_path):
    model = resumed(tmp_path, state)
    assert not run_state.changes(state['options'], model.recorded)
    again = [schedule.state_dict() for schedule in model.schedulers]
    assert again == state['schedulers']
    assert model.optimizer_g.state_dict()['param_groups'] == state['optimizers'][0]['param_groups']


def test_changed_degradation_is_reported():
    degradations = [{'type': 'rain'}], {'type': 'snow'}
    train_sets = [{'degradation': each, 'dataroot_gt': str(each)} for each in degradations]
    (key,) = run_state.changes(*(run_state.record({'datasets': {'train': options}}) for options in train_sets))
    assert key == 'datasets.train.degradation'


@pytest.mark.parametrize(
    ('switches', 'said'),
    [
        ({'total_iter': 3}, 'train.total_iter: 3, but the state is of iteration 4'),
        (
            {'optim_g': {'type': 'Adam', 'lr': 2e-3}},
            'train.optim_g: (the type is Adam, but|Adam with these)',
        ),
        ({'optim_g': {**ADAMW, 'amsgrad': True}}, 'train.optim_g: AdamW with these options cannot resume'),
        ({'optim_g': {**ADAMW}, 'optim_d': {**ADAMW}}, r'train.optim_\*: 2 optimisers'),
    ],
)
def test_misfits(state, tmp_path, switches, said):
    for each in (state, without_options(state)):
        (line,) = run_state.misfits(each, options(tmp_path, **switches))
        assert re.match(said, line)
        assert not run_state.misfits(each, options(tmp_path))


def test_misfit_of_other_shapes(state, tmp_path):
    (line,) = run_state.misfits(state, options(tmp_path), [torch.zeros(3, requires_grad=True)])
    assert 'network_g has 1 trainable parameters' in line


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Train a run of four iterations; return its folder."""
    folder = tmp_path_factory.mktemp('run')
    file = tiny_run.write(folder)
    text = file.read_text().replace('SRModel', 'RestorationModel').replace('!!float 2', '2')
    file.write_text(text.replace('manual_seed: 1\n', ''))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(['train', '-opt', 'tiny.yml']) == 0
    return folder


def listing(folder):
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob('*'))


WANDB = ['logger:use_tb_logger=true', 'logger:wandb={project: rain}']


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (['--auto_resume', '--force_yml', 'train:total_iter=3'], '3, but the state is of iteration 4.*--force_resume'),
        (['--auto_resume', '--force_yml', 'network_g:num_feat=16'], 'network_g differs.*network_g.num_feat: 8 → 16'),
        (['--force_resume'], '--force_resume requires --auto_resume'),
        (['--force_yml', *WANDB], r'not logged in to Weights & Biases \(division by zero\)'),
    ],
)
def test_rejected_before_anything(folder, monkeypatch, capfd, arguments, said):
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(login=lambda: 1 / 0))
    before = listing(folder)
    assert main(['train', '-opt', 'tiny.yml', *arguments]) == 2
    message = capfd.readouterr().err
    assert re.search(said, message, re.DOTALL) and 'Traceback' not in message
    assert listing(folder) == before


def test_forced_and_followed(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    command = ['train', '-opt', 'tiny.yml', '--auto_resume', '--force_yml']
    assert main([*command, 'train:total_iter=3', '--force_resume']) == 0
    assert 'Best' in capfd.readouterr().err
    assert main([*command, 'train:total_iter=8', 'train:optim_g:lr=1e-3']) == 0
    said = capfd.readouterr().err
    assert 'train.total_iter: 4 → 8' in said and 'train.optim_g.lr: 0.0001 → 0.001' in said
    assert 'manual_seed: ' not in said[said.index('Options that differ') :].partition('\n')[0]  # that of the state
    lines = (folder / 'experiments' / 'tiny' / 'metrics.csv').read_text().splitlines()
    assert [line.split(',')[2] for line in lines if line.startswith('5,')] == ['0.0005']
    assert main([*command, 'train:total_iter=9', 'train:optim_g:type=SGD', 'train:optim_g:betas=']) == 2


@pytest.mark.parametrize(
    ('force', 'is_afresh'),
    [
        ([], False),
        (['val:metrics:psnr:crop_border=4'], True),
        (['datasets:val:name=other'], True),
        (['val:metrics:ssim={type: calculate_ssim, crop_border: 0}', 'val:best_metric=ssim'], True),
        (['val:metrics:ssim={type: calculate_ssim, crop_border: 0}'], False),
    ],
)
def test_best_values_are_of_one_measure(folder, tmp_path, monkeypatch, capfd, force, is_afresh):
    shutil.copytree(folder, tmp_path / 'run')
    monkeypatch.chdir(tmp_path / 'run')
    run = tmp_path / 'run' / 'experiments' / 'tiny'
    newest = checkpoints.newest_whole(run / 'training_states')
    state = torch.load(newest, weights_only=True)
    state['best_metric_results']['val']['psnr']['val'] = 99.0
    torch.save(state, newest)
    (run / 'models' / 'net_g_best.pth').unlink()
    assert main(['train', '-opt', 'tiny.yml', '--auto_resume', '--force_yml', 'train:total_iter=12', *force]) == 0
    said = capfd.readouterr().err
    assert (run / 'models' / 'net_g_best.pth').exists() == is_afresh
    assert ('best values: of' in said and 'are reset' in said) == (is_afresh or any('ssim' in key for key in force))


def test_resuming_from_a_named_state(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    state = 'experiments/tiny/training_states/2.state'
    force = [f'path:resume_state={state}', 'train:total_iter=12']
    assert main(['train', '-opt', 'tiny.yml', '--auto_resume', '--force_yml', *force]) == 0
    assert 'path.resume_state is ignored: --auto_resume resumes from' in ''.join(capfd.readouterr())
    force = ['path:resume_state=experiments/tiny/training_states/12.state', 'train:total_iter=13']
    assert main(['train', '-opt', 'tiny.yml', '--force_yml', *force]) == 0
    said = capfd.readouterr().err
    changed = said[said.index('Options that differ') :].partition('\n')[0]
    assert 'total_iter: 12 → 13' in changed and 'manual_seed' not in changed


def test_finished_run_is_extended(tmp_path):
    model = build(options(tmp_path))
    train(model, 1, 4)
    model.save(0, 4)
    train(model, 5, 6)
    model.save(-1, -1)
    state = checkpoints.newest_whole(tmp_path / 'training_states')
    assert state.name == '6.state' and (tmp_path / 'models' / 'net_g_latest.pth').is_file()
    longer = resumed(tmp_path, torch.load(state, weights_only=True), total_iter=24)
    assert longer.iteration == 6


@pytest.mark.parametrize('status', [0, 2])
def test_wandb_that_fails_costs_no_work(folder, tmp_path, monkeypatch, capfd, status):
    """W&B fails when a value is logged, as `sync_tensorboard` hooks into TensorBoard's writer, and at the end."""
    from torch.utils.tensorboard import SummaryWriter

    class Wandb:
        run, codes = None, []

        def init(self, **_):
            self.run = self
            monkeypatch.setattr(SummaryWriter, 'add_scalar', lambda *_: 1 / 0)

        def finish(self, exit_code):
            self.codes.append(exit_code)
            raise ConnectionError('the network is down')

        login = setup = lambda _: True

    shutil.copytree(folder / 'data', tmp_path / 'data')
    shutil.copy(folder / 'tiny.yml', tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, 'wandb', Wandb())
    if status:

        def fail(*_):
            raise FileError('the disk is full')

        monkeypatch.setattr(RestorationModel, 'save', fail)
    assert main(['train', '-opt', 'tiny.yml', '--force_yml', *WANDB]) == status
    said = capfd.readouterr().err
    assert said.count('TensorBoard logs are not written: division by zero') == 1
    assert said.count('the end of the run was not sent to W&B: the network is down') == 1
    assert Wandb.codes == [status != 0]
    assert (tmp_path / 'experiments' / 'tiny' / 'models' / 'net_g_latest.pth').is_file() == (status == 0)


def test_models_of_basicsr_end_at_once(tmp_path, monkeypatch, capfd):
    tiny_run.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SRModel, 'get_current_log', lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert main(['train', '-opt', 'tiny.yml']) == 130
    assert 'saving' not in capfd.readouterr().err
