"""The import law: errors <- ops <- archs <- models, compare <- cli, and who may know BasicSR."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'ast_plugin'

BASE = {'errors', 'files', 'names'}
MAY_KNOW = {  # room, or file at the top -> rooms and files it may import, itself always
    'errors': set(),
    'files': {'errors'},
    'names': {'errors', 'files'},
    'devices': {'errors'},
    'faults': BASE,
    'options': BASE | {'faults', 'plugins', 'devices'},
    'plugins': BASE,
    'ops': BASE,
    'checkpoints': BASE,
    'archs': BASE | {'faults', 'ops', 'checkpoints', 'plugins'},
    'weights': BASE | {'archs', 'checkpoints', 'devices'},
    'spandrel': BASE | {'archs', 'checkpoints'},
    'degradations': BASE | {'ops'},
    'data': BASE | {'ops', 'degradations', 'faults'},
    'losses': BASE | {'ops'},
    'metrics': BASE | {'ops', 'devices'},
    'evaluation': BASE | {'devices', 'ops', 'archs', 'metrics', 'data', 'checkpoints', 'weights'},
    'models': BASE
    | {
        'faults',
        'options',
        'plugins',
        'ops',
        'archs',
        'losses',
        'metrics',
        'data',
        'checkpoints',
        'evaluation',
        'devices',
    },
    'toolbox': BASE | {'data', 'models', 'checkpoints'},
    'registration': BASE | {'toolbox'},
    '__init__': {'registration', 'weights'},
    '__main__': {'cli'},
}
ANYTHING = {'compare', 'cli'}
MAY_KNOW_BASICSR = {
    'toolbox',
    'registration',
    'archs',
    'models',
    'evaluation',
    'data',
    'losses',
    'metrics',
    'compare',
    'cli',
}
FILES = sorted(PACKAGE.rglob('*.py'))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, by absolute dotted name."""
    found = set()
    package = ['ast_plugin', *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = '.'.join([*base, *([node.module] if node.module else [])])
            found.update(f'{module}.{alias.name}' for alias in node.names)
    return found


def test_every_file_is_known_to_the_law():
    assert {room(path) for path in FILES} <= set(MAY_KNOW) | ANYTHING


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_law(path):
    own = room(path)
    known = {name.split('.')[1] for name in imports(path) if name.startswith('ast_plugin.')}
    known -= {'__version__', own}
    if own not in ANYTHING:
        assert known <= MAY_KNOW[own], f'{own} must not import {sorted(known - MAY_KNOW[own])}'
    assert 'cli' not in known or own == '__main__'


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_who_imports_basicsr(path):
    assert room(path) in MAY_KNOW_BASICSR or not any(name.split('.')[0] == 'basicsr' for name in imports(path))


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_layout(path):
    assert path.name not in ('utils.py', 'ast.py')
    assert len(path.read_text(encoding='utf-8').splitlines()) <= 600


@pytest.mark.parametrize('path', sorted((PACKAGE / 'ops').rglob('*.py')), ids=lambda path: path.name)
def test_ops_know_torch_and_einops(path):
    outside = {name.split('.')[0] for name in imports(path)} - {'ast_plugin', 'einops', 'torch', 'triton'}
    assert outside <= sys.stdlib_module_names


def loaded(*command: str) -> set[str]:
    """The top-level modules that a command of Python's loads, and a run of it that succeeds."""
    result = subprocess.run(
        [sys.executable, '-X', 'importtime', *command], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    lines = (line.rpartition('|')[2].strip() for line in result.stderr.splitlines() if line.startswith('import time:'))
    return {name.partition('.')[0] for name in lines}


def test_ops_load_torch_alone():
    modules = loaded('-c', 'import ast_plugin.ops')
    assert 'torch' in modules
    assert not modules & {'basicsr', 'torchvision', 'cv2', 'mmengine', 'PIL'}


def test_ast_is_built_without_basicsr():
    modules = loaded('-c', 'from ast_plugin.archs.networks import build_network; build_network({"type": "AST_XS"})')
    assert not modules & {'basicsr', 'torchvision', 'cv2', 'mmengine', 'PIL', 'spandrel', 'huggingface_hub'}


def test_package_loads_nothing_heavy():
    assert not loaded('-c', 'import ast_plugin') & {'torch', 'numpy', 'basicsr', 'torchvision', 'cv2', 'pydantic'}


def test_help_loads_nothing_heavy():
    assert not loaded('-m', 'ast_plugin', '--help') & {'torch', 'numpy', 'basicsr', 'torchvision', 'cv2', 'pydantic'}
