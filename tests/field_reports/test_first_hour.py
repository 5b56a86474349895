"""First steps of a new user: installation, custom pairs, an interrupted run, and output paths."""

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from ast_plugin import options
from ast_plugin.archs.ast_arch import AST_XS
from ast_plugin.checkpoints import read_checkpoint, save_torch, save_weights
from ast_plugin.cli.main import main
from ast_plugin.models import restoration_model
from ast_plugin.models.processes import RunStopped
from ast_plugin.models.training_run import find_weights
from tests.models.test_restoration_model import build, same, train, weights
from tests.models.test_run_state import resumable

ROOT = Path(__file__).parents[2]


def write_images(folder, names, side=64):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        cv2.imwrite(str(folder / name), np.random.default_rng(number).integers(0, 256, (side, side, 3), 'uint8'))


# ---- installing


def test_pins_let_tensorboard_start():
    """TensorBoard's nightly builds import pkg_resources, which setuptools includes up to version 81."""
    source = Path(importlib.util.find_spec('tensorboard').origin).with_name('default.py').read_text()
    pin = re.search(r'^setuptools==(\d+)', (ROOT / 'constraints.txt').read_text(), re.MULTILINE)[1]
    assert 'import pkg_resources' not in source or int(pin) < 82
    assert "'setuptools<82'" in (ROOT / 'setup.py').read_text()


def test_readme_installs_as_bootstrap_does():
    text = (ROOT / 'README.md').read_text()
    (line,) = (line for line in text.splitlines() if 'pip install basicsr==' in line)
    bootstrap = (ROOT / 'tools' / 'bootstrap.py').read_text()
    for words in ('--no-build-isolation', '--use-pep517', 'exec_fills_locals'):
        assert words in line and words in bootstrap
    assert line.startswith('PYTHONPATH=$PWD/tools/exec_fills_locals ')  # pip builds in a folder of its own


def test_clone_is_found_from_the_folder_above(tmp_path):
    """In an editable installation, no empty namespace package shadows the clone."""
    clone = tmp_path / 'above' / 'ast_plugin'
    shutil.copytree(ROOT / 'ast_plugin', clone / 'ast_plugin', ignore=shutil.ignore_patterns('weights', '__pycache__'))
    for name in ('setup.py', 'pyproject.toml'):
        shutil.copy(ROOT / name, clone)
    code = "from setuptools.build_meta import build_editable; build_editable('wheel')"
    (clone / 'wheel').mkdir()
    subprocess.run([sys.executable, '-c', code], cwd=clone, check=True, capture_output=True)
    with zipfile.ZipFile(next(clone.glob('wheel/*.whl'))) as wheel:
        (path_file,) = (name for name in wheel.namelist() if name.endswith('.pth'))
        assert wheel.read(path_file).decode().strip() == str(clone)
    # What site makes of that line, and of the finder that setuptools writes without the option.
    code = f'import sys; sys.path.append({str(clone)!r}); import ast_plugin; print(ast_plugin.__version__)'
    found = subprocess.run([sys.executable, '-Sc', code], cwd=clone.parent, capture_output=True, text=True)
    assert found.stdout.strip(), found.stderr


# ---- own pairs


