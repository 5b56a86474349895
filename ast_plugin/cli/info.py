"""Report parameters, MACs, peak memory and backend of the network of an option file.

  basicsr info -opt AST_derain --size 480x720
  basicsr info -opt my.yml --size 512x512 --run

Peak memory is extrapolated from forward passes of 256x256 and 512x512 images in separate processes (512x512 and
1024x1024 for larger images, if these fit in memory). --run measures time and memory at the requested size. No file is
written.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

from ast_plugin.cli import commands
from ast_plugin.compare.child import ChildFailed, run_job
from ast_plugin.errors import OptionError
from ast_plugin.names import say

_MOST_PIXELS = 2**26
_PROBES = ((256, 256), (512, 512))
# glibc's allocator keeps freed blocks of up to 32 MB. Larger images therefore need less memory per pixel and cannot be
# extrapolated from small images alone.
_LARGE_PROBE = (1024, 1024)
_LARGE = 512 * 768
_RUNS = 3
_MEBIBYTE = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr info`."""
    commands.add_file_arguments(parser)
    parser.add_argument(
        '--size', default='256x256', metavar='HxW', help='image height and width in pixels (default: %(default)s)'
    )
    parser.add_argument('--weights', metavar='FILE', help='load this weights file and check that it fits the network')
    parser.add_argument('--param-key', metavar='KEY', help='key of the weights in a .pth file, such as params_ema')
    parser.add_argument('--run', action='store_true', help='run the network on an image of this size and measure it')


def run(args: argparse.Namespace) -> int:
    """Print the properties of the network."""
    size = parse_size(args.size)
    loaded = commands.read_run(args, is_train=None)
    stage = loaded.stages[0]  # all stages share one network
    options = stage.opt.get('network_g')
    if not isinstance(options, dict) or 'type' not in options:
        raise OptionError(f'{loaded.source(stage)}: expected network_g with a type and arguments')
    import torch

    from ast_plugin import ops
    from ast_plugin.archs.blocks import FEED_FORWARDS, WindowAttention
    from ast_plugin.archs.networks import any_size, input_channels, load_network, required_multiple
    from ast_plugin.devices import describe_device, find_device
    from ast_plugin.evaluation.cost import available_bytes, count_macs_of_size

    weights = None if args.weights is None else str(Path(os.path.expanduser(args.weights)))
    channels = input_channels(options)
    device = find_device(stage.opt.get('device'))
    job = {'network': options, 'weights': weights, 'param_key': args.param_key, 'device': str(device)}
    try:
        network = load_network(options, weights, args.param_key, functools.partial(_print, 'weights'))
        required_multiple(network, channels)  # rejects networks that enlarge images
    except OptionError as error:
        raise OptionError(f'{loaded.source(stage)}: network_g: {error}') from error
    network = any_size(network, channels)
    multiple = getattr(network, 'size_multiple', 1)
    _print('network', f'{options["type"]}, {loaded.source(stage)}')
    parameters = list(network.parameters())
    held = sum(parameter.nbytes for parameter in parameters) / _MEBIBYTE
    _print('parameters', f'{sum(parameter.numel() for parameter in parameters):,d}, {held:.1f} MiB')

    total, uncounted, is_scaled = count_macs_of_size(network, channels, size, multiple)
    names = ', '.join(sorted({name.partition('::')[2].strip('_') for name in uncounted})) or 'none'
    how = 'counted by mmengine on smaller images' if is_scaled else 'counted by mmengine'
    _print('MACs', f'{total / 1e9:.2f} G for {size[0]}x{size[1]}, {how}; operators not counted: {names}')

    backend = 'PyTorch operators: the network has no AST blocks'
    if any(isinstance(module, (WindowAttention, *FEED_FORWARDS.values())) for module in network.modules()):
        with torch.inference_mode():
            backend = str(ops.explain(torch.zeros(1, 8, 8, 1, device=device)))
    _print('backend', f'{backend}, on {describe_device(device)}')

    free = available_bytes(device)
    needed = predict_memory(job, size, multiple, free)
    if needed is None:
        _print('memory', 'not predicted: this system does not report the memory of a process')
    else:
        _print('memory', f'about {needed / _MEBIBYTE:.0f} MiB on top of the parameters, predicted from other sizes')
    if args.run:
        if needed is not None and needed > free:
            raise OptionError(
                f'--size {size[0]}x{size[1]}: requires about {needed / _MEBIBYTE:.0f} MiB, '
                f'{free / _MEBIBYTE:.0f} MiB are free: choose a smaller size, or restore in tiles'
            )
        _print('measured', _measure(job, size))
    return 0


def parse_size(text: str) -> tuple[int, int]:
    """Parse 'HxW' into (height, width)."""
    match = re.fullmatch(r'([0-9]{1,9})[x×]([0-9]{1,9})', text.strip().lower())
    height, width = map(int, match.groups()) if match else (0, 0)
    if not 0 < height * width <= _MOST_PIXELS:
        raise OptionError(
            f'--size {text}: expected height and width in pixels, such as 480x720, each 1 or more, with at most '
            f'{_MOST_PIXELS:,d} pixels in total'
        )
    return height, width


def predict_memory(job: dict[str, Any], size: tuple[int, int], multiple: int, free: int) -> int | None:
    """Predict the peak memory of a forward pass in addition to the weights, linearly from two measured sizes.

    Args:
        job: description of the network for `compare.measure`.
        size: height and width of the image.
        multiple: sides are padded to a multiple of this.
        free: available memory in bytes.
    Returns:
        Bytes, or None if the system does not report the memory of a process.
    """
    from ast_plugin.evaluation.cost import extrapolate, padded_pixels

    def measure(*probes: tuple[int, int]) -> dict[tuple[int, int], int | None]:
        return {probe: _run_child('memory', {**job, 'size': probe})['peak_bytes'] for probe in probes}

    peaks = measure(*_PROBES)
    if None in peaks.values():
        return None
    if padded_pixels(size, multiple) > _LARGE and extrapolate(_LARGE_PROBE, peaks, multiple) < free / 2:
        peaks = {_PROBES[1]: peaks[_PROBES[1]], **measure(_LARGE_PROBE)}
    return max(0, round(extrapolate(size, peaks, multiple)))


def _measure(job: dict[str, Any], size: tuple[int, int]) -> str:
    peak = _run_child('memory', {**job, 'size': size})['peak_bytes']
    record = _run_child('speed', {**job, 'size': size, 'runs': _RUNS, 'counts': False})
    memory = 'unknown memory' if peak is None else f'{peak / _MEBIBYTE:.0f} MiB on top of the parameters'
    load = '' if record['load'] is None else f', load {record["load"]}'
    median, count = statistics.median(record['seconds']), len(record['seconds'])
    return f'{median:.3f} s (median of {count}, {record["threads"]} threads{load}), {memory}'


def _run_child(kind: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run a measurement in a separate process and return its record."""
    with tempfile.TemporaryDirectory(prefix='basicsr_info_') as folder:
        try:
            return run_job({**job, 'kind': kind}, Path(folder, 'log'))
        except ChildFailed as error:
            height, width = job['size']
            raise OptionError(f'the network cannot run at {height}x{width}: {error}') from error


def _print(name: str, text: str) -> None:
    say(f'{name:10}  {text}')
