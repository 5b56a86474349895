"""Measurements of a network in a separate process: latency, memory, MACs and image quality.

Usage: `python -m ast_plugin.compare.measure JOB`, see `ast_plugin.compare.child.run_job`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ast_plugin import __version__
from ast_plugin.archs.networks import AnySize, any_size, input_channels, load_network, required_multiple
from ast_plugin.devices import describe_device, find_device, return_freed_memory, wait_for
from ast_plugin.errors import DataError, OptionError, PluginError, class_of_failure, one_line
from ast_plugin.evaluation.cost import count_macs, peak_bytes
from ast_plugin.evaluation.protocols import read_protocol
from ast_plugin.evaluation.results import distinct
from ast_plugin.evaluation.validator import name_of
from ast_plugin.files import write_file
from ast_plugin.metrics.registered_metrics import complete
from ast_plugin.names import file_name, printable, say
from ast_plugin.ops import frozen_weights
from ast_plugin.plugins import load_plugins

_WARM_UP = 2  # untimed runs
_MOST_SECONDS = 60.0  # limit of the timed runs, after `_FEWEST_RUNS`
_FEWEST_RUNS = 3
_KEPT_SIDE = 768  # maximum side of the images in the report, in pixels
_PACKAGES = ('torch', 'torchvision', 'basicsr', 'numpy', 'opencv-python', 'lmdb', 'triton')


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, PyTorch threads, load and GPU, without host or user names."""
    return {
        'processor': _read('/proc/cpuinfo', r'^model name\s*: (.+)$') or platform.processor() or platform.machine(),
        'cores': os.cpu_count(),
        'threads': torch.get_num_threads(),
        'load': load_average(),
        'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        'system': f'{platform.system()} {platform.machine()}',
    }


def load_average() -> float | None:
    """Return the load average of the last minute, or None if the system does not report it."""
    return round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None


def installed_versions() -> dict[str, str]:
    """Return the versions of Python, this package and the packages that affect its speed."""
    versions = {'python': platform.python_version(), 'ast_plugin': __version__}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def peak_memory(function: Callable[[], object], device: torch.device | str = 'cpu') -> int | None:
    """Return the peak memory of a call in bytes, excluding memory in use before; None if the system does not report it.

    Measured as allocated tensor memory on a GPU, and as growth of the resident set size on a CPU.
    """
    if torch.device(device).type != 'cpu':
        return peak_bytes(function, torch.device(device))
    # Memory retained from earlier calls could be reused, which would hide what this call needs.
    gc.collect()
    return_freed_memory()
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')  # resets the peak resident set size
    resident = _read('/proc/self/status', r'^VmRSS:\s+(\d+) kB$')
    function()
    highest = _read('/proc/self/status', r'^VmHWM:\s+(\d+) kB$')
    return None if resident is None or highest is None else max(0, int(highest) - int(resident)) * 1024


def _read(file: str, pattern: str) -> str | None:
    """Return the first group of a pattern in a file of /proc, or None on systems without it."""
    with contextlib.suppress(OSError):
        found = re.search(pattern, Path(file).read_text(encoding='utf-8'), re.MULTILINE)
        return found and found[1].strip()
    return None


def measure_speed(job: Mapping[str, Any]) -> dict[str, Any]:
    """Measure latency, peak memory and MACs of a network at one size.

    Args:
        job: `network`, `weights`, `param_key`, `size` (height, width), `runs`, `device`; no MACs if `counts` is false.
    Returns:
        `parameters`, `macs`, `uncounted` (operators not included in the MACs, with the number of calls), `seconds` of
        each run, `milliseconds` (median), `peak_bytes` excluding weights and input (None if the system does not report
        it), `threads`, `device`, and `load` of the machine before the measurement.
    """
    device = find_device(job['device'])
    network = _load_any_size(job, device)
    record: dict[str, Any] = {
        'parameters': sum(parameter.numel() for parameter in network.parameters()),
        'threads': torch.get_num_threads(),
        'device': describe_device(device),
        'load': load_average(),
    }
    image = torch.rand(1, input_channels(job['network']), *job['size'], device=device)
    with torch.inference_mode(), frozen_weights():
        record['peak_bytes'] = peak_memory(lambda: network(image), device)
        record['seconds'] = _time_runs(network, image, job['runs'])
    record['milliseconds'] = round(1000 * statistics.median(record['seconds']), 3)
    if job.get('counts', True):
        record['macs'], record['uncounted'] = count_macs(network, image)
    return record


