"""What the benchmarks of backends share: turns, medians, fresh processes for memory, floors, and the table."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Line = dict[str, Any]
_MEGABYTE = 2**20


def take_turns(functions: Mapping[Any, Callable[[], object]], turns: int) -> dict[Any, Line]:
    """Call functions in turn, so that what else the machine does hurts them alike.

    Returns:
        For each `seconds` of every call, and `cpu_seconds`, which all threads of this process spent: on a busy machine
        they tell more.
    """
    taken: dict[Any, Line] = {key: {'seconds': [], 'cpu_seconds': []} for key in functions}
    for _ in range(turns):
        for key, function in functions.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            function()
            taken[key]['seconds'].append(round(time.perf_counter() - start, 5))
            taken[key]['cpu_seconds'].append(round(time.process_time() - cpu_start, 5))
    return taken


@contextlib.contextmanager
def computing(backend: str, precision: str, device: str = 'cpu') -> Iterator[None]:
    """Compute by a backend, in `fp32` or under bfloat16's autocast."""
    import torch

    from ast_plugin import ops

    with ops.use_backend(backend), torch.autocast(device, torch.bfloat16, enabled=precision == 'bf16'):
        yield


def machine_rates(turns: int = 5) -> dict[str, float]:
    """Operations a second of the fastest matrix product there is, by precision, and bytes a second of a copy.

    The best of `turns`: a floor is what the machine can do when nothing else runs.
    """
    import torch

    from ast_plugin.ops import fused_cpu_kernels as kernels

    rates = {}
    with torch.inference_mode():
        for precision, dtype in (('fp32', torch.float32), ('bf16', torch.bfloat16)):
            x, weight = torch.randn(4096, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
            for name, product in (('', kernels.linear), ('_torch', torch.nn.functional.linear)):
                seconds = take_turns({0: lambda product=product, x=x, w=weight: product(x, w)}, 1 + turns)[0]['seconds']
                rates[f'{precision}{name}'] = 2 * 4096 * 1024 * 1024 / min(seconds)
        source, target = torch.randn(2, 2**24)
        rates['copy'] = source.nbytes / min(take_turns({0: lambda: target.copy_(source)}, 1 + turns)[0]['seconds'])
    return rates


def add_ratios(lines: list[Line]) -> None:
    """Add to each line of a case how it compares with the case's first line."""
    first: dict[str, Line] = {}
    for line in lines:
        base = first.setdefault(line['case'], line)
        if 'seconds' not in line:
            continue
        line['median'], line['fastest'] = statistics.median(line['seconds']), min(line['seconds'])
        line['faster'] = base['median'] / line['median']
        line['cpu'] = statistics.median(line['cpu_seconds'])
        line['less_cpu'] = base['cpu'] / line['cpu']
        if line.get('peak_bytes') and base.get('peak_bytes'):
            line['of_memory'] = line['peak_bytes'] / base['peak_bytes']
        if line.get('floor'):
            line['of_floor'] = line['floor'] / line['fastest']


def table(lines: list[Line]) -> str:
    """A Markdown table of lines; × is against the first line of the case, and a line that was not run says why."""
    head = [
        'what',
        'path',
        'median',
        'fastest',
        '× faster',
        'CPU time',
        '× less',
        'peak MB',
        '× memory',
        'of the floor',
        'off by',
    ]
    rows = [head, ['---', '---'] + ['---:'] * (len(head) - 2)]
    for line in lines:
        row = [line['case'], line['path']]
        if 'skipped' in line:
            rows.append([*row, line['skipped'], *[''] * (len(head) - 3)])
            continue
        cells = [
            (line.get('median'), 1, _seconds),
            (line.get('fastest'), 1, _seconds),
            (line.get('faster'), 1, '{:.2f}'.format),
            (line.get('cpu'), 1, _seconds),
            (line.get('less_cpu'), 1, '{:.2f}'.format),
            (line.get('peak_bytes'), _MEGABYTE, '{:.0f}'.format),
            (line.get('of_memory'), 1, '{:.2f}'.format),
            (line.get('of_floor'), 1, '{:.0%}'.format),
            (line.get('error'), 1, '{:.0e}'.format),
        ]
        rows.append(row + ['' if value is None else text(value / unit) for value, unit, text in cells])
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def _seconds(value: float) -> str:
    return f'{value:.2f} s' if value >= 1 else f'{value * 1000:.1f} ms'
