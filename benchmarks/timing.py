"""Timing that several benchmarks share: calls that take turns, rates of the machine, ratios between lines."""

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

NO_GPU = 'torch finds no GPU here'

Compute = Callable[[], Tensor]


def take_turns(
    functions: Mapping[Any, Callable[[], object]], turns: int, probe: Callable[[], float] | None = None
) -> dict[Any, Line]:
    """Call functions in turn, so that other work of the machine slows them alike.

    Args:
        functions: by name.
        turns: how often each is called.
        probe: tells between calls how fast the machine is at the moment, see `speed_probe`.
    Returns:
        For each `seconds` of every call, `cpu_seconds`, which all threads of this process spent: on a busy machine they
        tell more; and `speeds`, the better of those that the probe found before and after.
    """
    taken: dict[Any, Line] = {name: {'seconds': [], 'cpu_seconds': [], 'speeds': []} for name in functions}
    probe = probe or (lambda: 1.0)
    before = probe()
    for _ in range(turns):
        for name, function in functions.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            function()
            taken[name]['seconds'].append(round(time.perf_counter() - start, 5))
            taken[name]['cpu_seconds'].append(round(time.process_time() - cpu_start, 5))
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
    """Time paths that compute one thing; one that fails has `skipped`, which says why.

    Args:
        case: what is computed.
        paths: functions that prepare the computation. The others are compared with the path `reference`.
        turns: timed calls of each, after one that compiles and allocates.
        peak: measures the memory of a path's computation.
        probe: see `take_turns`.
    Returns:
        By path `seconds`, `cpu_seconds`, `speeds`, `peak_bytes`, and `error` against the reference.
    """
    lines: dict[str, Line] = {path: {'case': case, 'path': path} for path in paths}
    computations, outputs = {}, {}
    for path, prepare in paths.items():
        try:
            compute = prepare()
            outputs[path] = compute().float()
            lines[path]['peak_bytes'] = peak(path, compute)
            computations[path] = compute
        except (
            PluginError,
            RuntimeError,
        ) as error:  # too little memory, or no compiler or package
            lines[path]['skipped'] = f'failed: {first_line(error)[:120]}'
    for path, taken in take_turns(computations, turns, probe).items():
        lines[path] |= taken
        if 'reference' in computations:
            reference = outputs['reference']
            lines[path]['error'] = float((outputs[path] - reference).norm() / reference.norm())
    return lines


def add_ratios(lines: Sequence[Line]) -> None:
    """Add to each measured line of a case how it compares with the first one."""
    measured = [line for line in lines if 'seconds' in line]
    for line in measured:
        line['median'], line['fastest'] = statistics.median(line['seconds']), min(line['seconds'])
        line['cpu'] = statistics.median(line['cpu_seconds'])
        first = measured[0]
        line['faster'], line['less_cpu'] = first['median'] / line['median'], first['cpu'] / line['cpu']
        if line.get('peak_bytes') and first.get('peak_bytes'):
            line['of_memory'] = line['peak_bytes'] / first['peak_bytes']
        if line.get('floor'):
            # Each call against a floor of its own: other tenants of the machine slow both.
            moments = zip(line['seconds'], line['speeds'], strict=True)
            line['of_floor'] = statistics.median(line['floor'] / speed / seconds for seconds, speed in moments)


def synchronized(compute: Compute, device: str) -> Compute:
    """The function, returning when the device is done."""

    def call() -> Tensor:
        result = compute()
        if device == 'cuda':
            torch.cuda.synchronize()
        return result

    return call


def machine_rates(device: str = 'cpu') -> dict[str, float]:
    """Operations a second of the fastest matrix product by precision, and bytes a second of a copy.

    The best of five calls: a floor is what the machine can do when nothing else runs.
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
    """A function that returns the rate of a product at the moment as a share of `machine_rates`; None on CUDA."""
    if device != 'cpu':
        return None
    x, weight = torch.randn(4096, 1024), torch.randn(1024, 1024)

    def probe() -> float:
        with torch.inference_mode():
            return 2 * 4096 * 1024**2 / _fastest(lambda: operators.linear(x, weight), device, 3) / rates['fp32']

    return probe


def _fastest(compute: Compute, device: str, calls: int = 6) -> float:
    seconds = take_turns({0: synchronized(compute, device)}, calls)[0]['seconds']
    return max(min(seconds[1:]), 1e-9)  # the first call prepares the library; clocks have steps


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a process of its own, in which nothing was allocated before."""
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
        return pool.submit(function, *arguments).result()
