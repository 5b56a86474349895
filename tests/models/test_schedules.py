import pytest
import torch

from ast_plugin.errors import OptionError
from ast_plugin.models.optimizers import WarmupCosineLR, build_schedule


def rates(steps, lr=2e-4, **options):
    """The rate of each iteration, stepped as BasicSR steps: before every iteration but the first."""
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=lr)
    schedule = WarmupCosineLR(optimizer, **options)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        schedule.step()
    return found


def test_the_recipe_epoch_by_epoch():
    """20 epochs of 5 iterations, against torch's own cosine run behind three epochs of warm-up."""
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


def test_iteration_by_iteration_it_ends_at_the_floor():
    found = rates(15, lr=1.0, total_iter=10, warmup_iter=4, eta_min=0.1)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found == sorted(found[:4]) + sorted(found[4:], reverse=True)
    assert found[10:] == [0.1] * 5


def test_a_resumed_schedule_goes_on():
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = WarmupCosineLR(optimizer, total_iter=10, warmup_iter=2)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    state = schedule.state_dict()
    other = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1.0)
    resumed = WarmupCosineLR(other, total_iter=10, warmup_iter=2)
    resumed.load_state_dict(state)
    other.load_state_dict(optimizer.state_dict())
    for _ in range(4):
        for o, s in ((optimizer, schedule), (other, resumed)):
            o.step()
            s.step()
        assert other.param_groups[0]['lr'] == optimizer.param_groups[0]['lr']


def test_warm_up_in_epochs_may_change_by_iteration():
    found = rates(10, lr=1.0, total_iter=10, warmup_epochs=2, iters_per_epoch=2)
    assert found == rates(10, lr=1.0, total_iter=10, warmup_iter=4)


@pytest.mark.parametrize(
    ('options', 'told'),
    [
        (
            {'total_iter': 3, 'warmup_iter': 3},
            'warm-up of 3 iterations does not fit into a run of 3; .* lower warmup_iter',
        ),
        ({'total_iter': 3, 'by': 'epoch', 'iters_per_epoch': 0}, 'iters_per_epoch of 1 or more'),
        ({'total_iter': 0}, 'a run of 0'),
        ({'total_iter': 3, 'warmup_iter': 1, 'warmup_epochs': 1, 'iters_per_epoch': 1}, 'not both'),
        ({'total_iter': 3, 'by': 'epoch'}, 'needs train.iters_per_epoch'),
        ({'total_iter': 3, 'warmup_epochs': 1}, 'needs train.iters_per_epoch'),
        ({'total_iter': 3, 'by': 'day'}, "not by 'day'"),
    ],
)
def test_numbers_that_contradict_one_another(options, told):
    with pytest.raises(OptionError, match=told):
        rates(1, **options)


def test_the_sections_lengths_stand_in_for_the_schedules():
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1.0)
    train = {'total_iter': 12, 'iters_per_epoch': 3, 'scheduler': {'type': 'WarmupCosineLR', 'warmup_epochs': 2}}
    schedule = build_schedule(optimizer, train)
    assert (schedule.warmup_steps, schedule.num_steps) == (6, 12)
    train['scheduler'].update(by='epoch', total_iter=9)
    schedule = build_schedule(optimizer, train)
    assert (schedule.warmup_steps, schedule.num_steps) == (2, 3)
    assert train['scheduler']['type'] == 'WarmupCosineLR'
    assert build_schedule(optimizer, {'scheduler': {'type': 'MultiStepLR', 'milestones': [3]}}) is None
