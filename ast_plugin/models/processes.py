"""Coordination of the processes of a run started by torchrun or slurm, and handling of stop signals."""

import atexit
import gc
import os
import signal
import stat
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from basicsr.utils.dist_util import get_dist_info

from ast_plugin.data.workers import STOP_SIGNALS
from ast_plugin.errors import PluginError

# Timeout for waiting on other processes at the end of a validation, where large images may be distributed unevenly. The
# default process group's timeout is ten minutes on GPUs.
PATIENCE = timedelta(days=1)

FAILED = 1000  # greater than any signal: a process has failed and requests that the others save and exit

_received: list[int] = []  # global, because signals are delivered to the process

_FAILURES, _MESSAGE = 'ast_plugin/failures', 'ast_plugin/message'
_BROKEN_CONNECTION = ('gloo', 'nccl', 'connection closed', 'connection reset', 'broken pipe')


class ProcessLost(PluginError, RuntimeError):
    """Another process of the run has exited without reporting a reason."""


class Processes:
    """Process group of a run. Every process creates this object and calls its methods in the same order."""

    def __init__(self) -> None:
        self.rank, self.count = get_dist_info()
        self.group = None
        if self.count > 1:
            # Gathered objects are in main memory, so gloo is used regardless of the training backend.
            self.group = dist.new_group(backend='gloo', timeout=PATIENCE)
            # Gradients of depthwise convolutions have other strides; copying them is cheap.
            warnings.filterwarnings('ignore', 'Grad strides do not match bucket view strides', UserWarning)

    def gather(self, items: Sequence[Any]) -> list[Any]:
        """Return the items of all processes; the number of items may differ between processes."""
        if self.count == 1:
            return list(items)
        lists: list[Any] = [None] * self.count
        dist.all_gather_object(lists, list(items), group=self.group)
        return [item for part in lists for item in part]

    def wait(self) -> None:
        """Wait until all processes have reached this point."""
        if self.count > 1:
            dist.barrier(group=self.group)


@contextmanager
def failing_together() -> Iterator[None]:
    """Report only the first failure among all processes, with its rank; the others exit silently (SystemExit).

    Raises:
        ProcessLost: if the connection to another process is lost without a reported reason; it may have been killed.
    """
    try:
        yield
    except Exception as error:
        rank, count = get_dist_info()
        if count == 1:
            raise
        first, message = _claim_first_failure(str(error))
        _abort_connections()
        text = f'{type(error).__name__} {error}'.lower()
        is_lost = isinstance(error, dist.DistError) or any(word in text for word in _BROKEN_CONNECTION)
        is_lost = is_lost and isinstance(error, RuntimeError) and not isinstance(error, PluginError)
        if not first and (is_lost or message == str(error)):
            raise SystemExit(2) from None
        if is_lost:
            reason = str(error).splitlines()[0]
            raise ProcessLost(
                f'[rank {rank}] another process of this run is gone; unless it reports a reason itself, it was killed '
                f'(possibly by the system for lack of memory), or its machine is unreachable ({reason})'
            ) from error
        if isinstance(error, PluginError):
            error.args = (f'[rank {rank}] {error}', *error.args[1:])
        raise


def follow() -> None:
    """Exit silently (SystemExit) once the failed process has reported its reason."""
    with suppress(RuntimeError, ValueError):
        dist.distributed_c10d._get_default_store().wait([_MESSAGE], timedelta(seconds=5))
    raise SystemExit(2)


def leave() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        # A network in a reference cycle may hold the connection and keep gloo's threads alive, which abort the process
        # if they outlive the interpreter.
        atexit.register(gc.collect)


class RunStopped(SystemExit):
    """Exit of a run on a signal, after it has been saved at an iteration (0 if nothing was saved)."""

    def __init__(self, number: int, iteration: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name
        self.iteration = iteration


def received_signal() -> int | None:
    """Return the number of the signal that requests this process to stop, or None."""
    return _received[0] if _received else None


@contextmanager
def catch_signals() -> Iterator[None]:
    """Record stop signals inside the block instead of terminating; see `received_signal`.

    Signals that the process was started to ignore stay ignored. No effect outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    def record(number: int, frame: object) -> None:
        if os.getpid() != owner:
            return  # a data worker that was just forked; it ends with its parent
        if number == getattr(signal, 'SIGHUP', None):  # a closing terminal; a shell may send it again
            _detach_from_terminal()
            _received.extend([] if _received else [number])
            return
        if _received:
            signal.signal(number, before[number])
            os.kill(owner, number)
            return
        _received.append(number)
        # os.write, because the signal may have interrupted a print.
        with suppress(OSError):
            os.write(2, f'\nbasicsr: {signal.Signals(number).name}: saving; a second signal exits at once\n'.encode())

    for number in before:
        signal.signal(number, record)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def _detach_from_terminal() -> None:
    """Redirect stdout and stderr to the null device if they are terminals, as writing to a closed one raises."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # os.isatty returns False for a closed terminal
                os.dup2(null, descriptor)
        os.close(null)


def _claim_first_failure(message: str) -> tuple[bool, str]:
    """Return whether this process is the first to fail, and the first failure's message, using the shared store."""
    try:
        store = dist.distributed_c10d._get_default_store()
        if store.add(_FAILURES, 1) == 1:
            store.set(_MESSAGE, message)
            return True, message
        store.wait([_MESSAGE], timedelta(seconds=5))
        return False, store.get(_MESSAGE).decode()
    except (RuntimeError, ValueError):  # under slurm, the store exits with the first process
        return True, message


def _abort_connections() -> None:
    """Abort the connections, so that no process waits for another."""
    with suppress(Exception):
        if dist.get_backend() == 'nccl':
            dist.distributed_c10d._abort_process_group()
        else:
            leave()
