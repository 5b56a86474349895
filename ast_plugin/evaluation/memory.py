"""How much memory there is, and how much a network takes."""

import os
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_UNKNOWN_MEMORY = 4 * 2**30
_MEMORY_INFO = Path('/proc/meminfo')
# Limit and use of this process's container, second and first version of Linux's control groups.
_GROUP_FILES = (
    (Path('/sys/fs/cgroup/memory.max'), Path('/sys/fs/cgroup/memory.current'), Path('/sys/fs/cgroup/memory.stat')),
    (
        Path('/sys/fs/cgroup/memory/memory.limit_in_bytes'),
        Path('/sys/fs/cgroup/memory/memory.usage_in_bytes'),
        Path('/sys/fs/cgroup/memory/memory.stat'),
    ),
)


def available_bytes(device: torch.device) -> int:
    """Memory that can still be had on a device: of the GPU, or of the machine and the container we run in.

    Where the system does not tell (it does on Linux), 4 GiB are assumed.
    """
    if device.type == 'cuda':
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    known = [amount for amount in (_free_in_machine(), *map(_free_in_group, _GROUP_FILES)) if amount is not None]
    return min(known, default=_UNKNOWN_MEMORY)


def peak_bytes(function: Callable[[Tensor], Tensor], image: Tensor) -> int:
    """Run a function and measure the most memory that its tensors held at once, without its parameters and input.

    On a CPU the tensors that pass through PyTorch's dispatcher are counted, not what a kernel allocates inside.
    """
    if image.device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(image.device)
        before = torch.cuda.memory_allocated(image.device)
        function(image)
        return torch.cuda.max_memory_allocated(image.device) - before
    with _LiveBytes() as live:
        function(image)
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators give back, until each is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        inputs = {_address(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _address(tensor) not in inputs | self.known:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        self.known.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, address, size).atexit = False

    def _remove(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _free_in_machine() -> int | None:
    try:
        lines = _MEMORY_INFO.read_text().splitlines()
    except OSError:
        try:
            return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // 2
        except (AttributeError, ValueError, OSError):
            return None
    amounts = dict(line.split(':', 1) for line in lines if ':' in line)
    amount = amounts.get('MemAvailable') or amounts.get('MemFree')
    return int(amount.split()[0]) * 1024 if amount else None


def _free_in_group(files: tuple[Path, Path, Path]) -> int | None:
    limit_file, use_file, statistics_file = files
    try:
        # A group without a limit says 'max'.
        limit, use = int(limit_file.read_text()), int(use_file.read_text())
        statistics = dict(line.split() for line in statistics_file.read_text().splitlines())
    except (OSError, ValueError):
        return None
    # Cached files count as used, and are given back when memory is needed.
    return max(0, limit - use + int(statistics.get('inactive_file', 0)))
