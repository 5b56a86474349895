"""`basicsr data lmdb` killed at twenty random moments, and what comes of it in the end."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data.lmdb_sources import contents, write_folders

KILLS = 20
PAIRS = 640  # ten batches
SEED = 4

pytestmark = pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='this system has no SIGKILL')


def start(source: Path, destination: Path) -> subprocess.Popen:
    arguments = ['data', 'lmdb', str(source), str(destination), '--encoding', 'raw']
    return subprocess.Popen([sys.executable, '-m', 'ast_plugin', *arguments], stdout=subprocess.PIPE, text=True)


def num_lines(destination: Path) -> int:
    """How many pairs a run has written down, finished ones included."""
    journal = destination.with_name(f'.{destination.name}.part') / 'journal.jsonl'
    try:
        return journal.read_bytes().count(b'\n')
    except FileNotFoundError:
        return 0


def kill_at_random(run: subprocess.Popen, destination: Path, moments: random.Random) -> int:
    """Let a run write some batches more, wait some milliseconds, and kill it; how far it had come, or -1: finished.

    Python's start, half of a run's time, is left out: a process that has done nothing leaves nothing.
    """
    target = min(num_lines(destination) + moments.randrange(0, PAIRS // 3), PAIRS)
    while num_lines(destination) < target and run.poll() is None:
        time.sleep(0.001)
    try:
        run.wait(moments.uniform(0, 0.05))
        return -1
    except subprocess.TimeoutExpired:
        run.kill()
        run.wait()
        return num_lines(destination)


def test_twenty_kills_change_no_byte(tmp_path):
    source = write_folders(tmp_path / 'source', PAIRS, (40, 40))
    undisturbed = tmp_path / 'undisturbed'
    assert start(source, undisturbed).wait() == 0
    expected = contents(undisturbed)

    moments = random.Random(SEED)
    destination = tmp_path / 'killed'
    reached: list[int] = []
    while len(reached) < KILLS:
        run = start(source, destination)
        lines = kill_at_random(run, destination, moments)
        run.stdout.close()
        if lines >= 0:
            reached.append(lines)
        if destination.exists():
            # Finished, or killed after it: compared, and all begins again.
            assert contents(destination) == expected
            shutil.rmtree(destination)
            shutil.rmtree(destination.with_name('.killed.part'), ignore_errors=True)
    last = start(source, destination)
    output, _ = last.communicate()
    assert last.returncode == 0 and 'verified' in output
    assert contents(destination) == expected
    assert not destination.with_name('.killed.part').exists()
    assert len({lines for lines in reached if 0 < lines < PAIRS}) >= 3, f'too few kills in between: {reached}'
