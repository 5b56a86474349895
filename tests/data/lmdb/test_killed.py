"""`basicsr data lmdb` killed at twenty random moments, and what comes of it in the end."""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data.images import contents
from tests.data.lmdb_sources import write_folders

KILLS = 20
PAIRS = 640  # ten batches
SEED = 4

pytestmark = pytest.mark.skipif(not Path('/proc/self/fd').is_dir(), reason='asks Linux what a process has open')


def start(source: Path, destination: Path) -> subprocess.Popen:
    arguments = ['data', 'lmdb', str(source), str(destination), '--encoding', 'raw']
    return subprocess.Popen([sys.executable, '-m', 'ast_plugin', *arguments], stdout=subprocess.PIPE, text=True)


def num_lines(destination: Path) -> int:
    """How many pairs a run has written down, finished ones included."""
    journal = destination.with_name(f'.{destination.name}.part') / 'pairs.jsonl'
    try:
        return journal.read_bytes().count(b'\n')
    except FileNotFoundError:
        return 0


def wait_for_work(run: subprocess.Popen, destination: Path) -> float:
    """Wait until a run has taken its folder, which is when a kill begins to matter; return that time, or its end."""
    staging = str(destination.with_name(f'.{destination.name}.part'))
    while run.poll() is None:
        with contextlib.suppress(OSError):
            if any(os.readlink(entry.path).startswith(staging) for entry in os.scandir(f'/proc/{run.pid}/fd')):
                break
        time.sleep(0.001)
    return time.monotonic()


def kill_within(run: subprocess.Popen, seconds: float) -> bool:
    """Kill a run after so many seconds; False if it has finished before."""
    try:
        run.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        run.kill()
        run.wait()
        return True


def test_twenty_kills_change_no_byte(tmp_path):
    source = write_folders(tmp_path / 'source', PAIRS, (40, 40))
    undisturbed, destination = tmp_path / 'undisturbed', tmp_path / 'killed'
    run = start(source, undisturbed)
    begun = wait_for_work(run, undisturbed)
    assert run.wait() == 0
    duration = time.monotonic() - begun
    expected = contents(undisturbed)

    moments = random.Random(SEED)
    reached: list[int] = []
    while len(reached) < KILLS:
        run = start(source, destination)
        wait_for_work(run, destination)
        if kill_within(run, moments.uniform(0, 0.7 * duration)):
            reached.append(num_lines(destination))
        run.stdout.close()
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
