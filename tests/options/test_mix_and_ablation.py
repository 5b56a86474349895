"""The shipped option files of mix/ and ablation/: checked, built, and trained a little."""

import re

import pytest
import torch

from ast_plugin import options
from ast_plugin.models import preflight
from ast_plugin.options import validation

MIX = {  # exchanged modules, parameters before and after
    'SwinIR_ASSA_FRFN': (8, 65_611, 78_931),
    'EDSR_AST': (4, 84_995, 109_771),
    'RCAN_ASSA': (2, 104_659, 113_427),
    'MSRResNet_AST': (2, 84_995, 72_651),
    'RRDBNet_AST': (2, 411_715, 436_363),
    'SRVGGNetCompact_FRFN': (2, 57_475, 54_019),
}
ABLATION = {  # parameters
    'attention_assa': 6_645_347,
    'attention_dense': 6_645_327,
    'attention_sparse': 6_645_327,
    'attention_sparse_relu': 6_645_327,
    'attention_topk': 6_645_327,
    'ffn_frfn': 6_645_347,
    'ffn_leff': 5_046_723,
    'ffn_mlp': 4_968_643,
}


@pytest.fixture(scope='module')
def registered():
    return preflight.load_registered()


def read(name, registered):
    path = options.find(name)
    opt = options.load(path)
    validation.check(opt, str(path), registered)
    return path, opt


def build(network, registered):
    arguments = {key: value for key, value in network.items() if key != 'type'}
    return registered.get('arch', network['type'])(**arguments)


def test_every_file_is_in_a_table():
    files = {name for name in options.shipped_files() if name.startswith(('mix/', 'ablation/'))}
    assert files == {f'mix/{name}' for name in MIX} | {f'ablation/{name}' for name in ABLATION}


@pytest.mark.parametrize('name', MIX)
def test_mixtures(name, registered):
    path, opt = read(f'mix/{name}', registered)
    assert opt['name'] == name and f'-opt mix/{name}' in path.read_text(encoding='utf-8')
    network = build(opt['network_g'], registered)
    base = build(opt['network_g']['base'], registered)
    counts = [sum(parameter.numel() for parameter in each.parameters()) for each in (base, network)]
    assert (len(network.exchanges), *counts) == MIX[name]
    assert network.scale == 1
    assert network.size_multiple == {'SwinIR_ASSA_FRFN': 8, 'RRDBNet_AST': 4}.get(name, 1)


@pytest.mark.parametrize('name', MIX)
def test_mixtures_learn(name, registered):
    """A few steps on one batch of the recipe's own data, with its own optimiser and loss."""
    _, opt = read(f'mix/{name}', registered)
    torch.manual_seed(0)
    prepared = options.prepare(opt, dataset_types=registered.by_kind['dataset'])
    training = {**prepared['datasets']['train'], 'gt_size': 32}
    dataset = registered.get('dataset', training['type'])(training)
    index = (lambda i: (0, i)) if getattr(type(dataset), 'index_carries_epoch', False) else (lambda i: i)
    pairs = [dataset[index(i)] for i in (0, 150)]
    lq, gt = (torch.stack([pair[key] for pair in pairs]) for key in ('lq', 'gt'))
    network = build({**opt['network_g'], 'nominal_size': 32}, registered).train()
    criterion = registered.get('loss', 'ASTCharbonnierLoss')()
    optimizer = torch.optim.AdamW(network.parameters(), lr=opt['train']['optim_g']['lr'])
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = criterion(network(lq), gt)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), opt['train']['clip_grad_norm'])
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < 0.9 * losses[0]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize('name', ABLATION)
def test_ablations(name, registered):
    path, opt = read(f'ablation/{name}', registered)
    kind, _, value = name.partition('_')
    network = {'type': 'AST_T', 'img_size': 128, 'drop_path_rate': 0.1, kind: value}
    assert opt['network_g'] == network
    with torch.device('meta'):
        count = sum(parameter.numel() for parameter in build(network, registered).parameters())
    assert count == ABLATION[name]
    stated = re.search(r'^# ([\d,]+) parameters', path.read_text(encoding='utf-8'), re.MULTILINE)
    assert int(stated[1].replace(',', '')) == count


def test_ablations_have_one_budget(registered):
    seen = []
    for name in ABLATION:
        _, opt = read(f'ablation/{name}', registered)
        assert opt['name'] == f'ablation_{name}'
        assert opt['datasets']['train']['layout'] == 'spad'
        seen.append({key: value for key, value in opt.items() if key not in ('name', 'network_g')})
    assert all(opt == seen[0] for opt in seen)
    train = seen[0]['train']
    assert (train['total_iter'], train['optim_g']['lr'], seen[0]['manual_seed']) == (100_000, 2e-4, 1234)
