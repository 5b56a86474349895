import pytest
import torch

from ast_plugin.errors import OptionError
from ast_plugin.models.schedules import WarmupCosineLR


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
    found = rates(100, total_iter=100, warmup_iter=15, iters_per_epoch=5, eta_min=1e-6)
    assert found == pytest.approx([rate for rate in want for _ in range(5)], rel=1e-9)


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


@pytest.mark.parametrize(
    'options', [{'total_iter': 3, 'warmup_iter': 3}, {'total_iter': 3, 'iters_per_epoch': 0}, {'total_iter': 0}]
)
def test_numbers_that_contradict_one_another(options):
    with pytest.raises(OptionError, match='warmup_iter < total_iter'):
        rates(1, **options)
