"""Processes and threads that prepare data: results in order, and no signals that are meant for the main process."""

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
"""How many items a process is given at once: one by one, handing over takes as long as small images do."""

_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_CAN_BLOCK = hasattr(signal, 'pthread_sigmask')  # not on Windows


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def map_ahead(
    executor: Executor, function: Callable[[Item], Result], items: Iterable[Item], num_ahead: int
) -> Iterator[Result]:
    """Yield `function(item)` for every item, in their order, and shut the executor down in the end.

    Args:
        executor: of threads or processes.
        function: what they do.
        items: taken as they are needed, however many there are.
        num_ahead: how many are under way beyond the one that is waited for.
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
    """Yield `function(item)` for every item, in their order.

    Processes end with this one, even when it is killed, and leave Ctrl-C to it.

    Args:
        function: a function of a module, which raises nothing that is to be told apart.
        items: taken as they are needed.
        workers: processes; with 1 all is done in this one.
        prepare: called once in every process.
    Raises:
        DataError: if a process is killed, as systems do when memory runs out.
    """
    if workers <= 1:
        prepare()
        yield from map(function, items)
        return
    items = iter(items)
    batches = iter(lambda: list(itertools.islice(items, BATCH)), [])
    # Processes that are forked from one with threads may hang; a server without threads forks them.
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
    """Start workers of a loader inside: signals reach none of them before it has come to `start_apart`."""
    if not _CAN_BLOCK:
        yield
        return
    resource_tracker.ensure_running()  # it would let the signals through again if it started in between
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_apart(worker_init: Callable[[int], None] | None, worker: int) -> None:
    """Begin a worker of a loader by leaving its parent's group.

    Terminals and launchers send SIGINT and SIGTERM to a whole group of processes. The process that trains takes them as
    a request to save, for which it needs its workers; it ends them itself. Where it is killed, they leave with it.
    """
    _leave_with_parent()
    if hasattr(os, 'setpgrp'):
        os.setpgrp()
    if hasattr(signal, 'sigtimedwait'):
        # Signals that came to the group until now are not for this process, those of the parent are.
        while (waiting := signal.sigtimedwait(_SIGNALS, 0)) is not None:
            if waiting.si_signo == signal.SIGTERM and waiting.si_pid == os.getppid():
                os._exit(0)
    if _CAN_BLOCK:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    if worker_init is not None:
        worker_init(worker)


def _run_batch(function: Callable[[Item], Result], batch: list[Item]) -> list[Result]:
    return [function(item) for item in batch]


def _start_process(prepare: Callable[[], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _leave_with_parent()
    prepare()


def _leave_with_parent() -> None:
    """Let a thread end this process when its parent is gone, even if it waits for a lock that the parent died with."""
    if (parent := multiprocessing.parent_process()) is None:
        return

    def leave() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
