"""The processes that work on one run, as torchrun or slurm start them, and the signals that ask them to stop."""

import atexit
import gc
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from basicsr.utils.dist_util import get_dist_info

from ast_plugin.errors import PluginError

# How long a process waits for the others at the end of a validation. The group that trains gives up after ten minutes
# on GPUs, and large images fall to the processes unevenly.
PATIENCE = timedelta(days=1)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
FAILED = 1000  # greater than any signal: a process cannot go on, and asks the others to save and leave

_received: list[int] = []  # signals belong to the process, and so does this

_FAILURES, _MESSAGE = 'ast_plugin/failures', 'ast_plugin/message'
_BROKEN_CONNECTION = ('gloo', 'nccl', 'connection closed', 'connection reset', 'broken pipe')


class ProcessLost(PluginError, RuntimeError):
    """Another process of the run is gone, without having said why."""


class Processes:
    """All processes of the run; every one of them makes this object, and calls its methods in the same order."""

    def __init__(self) -> None:
        self.rank, self.count = get_dist_info()
        self.group = None
        if self.count > 1:
            # What is gathered lies in main memory: gloo's matter, whatever trains the network.
            self.group = dist.new_group(backend='gloo', timeout=PATIENCE)
            # Depthwise convolutions' gradients come in another order, which costs the copy of a few numbers.
            warnings.filterwarnings('ignore', 'Grad strides do not match bucket view strides', UserWarning)

    def gather(self, items: Sequence[Any]) -> list[Any]:
        """Return the items of all processes; each may have another number of items, or none."""
        if self.count == 1:
            return list(items)
        lists: list[Any] = [None] * self.count
        dist.all_gather_object(lists, list(items), group=self.group)
        return [item for part in lists for item in part]

    def wait(self) -> None:
        """Go on when all others are here too."""
        if self.count > 1:
            dist.barrier(group=self.group)


@contextmanager
def failing_together() -> Iterator[None]:
    """Let the process that fails first say why, with its rank, and the others end without a word (SystemExit).

    Raises:
        ProcessLost: if the connection to another broke off, and nobody knows why: it may have been killed.
    """
    try:
        yield
    except Exception as error:
        rank, count = get_dist_info()
        if count == 1:
            raise
        first, message = _claim(str(error))
        _hang_up()
        text = f'{type(error).__name__} {error}'.lower()
        is_lost = isinstance(error, dist.DistError) or any(word in text for word in _BROKEN_CONNECTION)
        is_lost = is_lost and isinstance(error, RuntimeError) and not isinstance(error, PluginError)
        if not first and (is_lost or message == str(error)):
            raise SystemExit(2) from None
        if is_lost:
            reason = str(error).splitlines()[0]
            raise ProcessLost(
                f'[rank {rank}] another process of this run is gone; unless it says why itself, it was killed, by the '
                f'system for want of memory perhaps, or its machine is out of reach ({reason})'
            ) from error
        if isinstance(error, PluginError):
            error.args = (f'[rank {rank}] {error}', *error.args[1:])
        raise


def follow() -> None:
    """End without a word (SystemExit) when the process that has failed has said why."""
    with suppress(RuntimeError, ValueError):
        dist.distributed_c10d._get_default_store().wait([_MESSAGE], timedelta(seconds=5))
    raise SystemExit(2)


def leave() -> None:
    """Take leave of the other processes, where there are any and that has not been done."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        # A network that still holds the connection, by a cycle of references, keeps gloo's threads alive; those abort
        # the process when they outlive the interpreter.
        atexit.register(gc.collect)


class RunStopped(SystemExit):
    """The run has saved itself after an iteration (0 if there was nothing yet) and ends as a signal asked for it."""

    def __init__(self, number: int, iteration: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name
        self.iteration = iteration


def received_signal() -> int | None:
    """Return the number of the signal that asks this process to leave, if there was one."""
    return _received[0] if _received else None


@contextmanager
def catch_signals() -> Iterator[None]:
    """Take signals as requests inside; `received_signal` tells of them.

    Signals that the process was started to ignore stay ignored. Threads but the main one cannot have signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    def hear(number: int, frame: object) -> None:
        if os.getpid() != owner:
            return  # a process that prepares data, forked just now; it ends when its parent does
        if _received:
            signal.signal(number, before[number])
            os.kill(owner, number)
            return
        _received.append(number)
        # Not print: it may just have been interrupted itself.
        with suppress(OSError):
            os.write(2, f'\nbasicsr: {signal.Signals(number).name}: saving; once more ends it at once\n'.encode())

    for number in before:
        signal.signal(number, hear)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def _claim(message: str) -> tuple[bool, str]:
    """Whether this process is the first to fail, and what the first one said: by the store that they share."""
    try:
        store = dist.distributed_c10d._get_default_store()
        if store.add(_FAILURES, 1) == 1:
            store.set(_MESSAGE, message)
            return True, message
        store.wait([_MESSAGE], timedelta(seconds=5))
        return False, store.get(_MESSAGE).decode()
    except (RuntimeError, ValueError):  # under slurm the first process holds the board, and may have taken it with it
        return True, message


def _hang_up() -> None:
    """Cut the connections, so that nobody waits for this process and it waits for nobody."""
    with suppress(Exception):
        if dist.get_backend() == 'nccl':
            dist.distributed_c10d._abort_process_group()
        else:
            leave()
