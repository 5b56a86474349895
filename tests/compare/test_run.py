"""Journal and training: finished work is reused, interrupted training resumes, changed training restarts."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from ast_plugin.compare import run
from ast_plugin.compare.child import ChildFailed
from ast_plugin.compare.run import Comparison, Journal, PlannedNetwork, Training, count_iterations, digest_of
from ast_plugin.options import safe_yaml
from ast_plugin.options.sections import CompareSettings
from tests import tiny_run

OPT = {
    'name': 'net',
    'manual_seed': 0,
    'network_g': {'type': 'EDSR'},
    'datasets': {'train': {'name': 'train', 'gt_size': 32}, 'val': {'name': 'val'}},
    'train': {'total_iter': 7},
    'val': {'val_freq': 2},
    'logger': {'print_freq': 10, 'save_checkpoint_freq': 5},
}


def test_digest_ignores_the_order_of_keys():
    assert digest_of({'a': 1, 'b': [2, 3]}) == digest_of({'b': [2, 3], 'a': 1})
    assert len({digest_of(value) for value in ({'a': 1}, {'a': 2}, {'a': '1'}, {'b': 1}, [1], None)}) == 6


def test_journal(tmp_path):
    journal = Journal(tmp_path / 'new')
    assert journal.read('x', 'one') is None
    journal.write('x', 'one', {'value': 3})
    assert journal.read('x', 'one') == {'value': 3, 'digest': 'one'}
    assert journal.read('x', 'two') is None
    journal.write('x', 'two', {'value': 4})
    assert journal.read('x', 'one') is None
    for content in ('', '{', '[]', '{"digest"'):
        (tmp_path / 'new' / 'x.json').write_text(content)
        assert journal.read('x', 'two') is None


class Trainer:
    """Fake training process that writes the expected files, or fails."""

    def __init__(self, folder):
        self.folder, self.calls, self.failure = folder, [], None

    def __call__(self, module, arguments, log, *, on_wait, **options):
        assert module == 'ast_plugin' and arguments[0] == 'train'
        self.calls.append(arguments)
        self.opt = safe_yaml.read_file(Path(arguments[arguments.index('-opt') + 1]))
        root = Path(arguments[arguments.index('--root') + 1])
        experiment = root / 'experiments' / self.opt['name']
        (experiment / 'models').mkdir(parents=True, exist_ok=True)
        if root != self.folder:  # measures the speed
            for second in range(60):  # four iterations a second
                self.write_table(experiment, 4 * second)
                on_wait(float(second))
        self.write_table(experiment, self.opt['train']['total_iter'])
        on_wait(1.0)
        if self.failure:
            raise self.failure
        (experiment / 'models' / 'net_g_latest.pth').touch()
        return 3.0

    def write_table(self, experiment, length):
        rows = '\n'.join(f'{number},0' for number in range(1, length + 1))
        (experiment / 'metrics.csv').write_text(f'iter,epoch\n{rows}\n')

    @property
    def resumed(self):
        return ['--auto_resume' in arguments for arguments in self.calls]


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    stand_in = Trainer(tmp_path)
    monkeypatch.setattr(run, 'run_child', stand_in)
    return stand_in


def train(folder, opt=OPT, **settings):
    plan = SimpleNamespace(folder=folder, settings=CompareSettings(**settings))
    said = []
    return Training(Comparison(plan, said.append), PlannedNetwork('net', opt['network_g'], opt)).run(), said


def test_finished_training_is_not_redone(trainer, tmp_path):
    (weights, record), said = train(tmp_path)
    assert weights == tmp_path / 'experiments/net/models/net_g_latest.pth'
    assert (record['iterations'], record['seconds'], record['is_finished']) == (7, 3.0, True)
    assert {'torch', 'python'} <= record['versions'].keys()
    assert said[-1] == '  trained net in 3 s'
    (again, record_again), said = train(tmp_path)
    assert (again, record_again, said) == (weights, record, [])
    weights.unlink()  # lost weights are trained again
    train(tmp_path)
    assert weights.is_file() and trainer.resumed == [False, True]


def test_interrupted_training_resumes(trainer, tmp_path):
    trainer.failure = ChildFailed('terminated by SIGKILL', 4.0)
    with pytest.raises(ChildFailed, match='terminated by SIGKILL'):
        train(tmp_path)
    trainer.failure = None
    (_, record), said = train(tmp_path)
    assert trainer.resumed == [False, True]
    assert record['seconds'] == 7.0
    assert said[0] == '  training net, resuming after 4 s'


@pytest.mark.parametrize(
    ('change', 'restarts'),
    [
        ({'network_g': {'type': 'RCAN'}}, True),
        ({'train': {'total_iter': 8}}, True),
        ({'manual_seed': 1}, True),
        ({'datasets': {**OPT['datasets'], 'train': {'name': 'train', 'gt_size': 64}}}, True),
        # Weights do not depend on these:
        ({'val': {'val_freq': 1}}, False),
        ({'logger': {'print_freq': 1}}, False),
        ({'datasets': {**OPT['datasets'], 'val': {'name': 'other'}}}, False),
    ],
)
def test_changed_training_restarts(trainer, tmp_path, change, restarts):
    train(tmp_path)
    train(tmp_path, {**OPT, **change})
    assert trainer.resumed == [False] * (1 + restarts)
    aside = list((tmp_path / 'experiments').glob('net_archived_*/models/net_g_latest.pth'))
    assert len(aside) == restarts


def test_validation_matters_if_it_picks_weights(trainer, tmp_path):
    with pytest.raises(ChildFailed, match='best weights require a validation set'):
        train(tmp_path, weights='best')
    best = tmp_path / 'experiments/net/models/net_g_best.pth'
    best.touch()
    assert train(tmp_path, weights='best')[0][0] == best
    for freq in (3, 4):  # within one second: each older run is archived under a unique name
        with pytest.raises(ChildFailed):
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


def test_minutes_become_iterations(trainer, tmp_path):
    opt = {**OPT, 'train': {'total_iter': 10**6}}
    (_, record), _ = train(tmp_path, opt, minutes=2.0)
    assert record['iterations'] == 480
    assert trainer.opt['train']['total_iter'] == 480
    assert not (tmp_path / 'pace').exists()
    train(tmp_path, opt, minutes=2.0)
    assert len(trainer.calls) == 2  # the speed measurement and the training
    train(tmp_path, opt, minutes=1.0)
    assert trainer.opt['train']['total_iter'] == 240


def test_changed_images_are_measured_again(tmp_path, monkeypatch):
    record = {'values': {}, 'notes': [], 'multiple': 1}
    jobs = []
    monkeypatch.setattr(run, 'run_job', lambda job, *_, **__: jobs.append(job) or record)
    tiny_run.write(tmp_path)
    roots = {f'dataroot_{side}': str(tmp_path / 'data' / side) for side in ('lq', 'gt')}
    dataset = {'name': 'val', 'type': 'PairsDataset', 'layout': 'folders', 'phase': 'val', **roots}
    plan = run.Plan('x', tmp_path / 'x', [], dataset, None, None, CompareSettings(device='cpu'))
    for number, change in enumerate([lambda image: None, Path.touch, Path.unlink], 1):
        for side in ('lq', 'gt'):
            change(tmp_path / 'data' / side / '0.png')
        for _ in range(2):
            Comparison(plan, str).run()
        assert len(jobs) == number


def test_count_of_iterations(tmp_path):
    """Incomplete and damaged rows are not counted."""
    table = tmp_path / 'metrics.csv'
    assert count_iterations(table) is None
    table.write_text('iter,epoch\n')
    assert count_iterations(table) is None
    table.write_bytes(b'iter,epoch,psnr\n1,0,\n2,\xff\n3,0,\n3,,31.5\n\0\0,0,\n34')
    assert count_iterations(table) == 3
