"""Child processes of a comparison, one per job, so that a crash affects a single job only.

`python -m ast_plugin.compare.child PARENT MODULE ARGUMENT …` runs another module in this process.
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
    """Failure of a child process, with a one-line reason and its run time in seconds."""

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
    """Run a module in a new process and wait for it.

    If this process is interrupted (SIGINT, SIGTERM), the child receives SIGTERM and is waited for before the exception
    propagates. On Linux the child also receives SIGTERM if this process is killed.

    Args:
        module: module name, as for `python -m`.
        arguments: command-line arguments.
        log: file to which stdout and stderr are appended.
        threads: value of OMP_NUM_THREADS; unchanged if None.
        keep_open: file descriptors to inherit.
        on_wait: called every 0.2 s with the seconds since the start.
    Returns:
        Run time in seconds.
    Raises:
        ChildFailed: if the exit status is not 0.
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
            start_new_session=True,  # Ctrl-C reaches only this process, which forwards it once
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
    """Run one measurement in a new process.

    Args:
        job: `kind`, a key of `measure.KINDS`, and the options of its function. `network` has the type and arguments of
            the network; `weights` and `param_key` are None for random weights.
        log: file to which the output is appended; temporary files are written next to it.
        threads, keep_open: see `run_child`.
    Returns:
        The record of the measurement.
    Raises:
        ChildFailed: if the measurement failed.
    """
    job_file, record_file = log.with_suffix('.job'), log.with_suffix('.record')
    record_file.unlink(missing_ok=True)
    job_file.write_text(json.dumps({**job, 'record': str(record_file)}), encoding='utf-8')
    try:
        run_child('ast_plugin.compare.measure', [str(job_file)], log, threads=threads, keep_open=keep_open)
        return json.loads(record_file.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise ChildFailed('the process wrote no record') from error
    finally:
        job_file.unlink(missing_ok=True)
        record_file.unlink(missing_ok=True)


def _reason(status: int, log: Path, begin: int) -> str:
    """Return the last error message of a failed process after offset `begin` of the log."""
    with log.open('rb') as file:
        file.seek(max(begin, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        output = file.read().decode('utf-8', 'replace')
    lines = [line.strip() for line in reversed(output.splitlines()) if line.strip()]
    errors = [line for line in lines if line.startswith('basicsr: error:')]
    if errors:
        return errors[0].removeprefix('basicsr: error:').strip()
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f'signal {-status}'
        hint = ', possibly out of memory' if name == 'SIGKILL' else ''
        return f'terminated by {name}{hint}'
    # A traceback ends with the error message; skip lines of frames and position markers.
    errors = [line for line in lines if not line.startswith(('File ', '^'))]
    return errors[0][:300] if errors else f'exit status {status}'


def _die_with(parent: int) -> None:
    """Request SIGTERM when the parent exits for any reason, so that a training saves its state. Linux only."""
    if not sys.platform.startswith('linux'):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent exited before prctl
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == '__main__':
    _die_with(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
