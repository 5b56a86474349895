"""The machine that figures belong to: its processor and versions, and the memory that a call takes on it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ast_plugin import __version__
from ast_plugin.evaluation.cost import peak_bytes

_PACKAGES = ('torch', 'torchvision', 'basicsr', 'numpy', 'opencv-python', 'lmdb', 'triton')


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads that torch uses, load, and the GPU; no names of hosts or users."""
    return {
        'processor': _processor(),
        'cores': os.cpu_count(),
        'threads': torch.get_num_threads(),
        'load': load_average(),
        'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        'system': f'{platform.system()} {platform.machine()}',
    }


def load_average() -> float | None:
    """Processes that wanted to run in the last minute; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None


def installed_versions() -> dict[str, str]:
    """Versions of Python, this package, and the installed packages that decide its speed."""
    versions = {'python': platform.python_version(), 'ast_plugin': __version__}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def peak_memory(function: Callable[[], object], device: torch.device | str = 'cpu') -> int | None:
    """Bytes that a call takes at most on top of what is held before it; None where the system does not tell.

    On a GPU these are the bytes of tensors, on a CPU the growth of the process's resident size.
    """
    if torch.device(device).type != 'cpu':
        return peak_bytes(function, torch.device(device))
    # What earlier calls have left, as garbage or with the allocator, would hide what this one needs.
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # of glibc
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')  # the highest resident size counts from now on
    resident = _resident_bytes('VmRSS')
    function()
    peak = _resident_bytes('VmHWM')
    return None if resident is None or peak is None else max(0, peak - resident)


def _resident_bytes(key: str) -> int | None:
    """The present (VmRSS) or highest (VmHWM) resident size of this process; Linux only."""
    try:
        lines = Path('/proc/self/status').read_text(encoding='utf-8').splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f'{key}:')), None)


def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
    return next(names, platform.machine())