def test_own_pairs_are_complete(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for place in ('train/lq', 'train/gt', 'val/lq', 'val/gt'):
        write_images(tmp_path / 'datasets' / 'my_pairs' / place, ['1.png', '2.png'], side=150)
    assert main(['options', 'mine']) == 0
    assert main(['check', '-opt', 'mine/my_pairs.yml', '--force_yml', 'num_gpu=0']) == 0
    err = capsys.readouterr().err
    assert 'my_pairs: valid' in err and 'not usable' not in err
    opt = options.load(options.find('my_pairs'))
    assert not {'_base_', 'stages'} & opt.keys()  # all of it stands in one file
    guide = (ROOT / 'docs' / 'train.md').read_text()
    assert guide.index('my_pairs.yml') < guide.index('AST_quickstart')


# ---- stopping


def test_stopped_run_leaves_its_latest_weights(tmp_path, monkeypatch):
    opt = resumable(tmp_path)
    model = build(opt)
    train(model, 1, 2)
    model.save(0, 2)
    save_torch(tmp_path / 'models' / 'net_g_latest.pth', model.weights())  # of an earlier end
    train(model, 3, 3)
    monkeypatch.setattr(restoration_model, 'received_signal', lambda: 15)
    with pytest.raises(RunStopped):
        train(model, 4, 4)
    assert same(read_checkpoint(tmp_path / 'models' / 'net_g_latest.pth', 'params').state, weights(model))


def test_killed_run_is_tested_by_its_newest(tmp_path):
    (tmp_path / 'models').mkdir()
    for name, found in (('latest', 'latest'), ('9', '9'), ('36', '36'), ('latest', 'latest'), ('best', 'best')):
        save_torch(tmp_path / 'models' / f'net_g_{name}.pth', {'params': {'a': torch.ones(1)}})
        assert find_weights(tmp_path).name == f'net_g_{found}.pth'
    assert find_weights(tmp_path / 'nothing') is None


# ---- results where they were asked for


@pytest.fixture(scope='module')
def restoring(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'w.safetensors'
    network = {'type': 'AST_XS', 'img_size': 16, 'embed_dim': 4, 'window_size': 2}
    save_weights(path, AST_XS(img_size=16, embed_dim=4, window_size=2).state_dict(), network)
    return ['--weights', str(path), '--device', 'cpu']


@pytest.mark.parametrize(('name', 'kind'), [('out.jpg', 'JPEG'), ('new/out.PNG', 'PNG'), ('out.tif', 'TIFF')])
def test_output_that_is_an_image(name, kind, tmp_path, restoring):
    write_images(tmp_path, ['photo.jpg'], side=20)
    assert main(['infer', '-i', str(tmp_path / 'photo.jpg'), '-o', str(tmp_path / name), *restoring]) == 0
    with Image.open(tmp_path / name) as image:
        assert (image.format, image.size) == (kind, (20, 20))


def test_output_that_is_no_place_for_them(tmp_path, restoring, capsys):
    write_images(tmp_path, ['a.jpg', 'b.jpg'], side=20)
    a, b, both = str(tmp_path / 'a.jpg'), str(tmp_path / 'b.jpg'), str(tmp_path)
    for arguments, words in (
        (['-i', both, '-o', f'{both}/o.jpg'], '2 images: expected a folder'),
        (['-i', a, b, '-o', f'{both}/o.jpg'], '2 images: expected a folder'),
        (['-i', a, '-o', f'{both}/o.jpg', '--suffix', 'x'], 'expected a folder'),
        (['-i', a, '-o', f'{both}/o.gif'], 'with one of the extensions'),
        (['-i', a, '-o', a], 'a.jpg'),
    ):
        assert main(['infer', *arguments, *restoring]) == 2
        assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.jpg', 'b.jpg']
    (tmp_path / 'o.jpg').mkdir()  # an earlier version made such folders
    assert main(['infer', '-i', both, '-o', f'{both}/o.jpg', *restoring]) == 0
    assert len(list((tmp_path / 'o.jpg').glob('*.jpg'))) == 2


# ---- advice of the command at hand


def faulty(folder, layout):
    if layout == 'agan':
        write_images(folder / 'train' / 'data', ['1_rain.png', '2_rain.png'])
        write_images(folder / 'train' / 'gt', ['1_clean.png'])
    else:
        write_images(folder / 'lq', ['1.png', '2.png'])
        write_images(folder / 'gt', ['1.png'])


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--layout', 'agan'], ['2_rain.png', 'basicsr data prepare agan SRC PREPARED --skip-faulty']),
        (['--layout', 'agan', '--phase', 'test'], ['AGAN-Data was not found at', 'set SRC to its location']),
        (['--layout', 'istd'], ['ISTD was not found at', 'set SRC to its location']),
        (['--layout', 'spad', '--split', 'nonsense'], ['--split: ', 'set --list-file']),
        ([], ['2.png', 'correct --lq-template and --gt-template']),
        (['--lq-template', '{}_rain'], ['none of the 2 images', 'Correct the template']),
    ],
)
def test_lmdb_gives_its_own_advice(arguments, words, tmp_path, capsys):
    faulty(tmp_path / 'source', 'agan' if '--layout' in arguments else 'folders')
    assert main(['data', 'lmdb', str(tmp_path / 'source'), str(tmp_path / 'out'), *arguments]) == 2
    message = capsys.readouterr().err
    assert not re.search(r'datasets\.|dataroot|basicsr train|option file', message), message
    for word in words:
        assert word in message, message
