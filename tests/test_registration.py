"""Tests that BasicSR is repaired and extended exactly once, regardless of the import order.

Most orders are tested with a small stub of BasicSR and a plugin of one module, in separate processes.
"""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ast_plugin  # noqa: F401 (before BasicSR)
from ast_plugin import registration

ROOT = Path(__file__).parents[1]
FILES = {
    'basicsr/__init__.py': 'import log\nlog.append("basicsr")\nfrom .archs import build_network',
    'basicsr/archs/__init__.py': 'def build_network():\n    return "net"',
    'basicsr/utils/__init__.py': '',
    'basicsr/utils/registry.py': """
class Registry:
    def __init__(self, name):
        self._name, self._obj_map = name, {}

ARCH_REGISTRY = Registry('arch')
""",
    'log.py': 'lines = []\nappend = lines.append',
    'shy_arch.py': 'class Shy:\n    pass',
    'bold_arch.py': 'from basicsr.utils.registry import ARCH_REGISTRY\nclass Bold:\n    pass',
}
SETTING = """
import ast_plugin, importlib, importlib.util, log, sys, threading
from ast_plugin import registration, toolbox
def setup():
    toolbox.repair_before_import, toolbox.repair_after_import = lambda: log.append('before'), lambda: None
    registration.REGISTERED = {f'{name.lower()}_arch': ('ARCH_REGISTRY', (name,)) for name in ('Bold', 'Shy')}
def check():
    from basicsr.utils.registry import ARCH_REGISTRY
    import bold_arch, shy_arch
    assert ARCH_REGISTRY._obj_map == {'Bold': bold_arch.Bold, 'Shy': shy_arch.Shy}, ARCH_REGISTRY._obj_map
    assert log.lines == ['before', 'basicsr'], log.lines
setup()
"""


def run(code: str, path: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(path), str(ROOT)]), 'OMP_NUM_THREADS': '1'}
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment)


@pytest.fixture
def stubs(tmp_path) -> Path:
    """Return a folder with stubs of `basicsr` and of the plugin."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


ORDERS = {
    'basicsr': 'import basicsr',
    'function': 'from basicsr.archs import build_network; assert build_network() == "net"',
    'registry': 'import basicsr.utils.registry',
    'importer': 'import bold_arch',  # imports BasicSR itself, so it is incomplete during registration
    'module first': 'import shy_arch; import basicsr',
    'both': 'import shy_arch; assert "basicsr" not in sys.modules; import bold_arch',
    'reloaded plugin': """
import basicsr, importlib
importlib.reload(ast_plugin)
ast_plugin.registration.install()
log.lines[:] = log.lines[:2]
""",
    'installed twice': """
importlib.reload(registration).install()
assert sum(finder.__class__.__module__ == 'ast_plugin.registration' for finder in sys.meta_path) == 1
setup()
import basicsr
""",
    'reloaded modules': """
import basicsr, bold_arch
former = bold_arch.Bold
importlib.reload(bold_arch)
assert bold_arch.Bold is not former
check()
importlib.reload(basicsr)
assert log.lines == ['before', 'basicsr'] * 2
log.lines[:] = log.lines[:2]
""",
    'threads': """
failed = []
def use():
    from basicsr.archs import build_network
    try:
        check()
    except BaseException as error:
        failed.append(error)
