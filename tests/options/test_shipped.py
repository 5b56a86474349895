"""Shipped option files against tables of expected values: recipes, mixed networks, ablations, bundled weights."""

import re

import cv2
import numpy as np
import pytest
import torch

from ast_plugin import options
from ast_plugin.errors import OptionError
from ast_plugin.models import preflight
from ast_plugin.models.optimizers import build_schedule
from ast_plugin.options import validation

RECIPES = {  # protocol, layout, number of samples; the first three and their protocols are the paper's
    'AST_derain': ('spad', 'spad', 638_492),
    'AST_deraindrop': ('agan', 'agan', 861),
    'AST_dehaze': ('densehaze', 'densehaze', 50),
    'AST_deshadow': ('tiled', 'istd', 1_330),
    'AST_desnow': ('tiled', 'snow100k', 50_000),
    'AST_demoire': ('tiled', 'moire', 121_500),
}
STAGES = {  # lr, patch, batch, epochs, iterations, and iterations between validations, of which an epoch has four
    'AST_derain': [(2e-4, 128, 32, 20, 399_060, 4_988), (1e-4, 256, 16, 15, 598_590, 9_976)],
    'AST_deraindrop': [
        *[(2e-4, 128, 32, 300, 8_100, 6), (1e-4, 256, 16, 200, 10_800, 13), (8e-5, 384, 8, 150, 16_200, 27)],
    ],
    'AST_dehaze': [
        *[(2e-4, 256, 4, 2000, 26_000, 3), (1.2e-4, 384, 4, 1200, 15_600, 3), (8e-5, 512, 4, 800, 10_400, 3)],
        *[(3e-5, 768, 2, 300, 7_500, 6), (1e-5, 896, 2, 80, 2_000, 6)],
    ],
    'AST_deshadow': [
        *[(2e-4, 128, 32, 300, 12_600, 42), (1e-4, 256, 16, 200, 16_800, 84), (8e-5, 384, 8, 150, 25_050, 167)],
    ],
    'AST_desnow': [(2e-4, 128, 32, 60, 93_780, 15_630), (1e-4, 256, 16, 30, 93_750, 31_250)],
    'AST_demoire': [(2e-4, 128, 32, 30, 113_910, 18_985), (1e-4, 256, 16, 20, 151_880, 37_970)],
}
MIX = {  # replaced modules, parameters before and after
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
PRETRAINED = ('rain', 'raindrop', 'haze')
LARGEST_FILE = 8_000_000  # bytes, in float16


@pytest.fixture(scope='module')
def registered():
    return preflight.load_registered()


def load(name, *overrides):
    return options.load(options.find(name), overrides)


def build(network, registered):
    arguments = {key: value for key, value in network.items() if key != 'type'}
    return registered.get('arch', network['type'])(**arguments)


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_every_file_is_in_a_table():
    folders = {'mix': MIX, 'ablation': ABLATION, 'pretrained': PRETRAINED}
    known = {f'{folder}/{name}' for folder, names in folders.items() for name in names}
    known |= {*RECIPES, 'AST_quickstart', 'my_pairs'}
    assert {name for name in options.shipped_files() if not name.startswith('compare/')} == known


# ---- recipes


@pytest.mark.parametrize('name', RECIPES)
def test_recipe(name):
    """Each stage as prepared for BasicSR on the official data.

    Training selects the best weights as the authors did, on centre crops of the patch size, on SPAD on whole images;
    testing uses whole images and the protocol of the task. The warm-up has 1/3, 2/3 and 1 of the learning rate, one
    epoch each, and then decays by a cosine to 1e-6.
    """
    protocol, layout, length = RECIPES[name]
    stages, is_rain = options.expand(load(name)), name == 'AST_derain'
    for stage, row in zip(stages, STAGES[name], strict=True):
        run = options.prepare({**stage.opt, 'num_gpu': 1}, stage=stage.name, length_of=lambda _: length)
        assert run['name'] == f'{name}_stage_{stage.number}'
        assert run['path']['experiments_root'].endswith(f'experiments/{name}/stage_{stage.number}')
        train, data, val = run['train'], run['datasets'], run['val']
        lr, size, batch, _, iterations, _ = row
        assert (data['train']['gt_size'], data['train']['batch_size_per_gpu']) == (size, batch)
        assert (stage.opt['train']['total_epochs'], train['total_iter'], val['val_freq']) == row[3:]
        assert run['network_g'] == {'type': 'AST_B', 'img_size': 128, 'drop_path_rate': 0.1}
        adamw = {'type': 'AdamW', 'lr': lr, 'weight_decay': 0.02, 'betas': [0.9, 0.999], 'eps': 1e-8}
        assert train['optim_g'] == adamw
        assert train['scheduler'] == {'type': 'WarmupCosineLR', 'warmup_epochs': 3, 'eta_min': 1e-6, 'by': 'epoch'}
        assert train['pixel_opt'] == {'type': 'ASTCharbonnierLoss'}
        assert train['precision'] == 'fp16'
        assert 'clip_grad_norm' not in train and 'ema_decay' not in train
        assert train['mixing'] == ({'type': 'mixup', 'alpha': 1.2, 'start_epoch': 6} if is_rain else None)
        assert run['manual_seed'] == 1234
        assert data['train']['layout'] == data['val']['layout'] == layout
        assert data['train']['use_hflip'] and data['train']['use_rot']
        assert data['val'].get('center_crop') == (None if is_rain else size)
        assert (val['best_metric'], val['protocol']) == ('psnr', 'whole')
        assert val['metrics'] == {'psnr': {'type': 'calculate_psnr_y_float'}}
        test = options.prepare({**stage.opt, 'num_gpu': 0}, is_train=False)
        assert test['val']['protocol'] == protocol
        assert test['val'].get('metrics') is None
        assert 'during_training' not in val and 'during_training' not in test['val']
        assert 'center_crop' not in test['datasets']['val']

        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
        schedule = build_schedule(optimizer, train)
        epoch, rates = train['iters_per_epoch'], []
        for iteration in (0, epoch - 1, epoch, 2 * epoch, 3 * epoch, iterations):
            schedule.last_epoch = iteration
            rates.append(schedule.get_lr()[0])
        assert rates == pytest.approx([lr / 3, lr / 3, 2 * lr / 3, lr, lr, 1e-6])


def test_epochs_are_counted():
    stage = options.expand(load('AST_deraindrop'))[0]
    for process in ({'world_size': 2, 'dist': True}, {}):  # two GPUs halve the iterations
        opt = {**stage.opt, 'num_gpu': 2}
        run = options.prepare(opt, stage=stage.name, length_of=lambda _: 861, **process)
        assert (run['train']['iters_per_epoch'], run['train']['total_iter']) == (14, 4_200)
    with pytest.raises(OptionError, match='total_epochs, times_per_epoch, save_checkpoint_epochs: converting epochs'):
        options.prepare(stage.opt)
    short = options.expand(load('AST_deraindrop', 'train:total_epochs=2'))[0]  # fewer epochs than the warm-up
    run = options.prepare(short.opt, stage=short.name, length_of=lambda _: 861)
    assert run['train']['scheduler']['warmup_epochs'] == 1
    assert short.opt['train']['scheduler']['warmup_epochs'] == 3


# ---- mixed networks and ablations


@pytest.mark.parametrize('name', MIX)
def test_mixtures(name, registered):
    """Mixed networks have the documented sizes, and all parameters receive gradients from the data of the recipe."""
    opt = load(f'mix/{name}')
    text = options.find(f'mix/{name}').read_text(encoding='utf-8')
    assert opt['name'] == name and f'-opt mix/{name}' in text
    network = build(opt['network_g'], registered)
    base = build(opt['network_g']['base'], registered)
    assert (len(network.exchanges), count(base), count(network)) == MIX[name]
    assert network.scale == 1
    assert network.size_multiple == {'SwinIR_ASSA_FRFN': 8, 'RRDBNet_AST': 4}.get(name, 1)

    training = options.prepare(opt, dataset_types=registered.by_kind['dataset'])['datasets']['train']
    pair = registered.get('dataset', training['type'])({**training, 'gt_size': 32})[0, 0]
    restored = network.train()(pair['lq'][None])
    registered.get('loss', 'ASTCharbonnierLoss')()(restored, pair['gt'][None]).backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert sum(gradient.abs().sum() > 0 for gradient in gradients.values()) > 0.9 * len(gradients)


def test_ablations(registered):
    seen = []
    for name, parameters in ABLATION.items():
        path = options.find(f'ablation/{name}')
        opt = options.load(path)
        kind, _, value = name.partition('_')
        network = {'type': 'AST_T', 'img_size': 128, 'drop_path_rate': 0.1, kind: value}
        assert (opt['name'], opt['network_g']) == (f'ablation_{name}', network)
        with torch.device('meta'):
            assert count(build(network, registered)) == parameters
        stated = re.search(r'^# ([\d,]+) parameters', path.read_text(encoding='utf-8'), re.MULTILINE)
        assert int(stated[1].replace(',', '')) == parameters
        seen.append({key: value for key, value in opt.items() if key not in ('name', 'network_g')})
    assert all(opt == seen[0] for opt in seen)  # one budget
    train = seen[0]['train']
    assert (train['total_iter'], train['optim_g']['lr'], seen[0]['manual_seed']) == (100_000, 2e-4, 1234)
    assert seen[0]['datasets']['train']['layout'] == 'spad'


# ---- bundled weights


@pytest.mark.parametrize('task', PRETRAINED)
def test_pretrained(task, registered, tmp_path, monkeypatch):
    """Data and network of each stage, with a single photograph."""
    cv2.imwrite(str(tmp_path / 'photo.png'), np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8))
    monkeypatch.setenv('PHOTOS', str(tmp_path))
    monkeypatch.setenv('PHOTOS_VAL', str(tmp_path))
    opt = load(f'pretrained/{task}')
    validation.check(opt, task, registered)
    runs = [options.prepare({**stage.opt, 'num_gpu': 0}, stage=stage.name) for stage in options.expand(opt)]
    for run in runs:
        train = run['datasets']['train']
        sample = registered.get('dataset', train['type'])(train)[0, 0]
        assert sample['lq'].shape == (3, train['gt_size'], train['gt_size'])
        given = train['degradation']
        kinds = {parameters['type'] for parameters in (given if isinstance(given, list) else [given])}
        assert kinds == {run['datasets']['val']['degradation']['type']} == {task}
        assert train['clean_share'] > 0
        assert run['network_g'] == runs[0]['network_g']
    assert 2 * count(build(runs[0]['network_g'], registered)) < LARGEST_FILE
