"""SIGTERM and SIGINT as a request to save and leave; a second one ends the run at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SIGNALS = (signal.SIGTERM, signal.SIGINT)

_received: list[int] = []  # signals belong to the process, and so does this


class RunStopped(SystemExit):
    """The run has saved itself and ends because a signal asked for it; the exit status is the signal's.

    Args:
        number: of the signal.
        iteration: the last one done, which is saved; 0 if there was nothing to save yet.
    """

    def __init__(self, number: int, iteration: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name
        self.iteration = iteration


def received() -> int | None:
    """The number of the signal that asks this process to leave, if there was one."""
    return _received[0] if _received else None


@contextmanager
def heeded() -> Iterator[None]:
    """Take signals as requests inside; `received` tells of them.

    Signals that the process was started to ignore stay ignored. Outside the main thread nothing changes: Python lets
    no other thread have signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heard = [number for number in SIGNALS if before[number] not in (signal.SIG_IGN, None)]

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

    for number in heard:
        signal.signal(number, hear)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])
        _received.clear()
