"""Tests of the wheel's content and of its declared dependencies."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Build the wheel from a copy of the sources that contains a leftover file of an earlier build."""
    source = tmp_path_factory.mktemp('source')
    for name in ('ast_plugin', 'benchmarks', 'options'):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    stale = source / 'build' / 'lib' / 'ast_plugin' / 'option_files' / 'renamed_since.yml'
    stale.parent.mkdir(parents=True)
    stale.touch()
    pip = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--disable-pip-version-check', '--no-index']
    subprocess.run([*pip, '--no-deps', '--no-build-isolation', '--wheel-dir', source / 'dist', source], check=True)
    (path,) = (source / 'dist').glob('*.whl')
    with zipfile.ZipFile(path) as archive:
        yield archive


def read(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (path for path in wheel.namelist() if path.endswith(f'.dist-info/{name}'))
    return wheel.read(path).decode()


def test_wheel_content(wheel):
    folder = 'ast_plugin/option_files/'
    packed = {name.removeprefix(folder): wheel.read(name) for name in wheel.namelist() if name.startswith(folder)}
    sources = [path for path in (ROOT / 'options').rglob('*') if path.is_file()]
    assert packed == {path.relative_to(ROOT / 'options').as_posix(): path.read_bytes() for path in sources}
    assert 'AST_quickstart.yml' in packed
    files = [path for path in (ROOT / 'ast_plugin').rglob('*') if path.is_file() and path.suffix != '.pyc']
    names = {path.relative_to(ROOT).as_posix() for path in files}
    assert 'ast_plugin/compare/report_template.html' in names and names <= set(wheel.namelist())
    tops = {name.split('/')[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith('.dist-info')} == {'ast_plugin'}


def test_wheel_metadata(wheel):
    from ast_plugin import __version__

    text = read(wheel, 'entry_points.txt')
    assert '[basicsr.plugins]\nast_plugin = ast_plugin\n' in text
    assert '[console_scripts]\nbasicsr = ast_plugin.__main__:main\n' in text
    assert f'\nVersion: {__version__}\n' in read(wheel, 'METADATA')


def normal(name: str) -> str:
    """Return the normalized name of a distribution."""
    return re.sub(r'[-_.]+', '-', name).lower()


def requirements(wheel: zipfile.ZipFile) -> dict[str, set[str]]:
    """Return the names of required distributions by extra; '' for those always required."""
    found: dict[str, set[str]] = {}
    for line in read(wheel, 'METADATA').splitlines():
        match = re.match(r'Requires-Dist: ([\w.-]+)[^;]*(?:; extra == ["\'](\w+)["\'])?', line)
        if match:
            found.setdefault(match[2] or '', set()).add(normal(match[1]))
    return found


def test_imports_are_declared(wheel):
    owners = packages_distributions()
    imported = set()
    for path in (ROOT / 'ast_plugin').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition('.')[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition('.')[0])
    declared = set().union(*requirements(wheel).values())
    for name in imported - sys.stdlib_module_names - {'ast_plugin', 'triton'}:
        # An extra that is not installed has no known distribution; its import name is used.
        assert {normal(owner) for owner in owners.get(name, (name,))} & declared, f'{name} is imported and not declared'


def test_constraints_pin_all_that_is_required(wheel):
    lines = [line for line in (ROOT / 'constraints.txt').read_text().splitlines() if not line.startswith('#')]
    assert all(re.fullmatch(r'[\w.-]+==[\w.]+( ; .+)?', line) for line in lines)
    pinned = {normal(line.partition('==')[0]) for line in lines}
    required = requirements(wheel)
    assert required.pop('web') == {'gradio'}  # 6.31 requires Pillow < 13, which conflicts with the pinned version
    assert set().union(*required.values()) <= pinned