def measure_memory(job: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the peak memory of a forward pass after a warm-up pass on a small image.

    Args:
        job: `network`, `weights`, `param_key`, `size` (height, width), `device`.
    Returns:
        `peak_bytes` excluding weights and input; None if the system does not report it.
    """
    device = find_device(job['device'])
    network = _load_any_size(job, device)
    image = torch.rand(1, input_channels(job['network']), *job['size'], device=device)
    with torch.inference_mode():
        return {'peak_bytes': peak_memory(lambda: network(image), device)}


def measure_quality(job: Mapping[str, Any]) -> dict[str, Any]:
    """Restore and measure every image of a dataset under a protocol.

    Args:
        job: `network` (None measures the degraded images), `weights`, `param_key`, `dataset` (options), `protocol`,
            `metrics`, `bit_depth`, `device`, `kept` (number of images to save), `folder` (of the saved images).
    Returns:
        `values` (image -> metric -> value), `protocol` (one-line description), `multiple` (image sizes are padded to
        it), `notes`, `kept` (names of the saved images).
    Raises:
        DataError: if no image can be restored and measured.
    """
    bit_depth, device = job.get('bit_depth') or 8, find_device(job['device'])
    protocol = read_protocol(job['protocol'], bit_depth)
    metrics = complete(protocol.metrics if job['metrics'] is None else job['metrics'], device, bit_depth)
    network = None if job['network'] is None else _load_any_size(job, device)
    dataset = _open_dataset(job['dataset'])
    notes: list[str] = []
    values: dict[str, dict[str, float]] = {}
    kept: list[str] = []  # the first by name, as some datasets list files in arbitrary order
    for number in range(len(dataset)):
        path, stage, failures = name_of(dataset, number), 'unreadable', []
        try:
            sample = dataset[number]
            path, stage = sample['lq_path'], 'network'
            if 'gt' not in sample:
                raise OptionError(f'{job["dataset"]["name"]} has no clean images, which metrics require')
            lq, gt = sample['lq'][None].float(), sample['gt'][None].float()
            with torch.inference_mode():
                restored = lq.clamp(0, 1) if network is None else protocol.restore(network, lq, on_note=notes.append)
            stage = 'metric'
            measured = protocol.measure(restored[0], gt[0].clamp(0, 1), metrics, failures.append)
        except Exception as error:
            failures.append(f'{class_of_failure(error, stage)}: {one_line(error)}')
            measured = dict.fromkeys(metrics, math.nan)
        name = distinct(printable(Path(path).stem), values)
        values[name] = measured  # images that are NaN for one network are excluded for all
        notes += [f'{path}: {failure}' for failure in failures]
        if all(map(math.isnan, measured.values())):
            continue
        kept = sorted([*kept, name])[: job['kept']]
        if name in kept:
            _keep(image_path(job['folder'], name), restored[0])
            if network is None:
                _keep(image_path(job['folder'], name, is_clean=True), gt[0])
    if all(math.isnan(value) for measured in values.values() for value in measured.values()):
        raise DataError(f'no image of {job["dataset"]["name"]} can be restored and measured: {"; ".join(notes[:3])}')
    return {
        'values': dict(sorted(values.items())),
        'protocol': protocol.describe(),
        'multiple': network.size_multiple if isinstance(network, AnySize) else 1,
        'notes': list(dict.fromkeys(notes)),
        'kept': kept,
    }


KINDS = {'speed': measure_speed, 'memory': measure_memory, 'quality': measure_quality}


def image_path(folder: str | Path, name: str, is_clean: bool = False) -> Path:
    """Return the path of a saved restored image, or of its clean image."""
    return Path(folder, 'clean' if is_clean else 'restored', file_name(name, '.png'))


def _load_any_size(job: Mapping[str, Any], device: torch.device) -> nn.Module:
    """Load the network of a job, padding its input to supported sizes, and run a warm-up pass on a small image."""
    network = load_network(job['network'], job['weights'], job['param_key']).to(device)
    channels = input_channels(job['network'])
    required_multiple(network, channels)  # rejects networks that enlarge images
    network = any_size(network, channels)
    with torch.inference_mode():  # excludes the one-time initialisation of libraries from measurements
        network(torch.rand(1, channels, 64, 64, device=device))
    return network


def image_stamps(options: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """Return the images of a dataset with the times of their last modification, None for images that are not files."""
    dataset = _open_dataset(options)
    files = [str(photo.path) for photo in getattr(dataset, 'photos', ())]
    for pair in getattr(dataset, 'pairs', None) or getattr(dataset, 'paths', ()):  # the plugin's or BasicSR's
        files += [pair] if isinstance(pair, str) else [pair.lq, pair.gt] if hasattr(pair, 'lq') else pair.values()
    return [(file, os.path.getmtime(file) if os.path.exists(file) else None) for file in files]


def _open_dataset(options: Mapping[str, Any]) -> Any:
    import basicsr.data  # noqa: F401 - registers the toolbox's datasets
    from basicsr.utils.registry import DATASET_REGISTRY

    return DATASET_REGISTRY.get(options['type'])(dict(options))


def _keep(path: Path, image: Tensor) -> None:
    """Save the centre of an image, [C, H, W] in [0, 1], as PNG."""
    height, width = image.shape[-2:]
    top, left = max(0, height - _KEPT_SIDE) // 2, max(0, width - _KEPT_SIDE) // 2
    part = image[..., top : top + _KEPT_SIDE, left : left + _KEPT_SIDE]
    array = (part.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(array if array.shape[2] == 3 else array[..., 0])).save(path)


def _time_runs(network: nn.Module, image: Tensor, runs: int) -> list[float]:
    taken: list[float] = []
    for number in range(_WARM_UP + runs):
        start = time.perf_counter()
        network(image)
        wait_for(image.device)
        if number >= _WARM_UP:
            taken.append(round(time.perf_counter() - start, 6))
        if len(taken) >= _FEWEST_RUNS and sum(taken) > _MOST_SECONDS:
            break
    return taken


def main() -> int:
    """Run the job in the file given on the command line; return the exit status."""
    load_plugins()
    job = json.loads(Path(sys.argv[1]).read_text(encoding='utf-8'))
    try:
        record = KINDS[job['kind']](job)
    except PluginError as error:
        say(*f'basicsr: error: {error}'.split('\n'), file=sys.stderr)
        return 2
    write_file(job['record'], json.dumps(record).encode())
    return 0


if __name__ == '__main__':
    sys.exit(main())
