"""Processes that a comparison starts, one for each piece of work: a crash in one of them ends no other.

Run as a module it becomes another module's process: `python -m ast_plugin.compare.child PARENT MODULE ARGUMENT …`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_PACKAGE_PARENT = Path(__file__).resolve().parents[2]
_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.2
_TAIL_BYTES = 64 * 1024


class ChildFailed(Exception):
    """A process has failed, for a reason in a line, after so many seconds."""

    def __init__(self, reason: str, seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.seconds = seconds


def run_child(
    module: str,
    arguments: Sequence[str],
    log: Path,
    *,
    threads: int | None = None,
    keep_open: Sequence[int] = (),
    on_wait: Callable[[float], None] | None = None,
) -> float:
    """Run a module in a fresh process, its output in a file, and wait for it.

    When this process is asked to stop (SIGINT, SIGTERM), it asks the child to stop and waits for it before the
    exception goes on. On Linux the child is also asked to stop when this process is killed.

    Args:
        module: as for `python -m`.
        arguments: of its command line.
        log: file that its output is appended to.
        threads: that its libraries may use; all cores if None.
        keep_open: descriptors that it inherits.
        on_wait: called now and then with the seconds since its start.
    Returns:
        The seconds that it ran.
    Raises:
        ChildFailed: if it ended with another status than 0, or by a signal.
    """
    environment = {**os.environ, 'PYTHONUNBUFFERED': '1'}
    environment['PYTHONPATH'] = os.pathsep.join([str(_PACKAGE_PARENT), *filter(None, [os.environ.get('PYTHONPATH')])])
    environment |= {} if threads is None else {'OMP_NUM_THREADS': str(threads)}
    start = time.monotonic()
    with log.open('ab') as output:
        begin = output.tell()
        process = subprocess.Popen(
            [sys.executable, '-m', __name__, str(os.getpid()), module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
            pass_fds=keep_open if os.name == 'posix' else (),
        )
        try:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                if on_wait is not None:
                    on_wait(time.monotonic() - start)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            process.wait()
            raise
    seconds = time.monotonic() - start
    if process.returncode:
        raise ChildFailed(_reason(process.returncode, log, begin), seconds)
    return seconds


def run_job(
    job: Mapping[str, Any], log: Path, *, threads: int | None = None, keep_open: Sequence[int] = ()
) -> dict[str, Any]:
    """Measure one thing of one network in a fresh process.

    Args:
        job: `kind`, a key of `measure.KINDS`, and what its function takes. `network` is a network's type and arguments,
            `weights` and `param_key` are None for weights as they are drawn.
        log: file that the process's output is appended to; the job and its record lie beside it meanwhile.
        threads, keep_open: see `run_child`.
    Returns:
        The record of what was measured; ChildFailed says why there is none.
    """
    job_file, record_file = log.with_suffix('.job'), log.with_suffix('.record')
    record_file.unlink(missing_ok=True)
    job_file.write_text(json.dumps({**job, 'record': str(record_file)}), encoding='utf-8')
    try:
        run_child('ast_plugin.compare.measure', [str(job_file)], log, threads=threads, keep_open=keep_open)
        return json.loads(record_file.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise ChildFailed('it left no record') from error
    finally:
        job_file.unlink(missing_ok=True)
        record_file.unlink(missing_ok=True)


def _reason(status: int, log: Path, begin: int) -> str:
    """What a failed process said last of its failure, behind a place in the log."""
    with log.open('rb') as file:
        file.seek(max(begin, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        output = file.read().decode('utf-8', 'replace')
    lines = [line.strip() for line in reversed(output.splitlines()) if line.strip()]
    errors = [line for line in lines if line.startswith('basicsr: error:')]
    if errors:
        return errors[0].removeprefix('basicsr: error:').strip()
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f'signal {-status}'
        hint = ', perhaps because memory ran out' if name == 'SIGKILL' else ''
        return f'ended by {name}{hint}'
    # A traceback ends with its error; frames and their marks come before it.
    errors = [line for line in lines if not line.startswith(('File ', '^'))]
    return errors[0][:300] if errors else f'exit status {status}'


def _die_with(parent: int) -> None:
    """Get SIGTERM when the parent ends in whatever way; a run that is trained saves itself then. Linux only."""
    if not sys.platform.startswith('linux'):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before we asked
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == '__main__':
    _die_with(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
