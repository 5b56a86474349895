"""Device selection (CUDA, Apple MPS or CPU), synchronization and memory behaviour."""

from __future__ import annotations

import ctypes
from contextlib import suppress

import torch

from ast_plugin.errors import OptionError, one_line

AUTO = 'auto'
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def present_devices() -> list[str]:
    """Return the names of the devices that torch can use on this machine, fastest first."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [f'cuda:{number}' for number in range(count)] if count > 1 else ['cuda'] * count
    return [*gpus, *(['mps'] if torch.backends.mps.is_available() else []), 'cpu']


def find_device(name: str | torch.device | None = AUTO) -> torch.device:
    """Return a device after checking that a tensor can be allocated on it.

    Args:
        name: a torch device name; 'auto' or None selects the first available of CUDA, MPS and CPU.
    Raises:
        OptionError: if the device is not available; the message lists the available ones.
    """
    present = present_devices()
    name = present[0] if name in (None, AUTO) else name
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise OptionError(
            f'device {name!s} is not available; available devices: {", ".join(present)} ({one_line(error)})'
        ) from error
    return device


def describe_device(device: torch.device) -> str:
    """Return the device type, with the GPU's name for CUDA, to be recorded with measured numbers."""
    return f'{device.type} ({torch.cuda.get_device_name(device)})' if device.type == 'cuda' else device.type


def wait_for(device: torch.device) -> None:
    """Wait until a device has finished all queued work; return immediately for the CPU."""
    if device.type in ('cuda', 'mps'):
        getattr(torch, device.type).synchronize()


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for this process; no effect with other C libraries.

    By default glibc returns large blocks to the system and gets them back as zero-filled pages, hundreds of thousands
    of them in one training step on a CPU.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Return the memory kept by `keep_freed_memory` to the system; no effect without glibc."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def widest_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return `dtype`, or float32 in place of float64 on MPS, which does not support it."""
    return torch.float32 if dtype == torch.float64 and device.type == 'mps' else dtype
