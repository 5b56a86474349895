"""The shipped option files against a table of the recipes: what each stage comes to on the official data."""

import pytest

from ast_plugin import options

# lr, patch, batch, epochs and iterations of each stage. The first three are the paper's, the rest ours.
RECIPES = {
    'AST_derain': (
        638_492,
        [(2e-4, 128, 32, 20, 399_060), (1e-4, 256, 16, 15, 598_590)],
    ),
    'AST_deraindrop': (
        861,
        [(2e-4, 128, 32, 300, 8_100), (1e-4, 256, 16, 200, 10_800), (8e-5, 384, 8, 150, 16_200)],
    ),
    'AST_dehaze': (
        50,
        [
            (2e-4, 256, 4, 2000, 26_000),
            (1.2e-4, 384, 4, 1200, 15_600),
            (8e-5, 512, 4, 800, 10_400),
            (3e-5, 768, 2, 300, 7_500),
            (1e-5, 896, 2, 80, 2_000),
        ],
    ),
    'AST_deshadow': (
        1_330,
        [(2e-4, 128, 32, 300, 12_600), (1e-4, 256, 16, 200, 16_800), (8e-5, 384, 8, 150, 25_050)],
    ),
    'AST_desnow': (
        50_000,
        [(2e-4, 128, 32, 60, 93_780), (1e-4, 256, 16, 30, 93_750)],
    ),
    'AST_demoire': (
        121_500,
        [(2e-4, 128, 32, 30, 113_910), (1e-4, 256, 16, 20, 151_880)],
    ),
}
# Iterations between validations in each stage. Four times an epoch is the paper's.
VALIDATIONS = {
    'AST_derain': [4_988, 9_976],
    'AST_deraindrop': [6, 13, 27],
    'AST_dehaze': [3, 3, 3, 6, 6],
    'AST_deshadow': [42, 84, 167],
    'AST_desnow': [15_630, 31_250],
    'AST_demoire': [18_985, 37_970],
}
# The paper's for its own tasks.
PROTOCOLS = {'AST_derain': 'spad', 'AST_deraindrop': 'agan', 'AST_dehaze': 'densehaze'}
LAYOUTS = {
    'AST_derain': 'spad',
    'AST_deraindrop': 'agan',
    'AST_dehaze': 'densehaze',
    'AST_deshadow': 'istd',
    'AST_desnow': 'snow100k',
    'AST_demoire': 'moire',
}


@pytest.fixture(params=RECIPES)
def recipe(request):
    """A shipped file's name, its stages in the table, and the same as prepared for BasicSR on the official data."""
    length, table = RECIPES[request.param]
    read = options.expand(options.load(options.find(request.param)))
    runs = [
        options.prepare({**stage.opt, 'num_gpu': 1}, stage=stage.name, length_of=lambda _: length) for stage in read
    ]
    return request.param, table, read, runs


def test_every_file_is_in_the_table():
    """Those in folders have tables of their own."""
    files = {name for name in options.shipped_files() if '/' not in name}
    assert files - set(RECIPES) == {'AST_quickstart', 'my_pairs'}


def test_numbers_of_each_stage(recipe):
    name, table, read, runs = recipe
    found = [
        (
            run['train']['optim_g']['lr'],
            run['datasets']['train']['gt_size'],
            run['datasets']['train']['batch_size_per_gpu'],
            stage.opt['train']['total_epochs'],
            run['train']['total_iter'],
        )
        for stage, run in zip(read, runs, strict=True)
    ]
    assert found == table
    assert [run['val']['val_freq'] for run in runs] == VALIDATIONS[name]
    assert [run['name'] for run in runs] == [f'{name}_stage_{number}' for number in range(1, len(table) + 1)]
    for number, run in enumerate(runs, 1):
        assert run['path']['experiments_root'].endswith(f'experiments/{name}/stage_{number}')
        assert run['train']['total_iter'] == stage_epochs(table, number) * run['train']['iters_per_epoch']


def stage_epochs(table, number):
    return table[number - 1][3]


