"""Training in stages with the shipped option file for raindrops on a folder with the layout of AGAN-Data."""

import csv
import hashlib
import os
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ast_plugin.metrics import psnr_rgb
from ast_plugin.models import training_run as stages

TINY = [
    'network_g={type: SRVGGNetCompact, num_feat: 4, num_conv: 1, upscale: 1}',
    'datasets:train:gt_size=16',
    'datasets:train:batch_size_per_gpu=4',
    'datasets:train:num_worker_per_gpu=0',
    'datasets:val:center_crop=16',
    'train:precision=fp32',
    'train:total_epochs=1',
    'logger:save_checkpoint_epochs=1',
    'num_gpu=0',
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with eight small pairs in the layout of AGAN-Data."""
    generator = np.random.default_rng(0)
    for split, count in (('train', 8), ('test_a', 1)):
        for number in range(count):
            clean = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            for kind, name, image in (('gt', 'clean', clean), ('data', 'rain', clean // 2)):
                path = tmp_path / 'datasets' / 'AGAN-Data' / split / kind / f'{number}_{name}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), image)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('AGAN', raising=False)
    monkeypatch.setattr('ast_plugin.models.run_log.draw_curve', lambda *_: b'')
    return tmp_path


@pytest.fixture
def train(folder, basicsr):
    """Train with the shipped file, shortened; check the status, and return the output and errors."""

    def run(*arguments, command='train', overrides=(), status=0):
        return basicsr(command, '-opt', 'AST_deraindrop', *arguments, '--force_yml', *TINY, *overrides, status=status)

    return run


def weights(path):
    return torch.load(path, weights_only=True)['params']


def experiment(folder):
    return folder / 'experiments' / 'AST_deraindrop'


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_stages_start_from_the_best_weights(folder, train, monkeypatch):
    """Killed after stage 2 has saved its state but before it has finished, then run again."""
    import basicsr.train

    basicsr.train.get_root_logger()  # as by an earlier use of BasicSR in this process, without a log file
    original = basicsr.train.train_pipeline
    trained = []

    def killed_in_stage_2(root):
        original(root)
        trained.append(root)
        if len(trained) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(basicsr.train, 'train_pipeline', killed_in_stage_2)
    run = experiment(folder)
    said, _ = train(status=130)
    assert names(run) == ['stage_1', 'stage_2'] and not stages.is_finished(run / 'stage_2', 2)
    resumed, _ = train('--auto_resume')
    assert 'stage_1 is finished' in resumed
    assert f'stage_2 resumes from {run}/stage_2/training_states/2.state' in resumed
    said += resumed
    assert said.count('train.scheduler: 3 warm-up epochs do not fit into 1; using 0') == 4
    assert names(run) == ['stage_1', 'stage_2', 'stage_3']
    assert names(folder / 'tb_logger') == [f'AST_deraindrop_stage_{number}' for number in (1, 2, 3)]
    for number in (1, 2, 3):
        stage = run / f'stage_{number}'
        text = ''.join(log.read_text() for log in stage.glob('train_*.log'))
        assert text.count('Start training from epoch: 0, iter: 0') == 1
        assert names(stage / 'training_states') == ['2.state']
        state = torch.load(stage / 'training_states' / '2.state', weights_only=True)
        assert (state['iter'], state['optimizers'][0]['state'][0]['step']) == (2, 2)
        if number > 1:
            best = run / f'stage_{number - 1}' / 'models' / 'net_g_best.pth'
            assert f'Loading weights from {best}' in text
            assert f'stage_{number} starts from the best weights of stage_{number - 1}: {best}' in said
    # The best weights of the previous stage, at most one step with a learning rate of 1e-4 away.
    before = weights(run / 'stage_1' / 'models' / 'net_g_best.pth')
    after = weights(run / 'stage_2' / 'models' / 'net_g_latest.pth')
    change = max((after[name].float() - before[name].float()).abs().max().item() for name in before)
    assert 0 < change < 3e-4
    copy = yaml.safe_load((run / 'stage_2' / 'AST_deraindrop.yml').read_text())
    assert copy['name'] == 'AST_deraindrop_stage_2'
    assert 'stages' not in copy and copy['datasets']['train']['gt_size'] == 16

    # Everything is finished: nothing is trained or renamed.
    output, _ = train('--auto_resume')
    assert [f'stage_{number} is finished' in output for number in (1, 2, 3)] == [True] * 3
    assert names(run) == ['stage_1', 'stage_2', 'stage_3']

    assert f'Testing weights {run}/stage_3/models/net_g_best.pth' in train(command='test')[0]
    # With the paper's protocol on whole images, regardless of center_crop in training.
    results = folder / 'results' / 'AST_deraindrop'
    (row, _) = csv.DictReader((results / 'AGAN_test_a.csv').open(encoding='utf-8', newline=''))
    root = folder / 'datasets' / 'AGAN-Data' / 'test_a'
    lq, gt = (cv2.imread(str(root / name))[..., ::-1] for name in ('data/0_rain.png', 'gt/0_clean.png'))
    assert float(row['input psnr']) == pytest.approx(psnr_rgb(lq, gt), abs=1e-4)
    assert row['protocol'] == 'agan: tiles of 384, overlap 80, mean; not rounded'
    assert row['weights'] == f'{run}/stage_3/models/net_g_best.pth'
    assert row['sha256'] == hashlib.sha256(Path(row['weights']).read_bytes()).hexdigest()
    with Image.open(results / 'AGAN_test_a_worst_and_best.png') as sheet:
        assert sheet.width == 3 * 480 + 4 * 16 and sheet.height > 480


def test_one_stage(folder, train, basicsr):
    assert 'stage_2 starts from the weights of stage_1, but' in train('--stage', '2', status=2)[1]
    assert not (folder / 'experiments').exists()
    models = experiment(folder) / 'stage_1' / 'models'

    train('--stage', '1')
    (models / 'net_g_best.pth').unlink()
    line = f'stage_2 starts from the latest (no best ones exist) weights of stage_1: {models}/net_g_latest.pth'
    assert line in train('--stage', 'stage_2')[0]
    assert names(experiment(folder)) == ['stage_1', 'stage_2']

    # Later stages of a retrained stage are renamed.
    train('--stage', '1')
    kept = names(experiment(folder))
    assert [name.split('_archived_')[0] for name in kept] == ['stage_1', 'stage_1', 'stage_2']
    assert '_archived_' in kept[2]
    assert f'Testing weights {models}/net_g_best.pth' in train(command='test')[0]

    assert 'expected a number from 1 to 3' in train('--stage', '4', status=2)[1]
    _, err = basicsr('train', '-opt', 'AST_quickstart', '--stage', '1', status=2)
    assert 'AST_quickstart.yml has no stages' in err


def test_signal_after_the_last_iteration(folder, monkeypatch, train):
    monkeypatch.setattr(stages, 'mark_finished', lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert 'stopped by SIGTERM, saved after iteration 2; resume with' in train(status=143)[1]
    assert names(experiment(folder)) == ['stage_1']


def test_complete_run_archives_an_older_one(folder, train):
    old = experiment(folder) / 'stage_3' / 'models'
    old.mkdir(parents=True)
    (old / 'net_g_best.pth').write_bytes(b'old')
    # All checks run before that.
    for override, message in (
        ('stages:2:train:optim_g:lr=fast', 'stages.2.train.optim_g.lr: expected a number'),
        ('stages:2:datasets:train:dataroot=nowhere', 'stage_3: datasets.train: AGAN-Data was not found at nowhere'),
        ('stages:2:network_g={num_feat: 8}', 'stage_3: network_g, which starts from the stage before: '),
    ):
        assert message in train(overrides=[override], status=2)[1]
    assert names(folder / 'experiments') == ['AST_deraindrop']

    train(overrides=['stages=[{name: only, train: {total_epochs: 1, optim_g: {lr: 1e-4}}}]'])
    assert names(experiment(folder)) == ['only']
    (aside,) = (folder / 'experiments').glob('AST_deraindrop_archived_*')
    assert (aside / 'stage_3' / 'models' / 'net_g_best.pth').read_bytes() == b'old'


def test_finished(tmp_path):
    stages.mark_finished(tmp_path, 5)
    assert not stages.is_finished(tmp_path, 5)  # no weights
    (tmp_path / 'models').mkdir()
    (tmp_path / 'models' / 'net_g_latest.pth').touch()
    assert stages.is_finished(tmp_path, 5) and not stages.is_finished(tmp_path, 6)
    for content in ('[1]', '{'):
        (tmp_path / 'finished.json').write_text(content)
        assert not stages.is_finished(tmp_path, 5)
