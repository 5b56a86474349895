import sys
import types

import pytest
import torch

from ast_plugin.errors import OptionError
from ast_plugin.models.optimizers import WarmupCosineLR, build_optimizer, build_schedule, find_optimizer
from ast_plugin.options.validation import argument_faults


@pytest.fixture
def without_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pytorch_optimizer', None)


@pytest.fixture
def with_extra(monkeypatch):
    """Replace the package by a stub with one optimiser of its own and one whose name torch also has."""
    module = types.ModuleType('pytorch_optimizer')
    for name in ('Lion', 'AdamW', 'SophiaH'):
        setattr(module, name, type(name, (torch.optim.SGD,), {'__module__': 'pytorch_optimizer'}))
    monkeypatch.setitem(sys.modules, 'pytorch_optimizer', module)
    return module


def test_every_optimiser_of_torch_makes_a_step(without_extra):
    kinds = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    names = kinds.keys() - {'Optimizer', 'LBFGS', 'SparseAdam'}
    assert {'AdamW', 'SGD', 'NAdam', 'Adafactor', 'RMSprop'} <= names
    for name in names:
        weight = torch.nn.Parameter(torch.ones(3, 3))
        optimizer = build_optimizer(name, [weight], 0.1)
        weight.sum().backward()
        optimizer.step()
        assert not torch.equal(weight, torch.ones(3, 3)), name


def test_torch_comes_first_then_the_extra(with_extra):
    assert find_optimizer('AdamW') is torch.optim.AdamW
    assert find_optimizer('Lion') is with_extra.Lion
    with pytest.raises(OptionError, match='did you mean Lion'):
        find_optimizer('Lionn')


@pytest.mark.parametrize(
    ('name', 'told'),
    [
        ('Lion', r'pip install "ast_plugin\[optimizers\]"'),
        ('AdmaW', 'did you mean AdamW'),
        ('LBFGS', 'evaluates the loss several times'),
        ('SparseAdam', 'sparse gradients'),
        ('SophiaH', 'second derivatives'),
        ('SAM', 'wraps another optimiser'),
        ('Optimizer', 'no optimiser'),
        ('lr_scheduler', 'no optimiser'),
    ],
)
def test_names_that_cannot_be_had(name, told, without_extra):
    with pytest.raises(OptionError, match=told):
        find_optimizer(name)


@pytest.mark.parametrize(
    ('name', 'options'), [('SGD', {'momentum': -1.0}), ('AdamW', {'moment': 3}), ('Adadelta', {'fused': True})]
)
def test_options_that_are_rejected(name, options):
    with pytest.raises(OptionError, match=f'{name} rejects'):
        build_optimizer(name, [torch.nn.Parameter(torch.ones(2))], 0.1, **options)


def test_the_real_extra():
    """Its optimisers pass their arguments to the base class and set its `defaults` themselves."""
    pytest.importorskip('pytorch_optimizer')
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer('Lion', [weight], 0.1, weight_decay=0.0)
    weight.sum().backward()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))
    where, given = ('train', 'optim_g'), ('params', 'defaults')
    options = {'type': 'Lion', 'lr': 1e-3, 'weight_decay': 0.1}
    assert argument_faults(type(optimizer), options, where, given) == []
    (fault,) = argument_faults(type(optimizer), {**options, 'weight_decay': 'much'}, where, given)
    assert str(fault).startswith('train.optim_g.weight_decay: expected a number')


def rates(steps, lr=2e-4, **options):
    """Return the rate of each iteration, stepped as in BasicSR: before every iteration except the first."""
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=lr)
    schedule = WarmupCosineLR(optimizer, **options)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        schedule.step()
    return found


def test_the_recipe_epoch_by_epoch():
    """Compare 20 epochs of 5 iterations with torch's cosine annealing after three warm-up epochs."""
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=2e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 17, eta_min=1e-6)
    want = [2e-4 / 3, 4e-4 / 3, 2e-4]
    for _ in range(17):
        want.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        cosine.step()
    found = rates(100, total_iter=100, warmup_epochs=3, by='epoch', iters_per_epoch=5, eta_min=1e-6)
    assert found == pytest.approx([rate for rate in want for _ in range(5)], rel=1e-9)
    assert found == rates(100, total_iter=100, warmup_iter=15, by='epoch', iters_per_epoch=5, eta_min=1e-6)


def test_by_iteration_it_ends_at_the_floor():
    found = rates(15, lr=1.0, total_iter=10, warmup_iter=4, eta_min=0.1)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found == sorted(found[:4]) + sorted(found[4:], reverse=True)
    assert found[10:] == [0.1] * 5


@pytest.mark.parametrize(
    ('options', 'told'),
    [
        (
            {'total_iter': 3, 'warmup_iter': 3},
            'warm-up of 3 iterations does not fit into a run of 3: lower warmup_iter',
        ),
        ({'total_iter': 3, 'by': 'epoch', 'iters_per_epoch': 0}, 'iters_per_epoch of 1 or more'),
        ({'total_iter': 0}, 'a run of 0'),
        ({'total_iter': 3, 'warmup_iter': 1, 'warmup_epochs': 1, 'iters_per_epoch': 1}, 'not both'),
        ({'total_iter': 3, 'by': 'epoch'}, 'needs train.iters_per_epoch'),
        ({'total_iter': 3, 'warmup_epochs': 1}, 'needs train.iters_per_epoch'),
        ({'total_iter': 3, 'by': 'day'}, "got 'day'"),
    ],
)
def test_numbers_that_contradict_one_another(options, told):
    with pytest.raises(OptionError, match=told):
        rates(1, **options)


def test_schedules_by_name():
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1.0)
    train = {'total_iter': 12, 'iters_per_epoch': 3, 'scheduler': {'type': 'WarmupCosineLR', 'warmup_epochs': 2}}
    schedule = build_schedule(optimizer, train)
    assert (schedule.warmup_steps, schedule.num_steps) == (6, 12)
    train['scheduler'].update(by='epoch', total_iter=9)
    schedule = build_schedule(optimizer, train)
    assert (schedule.warmup_steps, schedule.num_steps) == (2, 3)
    assert train['scheduler']['type'] == 'WarmupCosineLR'
    schedule = build_schedule(optimizer, {**train, 'scheduler': {'type': 'MultiStepLR', 'milestones': [3]}})
    assert type(schedule).__name__ == 'MultiStepRestartLR'
    with pytest.raises(OptionError, match='did you mean MultiStepLR'):
        build_schedule(optimizer, {'scheduler': {'type': 'MultiStep'}})
