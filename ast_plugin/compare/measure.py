"""Measures one thing of one network in a fresh process, and says on which machine it is.

`python -m ast_plugin.compare.measure JOB`, see `ast_plugin.compare.child.run_job`.
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

_WARM_UP = 2  # runs before those that are timed
_MOST_SECONDS = 60.0  # for timed runs, as soon as there are three
_FEWEST_RUNS = 3
_KEPT_SIDE = 768  # longest side of the images that are kept for the report, in pixels
_PACKAGES = ('torch', 'torchvision', 'basicsr', 'numpy', 'opencv-python', 'lmdb', 'triton')


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads that torch uses, load, and the GPU; no names of hosts or users."""
    return {
        'processor': _read('/proc/cpuinfo', r'^model name\s*: (.+)$') or platform.processor() or platform.machine(),
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
    return_freed_memory()
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')  # the highest resident size counts from now on
    resident = _read('/proc/self/status', r'^VmRSS:\s+(\d+) kB$')
    function()
    highest = _read('/proc/self/status', r'^VmHWM:\s+(\d+) kB$')
    return None if resident is None or highest is None else max(0, int(highest) - int(resident)) * 1024


def _read(file: str, pattern: str) -> str | None:
    """What Linux says of the machine or this process in a line of a file; None elsewhere."""
    with contextlib.suppress(OSError):
        found = re.search(pattern, Path(file).read_text(encoding='utf-8'), re.MULTILINE)
        return found and found[1].strip()
    return None


def measure_speed(job: Mapping[str, Any]) -> dict[str, Any]:
    """Latency and peak memory of a network at one size, and the multiplications that it takes.

    Args:
        job: `network`, `weights`, `param_key`, `size` (height, width), `runs`, `device`; `counts` false leaves out the
            multiplications.
    Returns:
        `parameters`, `macs`, `uncounted` (operators that are left out of them, with how often they were called),
        `seconds` of each run, `milliseconds` of the median, `peak_bytes` on top of the weights (None where the system
        does not tell), `threads`, `load` of the machine before.
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
    """Peak memory of a pass on top of the weights, after one on a small image.

    Args:
        job: `network`, `weights`, `param_key`, `size` (height, width), `device`.
    Returns:
        `peak_bytes`; None where the system does not tell.
    """
    device = find_device(job['device'])
    network = _load_any_size(job, device)
    image = torch.rand(1, input_channels(job['network']), *job['size'], device=device)
    with torch.inference_mode():
        return {'peak_bytes': peak_memory(lambda: network(image), device)}


def measure_quality(job: Mapping[str, Any]) -> dict[str, Any]:
    """Restore and measure every image of a dataset under a protocol.

    Args:
        job: `network` (None measures the unrestored images), `weights`, `param_key`, `dataset` (options), `protocol`,
            `metrics`, `bit_depth`, `device`, `kept` (how many images to keep), `folder` (where).
    Returns:
        `values`, by image and metric; `protocol`, in a line; `multiple`, of which the sizes had to be; `notes`;
        `kept`, the names of the images in the folder.
    """
    bit_depth, device = job.get('bit_depth') or 8, find_device(job['device'])
    protocol = read_protocol(job['protocol'], bit_depth)
    metrics = complete(protocol.metrics if job['metrics'] is None else job['metrics'], device, bit_depth)
    network = None if job['network'] is None else _load_any_size(job, device)
    dataset = _open_dataset(job['dataset'])
    notes: list[str] = []
    values: dict[str, dict[str, float]] = {}
    kept: list[str] = []  # the first ones by name: some datasets list their files in no order
    for number in range(len(dataset)):
        path, stage, failures = name_of(dataset, number), 'unreadable', []
        try:
            sample = dataset[number]
            path, stage = sample['lq_path'], 'network'
            if 'gt' not in sample:
                raise OptionError(f'{job["dataset"]["name"]} has no clean images that results could be measured by')
            lq, gt = sample['lq'][None].float(), sample['gt'][None].float()
            with torch.inference_mode():
                restored = lq.clamp(0, 1) if network is None else protocol.restore(network, lq, on_note=notes.append)
            stage = 'metric'
            measured = protocol.measure(restored[0], gt[0].clamp(0, 1), metrics, failures.append)
        except Exception as error:
            failures.append(f'{class_of_failure(error, stage)}: {one_line(error)}')
            measured = dict.fromkeys(metrics, math.nan)
        name = distinct(printable(Path(path).stem), values)
        values[name] = measured  # what is not a number for one network is left out for all
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
    """Where a restored image is kept, or the clean one that belongs to it."""
    return Path(folder, 'clean' if is_clean else 'restored', file_name(name, '.png'))


def _load_any_size(job: Mapping[str, Any], device: torch.device) -> nn.Module:
    """The network of a job, padding its input where it does not take every size, after a pass on a small image."""
    network = load_network(job['network'], job['weights'], job['param_key']).to(device)
    channels = input_channels(job['network'])
    required_multiple(network, channels)  # refuses networks that enlarge images
    network = any_size(network, channels)
    with torch.inference_mode():  # what libraries take at their first call is no cost of the network
        network(torch.rand(1, channels, 64, 64, device=device))
    return network


def _open_dataset(options: Mapping[str, Any]) -> Any:
    import basicsr.data  # noqa: F401 - registers the toolbox's datasets
    from basicsr.utils.registry import DATASET_REGISTRY

    return DATASET_REGISTRY.get(options['type'])(dict(options))


def _keep(path: Path, image: Tensor) -> None:
    """Write the middle of an image, [3, H, W] in [0, 1], as PNG."""
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
    """Do the job that the command line names."""
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
