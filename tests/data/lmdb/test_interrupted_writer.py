"""Interrupted packing is resumed, restarted or left alone, and never treated as finished."""

import contextlib
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from ast_plugin.data.lmdb import writer as lmdb_writer
from ast_plugin.errors import FileError
from ast_plugin.files import lock_folder
from tests.data.images import contents
from tests.data.lmdb_sources import pack, write_folders
from tests.data.work import run_command

KILLS = 20
PAIRS = 640  # ten batches
SEED = 4


@pytest.fixture
def interrupted(monkeypatch):
    """Pack with a function or method replaced by one that raises KeyboardInterrupt after a number of calls."""

    def pack_until(target, name, replacement, *arguments, **options) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(target, name, replacement)
            with pytest.raises(KeyboardInterrupt):
                pack(*arguments, **options)

    return pack_until


def interrupt(*_) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize('num_commits', range(6))
def test_an_interrupted_run_is_gone_on_from(root, tmp_path, small_batches, interrupted, num_commits):
    pack(root, tmp_path / 'whole')
    commit, calls = lmdb_writer._commit, []

    def commit_some(*arguments):
        if len(calls) == num_commits:
            raise KeyboardInterrupt
        calls.append(1)
        commit(*arguments)

    interrupted(lmdb_writer, '_commit', commit_some, root, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    outcome = pack(root, tmp_path / 'out')
    assert outcome.num_resumed == num_commits // 2 * 3  # both LMDBs of a batch of three
    assert contents(tmp_path / 'whole') == contents(tmp_path / 'out')
    assert list(tmp_path.glob('.*')) == []


@pytest.mark.parametrize('change', ['encoding', 'level', 'file', 'journal', 'data', 'cut'])
def test_unfinished_work_is_begun_anew(root, tmp_path, small_batches, interrupted, change):
    interrupted(lmdb_writer, '_verify', interrupt, root, tmp_path / 'out')
    staging = tmp_path / '.out.part'
    settings = {'encoding': {'encoding': 'raw'}, 'level': {'level': 5}}.get(change, {})
    if change == 'file':
        cv2.imwrite(str(root / 'lq/003.png'), np.zeros((9, 11, 3), np.uint8))
        os.utime(root / 'lq/003.png', ns=(0, 0))
    elif change == 'journal':
        (staging / 'pairs.jsonl').write_text('["000", [9')
    elif change == 'data':
        (staging / 'pair/gt.lmdb/data.mdb').write_bytes(b'rubbish' * 5000)
    elif change == 'cut':
        os.truncate(staging / 'pair/gt.lmdb/data.mdb', 9000)
    assert pack(root, tmp_path / 'out', **settings).num_resumed == 0
    pack(root, tmp_path / 'expected', **settings)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'expected')


def test_unfinished_work_is_left_to_its_plan(root, tmp_path, interrupted):
    pack(root, tmp_path / 'out')
    interrupted(lmdb_writer, '_verify', interrupt, root, tmp_path / 'out', 'raw', overwrite=True)
    pack(root, tmp_path / 'out')
    assert pack(root, tmp_path / 'out', 'raw', overwrite=True).num_resumed == 7


def test_two_at_once_do_not_write_into_each_other(root, tmp_path):
    (tmp_path / '.out.part').mkdir()
    with (
        lock_folder(tmp_path / '.out.part', 'taken'),
        pytest.raises(FileError, match='another process is writing there'),
    ):
        pack(root, tmp_path / 'out')
    assert pack(root, tmp_path / 'out').num_pairs == 7


@pytest.mark.parametrize('moment', ['before', 'between', 'after'])
def test_a_kill_while_old_lmdbs_are_replaced(root, tmp_path, interrupted, moment):
    pack(root, tmp_path / 'out')
    rename = Path.rename

    def rename_some(self, target):
        if self.name == {'before': 'out', 'between': 'pair'}.get(moment):
            raise KeyboardInterrupt
        rename(self, target)
        if self.name == 'pair':
            raise KeyboardInterrupt

    interrupted(Path, 'rename', rename_some, root, tmp_path / 'out', 'raw', overwrite=True)
    pack(root, tmp_path / 'out', 'raw', overwrite=moment == 'before')
    pack(root, tmp_path / 'expected', 'raw')
    assert contents(tmp_path / 'out') == contents(tmp_path / 'expected')
    assert list(tmp_path.glob('.*')) == []


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no limit of file sizes')
def test_full_disk_is_reported_and_resumed(tmp_path):
    root = write_folders(tmp_path / 'source', 90, (40, 40))

    def limit() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))

    command = [sys.executable, '-m', 'ast_plugin', 'data', 'lmdb', root, tmp_path / 'out', '--encoding', 'raw']
    stopped = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert stopped.returncode == 2 and 'Traceback' not in stopped.stderr
    assert f'{tmp_path}/out: cannot be written: ' in stopped.stderr and 'it resumes from' in stopped.stderr
    assert 'MB are free there' in stopped.stderr
    assert not (tmp_path / 'out').exists()
    assert pack(root, tmp_path / 'out', 'raw').num_resumed == 64
    pack(root, tmp_path / 'expected', 'raw')
    assert contents(tmp_path / 'out') == contents(tmp_path / 'expected')


@pytest.mark.skipif(not Path('/proc/self/fd').is_dir(), reason='asks Linux what a process has open')
def test_twenty_kills_change_no_byte(tmp_path):
    source, destination, staging = tmp_path / 'source', tmp_path / 'killed', tmp_path / '.killed.part'
    write_folders(source, PAIRS, (40, 40))
    processes = multiprocessing.get_context('forkserver')  # imports the modules of all runs once
    processes.set_forkserver_preload(['ast_plugin.cli.main', 'ast_plugin.cli.data'])

    def start() -> multiprocessing.Process:
        """Start packing, and wait until it has locked its folder, from when on a kill matters."""
        arguments = ['data', 'lmdb', str(source), str(destination), '--encoding', 'raw']
        run = processes.Process(target=run_command, args=(arguments,))
        run.start()
        while run.is_alive():
            with contextlib.suppress(OSError):
                opened = [os.readlink(entry.path) for entry in os.scandir(f'/proc/{run.pid}/fd')]
                if any(path.startswith(str(staging)) for path in opened):
                    break
            time.sleep(0.001)
        return run

    def num_done() -> int:
        journal = staging / 'pairs.jsonl'
        return journal.read_bytes().count(b'\n') if journal.is_file() else 0

    start().join()
    expected = contents(destination)
    shutil.rmtree(destination)
    moments, reached = random.Random(SEED), []
    while len(reached) < KILLS:
        # Kill by progress, independent of machine load, and during verification.
        goal = min(num_done() + moments.randint(0, 256), PAIRS)
        run = start()
        while run.is_alive() and num_done() < goal:
            time.sleep(0.001)
        run.join(moments.uniform(0, 1.5 if goal == PAIRS else 0.01))
        if run.is_alive():
            run.kill()
            run.join()
            reached.append(num_done())
        if destination.exists():
            # Finished, or killed afterwards: compare, and start again.
            assert contents(destination) == expected
            shutil.rmtree(destination)
            shutil.rmtree(staging, ignore_errors=True)
    last = start()
    last.join()
    assert last.exitcode == 0 and contents(destination) == expected
    assert not staging.exists()
    assert len({lines for lines in reached if 0 < lines < PAIRS}) >= 3, f'too few kills in between: {reached}'
