"""A function of many items on all cores, results in order, with little in memory at a time."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from ast_plugin.errors import DataError

Item = TypeVar('Item')
Result = TypeVar('Result')

BATCH = 16
"""How many items a process is given at once: one by one, handing over takes as long as small pictures do."""


def num_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def map_in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    *,
    prepare: Callable[[], None] = int,
) -> Iterator[Result]:
    """Yield `function(item)` for every item, in their order.

    At most a few batches for each process are under way, however many items there are. Processes end with this one,
    even when it is killed, and leave Ctrl-C to it.

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
    executor = ProcessPoolExecutor(workers, context, _start, (prepare,))
    try:
        pending = deque(executor.submit(_run, function, batch) for batch in itertools.islice(batches, 3 * workers))
        while pending:
            results = pending.popleft().result()
            pending.extend(executor.submit(_run, function, batch) for batch in itertools.islice(batches, 1))
            yield from results
    except BrokenProcessPool as error:
        raise DataError(
            'a process that reads pictures was killed, most likely because memory ran out; use fewer with --workers'
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _start(prepare: Callable[[], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    prepare()


def _leave_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _run(function: Callable[[Item], Result], batch: list[Item]) -> list[Result]:
    return [function(item) for item in batch]
