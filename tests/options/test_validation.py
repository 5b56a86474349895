"""Validation of option files: all faults with key and suggestion."""

import copy
from dataclasses import replace

import pytest
from torch import Tensor, nn

from ast_plugin import options
from ast_plugin.errors import OptionError
from ast_plugin.models import preflight
from ast_plugin.options import safe_yaml, validation
from tests import tiny_run

TINY = safe_yaml.read_text(tiny_run.OPTIONS, 'tiny.yml')
VAL = TINY['datasets']['val']
SHIPPED = [file for name, file in options.shipped_files().items() if not name.startswith('compare/')]


@pytest.fixture(scope='module')
def registered():
    return preflight.load_registered()


def changed(path, value):
    """Return TINY with one value set, or removed if the value is `...`."""
    opt = copy.deepcopy(TINY)
    *sections, key = path.split(':')
    section = opt
    for name in sections:
        section = section[name]
    if value is ...:
        del section[key]
    else:
        section[key] = value
    return opt


def faults(opt, registered=None, **kwargs):
    return [str(fault) for fault in validation.find_faults(opt, registered, **kwargs)]


@pytest.mark.parametrize('is_train', [True, False])
def test_right_file_has_no_fault(registered, is_train):
    before = copy.deepcopy(TINY)
    assert faults(TINY, registered, is_train=is_train) == []
    assert faults(TINY, is_train=is_train) == []
    assert before == TINY


@pytest.mark.parametrize('file', SHIPPED, ids=lambda path: path.stem)
def test_shipped_file_has_no_fault(registered, file):
    opt = options.load(file)
    assert faults(opt, registered) == []
    assert faults(opt, registered, is_train=False) == []


