"""Tests of an installed third-party package that provides a network, a block and an option file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from . import tiny_run

ROOT = Path(__file__).parents[1]
FILES = {
    'stranger-1.2.dist-info/METADATA': 'Metadata-Version: 2.1\nName: stranger\nVersion: 1.2\n',
    'stranger-1.2.dist-info/top_level.txt': 'stranger\n',
    'stranger-1.2.dist-info/entry_points.txt': """
[basicsr.plugins]
stranger = stranger.registration

[basicsr.options]
stranger = stranger.recipes
""",
    'stranger/__init__.py': '',
    'stranger/recipes/__init__.py': 'raise RuntimeError("option files are found without importing anything")',
    'stranger/registration.py': '''
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from ast_plugin.archs.mixed.block_registry import BLOCKS


@ARCH_REGISTRY.register()
class StrangeNet(nn.Module):
    """Attention on tokens in windows as wide as the image; H and W are passed in one dictionary argument."""

    def __init__(self, width: int = 8, depth: int = 2):
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.steps = nn.ModuleList(Step(width) for _ in range(depth))
        self.tail = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x):
        y = self.head(x)
        for step in self.steps:
            y = step(y)
        return x + self.tail(y)


class Step(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return x + self.mixer(self.norm(tokens)).transpose(1, 2).reshape(x.shape)


@BLOCKS.register_module()
class CrossConv(nn.Module):
    """Convolution with a row and a column of weights, in NCHW."""

    works_in, replaces, sizes = 'nchw', ('tokens', 'maps'), {'width': 'dim'}

    def __init__(self, width: int, reach: int = 1):
        super().__init__()
        side = 2 * reach + 1
        self.row = nn.Conv2d(width, width, (1, side), padding=(0, reach), groups=width)
        self.column = nn.Conv2d(width, width, (side, 1), padding=(reach, 0), groups=width)

    def forward(self, x):
        return self.row(x) + self.column(x)
''',
}
MIX = [
    {'match': 'steps.0.mixer', 'with': {'type': 'CrossConv', 'reach': 2}},
    {'match': 'steps.1.mixer', 'with': {'type': 'ASSA', 'num_heads': 2}},
]


def recipe() -> str:
    opt = yaml.safe_load(tiny_run.OPTIONS)
    del opt['val'], opt['datasets']['val']
    base = {'type': 'StrangeNet', 'width': 8}
    opt |= {'name': 'strange_rain', 'network_g': {'type': 'Mixed', 'nominal_size': 32, 'base': base, 'mix': MIX}}
    return f'# StrangeNet with CrossConv in one step and ASSA in the other.\n{yaml.safe_dump(opt)}'


COMMANDS = [
    ['options'],
    ['list', 'arch'],
    ['mix', '-opt', 'stranger/strange_rain', '--size', '13', '21'],
    ['mix', '-opt', 'stranger/strange_rain', '--force_yml', 'network_g:base:widht=4', '--size', '9', '9'],
    ['mix', '-opt', 'stranger/strange_ran'],
]
RUN_ALL = """
import sys
from ast_plugin.cli.main import main
for command in {commands}:
    status = main(command)
    print('status', status, flush=True)
    print('----', flush=True)
    print('----', file=sys.stderr, flush=True)
"""


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
    """Return a process environment with the package installed, and a working folder with pairs."""
    target, work = (tmp_path_factory.mktemp(name) for name in ('target', 'work'))
    for name, text in {**FILES, 'stranger/recipes/strange_rain.yml': recipe()}.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip('\n'), encoding='utf-8')
    tiny_run.write(work)
    variables = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(target), str(ROOT)]), 'OMP_NUM_THREADS': '1'}
    return {'cwd': work, 'env': variables}


def run(environment, *arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **environment)


def test_its_names_and_its_network_are_known(environment):
    result = run(environment, '-c', RUN_ALL.format(commands=COMMANDS))
    assert result.returncode == 0, result.stderr
    options, archs, mixed, *_ = result.stdout.split('----\n')
    *_, unknown_key, unknown_file, _ = result.stderr.split('----\n')
    assert 'stranger/strange_rain' in options and 'StrangeNet with CrossConv' in options
    assert ['StrangeNet', 'stranger.registration', 'stranger', '1.2'] in map(str.split, archs.splitlines())
    assert 'CrossConv' in mixed and 'ASSA' in mixed
    assert '13x21 -> 13x21' in mixed and 'all finite' in mixed
    assert [line for line in result.stdout.splitlines() if line.startswith('status')] == [
        *['status 0'] * 3,
        *['status 2'] * 2,
    ]
    assert 'network_g.base.widht: unknown key, did you mean width?' in unknown_key
    assert 'did you mean stranger/strange_rain?' in unknown_file


def test_its_recipe_trains(environment):
    trained = run(environment, '-m', 'ast_plugin', 'train', '-opt', 'stranger/strange_rain')
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert (environment['cwd'] / 'experiments/strange_rain/models/net_g_4.pth').is_file()