def test_what_all_stages_share(recipe):
    name, _, _, runs = recipe
    for run in runs:
        train = run['train']
        assert run['network_g'] == {'type': 'AST_B', 'img_size': 128, 'drop_path_rate': 0.1}
        assert {key: value for key, value in train['optim_g'].items() if key != 'lr'} == {
            'type': 'AdamW',
            'weight_decay': 0.02,
            'betas': [0.9, 0.999],
            'eps': 1e-8,
        }
        assert train['scheduler'] == {'type': 'WarmupCosineLR', 'warmup_epochs': 3, 'eta_min': 1e-6, 'by': 'epoch'}
        assert train['pixel_opt'] == {'type': 'ASTCharbonnierLoss'}
        assert train['precision'] == 'fp16'
        assert 'clip_grad_norm' not in train and 'ema_decay' not in train
        mixing = {'type': 'mixup', 'alpha': 1.2, 'start_epoch': 6}
        assert train['mixing'] == (mixing if name == 'AST_derain' else None)
        assert run['manual_seed'] == 1234
        assert run['val']['best_metric'] == 'psnr'
        training, validation = run['datasets']['train'], run['datasets']['val']
        assert training['layout'] == validation['layout'] == LAYOUTS[name]
        assert training['use_hflip'] and training['use_rot']
        # The authors validate on centres as large as the patch; on SPAD on whole images.
        assert validation.get('center_crop') == (None if name == 'AST_derain' else training['gt_size'])


def test_how_each_task_is_measured(recipe):
    """Training picks the best weights as the authors did; a test takes whole images by the task's protocol."""
    name, _, read, runs = recipe
    for stage, run in zip(read, runs, strict=True):
        assert run['val']['protocol'] == 'whole'
        assert run['val']['metrics'] == {'psnr': {'type': 'calculate_psnr_y_float'}}
        test = options.prepare({**stage.opt, 'num_gpu': 0}, is_train=False)
        assert test['val']['protocol'] == PROTOCOLS.get(name, 'tiled')
        assert test['val'].get('metrics') is None
        assert 'during_training' not in run['val'] and 'during_training' not in test['val']
        assert 'center_crop' not in test['datasets']['val']
        assert test['network_g']['img_size'] == 128


def test_rates_of_a_stage(recipe):
    """A third, two thirds and all of the rate, an epoch each; then the cosine down to 1e-6."""
    import torch

    from ast_plugin.models.optimizers import build_schedule

    _, table, _, runs = recipe
    for (lr, *_), run in zip(table, runs, strict=True):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
        schedule = build_schedule(optimizer, run['train'])
        epoch = run['train']['iters_per_epoch']
        rates = []
        for iteration in (0, epoch - 1, epoch, 2 * epoch, 3 * epoch, run['train']['total_iter']):
            schedule.last_epoch = iteration
            rates.append(schedule.get_lr()[0])
        assert rates == pytest.approx([lr / 3, lr / 3, 2 * lr / 3, lr, lr, 1e-6])


def test_two_gpus_halve_the_iterations():
    (stage, *_) = options.expand(options.load(options.find('AST_deraindrop')))
    for process in ({'world_size': 2, 'dist': True}, {}):
        opt = {**stage.opt, 'num_gpu': 2}
        run = options.prepare(opt, stage=stage.name, length_of=lambda _: 861, **process)
        assert (run['train']['iters_per_epoch'], run['train']['total_iter']) == (14, 4_200)


def test_epochs_cut_below_the_warm_up():
    (stage, *_) = options.expand(options.load(options.find('AST_deraindrop'), ['train:total_epochs=2']))
    run = options.prepare(stage.opt, stage=stage.name, length_of=lambda _: 861)
    assert run['train']['scheduler']['warmup_epochs'] == 1
    assert stage.opt['train']['scheduler']['warmup_epochs'] == 3


def test_epochs_cannot_be_counted_without_data():
    from ast_plugin.errors import OptionError

    (stage, *_) = options.expand(options.load(options.find('AST_deraindrop')))
    with pytest.raises(OptionError, match='total_epochs, times_per_epoch, save_checkpoint_epochs: epochs cannot'):
        options.prepare(stage.opt)
