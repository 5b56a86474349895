from copy import deepcopy

import pytest
import torch
from torch import nn

from ast_plugin.archs.ast_arch import AST
from ast_plugin.errors import OptionError
from ast_plugin.models.training_step import check_switches

OPT = {
    'num_gpu': 0,
    'dist': False,
    'datasets': {'train': {'batch_size_per_gpu': 4}},
    'train': {
        'precision': 'bf16',
        'accumulate': 2,
        'channels_last': True,
        'gradient_checkpointing': True,
        'compile': True,
        'mixing': {'type': 'mixup', 'start_epoch': 2},
        'iters_per_epoch': 3,
        'on_nonfinite': 'skip',
    },
}


def network():
    """Without memory behind its weights."""
    with torch.device('meta'):
        return AST(img_size=16, embed_dim=4, depths=[1] * 9, num_heads=[1] * 9)


def test_all_switches_together_pass_and_nothing_is_computed():
    opt = deepcopy(OPT)
    check_switches(opt, network(), {'pixel_opt': nn.L1Loss()})
    assert opt == OPT


@pytest.mark.parametrize(
    ('switch', 'told'),
    [
        ({'precision': 'fp8'}, 'train.precision'),
        ({'accumulate': 5}, 'a batch of 4 cannot be cut into 5'),
        ({'compile': 'inductr'}, 'no backend'),
        ({'iters_per_epoch': None}, 'train.iters_per_epoch'),
        ({'mixing': {'type': 'mixup', 'alpha': 0}}, 'alpha'),
        ({'on_nonfinite': 'ignore'}, 'stop or skip'),
    ],
)
def test_one_that_does_not_apply(switch, told):
    opt = deepcopy(OPT)
    opt['train'].update(switch)
    with pytest.raises(OptionError, match=told):
        check_switches(opt, network(), {'pixel_opt': nn.L1Loss()})


def test_losses_are_looked_at():
    with pytest.raises(OptionError, match='pixel_opt'):
        check_switches(deepcopy(OPT), network(), {'pixel_opt': nn.L1Loss(reduction='sum')})


def test_gpus_are_left_alone(monkeypatch):
    """What format a GPU computes in shows when the process that takes it starts."""
    opt = {**deepcopy(OPT), 'num_gpu': 2}
    monkeypatch.setattr('torch.nn.functional.conv2d', None)  # not called
    check_switches(opt, network(), {})
