"""Run the commands of the README and docs/ page by page on files with the expected names; shorten long runs."""

import argparse
import shlex
import shutil
import zlib

import pytest

from ast_plugin.archs.ast_arch import AST_XS
from ast_plugin.checkpoints import save_torch, save_weights
from ast_plugin.cli import web
from ast_plugin.cli.main import main
from ast_plugin.compare.run import make_plan
from benchmarks.__main__ import make_parser

from .. import tiny_run
from ..data.images import write_noise
from ..weights.helpers import release_tiny
from .pages import PAGES, commands

ELSEWHERE = ('git clone', 'make demo', 'make test', 'pip install', 'PYTHONPATH=$PWD/tools')
"""Prefixes of commands that need a separate clone: .ci/run covers the first and the last, and `make demo` is
`basicsr demo`, whose two commands are run here."""

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
SHORT_STAGES = [
    'num_gpu=0',
    'network_g:type=AST_XS',
    'train:total_epochs=1',
    'train:precision=fp32',
    'train:scheduler:warmup_epochs=0',
    'datasets:train:gt_size=32',
    'datasets:train:batch_size_per_gpu=1',
    'datasets:train:num_worker_per_gpu=0',
]


def write_images(folder, names, side=64):
    for name in names:
        write_noise(folder / name, zlib.crc32(str(folder / name).encode()), (side, side))


def write_spad(root):
    """Write two training pairs and one test pair in the layout of SPA-Data."""
    for name, count in (('real_world', 2), ('real_test_1000', 1)):
        names = [f'{number}.png' for number in range(count)]
        for folder in (name, f'{name}_gt'):
            write_images(root / folder, names, side=32)
        lines = [f'/{name}/{image} /{name}_gt/{image}\n' for image in names]
        (root / f'{name}.txt').write_text(''.join(lines), encoding='utf-8')


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with the files used by the commands, set as working directory and home."""
    write_images(tmp_path, ['photo.jpg', 'photo.png'])
    write_images(tmp_path / 'folder', ['a.png', 'b.jpg'])
    for folder in ('restored', 'clean'):
        write_images(tmp_path / folder, ['a.png'])
    write_images(tmp_path / 'photos', ['a.jpg', 'b.jpg'], side=300)
    for split in ('train', 'val'):
        write_images(tmp_path / 'datasets' / 'photos' / split, ['c.png'], side=300)
    for place in ('train/lq', 'train/gt', 'val/lq', 'val/gt'):
        write_images(tmp_path / 'datasets' / 'my_pairs' / place, ['1.png', '2.png'])
    write_spad(tmp_path / 'datasets' / 'SPAD')
    for place in (tmp_path / 'downloads' / 'raindrop', tmp_path / 'datasets' / 'AGAN-Data'):
        for start, split in enumerate(('train', 'test_a', 'test_b')):
            for kind, ending in (('data', 'rain'), ('gt', 'clean')):
                write_images(place / split / kind, [f'{10 * start + number}_{ending}.png' for number in range(2)])
    network = AST_XS(img_size=64)
    save_torch(tmp_path / 'model_best.pth', {'state_dict': network.state_dict()})
    models = tmp_path / 'experiments' / 'AST_quickstart' / 'models'
    models.mkdir(parents=True)
    save_torch(models / 'net_g_best.pth', {'params': network.state_dict()})
    save_weights(models / 'net_g_best.safetensors', network.state_dict(), {'type': 'AST_XS', 'img_size': 64})
    shutil.copy(tiny_run.write(tmp_path), tmp_path / 'my.yml')
    release_tiny(monkeypatch, tmp_path)
    monkeypatch.setattr('ast_plugin.models.preflight._try_model', lambda *_: None)  # takes as long as the run
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    return tmp_path


def shortened(arguments):
    """Return arguments that shorten a training to two iterations, or to one epoch per stage."""
    short = SHORT_STAGES if 'AST_derain' in arguments else SHORT
    return [*arguments, *([] if '--force_yml' in arguments else ['--force_yml']), *short]


def run_command(line, root):
    """Run a command line, shortened where necessary, and return its exit status."""
    words = [word.replace('~', str(root)).replace('/data/', f'{root}/datasets/') for word in shlex.split(line)]
    match words:
        case ['basicsr', 'train', *_]:
            return main(shortened(words[1:]))
        case ['basicsr', 'test', *arguments]:
            return main(['test', *arguments, '--force_yml', 'datasets:val:center_crop=32'])
        case ['basicsr', 'compare', '-opt', file]:  # tests/cli/test_compare.py runs whole comparisons
            return 0 if make_plan(file, root, ['datasets:train:gt_size=32']).networks else 1
        case ['basicsr', 'web', *rest]:  # tests/cli/test_web.py serves the page
            parser = argparse.ArgumentParser()
            web.add_arguments(parser)
            args = parser.parse_args(rest)
            return 0 if web.find_networks(args.weights, args.device) else 1
        case ['basicsr', 'info', *rest]:  # tests/cli/test_info.py measures memory, in separate processes
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr('ast_plugin.cli.info.predict_memory', lambda *_: None)
                return main(['info', *rest[:-1], '64x64'])
        case ['basicsr', *arguments]:
            return main(arguments)
        case ['torchrun', '--nproc_per_node=4', '-m', 'ast_plugin', 'train', *arguments, '--launcher', 'pytorch']:
            return main(['check', *arguments])  # tests/test_distributed.py launches it
        case ['python', 'tools/benchmark.py', *arguments]:  # tests/benchmarks runs them
            return 0 if make_parser().parse_args(arguments).run else 1
    raise AssertionError(f'{line}: run_command does not handle this command')


@pytest.mark.parametrize('page', dict.fromkeys(commands().values()))
def test_commands(page, workspace):
    for line, first_page in commands().items():
        if first_page == page and not line.startswith(ELSEWHERE):
            assert run_command(line, workspace) == 0, line


def test_pages_are_read():
    assert len(PAGES) > 8
    assert {line.split()[1] for line in commands()} >= {'train', 'infer', 'test', 'check', 'data', 'mix'}
