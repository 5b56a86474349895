"""What this process holds in memory, as Linux tells it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path


def resident_bytes(key: str) -> int | None:
    """The present (VmRSS) or highest (VmHWM) resident size; None where the system does not tell."""
    try:
        lines = Path('/proc/self/status').read_text(encoding='utf-8').splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith(f'{key}:')]
    return sizes[0] if sizes else None


def resident_growth(function: Callable[[], object]) -> int | None:
    """By how many bytes a call lets this process grow at most; None where the system does not tell.

    What earlier calls have left, as garbage or with the allocator, is given back before: it would hide what this one
    needs.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # of glibc
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')  # let the highest size count from now on
    before = resident_bytes('VmRSS')
    function()
    peak = resident_bytes('VmHWM')
    return None if before is None or peak is None else max(0, peak - before)
