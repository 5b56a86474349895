"""Measures one thing of one network: `python -m ast_plugin.compare.measure JOB.json`, a fresh process each time.

The job names the file that the record of what was measured goes to.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ast_plugin.compare.machine import load_average, peak_memory
from ast_plugin.errors import DataError, PluginError
from ast_plugin.files import write_file

_WARM_UP = 2  # runs before those that are timed
_MOST_SECONDS = 60.0  # for timed runs, as soon as there are three
_FEWEST_RUNS = 3
_PICTURE_SIDE = 768  # longest side of the pictures that are kept for the report


def measure_speed(job: Mapping[str, Any]) -> dict[str, Any]:
    """Latency and peak memory of a network at one size, and the multiplications that it takes.

    Args:
        job: `network`, `weights`, `param_key`, `channels`, `size` (height, width), `runs`, `device`; `counts` false
            leaves out the multiplications.
    Returns:
        `parameters`, `macs`, `uncounted` (operators that are left out of them, with how often they were called),
        `seconds` of each run, `peak_bytes` on top of the weights (None where the system does not tell), `threads`,
        `load` of the machine before.
    """
    import torch

    from ast_plugin.archs.networks import load_network
    from ast_plugin.evaluation.cost import count_macs
    from ast_plugin.evaluation.restorer import find_device
    from ast_plugin.ops import frozen_weights

    device = find_device(job['device'])
    network = load_network(job['network'], job['weights'], job['param_key']).to(device)
    network = _fitted(network, job)
    record: dict[str, Any] = {
        'parameters': sum(parameter.numel() for parameter in network.parameters()),
        'threads': torch.get_num_threads(),
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu',
        'load': load_average(),
    }
    image = torch.rand(1, job['channels'], *job['size'], device=device)
    with torch.inference_mode(), frozen_weights():
        record['peak_bytes'] = peak_memory(lambda: network(image), device)
        record['seconds'] = _seconds(network, image, job['runs'])
    if job.get('counts', True):
        record['macs'], record['uncounted'] = count_macs(network, image)
    return record


def measure_memory(job: Mapping[str, Any]) -> dict[str, Any]:
    """Peak memory of a pass on a CPU on top of the weights, after one on a small picture.

    Args:
        job: `network`, `weights`, `param_key`, `channels`, `size` (height, width).
    Returns:
        `peak_bytes`; None where the system does not tell.
    """
    import torch

    from ast_plugin.archs.networks import load_network

    network = _fitted(load_network(job['network'], job['weights'], job['param_key']), job)
    with torch.inference_mode():
        image = torch.rand(1, job['channels'], *job['size'])
        return {'peak_bytes': peak_memory(lambda: network(image))}


def measure_quality(job: Mapping[str, Any]) -> dict[str, Any]:
    """Restore and measure every picture of a dataset under a protocol.

    Args:
        job: `network` (None measures the unrestored pictures), `weights`, `param_key`, `dataset` (options), `protocol`,
            `metrics`, `device`, `pictures` (how many to keep), `folder` (where).
    Returns:
        `values`, by picture and metric; `protocol`, in a line; `multiple`, of which the sizes had to be; `notes`;
        `pictures`, the names of those kept.
    """
    import torch

    from ast_plugin.archs.networks import load_network
    from ast_plugin.evaluation.protocols import read_protocol
    from ast_plugin.evaluation.restorer import find_device
    from ast_plugin.evaluation.results import distinct

    protocol = read_protocol(job['protocol'])
    dataset = _dataset(job['dataset'])
    network, notes = None, []
    if job['network'] is not None:
        network = load_network(job['network'], job['weights'], job['param_key']).to(find_device(job['device']))
        network = _fitted(network, job)
    values: dict[str, dict[str, float]] = {}
    kept: list[str] = []  # the first ones by name: some datasets list their files in no order
    for number in range(len(dataset)):
        sample = dataset[number]
        if 'gt' not in sample:
            raise DataError(f'{job["dataset"]["name"]} has no clean pictures that results could be measured by')
        name = distinct(Path(sample['lq_path']).stem, values)
        lq, gt = sample['lq'][None].float(), sample['gt'][None].float()
        with torch.inference_mode():
            restored = lq.clamp(0, 1) if network is None else protocol.restore(network, lq, on_note=notes.append)
        values[name] = protocol.measure(restored[0], gt[0].clamp(0, 1), job['metrics'])
        kept = sorted([*kept, name])[: job['pictures']]
        if name in kept:
            _keep(picture_path(job['folder'], name), restored[0])
            if network is None:
                _keep(picture_path(job['folder'], name, is_clean=True), gt[0])
    return {
        'values': dict(sorted(values.items())),
        'protocol': protocol.describe(),
        'multiple': getattr(network, 'multiple', 1),
        'notes': list(dict.fromkeys(notes)),
        'pictures': kept,
    }


KINDS = {'speed': measure_speed, 'memory': measure_memory, 'quality': measure_quality}


def picture_path(folder: str | Path, name: str, is_clean: bool = False) -> Path:
    """Where a picture is kept, or the clean one that belongs to it."""
    return Path(folder, 'clean' if is_clean else 'restored', f'{name}.png')


def _fitted(network: Any, job: Mapping[str, Any]) -> Any:
    """The network, padding what it gets where it takes not every size."""
    from ast_plugin.archs.networks import AnySize, required_multiple

    multiple = required_multiple(network, job['channels'])
    return network if multiple == 1 else AnySize(network, multiple).eval()


def _dataset(options: Mapping[str, Any]) -> Any:
    import basicsr.data  # noqa: F401 - registers the toolbox's datasets
    from basicsr.utils.registry import DATASET_REGISTRY

    return DATASET_REGISTRY.get(options['type'])(dict(options))


def _keep(path: Path, image: Any) -> None:
    """Write the middle of a picture, [3, H, W] in [0, 1], as PNG."""
    import numpy as np
    from PIL import Image

    height, width = image.shape[-2:]
    top, left = max(0, height - _PICTURE_SIDE) // 2, max(0, width - _PICTURE_SIDE) // 2
    part = image[..., top : top + _PICTURE_SIDE, left : left + _PICTURE_SIDE]
    array = (part.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(array if array.shape[2] == 3 else array[..., 0])).save(path)


def _seconds(network: Any, image: Any, runs: int) -> list[float]:
    import torch

    taken: list[float] = []
    for number in range(_WARM_UP + runs):
        start = time.perf_counter()
        network(image)
        if image.device.type == 'cuda':
            torch.cuda.synchronize(image.device)
        if number >= _WARM_UP:
            taken.append(round(time.perf_counter() - start, 6))
        if len(taken) >= _FEWEST_RUNS and sum(taken) > _MOST_SECONDS:
            break
    return taken


def main() -> int:
    """Do the job that the command line names."""
    import ast_plugin  # noqa: F401 - registers
    from ast_plugin.plugins import load_plugins

    load_plugins()
    job = json.loads(Path(sys.argv[1]).read_text(encoding='utf-8'))
    try:
        record = KINDS[job['kind']](job)
    except PluginError as error:
        print(f'basicsr: error: {error}', file=sys.stderr)
        return 2
    content = json.dumps(record).encode()
    write_file(job['record'], content)
    return 0


if __name__ == '__main__':
    sys.exit(main())
