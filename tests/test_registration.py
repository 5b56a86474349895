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
toolbox.repair_before_import, toolbox.repair_after_import = lambda: log.append('before'), lambda: None
registration.REGISTERED = {f'{name.lower()}_arch': ('ARCH_REGISTRY', (name,)) for name in ('Bold', 'Shy')}
def check(times=1):
    from basicsr.utils.registry import ARCH_REGISTRY
    import bold_arch, shy_arch
    assert ARCH_REGISTRY._obj_map == {'Bold': bold_arch.Bold, 'Shy': shy_arch.Shy}, ARCH_REGISTRY._obj_map
    assert log.lines == ['before', 'basicsr'] * times, log.lines
"""


@pytest.fixture
def run(tmp_path):
    """Run code in a new process with stubs of `basicsr` and of the plugin."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run(code: str, setting: str = SETTING) -> subprocess.CompletedProcess:
        environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(tmp_path), str(ROOT)])}
        return subprocess.run([sys.executable, '-c', setting + code], capture_output=True, text=True, env=environment)

    return run


@pytest.mark.parametrize(
    'order',
    [
        'import basicsr',
        'from basicsr.archs import build_network; assert build_network() == "net"',
        'import basicsr.utils.registry',
        'import bold_arch',  # imports BasicSR itself, so it is incomplete during registration
        'import shy_arch; import basicsr',
        'import shy_arch; assert "basicsr" not in sys.modules; import bold_arch',
        'import basicsr, importlib; importlib.reload(ast_plugin); ast_plugin.registration.install()\n'
        'log.lines[:] = log.lines[:2]',
    ],
)
def test_orders(run, order):
    result = run(f'{order}\ncheck()')
    assert result.returncode == 0, result.stderr


def test_reloaded_modules_are_registered(run):
    result = run(
        'import basicsr, bold_arch\nformer = bold_arch.Bold\nimportlib.reload(bold_arch)\n'
        'assert bold_arch.Bold is not former\ncheck()\nimportlib.reload(basicsr)\ncheck(times=2)'
    )
    assert result.returncode == 0, result.stderr


def test_threads_see_everything_registered(run):
    result = run("""
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
""")
    assert result.returncode == 0, result.stderr


def test_loader_that_is_a_class(run):
    """The loader of frozen modules is a class, too."""
    result = run("""
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
check()
""")
    assert result.returncode == 0, result.stderr


def test_looking_does_not_import(run):
    result = run("""
spec = importlib.util.find_spec('basicsr')
assert spec.origin.endswith('__init__.py') and 'append' in spec.loader.get_source('basicsr')
assert not log.lines and 'basicsr' not in sys.modules
from importlib.metadata import version; version('pip')
import basicsr, inspect
assert type(basicsr.__loader__) is type(basicsr.__spec__.loader) is type(log.__loader__)
assert 'append' in inspect.getsource(basicsr)
check()
""")
    assert result.returncode == 0, result.stderr


def test_installing_twice_watches_once(run):
    again = 'import ast_plugin, importlib\nimportlib.reload(ast_plugin.registration).install()\n'
    result = run(
        """
assert sum(finder.__class__.__module__ == 'ast_plugin.registration' for finder in sys.meta_path) == 1
import basicsr; check()
""",
        again + SETTING,
    )
    assert result.returncode == 0, result.stderr


def test_without_basicsr(run, tmp_path):
    shutil.rmtree(tmp_path / 'basicsr')
    result = run("""
sys.path[:] = [path for path in sys.path if 'site-packages' not in path]
import basicsr.archs
""")
    assert result.stderr.splitlines()[-1].startswith('ModuleNotFoundError: No module named')


def test_failed_registration_at_import(run):
    result = run("registration.REGISTERED['other_arch'] = ('ARCH_REGISTRY', ())\nimport basicsr")
    assert "No module named 'other_arch'" in result.stderr


def test_real_basicsr_imported_first():
    code = """
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
"""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment)
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
    for registry, promised in PROMISED.items():
        entries = dict(iter(getattr(registries(), registry)))
        assert sorted(name for name, item in entries.items() if item.__module__.startswith('ast_plugin.')) == promised


def test_registering_again_changes_nothing():
    before = {name: dict(iter(getattr(registries(), name))) for name in PROMISED}
    registration.register_all()
    assert before == {name: dict(iter(getattr(registries(), name))) for name in PROMISED}


def test_basicsr_builds_what_is_registered():
    from basicsr.archs import build_network
    from basicsr.losses import build_loss

    assert type(build_network({'type': 'AST_XS', 'img_size': 128})).__name__ == 'AST'
    assert type(build_loss({'type': 'ASTCharbonnierLoss'})).__name__ == 'ASTCharbonnierLoss'


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
