"""The site builds without warnings, with a page for every section of option files and every public module."""

import importlib
import os
import shutil
import subprocess
import sys

import pytest

from ast_plugin.models.preflight import load_registered

from .pages import ROOT


@pytest.mark.skipif(sys.version_info < (3, 11), reason='MyST needs Python 3.11')
def test_site(tmp_path):
    shutil.copytree(ROOT / 'docs', tmp_path / 'docs', ignore=shutil.ignore_patterns('_build', 'api', 'options'))
    command = [sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', 'docs', 'site']
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    html = {path.relative_to(tmp_path / 'site').as_posix() for path in (tmp_path / 'site').rglob('*.html')}
    assert {'index.html', 'train.html', 'options/index.html', 'api/index.html'} <= html
    assert 'FRFN' in (tmp_path / 'site' / 'api' / 'ast_plugin.archs.blocks.html').read_text(encoding='utf-8')


def test_every_key_is_described(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'docs'))
    keys = list(importlib.import_module('generate').option_keys(load_registered()))
    assert [key for key in keys if not key.description or not key.type] == []
    by_place = {(key.section, key.key): key for key in keys}
    assert len(by_place) == len(keys)
    assert by_place['train', 'total_iter'].type == 'integer, ≥ 1'
    assert by_place['network_g (AST)', 'embed_dim'].default == 32
    assert by_place['datasets.* (PairedImageDataset)', 'name'].type == 'string, required'
