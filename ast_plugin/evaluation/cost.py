"""What a network costs: multiplications, as mmengine counts them, and memory, beside what there is of it."""

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

# Counted with the operator that they belong to, or nothing but views and copies: no multiplications are missing for
# want of them.
_FREE_OPERATORS = ('aten::pad', 'aten::rsub', 'aten::unflatten', 'aten::alias', 'aten::unbind', 'aten::movedim')
SMALL_SIZES = ((128, 128), (128, 256))  # height and width of images that are measured in the place of large ones

_UNKNOWN_MEMORY = 4 * 2**30
_MEMORY_INFO, _PROCESS_SIZE = Path('/proc/meminfo'), Path('/proc/self/statm')
# Limit, use and statistics of this process's container, by the second and the first version of Linux's control groups.
_GROUP_FILES = (
    [Path('/sys/fs/cgroup', f'memory.{name}') for name in ('max', 'current', 'stat')],
    [Path('/sys/fs/cgroup/memory', f'memory.{name}') for name in ('limit_in_bytes', 'usage_in_bytes', 'stat')],
)


def count_macs(network: nn.Module, image: Tensor) -> tuple[int, dict[str, int]]:
    """Count the multiplications (with their additions) of one pass in evaluation mode on [1, C, H, W], by a trace.

    Returns:
        The count, and by name how often operators were called that the analysis does not count.
    """
    from mmengine.analysis import FlopAnalyzer

    logging.getLogger('mmengine').setLevel(logging.ERROR)
    training = network.training
    frozen = [parameter for parameter in network.parameters() if not parameter.requires_grad]
    try:
        # Frozen networks take faster paths, whose operators the analysis does not know.
        network.eval().requires_grad_(True)
        with warnings.catch_warnings(), use_backend('reference'):
            warnings.simplefilter('ignore')  # what torch.jit says of constants in a trace
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
    """Count the multiplications for an image of a size; of a large one by the line through two smaller ones.

    The trace keeps all that it computes. The line is right for convolutions, layers of tokens and attention within
    windows, which take as much for every pixel; attention among all tokens takes more than it says.

    Args:
        network: see `count_macs`.
        channels: of the image.
        size: height and width in pixels.
        multiple: what the network pads sides to.
    Returns:
        The count, the operators left out, and whether it is from the line.
    """
    if padded_pixels(size, multiple) <= padded_pixels(SMALL_SIZES[1], multiple):
        return (*count_macs(network, torch.zeros(1, channels, *size)), False)
    counts = [count_macs(network, torch.zeros(1, channels, *small)) for small in SMALL_SIZES]
    measured = dict(zip(SMALL_SIZES, (total for total, _ in counts), strict=True))
    return round(extrapolate(size, measured, multiple)), counts[1][1], True


def padded_pixels(size: tuple[int, int], multiple: int) -> int:
    """Return the number of pixels of an image (height, width) once its sides are padded to a multiple."""
    return math.prod(-(-side // multiple) * multiple for side in size)


def extrapolate(size: tuple[int, int], measured: Mapping[tuple[int, int], float], multiple: int) -> float:
    """Return the value at a size, by pixels padded to a multiple, of the line through two sizes that were measured."""
    (first, low), (second, high) = ((padded_pixels(each, multiple), value) for each, value in measured.items())
    return low + (high - low) / (second - first) * (padded_pixels(size, multiple) - first)


def available_bytes(device: torch.device) -> int:
    """Return the free memory of a device: of a GPU, or of the machine, container and limits here, which MPS shares.

    Where the system does not tell (it does on Linux), 4 GiB are assumed.
    """
    if device.type == 'cuda':
        free, _ = torch.cuda.mem_get_info(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        segments = [each for each in torch.cuda.memory_snapshot() if each['device'] == index]
        # What CUDA graphs have reserved is theirs.
        shared = [each for each in segments if tuple(each.get('segment_pool_id', (0, 0))) == (0, 0)]
        return free + sum(each['total_size'] - each['allocated_size'] for each in shared)
    return_freed_memory()  # a training before has kept its own, which the system counts as taken
    known = [_free_in_machine(), _free_in_process(), *map(_free_in_group, _GROUP_FILES)]
    if device.type == 'mps':
        known.append(max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()))
    return min((amount for amount in known if amount is not None), default=_UNKNOWN_MEMORY)


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Run a function and measure the most memory that its tensors held at once, without what was there before.

    But on CUDA the tensors that pass through PyTorch's dispatcher are counted, not what a kernel allocates inside.
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
    """Adds up the storages that operators return, until each is freed."""

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
    """What `ulimit -v` leaves of the address space; None without a limit."""
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
        # Cached files count as used, and are given back when memory is needed.
        cached = int(dict(line.split() for line in statistics.splitlines()).get('inactive_file', 0))
        return max(0, int(limit) - int(use) + cached)
    except (OSError, ValueError):  # a group without a limit says 'max'
        return None