UNKNOWN = 'unknown key, did you mean '
MISSING = 'required, but missing'
FOLDER_NAME = r'expected a valid folder name (without / or \, not starting with a dot or blank)'
CASES = [
    ('nettwork_g', {}, f'nettwork_g: {UNKNOWN}network_g?'),
    ('name', ..., f'name: {MISSING}'),
    ('name', 5, 'name: expected text, got 5'),
    ('name', '../up', f"name: {FOLDER_NAME}, got the text '../up'"),
    ('scale', 0, 'scale: expected more than 0, got 0'),
    ('scale', float('nan'), 'scale: expected a finite number, got nan'),
    ('num_gpu', 'two', "num_gpu: expected a whole number or 'auto', got the text 'two'"),
    ('datasets:train', ..., f'datasets.train: {MISSING}'),
    ('datasets:train', 3, 'datasets.train: expected a mapping of keys to values, got 3'),
    ('datasets:train:gt_sise', 3, f'datasets.train.gt_sise: {UNKNOWN}gt_size?'),
    ('datasets:train:batch_size_per_gpu', ..., f'datasets.train.batch_size_per_gpu: {MISSING}'),
    (
        'datasets:train:type',
        'PairsDatset',
        'datasets.train.type: no dataset is registered as PairsDatset, did you mean P',
    ),
    ('datasets:tset', VAL, 'datasets.tset: expected train, val or test, optionally with a number: val_2'),
    ('datasets:train_2', VAL, 'datasets.train_2: expected train, val or test, optionally with a number: val_2'),
    ('datasets:val_2', VAL, 'datasets.val_2.name: val is already the name of datasets.val'),
    ('network_g', ..., f'network_g: {MISSING}'),
    ('network_g:type', ['AST'], "network_g.type: expected text, got the list ['AST']"),
    ('network_g:type', 'AST_TT', 'network_g.type: no arch is registered as AST_TT, did you mean AST_T? (is its plugin'),
    ('network_g:num_feats', 8, f'network_g.num_feats: {UNKNOWN}num_feat?'),
    ('network_g:num_feat', 'many', "network_g.num_feat: expected a number, got the text 'many'"),
    ('network_d', {'type': 'AST', 'depth': [1]}, f'network_d.depth: {UNKNOWN}depths?'),
    ('path:pretrained_network_g', 'x', f'path.pretrained_network_g: {UNKNOWN}pretrain_network_g?'),
    ('path:pretrain_network_d', 'x', f'path.pretrain_network_d: {UNKNOWN}pretrain_network_g?'),
    ('path:resume_state', 'None', "path.resume_state: expected text, or ~ for no value (got the text 'None')"),
    ('path:strict_load_g', 'yes', "path.strict_load_g: expected true or false, got the text 'yes'"),
    ('train', ..., f'train: {MISSING}'),
    ('train:total_iter', ..., f'train.total_iter: {MISSING}'),
    ('train:total_epochs', 3, 'train.total_epochs: conflicts with total_iter, remove one of them'),
    ('train:accumulate', 0, 'train.accumulate: expected 1 or more, got 0'),
    ('train:mixing', {'type': 'mixup', 'alfa': 1}, f'train.mixing.alfa: {UNKNOWN}alpha?'),
    ('val:times_per_epoch', 4, 'val.times_per_epoch: conflicts with val_freq'),
    ('logger:save_checkpoint_freq', ..., f'logger.save_checkpoint_freq: {MISSING} (or save_checkpoint_epochs)'),
    ('stages', 3, 'stages: expected a list, got 3'),
    ('stages', [], 'stages: expected 1 items or more'),
    ('stages', [{}, 3], 'stages.1: expected a mapping of keys to values, got 3'),
    ('stages', [{'name': '../up'}], 'stages.0.name: expected a valid folder name'),
    ('stages', [{'name': 'a'}, {'name': 'a'}], 'stages.1.name: a is already the name of stages.0'),
    ('stages', [{}, {'train': {'total_epoch': 3}}], f'stages.1.train.total_epoch: {UNKNOWN}total_epochs?'),
    ('stages', [{}, {'train': {'optim_g': {'type': 'Adma'}}}], 'stages.1.train.optim_g.type: no optimiser'),
    ('stages', [{}, {'train': {'optim_g': {'_delete_': 3}}}], 'stages.1.train.optim_g._delete_: expected true or fal'),
    ('stages', [{}, {'train': {'optim_g': None}}], f'stages.1.train.optim_g: {MISSING}'),
    ('stages', [{}, {'stages': []}], 'stages.1.stages: stages cannot be nested'),
    ('stages', [{'val': {'best_metric': 'x'}}, {}], 'stages.0.val.best_metric: x is not in val.metrics: psnr'),
    ('train:optim_g:type', 'AdmaW', 'train.optim_g.type: no optimiser of torch.optim'),
    ('train:optim_g:lr', ..., f'train.optim_g.lr: {MISSING}'),
    ('train:optim_g:weight_decai', 0, f'train.optim_g.weight_decai: {UNKNOWN}weight_decay?'),
    ('train:optim_g:betas', [1, 'a'], "train.optim_g.betas.1: expected a number, got the text 'a'"),
    ('train:scheduler:type', 'MultistepLR', 'train.scheduler.type: unknown scheduler MultistepLR, did you mean M'),
    ('train:scheduler:milestones', ..., 'train.scheduler.milestones: required by MultiStepRestartLR, but missing'),
    ('train:pixel_opt', 'L1Loss', "train.pixel_opt: expected a mapping of keys to values, got the text 'L1Loss'"),
    ('train:pixel_opt:type', 'L1', 'train.pixel_opt.type: no loss is registered as L1'),
    ('train:edge_opt', {'type': 'EdgeLoss'}, 'train.edge_opt: unknown key'),
    ('val', ..., 'val: required to measure datasets.val; set val.val_freq'),
    ('datasets:val', ..., 'datasets.val: required by the section val, but missing; add it, or remove val'),
    ('val:val_freq', ..., f'val.val_freq: {MISSING}'),
    ('val:protocol', 'agan', 'val.protocol: only supported by model_type RestorationModel'),
    ('val:during_training', {'metric': {}}, f'val.during_training.metric: {UNKNOWN}metrics?'),
    ('val:best_metric', 'ssim', 'val.best_metric: ssim is not in val.metrics: psnr'),
    ('val:metrics:psnr:test_y_chanel', True, f'val.metrics.psnr.test_y_chanel: {UNKNOWN}test_y_channel?'),
    ('val:metrics:psnr:crop_border', ..., 'val.metrics.psnr.crop_border: required by calculate_psnr, but missing'),
    ('model_type', 'SRModle', 'model_type: no model is registered as SRModle, did you mean SRModel?'),
]


