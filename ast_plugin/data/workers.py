"""Worker processes and threads for data: ordered results, and shielding from signals meant for the main process."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import TypeVar

from ast_plugin.errors import DataError

Item = TypeVar('Item')
Result = TypeVar('Result')

BATCH = 16
"""Number of items sent to a process at once: sending them singly takes as long as processing small images."""

STOP_SIGNALS = {getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGHUP') if hasattr(signal, name)}
"""Signals that request a training to save and stop. Windows has no SIGHUP, which is sent when a terminal closes."""
_CAN_BLOCK = hasattr(signal, 'pthread_sigmask')  # not on Windows


def num_cores() -> int:
    """Return the number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def map_ahead(
    executor: Executor, function: Callable[[Item], Result], items: Iterable[Item], num_ahead: int
) -> Iterator[Result]:
    """Yield `function(item)` for every item, in order, and shut the executor down at the end.

    Args:
        executor: of threads or processes.
        function: called in the executor.
        items: consumed lazily.
        num_ahead: number of calls submitted beyond the one whose result is awaited.
    """
    pending: deque = deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > num_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def map_in_processes(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    *,
    prepare: Callable[[], None] = int,
) -> Iterator[Result]:
    """Yield `function(item)` for every item, in order.

    The processes end with this one, even if it is killed, and leave Ctrl-C to it.

    Args:
        function: module-level function (it is pickled); an exception ends the iteration.
        items: consumed lazily.
        workers: number of processes; 1 runs everything in this process.
        prepare: called once in every process.
    Raises:
        DataError: if a process is killed, as operating systems do when memory runs out.
    """
    if workers <= 1:
        prepare()
        yield from map(function, items)
        return
    items = iter(items)
    batches = iter(lambda: list(itertools.islice(items, BATCH)), [])
    # Forking a process with threads may deadlock; the fork server has none.
    context = multiprocessing.get_context('forkserver' if hasattr(os, 'fork') else 'spawn')
    executor = ProcessPoolExecutor(workers, context, _start_process, (prepare,))
    try:
        for results in map_ahead(executor, partial(_run_batch, function), batches, 3 * workers):
            yield from results
    except BrokenProcessPool as error:
        raise DataError(
            'a process that reads images was killed, most likely because memory ran out; use fewer with --workers'
        ) from error


@contextmanager
def block_signals() -> Iterator[None]:
    """Block `STOP_SIGNALS` while loader workers start inside; each unblocks them itself in `start_apart`."""
    if not _CAN_BLOCK:
        yield
        return
    resource_tracker.ensure_running()  # starting it later would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_apart(worker_init: Callable[[int], None] | None, worker: int) -> None:
    """Initialize a loader worker in a process group of its own.

    Terminals and launchers send `STOP_SIGNALS` to the whole process group. The training process treats them as a
    request to save, for which it still needs its workers; it ends them itself. If it is killed, its workers exit too.
    """
    _leave_with_parent()
    if hasattr(os, 'setpgrp'):
        os.setpgrp()
    if hasattr(signal, 'sigtimedwait'):
        # Discard signals sent to the group so far, but not SIGTERM from the parent.
        while (waiting := signal.sigtimedwait(STOP_SIGNALS, 0)) is not None:
            if waiting.si_signo == signal.SIGTERM and waiting.si_pid == os.getppid():
                os._exit(0)
    if _CAN_BLOCK:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if worker_init is not None:
        worker_init(worker)


def _run_batch(function: Callable[[Item], Result], batch: list[Item]) -> list[Result]:
    return [function(item) for item in batch]


def _start_process(prepare: Callable[[], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _leave_with_parent()
    prepare()


def _leave_with_parent() -> None:
    """Start a thread that exits this process when its parent dies, even if a lock held by the parent is awaited."""
    if (parent := multiprocessing.parent_process()) is None:
        return

    def leave() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
