"""Tests of tools/bootstrap.py: when it installs, which pip commands it runs, and how failures are reported.

Nothing is installed.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bootstrap(tmp_path, monkeypatch):
    """The script as a module, applied to a temporary project."""
    spec = importlib.util.spec_from_file_location('bootstrap', ROOT / 'tools' / 'bootstrap.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / 'setup.py').write_text('setup()')
    (tmp_path / 'constraints.txt').write_text('# pins\ntorch==2.13.0\nbasicsr==1.4.2\n')
    (tmp_path / '.venv').mkdir()
    for name, path in {'ROOT': '.', 'VENV': '.venv', 'STAMP': '.venv/stamp', 'CONSTRAINTS': 'constraints.txt'}.items():
        monkeypatch.setattr(module, name, tmp_path / path)
    return module


@pytest.fixture
def installs(bootstrap, monkeypatch) -> list:
    """The torch builds that installations were started with."""
    calls = []
    monkeypatch.setattr(bootstrap, 'install', calls.append)
    return calls


def test_requirements_are_installed_once(bootstrap, installs):
    for _ in range(2):
        bootstrap.ensure_installed('auto')
    assert installs == ['auto']
    for name in ('setup.py', 'constraints.txt'):
        (bootstrap.ROOT / name).write_text('changed')
        bootstrap.ensure_installed('auto')
    assert installs == ['auto'] * 3
    bootstrap.ensure_installed('cuda')  # a build requested by name is always installed
    assert installs[3:] == ['cuda']


def test_interrupted_installation_is_taken_up(bootstrap, monkeypatch, installs):
    def interrupted(build):
        raise KeyboardInterrupt

    bootstrap.ensure_installed('auto')
    (bootstrap.ROOT / 'setup.py').write_text('changed')
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bootstrap, 'install', interrupted)
        bootstrap.ensure_installed('auto')
    bootstrap.ensure_installed('auto')
    assert installs == ['auto', 'auto']


@pytest.fixture
def machine(bootstrap, monkeypatch):
    """Install torch on a simulated machine (platform, GPU, installed version); return the last word of each command."""

    def install_torch(build, *, platform='linux', gpu=False, present=None, offered=()):
        commands = []

        def run(command, **options):
            commands.append(' '.join(map(str, command[4:])).replace(f' -c {bootstrap.CONSTRAINTS}', ''))
            found = any(offer in commands[-1] for offer in offered)
            return subprocess.CompletedProcess(command, 0 if found else 1, '', 'ERROR: No matching distribution')

        monkeypatch.setattr(bootstrap.sys, 'platform', platform)
        monkeypatch.setattr(bootstrap, 'has_nvidia_gpu', lambda: gpu)
        monkeypatch.setattr(bootstrap, 'installed', lambda package: present)
        monkeypatch.setattr(bootstrap.subprocess, 'run', run)
        bootstrap.install_torch(build)
        return [command.split()[-1] for command in commands]

    return install_torch


@pytest.mark.parametrize(
    ('options', 'commands'),
    [
        ({'offered': ['+cpu']}, ['torch==2.13.0+cpu']),
        ({'offered': ['torchvision', 'uv']}, ['torch==2.13.0+cpu', 'uv', 'torchvision']),
        ({'gpu': True, 'offered': ['torch']}, ['torch===2.13.0']),
        ({'platform': 'darwin', 'offered': ['torch']}, ['torch==2.13.0']),
        ({'present': '2.12.0', 'offered': ['+cpu']}, ['torch==2.13.0+cpu']),
        *(({'present': present}, []) for present in ('2.13.0', '2.13.0+cpu', '2.13.0+cu130')),
    ],
    ids=str,
)
def test_torch_for_a_machine(machine, options, commands):
    assert machine('auto', **options) == commands


def test_missing_cpu_torch_is_reported(bootstrap, machine):
    with pytest.raises(bootstrap.BootstrapError, match='--torch cuda'):
        machine('auto', offered=['--disable-pip-version-check uv'])


def test_failing_pip_is_named(bootstrap, monkeypatch):
    monkeypatch.setattr(bootstrap.subprocess, 'run', lambda command, **_: subprocess.CompletedProcess(command, 3))
    with pytest.raises(bootstrap.BootstrapError, match=r'status 3.*pip install wheel'):
        bootstrap.pip('wheel')


def test_all_run_and_the_first_failure_counts(bootstrap, monkeypatch):
    ran = []

    def run(command, **_):
        ran.append(command[2])
        return subprocess.CompletedProcess(command, {'ruff': 4}.get(command[2], 0))

    monkeypatch.setattr(bootstrap.subprocess, 'run', run)
    assert bootstrap.run(['ruff', 'check'], ['pytest']) == 4
    assert ran == ['ruff', 'pytest']


def test_exec_defines_local_names():
    """BasicSR's setup.py relies on this behaviour, which Python 3.13 removed."""
    code = 'def version():\n    exec("__version__ = 1")\n    return locals()["__version__"]\nassert version() == 1'
    environment = {**os.environ, 'PYTHONPATH': str(ROOT / 'tools' / 'exec_fills_locals')}
    subprocess.run([sys.executable, '-c', code], env=environment, check=True)
