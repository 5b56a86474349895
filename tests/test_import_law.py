"""Tests of the import law: errors <- ops <- archs <- models, compare <- cli, and which modules may use BasicSR."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / 'ast_plugin'

BASE = {'errors', 'files', 'names'}
MAY_KNOW = {  # package or top-level file -> packages and files that it may import, in addition to itself
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
    """Return the absolute names of all modules that a file imports, at any place."""
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


IMPORTS = {path.relative_to(PACKAGE).as_posix(): (room(path), imports(path)) for path in FILES}


def test_every_file_is_known_to_the_law():
    assert {own for own, _ in IMPORTS.values()} <= set(MAY_KNOW) | ANYTHING


def test_law():
    breaches = {}
    for file, (own, names) in IMPORTS.items():
        known = {name.split('.')[1] for name in names if name.startswith('ast_plugin.')} - {'__version__', own}
        refused = known & ({'cli'} if own in ANYTHING else known - MAY_KNOW[own])
        if refused:
            breaches[file] = sorted(refused)
    assert not breaches, 'must not import these rooms'


def test_who_imports_basicsr():
    known = {own for own, names in IMPORTS.values() if any(name.split('.')[0] == 'basicsr' for name in names)}
    assert known <= MAY_KNOW_BASICSR


def test_no_circles():
    """There are no import cycles, including imports inside functions and under TYPE_CHECKING."""
    modules = {}
    for path in FILES:
        parts = path.relative_to(PACKAGE.parent).with_suffix('').parts
        modules['.'.join(parts).removesuffix('.__init__')] = imports(path) - {'ast_plugin.__version__'}
    edges = {  # imported names are modules or members of modules
        name: {each if each in modules else each.rpartition('.')[0] for each in names} & modules.keys()
        for name, names in modules.items()
    }
    with_no_way_back = set()
    while edges:
        ends = {name for name, known in edges.items() if known <= with_no_way_back}
        assert ends, f'circles among {sorted(edges)}'
        with_no_way_back |= ends
        edges = {name: known for name, known in edges.items() if name not in ends}


def test_layout():
    assert not [path.name for path in FILES if path.name in ('utils.py', 'ast.py')]
    assert not [path for path in FILES if len(path.read_text(encoding='utf-8').splitlines()) > 600]


def test_ops_know_torch_and_einops():
    names = {name.split('.')[0] for own, names in IMPORTS.values() if own == 'ops' for name in names}
    assert names <= sys.stdlib_module_names | {'ast_plugin', 'einops', 'torch', 'triton'}


def loaded(*command: str) -> set[str]:
    """Run Python code and return the top-level modules that it loads."""
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
