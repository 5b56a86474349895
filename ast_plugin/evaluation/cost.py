"""Cost of a network: MACs, counted with mmengine, and peak memory; memory available on a device."""

import logging
import math
import os
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ast_plugin.devices import return_freed_memory
from ast_plugin.ops import use_backend

# Operators without multiplications: views, copies, or counted as part of another operator.
_FREE_OPERATORS = ('aten::pad', 'aten::rsub', 'aten::unflatten', 'aten::alias', 'aten::unbind', 'aten::movedim')
SMALL_SIZES = ((128, 128), (128, 256))  # (height, width) measured to extrapolate to large images

_UNKNOWN_MEMORY = 4 * 2**30
_MEMORY_INFO, _PROCESS_SIZE = Path('/proc/meminfo'), Path('/proc/self/statm')
# Memory limit, usage and statistics of the container: cgroup v2, then v1.
_GROUP_FILES = (
    [Path('/sys/fs/cgroup', f'memory.{name}') for name in ('max', 'current', 'stat')],
    [Path('/sys/fs/cgroup/memory', f'memory.{name}') for name in ('limit_in_bytes', 'usage_in_bytes', 'stat')],
)


def count_macs(network: nn.Module, image: Tensor) -> tuple[int, dict[str, int]]:
    """Count the MACs of one forward pass in evaluation mode on an image [1, C, H, W], by tracing.

    Returns:
        The number of MACs, and the number of calls of each operator that mmengine does not count.
    """
    from mmengine.analysis import FlopAnalyzer

    logging.getLogger('mmengine').setLevel(logging.ERROR)
    training = network.training
    frozen = [parameter for parameter in network.parameters() if not parameter.requires_grad]
    try:
        # Frozen networks use fused operators, which mmengine does not count.
        network.eval().requires_grad_(True)
        with warnings.catch_warnings(), use_backend('reference'):
            warnings.simplefilter('ignore')  # torch.jit warnings about constants in the trace
            analyzer = FlopAnalyzer(network, (image,))
            analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings('none')
            total = int(analyzer.total())
            uncounted = dict(analyzer.unsupported_ops())
    finally:
        network.train(training)
        for parameter in frozen:
            parameter.requires_grad_(False)
    return total, {name: count for name, count in sorted(uncounted.items()) if name not in _FREE_OPERATORS}


def count_macs_of_size(
    network: nn.Module, channels: int, size: tuple[int, int], multiple: int = 1
) -> tuple[int, dict[str, int], bool]:
    """Count the MACs for an image size; for large images extrapolate linearly from two smaller sizes.

    Tracing keeps all activations in memory, which limits the size. Extrapolation is exact for convolutions, token-wise
    layers and window attention, whose cost is linear in the number of pixels, and too low for global attention.

    Args:
        network: see `count_macs`.
        channels: number of channels of the image.
        size: (height, width) in pixels.
        multiple: the network pads sides to a multiple of this.
    Returns:
        The number of MACs, the operators not counted, and whether the number is extrapolated.
    """
    if padded_pixels(size, multiple) <= padded_pixels(SMALL_SIZES[1], multiple):
        return (*count_macs(network, torch.zeros(1, channels, *size)), False)
    counts = [count_macs(network, torch.zeros(1, channels, *small)) for small in SMALL_SIZES]
    measured = dict(zip(SMALL_SIZES, (total for total, _ in counts), strict=True))
    return round(extrapolate(size, measured, multiple)), counts[1][1], True


def padded_pixels(size: tuple[int, int], multiple: int) -> int:
    """Return the number of pixels of an image (height, width) after padding its sides to a multiple."""
    return math.prod(-(-side // multiple) * multiple for side in size)


def extrapolate(size: tuple[int, int], measured: Mapping[tuple[int, int], float], multiple: int) -> float:
    """Extrapolate a value linearly in the number of padded pixels from two measured sizes."""
    (first, low), (second, high) = ((padded_pixels(each, multiple), value) for each, value in measured.items())
    return low + (high - low) / (second - first) * (padded_pixels(size, multiple) - first)


def available_bytes(device: torch.device) -> int:
    """Return the memory available on a device, in bytes.

    For CPU and MPS this is the minimum over the machine, its container and the limits of the process; 4 GiB are assumed
    on systems that do not report it (Linux does).
    """
    if device.type == 'cuda':
        free, _ = torch.cuda.mem_get_info(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        segments = [each for each in torch.cuda.memory_snapshot() if each['device'] == index]
        # Segments reserved by CUDA graphs are not reusable.
        shared = [each for each in segments if tuple(each.get('segment_pool_id', (0, 0))) == (0, 0)]
        return free + sum(each['total_size'] - each['allocated_size'] for each in shared)
    return_freed_memory()  # the allocator may hold freed memory that the system counts as used
    known = [_free_in_machine(), _free_in_process(), *map(_free_in_group, _GROUP_FILES)]
    if device.type == 'mps':
        known.append(max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()))
    return min((amount for amount in known if amount is not None), default=_UNKNOWN_MEMORY)


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Run a function and return the peak memory of its tensors in bytes, excluding tensors that existed before.

    On CUDA all memory from PyTorch's allocator is counted; on other devices only tensors returned by operators are,
    without temporary buffers inside kernels.
    """
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveBytes() as live:
        function()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Sum of the sizes of all live storages returned by operators."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        inputs = {storage._cdata for storage in _storages((args, kwargs))}
        result = operator(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in inputs | self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes()).atexit = False
        return result

    def _remove(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


def _storages(values: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


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


def _free_in_process() -> int | None:
    """Return the address space left by `ulimit -v`, or None without a limit."""
    try:
        import resource  # not on Windows

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        used = int(_PROCESS_SIZE.read_text().split()[0]) * resource.getpagesize()
        return None if limit == resource.RLIM_INFINITY else max(0, limit - used)
    except (ImportError, OSError):
        return None


def _free_in_group(files: Sequence[Path]) -> int | None:
    try:
        limit, use, statistics = (file.read_text() for file in files)
        # The usage includes the page cache, which is reclaimed when memory is needed.
        cached = int(dict(line.split() for line in statistics.splitlines()).get('inactive_file', 0))
        return max(0, int(limit) - int(use) + cached)
    except (OSError, ValueError):  # a group without a limit contains 'max'
        return None