@pytest.mark.parametrize(('path', 'value', 'message'), CASES, ids=[f'{path}={value}'[:60] for path, value, _ in CASES])
def test_one_fault_gives_one_line(registered, path, value, message):
    found = faults(changed(path, value), registered)
    assert len(found) == 1, found
    assert found[0].startswith(message)


# Options of the plugin's model.
METRICS = {'psnr': {'type': 'calculate_psnr', 'crop_border': 0, 'borders': 0}}
SPAD = {'val_freq': 2, 'protocol': 'spad'}
LPIPS = {'metrics': {'lpips': {'type': 'pyiqa', 'metric': 'lpips'}}}
DURING_LPIPS, BEST_LPIPS = {'during_training': LPIPS}, {**LPIPS, 'val_freq': 2, 'best_metric': 'lpips'}
OWN_CASES = [
    ('val:protocol', 'agn', "val.protocol: expected 'basicsr', 'spad', 'agan', 'densehaze', 'whole' or 'tiled'"),
    ('val:protocol', {'type': 'agan', 'tiles': 3}, f'val.protocol.tiles: {UNKNOWN}tile?'),
    ('val:protocol', {'type': 'agan', 'tile': 0}, "val.protocol.tile: expected 1 or more or 'auto', got 0"),
    ('val:protocol', {'tile': 3}, f'val.protocol.type: {MISSING}'),
    ('val:during_training', {'protocol': 'agn'}, "val.during_training.protocol: expected 'basicsr'"),
    ('val:during_training', {'metrics': METRICS}, f'val.during_training.metrics.psnr.borders: {UNKNOWN}crop_border?'),
    ('val', {**SPAD, 'best_metric': 'ssim'}, None),
    ('val', {**SPAD, 'best_metric': 'lpips'}, 'val.best_metric: lpips is not in val.metrics: psnr, ssim'),
    ('val', {'val_freq': 2, 'best_metric': 'psnr'}, 'val.best_metric: psnr is not in val.metrics: empty'),
    (
        'val',
        {**SPAD, 'best_metric': 'ssim', **DURING_LPIPS},
        'val.best_metric: ssim is not in val.during_training.metr',
    ),
    (
        'val',
        {**BEST_LPIPS, 'during_training': {'protocol': 'whole'}},
        'val.best_metric: lpips is not in val.during_tra',
    ),
    ('train:edge_opt', {'type': 'EdgeLoss'}, None),
    ('train:edge_opt', {'type': 'EdgeLos', 'x': 1}, 'train.edge_opt.type: no loss is registered as EdgeLos, did you'),
    ('train:scheduler', {'type': 'WarmupCosineLR', 'warmup_iter': 2}, None),
]


@pytest.mark.parametrize(('path', 'value', 'message'), OWN_CASES)
def test_faults_of_our_model(registered, path, value, message):
    opt = {**changed(path, value), 'model_type': 'RestorationModel'}
    found = faults(opt, registered)
    assert len(found) == (message is not None) and (not found or found[0].startswith(message)), found
    if path == 'val':
        assert faults(opt, registered, is_train=False) == []  # testing does not select best weights


def test_all_faults_in_the_order_of_the_file(registered):
    opt = changed('train:total_iter', 'x')
    opt['logger']['print_frq'] = 1
    opt['network_g']['numfeat'] = 1
    opt['datasets']['val']['dataroot_lg'] = 'x'
    opt['nam'] = 'x'
    with pytest.raises(OptionError) as caught:
        validation.check(opt, 'my.yml', registered)
    keys = [line.split(': ')[1] for line in str(caught.value).splitlines() if line.startswith('my.yml: ')]
    assert keys == ['datasets.val.dataroot_lg', 'network_g.numfeat', 'train.total_iter', 'logger.print_frq', 'nam']