threads = [threading.Thread(target=use) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failed, failed
""",
    'loader that is a class, as of frozen modules': """
from importlib.machinery import PathFinder
found = PathFinder.find_spec('basicsr')
loader = found.loader
class Loader:
    create_module = staticmethod(lambda spec: None)
    exec_module = staticmethod(lambda module: loader.exec_module(module))
class Finder:
    find_spec = staticmethod(lambda name, path=None, target=None: found if name == 'basicsr' else None)
found.loader = Loader
sys.meta_path.insert(1, Finder)
import basicsr
assert basicsr.__spec__.loader is Loader and 'exec_module' in vars(Loader)
""",
    'looking does not import': """
spec = importlib.util.find_spec('basicsr')
assert spec.origin.endswith('__init__.py') and 'append' in spec.loader.get_source('basicsr')
assert not log.lines and 'basicsr' not in sys.modules
from importlib.metadata import version; version('pip')
import basicsr, inspect
assert type(basicsr.__loader__) is type(basicsr.__spec__.loader) is type(log.__loader__)
assert 'append' in inspect.getsource(basicsr)
""",
}


@pytest.mark.parametrize('order', ORDERS)
def test_orders(stubs, order):
    result = run(f'{SETTING}{ORDERS[order]}\ncheck()', stubs)
    assert result.returncode == 0, result.stderr


def test_without_basicsr(stubs):
    shutil.rmtree(stubs / 'basicsr')
    code = "sys.path[:] = [path for path in sys.path if 'site-packages' not in path]; import basicsr.archs"
    assert run(SETTING + code, stubs).stderr.splitlines()[-1].startswith('ModuleNotFoundError: No module named')


def test_failed_registration_at_import(stubs):
    result = run(f"{SETTING}registration.REGISTERED['other_arch'] = ('ARCH_REGISTRY', ())\nimport basicsr", stubs)
    assert "No module named 'other_arch'" in result.stderr


def test_real_basicsr_imported_first():
    result = run("""
from ast_plugin import toolbox, registration
toolbox.repair_before_import()
hook = __import__('sys').meta_path.pop(0)
import basicsr
from basicsr.utils.registry import ARCH_REGISTRY, MODEL_REGISTRY
assert 'AST' not in ARCH_REGISTRY and 'SRModel' in MODEL_REGISTRY
import importlib, ast_plugin
importlib.reload(ast_plugin)
assert 'AST' in ARCH_REGISTRY and 'RestorationModel' in MODEL_REGISTRY
from basicsr import train
assert train.load_resume_state.__code__.co_filename.endswith('repairs.py')
""")
    assert result.returncode == 0, result.stderr


PROMISED = {
    'ARCH_REGISTRY': ['AST', 'AST_B', 'AST_T', 'AST_XS', 'Mixed', 'Spandrel'],
    'MODEL_REGISTRY': ['RestorationModel'],
    'DATASET_REGISTRY': ['PairsDataset', 'SyntheticPairsDataset'],
    'LOSS_REGISTRY': ['ASTCharbonnierLoss', 'EdgeLoss', 'FFTLoss', 'PSNRLoss', 'TVLoss'],
    'METRIC_REGISTRY': [
        *('calculate_psnr_matlab', 'calculate_psnr_skimage', 'calculate_psnr_y_float'),
        *('calculate_ssim_matlab', 'calculate_ssim_skimage', 'pyiqa'),
    ],
}


def registries():
    return importlib.import_module('basicsr.utils.registry')


def test_promised_names_are_registered():
    before = {name: dict(iter(getattr(registries(), name))) for name in PROMISED}
    for registry, promised in PROMISED.items():
        ours = {name for name, item in before[registry].items() if item.__module__.startswith('ast_plugin.')}
        assert sorted(ours) == promised
    registration.register_all()
    assert before == {name: dict(iter(getattr(registries(), name))) for name in PROMISED}


def named(module: str, name: str = 'Net', qualname: str | None = None) -> type:
    return type(name, (), {'__module__': module, '__qualname__': qualname or name})


def test_collision_names_both_modules():
    registry = registries().Registry('arch')
    theirs, ours = named('their_plugin.nets'), named('ast_plugin.archs.ast_arch')
    registration.add(registry, 'Net', theirs)
    for other in (ours, named('their_plugin.nets', qualname='Outer.Net')):
        with pytest.raises(registration.RegistrationError) as caught:
            registration.add(registry, 'Net', other)
        assert f'{other.__module__} registers Net in the arch registry, where their_plugin.nets' in str(caught.value)
    assert dict(iter(registry)) == {'Net': theirs}


def test_same_object_and_its_reloaded_self():
    registry = registries().Registry('arch')
    first, second = named('nets'), named('nets')
    registration.add(registry, 'Net', first)
    registration.add(registry, 'Net', first)
    assert registry.get('Net') is first
    registration.add(registry, 'Net', second)
    assert registry.get('Net') is second
    assert set(vars(second)) == set(vars(named('nets')))  # only the entry was set
