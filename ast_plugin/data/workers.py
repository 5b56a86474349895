"""The processes that prepare data, out of reach of signals that are meant for the one that trains.

Terminals and launchers send SIGINT and SIGTERM to a whole group of processes. The process that trains takes them as a
request to save, for which it needs its workers; it ends them itself.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_CAN_BLOCK = hasattr(signal, 'pthread_sigmask')  # not on Windows


@contextmanager
def being_started() -> Iterator[None]:
    """Start workers inside: signals reach none of them before it has come to `start_apart`."""
    if not _CAN_BLOCK:
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # it would let the signals through again if it started in between
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_apart(worker_init: Callable[[int], None] | None, worker: int) -> None:
    """Begin a worker by leaving its parent's group.

    Args:
        worker_init: what else is done when a worker starts, None for nothing.
        worker: its number.
    """
    if hasattr(os, 'setpgrp'):
        os.setpgrp()
    if hasattr(signal, 'sigtimedwait'):
        # What came to the group until now is not for this process, what comes from the parent is.
        while (waiting := signal.sigtimedwait(_SIGNALS, 0)) is not None:
            if waiting.si_signo == signal.SIGTERM and waiting.si_pid == os.getppid():
                os._exit(0)
    if _CAN_BLOCK:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    if worker_init is not None:
        worker_init(worker)
