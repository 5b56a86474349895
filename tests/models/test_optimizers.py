import sys
import types

import pytest
import torch

from ast_plugin.errors import OptionError
from ast_plugin.models.optimizers import build_optimizer, find_optimizer
from ast_plugin.options.signatures import argument_faults


@pytest.fixture
def without_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pytorch_optimizer', None)


@pytest.fixture
def with_extra(monkeypatch):
    """A stand-in for the package: one optimiser of its own, and one of a name that torch has too."""
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


def test_fused(device):
    results = []
    for fused in (False, True):
        weight = torch.nn.Parameter(torch.ones(5, device=device))
        optimizer = build_optimizer('AdamW', [weight], 0.1, fused=fused)
        for _ in range(3):
            optimizer.zero_grad()
            weight.square().sum().backward()
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(*results)


def test_torch_comes_first_then_the_extra(with_extra):
    assert find_optimizer('AdamW') is torch.optim.AdamW
    assert find_optimizer('Lion') is with_extra.Lion
    with pytest.raises(OptionError, match='did you mean Lion'):
        find_optimizer('Lionn')


def test_the_real_extra():
    pytest.importorskip('pytorch_optimizer')
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer('Lion', [weight], 0.1, weight_decay=0.0)
    weight.sum().backward()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))


@pytest.mark.parametrize(
    ('name', 'told'),
    [
        ('Lion', r'pip install "ast_plugin\[optimizers\]"'),
        ('AdmaW', 'did you mean AdamW'),
        ('LBFGS', 'calls back for the loss'),
        ('SparseAdam', 'sparse gradients'),
        ('SophiaH', 'second derivatives'),
        ('SAM', 'around another optimiser'),
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
def test_options_that_are_refused(name, options):
    with pytest.raises(OptionError, match=f'{name} refuses'):
        build_optimizer(name, [torch.nn.Parameter(torch.ones(2))], 0.1, **options)


def test_option_files_may_name_those_of_the_extra():
    """Their arguments go on to the base class, whose `defaults` are theirs to give."""
    pytest.importorskip('pytorch_optimizer')
    lion, where, given = find_optimizer('Lion'), ('train', 'optim_g'), ('params', 'defaults')
    options = {'type': 'Lion', 'lr': 1e-3, 'weight_decay': 0.1}
    assert argument_faults(lion, options, where, given) == []
    (fault,) = argument_faults(lion, {**options, 'weight_decay': 'much'}, where, given)
    assert str(fault).startswith('train.optim_g.weight_decay: expected a number')
