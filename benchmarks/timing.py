"""Timing utilities shared by the benchmarks: alternating calls, peak rates of the machine, and ratios between rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ast_plugin.errors import PluginError, first_line
from ast_plugin.ops.cpu import operators
from benchmarks.records import Line

NO_GPU = 'PyTorch found no GPU'

Compute = Callable[[], Tensor]


def take_turns(
    functions: Mapping[Any, Callable[[], object]], turns: int, probe: Callable[[], float] | None = None
) -> dict[Any, Line]:
    """Call functions alternately, so that other load on the machine affects them equally.

    Args:
        functions: functions by name.
        turns: number of calls of each.
        probe: called between calls to measure the current speed of the machine, see `speed_probe`.
    Returns:
        For each function `seconds` of every call; `cpu_seconds` of all threads, which are more reliable on a busy
        machine; and `speeds`, the maximum of the probe before and after each call.
    """
    taken: dict[Any, Line] = {name: {'seconds': [], 'cpu_seconds': [], 'speeds': []} for name in functions}
    probe = probe or (lambda: 1.0)
    before = probe()
    for _ in range(turns):
        for name, function in functions.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            function()
            taken[name]['seconds'].append(round(time.perf_counter() - start, 6))
            taken[name]['cpu_seconds'].append(round(time.process_time() - cpu_start, 6))
            after = probe()
            taken[name]['speeds'].append(round(max(before, after), 3))
            before = after
    return taken


def measure_paths(
    case: str,
    paths: Mapping[str, Callable[[], Compute]],
    turns: int,
    peak: Callable[[str, Compute], int | None] = lambda path, compute: None,
    probe: Callable[[], float] | None = None,
) -> dict[str, Line]:
    """Time several paths of the same computation; a failed path has the reason in `skipped`.

    Args:
        case: label of the computation.
        paths: functions that prepare the computation, by path. Errors are relative to the path `reference`.
        turns: timed calls of each path, after an untimed one that compiles and allocates.
        peak: returns the peak memory of a path.
        probe: see `take_turns`.
    Returns:
        `seconds`, `cpu_seconds`, `speeds`, `peak_bytes`, and relative `error` to the reference, by path.
    """
    lines: dict[str, Line] = {path: {'case': case, 'path': path} for path in paths}
    computations, outputs = {}, {}
    for path, prepare in paths.items():
        try:
            compute = prepare()
            outputs[path] = compute().float()
            lines[path]['peak_bytes'] = peak(path, compute)
            computations[path] = compute
        except (PluginError, RuntimeError) as error:  # out of memory, missing compiler or package
            lines[path]['skipped'] = f'failed: {first_line(error)[:120]}'
    for path, taken in take_turns(computations, turns, probe).items():
        lines[path] |= taken
        if 'reference' in computations:
            reference = outputs['reference']
            lines[path]['error'] = float((outputs[path] - reference).norm() / reference.norm())
    return lines


def add_ratios(lines: Sequence[Line]) -> None:
    """Add medians and ratios to the first measured row of a case to each of its rows."""
    measured = [line for line in lines if 'seconds' in line]
    for line in measured:
        line['median'], line['fastest'] = statistics.median(line['seconds']), min(line['seconds'])
        line['cpu'] = statistics.median(line['cpu_seconds'])
        first = measured[0]
        line['faster'], line['less_cpu'] = first['median'] / line['median'], first['cpu'] / line['cpu']
        if line.get('peak_bytes') and first.get('peak_bytes'):
            line['of_memory'] = line['peak_bytes'] / first['peak_bytes']
        if line.get('floor'):
            # The roofline is scaled to the speed at each call, which other load on the machine reduces.
            moments = zip(line['seconds'], line['speeds'], strict=True)
            line['of_floor'] = statistics.median(line['floor'] / speed / seconds for seconds, speed in moments)


def synchronized(compute: Compute, device: str) -> Compute:
    """Wrap a function so that it returns after the device has finished."""

    def call() -> Tensor:
        result = compute()
        if device == 'cuda':
            torch.cuda.synchronize()
        return result

    return call


def machine_rates(device: str = 'cpu') -> dict[str, float]:
    """Return FLOP/s of the fastest matrix product by precision, and bytes/s of a copy.

    The best of five calls, as the roofline refers to an idle machine.
    """
    side = 8192 if device == 'cuda' else 1024
    products = {'': functional.linear}
    if device == 'cpu':
        products = {'': operators.linear, '_torch': functional.linear}
    rates = {}
    with torch.inference_mode():
        for precision, dtype in (('fp32', torch.float32), ('bf16', torch.bfloat16)):
            x, weight = torch.randn(4 * side, side).to(device, dtype), torch.randn(side, side).to(device, dtype)
            for name, product in products.items():
                seconds = _fastest(lambda product=product, x=x, weight=weight: product(x, weight), device)
                rates[f'{precision}{name}'] = 2 * 4 * side**3 / seconds
        source, target = torch.randn(2, 2**24).to(device)
        rates['copy'] = source.nbytes / _fastest(lambda: target.copy_(source), device)
    return rates


def speed_probe(rates: Mapping[str, float], device: str = 'cpu') -> Callable[[], float] | None:
    """Return a function that measures the current matrix product rate relative to `machine_rates`; None on CUDA."""
    if device != 'cpu':
        return None
    x, weight = torch.randn(4096, 1024), torch.randn(1024, 1024)

    def probe() -> float:
        with torch.inference_mode():
            return 2 * 4096 * 1024**2 / _fastest(lambda: operators.linear(x, weight), device, 3) / rates['fp32']

    return probe


def _fastest(compute: Compute, device: str, calls: int = 6) -> float:
    seconds = take_turns({0: synchronized(compute, device)}, calls)[0]['seconds']
    return max(min(seconds[1:]), 1e-9)  # the first call is a warm-up; clock resolution is finite


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module-level function in a new process, without earlier memory allocations."""
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
        return pool.submit(function, *arguments).result()
