"""The commands of the README and docs/ run on files that bear the names they use; trainings are cut short."""

import shlex
import shutil
import zlib

import cv2
import numpy as np
import pytest

from ast_plugin.archs.ast_arch import AST_XS
from ast_plugin.checkpoints import save_torch, save_weights
from ast_plugin.cli.main import main

from .. import tiny_run
from .pages import PAGES, ROOT, commands

ELSEWHERE = {
    'git clone': '.ci/run',
    'make demo': 'tests/tools/test_bootstrap.py',
    'make test': '.ci/run',
    'torchrun': 'tests/test_distributed.py',
    'basicsr compare': 'tests/cli/test_compare.py',
    'basicsr info': 'tests/cli/test_info.py',
    'python tools/benchmark.py': 'tests/benchmarks',
}
"""Commands by their beginning that are not run here, and what tests the nearest to them."""

SHORT = [
    'num_gpu=0',
    'train:total_iter=2',
    'train:scheduler:warmup_iter=1',
    'val:val_freq=2',
    'logger:save_checkpoint_freq=2',
    'datasets:train:gt_size=32',
    'datasets:train:batch_size_per_gpu=1',
    'datasets:val:center_crop=32',
]
RUNS = [(page, line) for page, line in commands() if not line.startswith(tuple(ELSEWHERE))]


def write_images(folder, names, side=64):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        image = np.random.default_rng(zlib.crc32(str(folder / name).encode())).integers(
            0, 256, (side, side, 3), dtype=np.uint8
        )
        assert cv2.imwrite(str(folder / name), image)


@pytest.fixture(scope='module')
def workspaces(tmp_path_factory):
    """A folder for each page in which the files are that its commands name."""
    made = {}

    def workspace(page):
        if page not in made:
            made[page] = root = tmp_path_factory.mktemp(page)
            write_images(root, ['photo.jpg', 'photo.png'])
            write_images(root / 'folder', ['a.png', 'b.jpg'])
            write_images(root / 'photos', ['a.jpg', 'b.jpg'], side=300)
            for place in (root / 'downloads' / 'raindrop', root / 'datasets' / 'AGAN-Data'):
                for split in ('train', 'test_a', 'test_b'):
                    for kind, ending in (('data', 'rain'), ('gt', 'clean')):
                        start = {'train': 0, 'test_a': 10, 'test_b': 20}[split]
                        numbers = range(start, start + 2)
                        write_images(place / split / kind, [f'{number}_{ending}.png' for number in numbers])
            network = AST_XS(img_size=64)
            save_torch(root / 'model_best.pth', {'state_dict': network.state_dict()})
            models = root / 'experiments' / 'AST_quickstart' / 'models'
            models.mkdir(parents=True)
            save_torch(models / 'net_g_best.pth', {'params': network.state_dict()})
            save_weights(models / 'net_g_best.safetensors', network.state_dict(), {'type': 'AST_XS', 'img_size': 64})
            shutil.copy(tiny_run.write(root), root / 'my.yml')
        return made[page]

    return workspace


def arguments_of(line):
    """The arguments to run instead of `line`: a training is made short, one on a dataset is only checked."""
    arguments = shlex.split(line)[1:]
    if arguments[0] == 'train':
        return [*arguments, *SHORT] if '--force_yml' in arguments else [*arguments, '--force_yml', *SHORT]
    return arguments


@pytest.mark.parametrize(('page', 'line'), RUNS, ids=[f'{page}-{line[:60]}' for page, line in RUNS])
def test_command(page, line, workspaces, monkeypatch):
    assert line.startswith('basicsr '), f'{line}: name the test that runs it in ELSEWHERE'
    root = workspaces(page)
    monkeypatch.chdir(root)
    monkeypatch.setenv('HOME', str(root))
    line = line.replace("'photos/*.jpg'", 'photos/a.jpg photos/b.jpg')
    status = main([argument.replace('~', str(root)) for argument in arguments_of(line)])
    needs_data = 'AST_derain' in line  # told where it is expected; the recipe itself is checked in tests/options
    assert status == (2 if needs_data else 0)


def test_those_run_elsewhere():
    for place in ELSEWHERE.values():
        assert (ROOT / place).exists(), place


def test_pages_are_read():
    assert len(PAGES) > 8
    assert {line.split()[1] for _, line in RUNS} >= {'train', 'infer', 'test', 'check', 'data', 'mix'}
