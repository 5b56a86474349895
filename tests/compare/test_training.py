"""Training for a comparison: what is done is not redone, what is begun goes on, what has changed begins anew."""

from pathlib import Path

import pytest

from ast_plugin.compare import training
from ast_plugin.compare.child import Outcome
from ast_plugin.compare.journal import Journal
from ast_plugin.compare.training import Training, TrainingFailed, count_iterations
from ast_plugin.options import safe_yaml

OPT = {
    'name': 'net',
    'manual_seed': 0,
    'network_g': {'type': 'EDSR'},
    'datasets': {'train': {'name': 'train', 'gt_size': 32}, 'val': {'name': 'val'}},
    'train': {'total_iter': 7},
    'val': {'val_freq': 2},
    'logger': {'print_freq': 10, 'save_checkpoint_freq': 5},
}
SETTINGS = {'weights': 'latest', 'minutes': None, 'threads': None}


class Trainer:
    """Stands in for the process that trains: writes what it would leave, or fails."""

    def __init__(self, folder):
        self.folder, self.calls, self.outcome = folder, [], Outcome(0, 3.0)

    def __call__(self, module, arguments, log, **options):
        assert module == 'ast_plugin' and arguments[0] == 'train'
        self.calls.append(arguments)
        file = arguments[arguments.index('-opt') + 1]
        self.opt = safe_yaml.read_file(Path(file))
        assert arguments[arguments.index('--root') + 1] == str(self.folder)
        experiment = self.folder / 'experiments' / self.opt['name']
        (experiment / 'models').mkdir(parents=True, exist_ok=True)
        on_wait = options.get('on_wait')
        if self.opt['name'].endswith('_pace'):
            for second in range(60):  # four iterations a second
                rows = '\n'.join(str(i) for i in range(1, 4 * second + 1))
                (experiment / 'metrics.csv').write_text(f'iter,epoch\n{rows}\n')
                on_wait(float(second))
        rows = '\n'.join(str(i) for i in range(1, self.opt['train']['total_iter'] + 1))
        (experiment / 'metrics.csv').write_text(f'iter,epoch\n{rows}\n')
        on_wait(1.0)
        if self.outcome.status == 0:
            (experiment / 'models' / 'net_g_latest.pth').touch()
        return self.outcome

    @property
    def resumed(self):
        return ['--auto_resume' in arguments for arguments in self.calls]


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    (tmp_path / 'logs').mkdir()
    stand_in = Trainer(tmp_path)
    monkeypatch.setattr(training, 'run_child', stand_in)
    return stand_in


def train(folder, opt=OPT, **settings):
    said = []
    run = Training('net', opt, folder, Journal(folder / 'journal'), {**SETTINGS, **settings})
    return run.run(said.append), said


def test_what_is_done_is_not_redone(trainer, tmp_path):
    (weights, record), said = train(tmp_path)
    assert weights == tmp_path / 'experiments/net/models/net_g_latest.pth'
    assert (record['iterations'], record['seconds'], record['is_finished']) == (7, 3.0, True)
    assert {'torch', 'python'} <= record['versions'].keys()
    assert said[-1] == '  trained net in 3 s'
    (again, record_again), said = train(tmp_path)
    assert (again, record_again, said) == (weights, record, [])
    assert trainer.resumed == [False]


def test_what_is_begun_goes_on(trainer, tmp_path):
    trainer.outcome = Outcome(-9, 4.0, 'ended by SIGKILL')
    with pytest.raises(TrainingFailed, match='ended by SIGKILL'):
        train(tmp_path)
    trainer.outcome = Outcome(0, 3.0)
    (_, record), said = train(tmp_path)
    assert trainer.resumed == [False, True]
    assert record['seconds'] == 7.0
    assert said[0] == '  training net, going on after 4 s'


@pytest.mark.parametrize(
    'change',
    [
        {'network_g': {'type': 'RCAN'}},
        {'train': {'total_iter': 8}},
        {'manual_seed': 1},
        {'datasets': {**OPT['datasets'], 'train': {'name': 'train', 'gt_size': 64}}},
    ],
)
def test_what_has_changed_begins_anew(trainer, tmp_path, change):
    train(tmp_path)
    train(tmp_path, {**OPT, **change})
    assert trainer.resumed == [False, False]
    aside = list((tmp_path / 'experiments').glob('net_archived_*'))
    assert len(aside) == 1 and (aside[0] / 'models/net_g_latest.pth').is_file()


@pytest.mark.parametrize(
    'change',
    [
        {'val': {'val_freq': 1}},
        {'logger': {'print_freq': 1}},
        {'datasets': {**OPT['datasets'], 'val': {'name': 'other'}}},
    ],
)
def test_what_weights_do_not_depend_on_may_change(trainer, tmp_path, change):
    train(tmp_path)
    train(tmp_path, {**OPT, **change})
    assert trainer.resumed == [False]


def test_validation_matters_where_it_picks_the_weights(trainer, tmp_path):
    with pytest.raises(TrainingFailed, match='is a validation set there'):
        train(tmp_path, weights='best')
    best = tmp_path / 'experiments/net/models/net_g_best.pth'
    best.touch()
    assert train(tmp_path, weights='best')[0][0] == best
    for freq in (3, 4):  # within a second: each older run is put aside under a name of its own
        with pytest.raises(TrainingFailed):
            train(tmp_path, {**OPT, 'val': {'val_freq': freq}}, weights='best')
    assert trainer.resumed == [False, True, False, False]
    assert len(list(tmp_path.glob('experiments/net_archived_*'))) == 2


def test_weights_that_training_starts_from_matter(trainer, tmp_path):
    start = tmp_path / 'start.pth'
    opt = {**OPT, 'path': {'pretrain_network_g': str(start)}}
    for content in (b'1', b'1', b'2'):
        start.write_bytes(content)
        train(tmp_path, opt)
    assert trainer.resumed == [False, False]


def test_lost_weights_are_trained_again(trainer, tmp_path):
    (weights, _), _ = train(tmp_path)
    weights.unlink()
    train(tmp_path)
    assert weights.is_file()
    assert trainer.resumed == [False, True]


def test_minutes_become_iterations_by_the_pace(trainer, tmp_path):
    opt = {**OPT, 'train': {'total_iter': 10**6}}
    (_, record), _ = train(tmp_path, opt, minutes=2.0)
    assert record['iterations'] == 480
    assert trainer.opt['train']['total_iter'] == 480
    assert not (tmp_path / 'experiments/net_pace').exists()
    train(tmp_path, opt, minutes=2.0)
    assert len(trainer.calls) == 2  # the pace, and the training
    train(tmp_path, opt, minutes=1.0)
    assert trainer.opt['train']['total_iter'] == 240


def test_a_row_that_is_being_written_is_not_counted(tmp_path):
    table = tmp_path / 'metrics.csv'
    assert count_iterations(table) is None
    table.write_text('iter,epoch\n')
    assert count_iterations(table) is None
    table.write_text('iter,epoch\n1,0\n2,0\n2,,31.5\n34')
    assert count_iterations(table) == 2
