"""Where networks run: a GPU of CUDA, one of Apple's by Metal (MPS), or the CPU."""

from __future__ import annotations

import ctypes
from contextlib import suppress

import torch

from ast_plugin.errors import OptionError, one_line

AUTO = 'auto'
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def present_devices() -> list[str]:
    """Names of the devices of this machine that torch can use, the fastest first."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [f'cuda:{number}' for number in range(count)] if count > 1 else ['cuda'] * count
    return [*gpus, *(['mps'] if torch.backends.mps.is_available() else []), 'cpu']


def find_device(name: str | torch.device | None = AUTO) -> torch.device:
    """Return a device after a tensor was put on it.

    Args:
        name: as torch calls it; 'auto' or None takes the first of CUDA, MPS and the CPU that is there.
    Raises:
        OptionError: if there is no such device here; says what there is.
    """
    present = present_devices()
    name = present[0] if name in (None, AUTO) else name
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise OptionError(
            f'device {name!s} cannot be used here, there is: {", ".join(present)} ({one_line(error)})'
        ) from error
    return device


def describe_device(device: torch.device) -> str:
    """Return the device's type, and of CUDA what GPU it is: figures depend on it."""
    return f'{device.type} ({torch.cuda.get_device_name(device)})' if device.type == 'cuda' else device.type


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given; the CPU always has."""
    if device.type in ('cuda', 'mps'):
        getattr(torch, device.type).synchronize()


def keep_freed_memory() -> None:
    """Let glibc keep for this process what it frees, where glibc is.

    By itself it gives large blocks back to the system, which hands them out anew page by page, filled with zeros: a
    step of training on a CPU asks for hundreds of thousands of pages.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Let glibc give back to the system what it keeps, as `keep_freed_memory` lets it, where glibc is."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def widest_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return a dtype, or float32 for float64 on MPS, which has none."""
    return torch.float32 if dtype == torch.float64 and device.type == 'mps' else dtype