def test_what_all_stages_lack(registered):
    assert faults(changed('stages', [{'name': 'A'}, {'name': 'a'}]), registered) == []  # names tell capitals
    opt = changed('train:total_iter', ...)
    opt['logger']['print_frq'] = 1
    opt['stages'] = [{}, {}]
    assert faults(opt, registered) == [
        'train.total_iter: required, but missing (or total_epochs)',
        f'logger.print_frq: {UNKNOWN}print_freq?',
    ]
    opt['stages'] = [{'train': {'total_epochs': 3}}, {}]
    assert faults(opt, registered) == [
        f'logger.print_frq: {UNKNOWN}print_freq?',
        'stages.1.train.total_iter: required, but missing (or total_epochs)',
    ]
    opt['stages'] = [{'train': {'total_epochs': 3}, 'logger': {'_delete_': True, 'print_freq': 1}}]
    assert faults(opt, registered) == ['logger.save_checkpoint_freq: required, but missing (or save_checkpoint_epochs)']
    opt = changed('path:resume_state', 'x.state')
    opt['stages'] = [{}]
    assert faults(opt, registered)[0].startswith('path.resume_state: a training state belongs to one stage')


def test_testing_needs_less(registered):
    opt = {key: value for key, value in TINY.items() if key not in ('train', 'logger', 'val')}
    assert faults(opt, registered, is_train=False) == []
    missing = ['datasets.val: required for testing (or datasets.test), but missing']
    assert faults(changed('datasets:val', ...), registered, is_train=False) == missing


def test_third_party_model_may_have_its_own_keys(registered):
    model = type('StrangerModel', (), {'__module__': 'stranger'})
    stranger = replace(registered, by_kind={**registered.by_kind, 'model': {'StrangerModel': model}})
    opt = {**changed('train:my_loss_weight', 3), 'model_type': 'StrangerModel', 'my_section': {'a': 1}}
    opt['train']['scheduler'] = {'type': 'Own', 'x': 1}
    opt['val']['mine'] = 1
    assert faults(opt, stranger) == []
    opt['network_g']['numfeat'] = 3
    opt['datasets']['train']['gt_sise'] = 3
    assert len(faults(opt, stranger)) == 2


def test_failed_plugin_is_named(registered):
    broken = replace(registered, failed_plugins=['plugin x of y 1 failed to load: ImportError: no z'])
    (fault,) = faults(changed('network_g:type', 'Qqq'), broken)
    assert fault == 'network_g.type: no arch is registered as Qqq (plugin x of y 1 failed to load: ImportError: no z)'


# ---- signatures of constructors and functions


class Open(nn.Module):
    def __init__(self, size, depth=3, **kwargs):
        super().__init__()


class Child(Open):
    def __init__(self, width: int = 1, **kwargs):
        super().__init__(**kwargs)


def factory(scale=1, **kwargs) -> Open:
    return Open(**kwargs)


def forwards(**kwargs):
    return dict(**kwargs)


def typed(value: float | Tensor = 1.0, pair: tuple[int, int] = (1, 2)):
    return value, pair


@pytest.mark.parametrize(
    ('target', 'arguments', 'expected'),
    [
        (Open, {'size': 1, 'dept': 1}, [f'dept: {UNKNOWN}depth?']),
        (Open, {}, ['size: required by Open, but missing']),
        (Child, {'size': 1, 'width': 2, 'depth': 3}, []),
        (Child, {'size': 1, 'widht': 2}, [f'widht: {UNKNOWN}width?']),
        (Child, {'size': 1, 'width': 'x'}, ["width: expected a whole number, got the text 'x'"]),
        (Child, {'size': 1, 'width': True}, ['width: expected a whole number, got true']),
        (factory, {'size': 1, 'scale': 2}, []),
        (factory, {'size': 1, 'scael': 2}, [f'scael: {UNKNOWN}scale?']),
        (forwards, {'anything': 1}, []),
        (Open, {'size': 1, 'depth': [1, 2]}, []),
        (typed, {'value': 'x'}, ["value: expected a number, got the text 'x'"]),
        (typed, {'pair': [1, 2], 'value': 3}, []),
        (typed, {'pair': [1]}, ['pair.1: required, but missing']),
    ],
)
def test_arguments(target, arguments, expected):
    assert sorted(str(fault) for fault in validation.argument_faults(target, arguments, ())) == sorted(expected)
