"""Packing that is cut short: gone on from, begun anew or left alone, and never taken for finished."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from ast_plugin.data.lmdb import writer as lmdb_writer
from ast_plugin.errors import FileError
from tests.data.images import contents
from tests.data.lmdb_sources import pack, write_folders


@pytest.mark.parametrize('num_commits', range(6))
def test_an_interrupted_run_is_gone_on_from(root, tmp_path, small_batches, monkeypatch, num_commits):
    pack(root, tmp_path / 'whole')
    commit, calls = lmdb_writer._commit, []

    def interrupted(*arguments):
        if len(calls) == num_commits:
            raise KeyboardInterrupt
        calls.append(1)
        commit(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(lmdb_writer, '_commit', interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack(root, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    outcome = pack(root, tmp_path / 'out')
    assert outcome.num_resumed == num_commits // 2 * 3  # both LMDBs of a batch of three
    assert contents(tmp_path / 'whole') == contents(tmp_path / 'out')
    assert list(tmp_path.glob('.*')) == []


@pytest.mark.parametrize('change', ['encoding', 'level', 'file', 'journal', 'data', 'cut'])
def test_unfinished_work_is_begun_anew(root, tmp_path, small_batches, monkeypatch, change):
    with monkeypatch.context() as patch:
        patch.setattr(lmdb_writer, '_verify', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack(root, tmp_path / 'out')
    settings = {'encoding': 'raw'} if change == 'encoding' else {'level': 5} if change == 'level' else {}
    if change == 'file':
        cv2.imwrite(str(root / 'lq/003.png'), np.zeros((9, 11, 3), np.uint8))
        os.utime(root / 'lq/003.png', ns=(0, 0))
    if change == 'journal':
        (tmp_path / '.out.part/pairs.jsonl').write_text('["000", [9')
    if change == 'data':
        (tmp_path / '.out.part/pair/gt.lmdb/data.mdb').write_bytes(b'rubbish' * 5000)
    if change == 'cut':
        os.truncate(tmp_path / '.out.part/pair/gt.lmdb/data.mdb', 9000)
    assert pack(root, tmp_path / 'out', **settings).num_resumed == 0
    pack(root, tmp_path / 'expected', **settings)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'expected')


def test_unfinished_work_is_left_to_its_plan(root, tmp_path, monkeypatch):
    pack(root, tmp_path / 'out')
    with monkeypatch.context() as patch:
        patch.setattr(lmdb_writer, '_verify', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack(root, tmp_path / 'out', 'raw', overwrite=True)
    pack(root, tmp_path / 'out')
    assert pack(root, tmp_path / 'out', 'raw', overwrite=True).num_resumed == 7


def test_two_at_once_do_not_write_into_each_other(root, tmp_path):
    fcntl = pytest.importorskip('fcntl')
    (tmp_path / '.out.part').mkdir()
    handle = os.open(tmp_path / '.out.part', os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(FileError, match='another process is writing there'):
            pack(root, tmp_path / 'out')
    finally:
        os.close(handle)
    assert pack(root, tmp_path / 'out').num_pairs == 7


@pytest.mark.parametrize('moment', ['before', 'between', 'after'])
def test_a_kill_while_old_lmdbs_are_replaced(root, tmp_path, monkeypatch, moment):
    pack(root, tmp_path / 'out')
    rename = Path.rename

    def interrupted(self, target):
        names = {'before': 'out', 'between': 'pair'}
        if self.name == names.get(moment):
            raise KeyboardInterrupt
        rename(self, target)
        if self.name == 'pair':
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'rename', interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack(root, tmp_path / 'out', 'raw', overwrite=True)
    pack(root, tmp_path / 'out', 'raw', overwrite=moment == 'before')
    pack(root, tmp_path / 'expected', 'raw')
    assert contents(tmp_path / 'out') == contents(tmp_path / 'expected')
    assert list(tmp_path.glob('.*')) == []


def command(*arguments, limit: int | None = None) -> subprocess.CompletedProcess:
    """Run `basicsr data lmdb`, with files of at most so many bytes, as a full disk would have it."""

    def limited() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, '-m', 'ast_plugin', 'data', 'lmdb', *map(str, arguments)],
        capture_output=True,
        text=True,
        preexec_fn=limited if limit else None,
    )


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no limit of file sizes')
def test_a_full_disk_is_told_and_gone_on_from(tmp_path):
    root = write_folders(tmp_path / 'source', 90, (40, 40))
    stopped = command(root, tmp_path / 'out', '--encoding', 'raw', limit=600_000)
    assert stopped.returncode == 2 and 'Traceback' not in stopped.stderr
    assert f'{tmp_path}/out: cannot be written: ' in stopped.stderr and 'goes on from there' in stopped.stderr
    assert 'MB are free there' in stopped.stderr
    assert not (tmp_path / 'out').exists()
    assert pack(root, tmp_path / 'out', 'raw').num_resumed == 64
    pack(root, tmp_path / 'expected', 'raw')
    assert contents(tmp_path / 'out') == contents(tmp_path / 'expected')
