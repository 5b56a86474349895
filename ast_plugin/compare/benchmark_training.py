"""What each switch of training costs and saves: iterations per second and peak memory, against float32.

  python tools/benchmark.py train
  python tools/benchmark.py train --net AST_XS --size 64 --iters 3 --json benchmarks/train_cpu.json

A training step is everything from a batch on the device to new weights: mixing, network, losses, gradients, optimiser,
moving average. All switches start from the same weights. They take turns, one step each, so that what else the machine
does hurts them alike; a line's time is the median of its steps. Memory is what the first two steps need on top of the
network's weights: on a CPU by the resident size of a fresh process, on CUDA as torch allocates it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ast_plugin.compare import benchmark_records
from ast_plugin.compare.resident_memory import resident_growth
from ast_plugin.errors import OptionError, PluginError, first_line

REFERENCE = 'fp32'
SWITCHES: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    'bf16': {'precision': 'bf16'},
    'fp16': {'precision': 'fp16'},
    'channels_last': {'channels_last': True},
    'compile': {'compile': True},
    'accumulate: 2': {'accumulate': 2},
    'gradient_checkpointing': {'gradient_checkpointing': True},
    'fused': {'optim_g': {'fused': True}},
    'clip_grad_norm': {'clip_grad_norm': 0.01},
    'ema_decay': {'ema_decay': 0.999},
    'mixing: mixup': {'mixing': {'type': 'mixup', 'start_epoch': 1}},
    'mixing: cutmix': {'mixing': {'type': 'cutmix', 'start_epoch': 1}},
}
_DEFAULTS = {
    'cpu': {'net': 'AST_T', 'batch': 2, 'size': 128, 'iters': 5},
    'cuda': {'net': 'AST_B', 'batch': 8, 'size': 256, 'iters': 20},
}
_WARM_UP = 2  # steps; the first ones compile, allocate, and make the optimiser's state
_MEGABYTE = 2**20


@dataclass(frozen=True)
class Settings:
    """What is trained, and where.

    Attributes:
        net: registered name of a network that restores at scale 1.
        batch: images a step.
        size: side of the square images in pixels.
        iters: steps that are timed.
        device: `cpu` or `cuda`.
    """

    net: str
    batch: int
    size: int
    iters: int
    device: str


Step = Callable[[int], None]
Line = dict[str, Any]


def prepare_step(settings: Settings, train: Mapping[str, Any]) -> Step:
    """Build network, optimiser and all as `RestorationModel` does, without its files and logs.

    Args:
        settings: the same weights and images for the same settings.
        train: switches, as in an option file.
    Returns:
        A function that makes the step of an iteration, counted from 1, and waits for it to be done.
    Raises:
        OptionError: if the network is not known, or a switch does not apply.
    """
    import torch
    from basicsr.utils.registry import ARCH_REGISTRY

    from ast_plugin.losses.restoration_loss import ASTCharbonnierLoss
    from ast_plugin.models import mixup, network_switches
    from ast_plugin.models.optimizers import build_optimizer
    from ast_plugin.models.training_step import Precision, TrainingStep, update_average

    device = torch.device(settings.device)
    torch.manual_seed(0)
    network = network_switches.apply(ARCH_REGISTRY.get(settings.net)().train(), train).to(device)
    average = ARCH_REGISTRY.get(settings.net)().to(device).eval() if train.get('ema_decay') else None
    options = {'lr': 1e-4, 'weight_decay': 0.02, **train.get('optim_g', {})}
    optimizer = build_optimizer('AdamW', network.parameters(), **options)
    precision = Precision(train.get('precision', 'fp32'), device)
    step = TrainingStep(network, optimizer, precision, train, batch=settings.batch)
    mixing = mixup.from_options(train, seed=0, rank=0)
    loss = ASTCharbonnierLoss()
    lq, gt = torch.rand(2, settings.batch, 3, settings.size, settings.size, device=device)

    def make_step(iteration: int) -> None:
        images = mixing(lq, gt, iteration) if mixing is not None else (lq, gt)
        step(*images, lambda output, target: {'l_pix': loss(output, target)}, iteration)
        if average is not None:
            update_average(average, network, train['ema_decay'])
        if device.type == 'cuda':
            torch.cuda.synchronize(device)

    return make_step


def measure(settings: Settings, switches: Mapping[str, Mapping[str, Any]], say: Callable[[str], None]) -> list[Line]:
    """Measure switches, taking turns.

    Args:
        settings: for all of them.
        switches: options of `train` by name.
        say: told what is going on.
    Returns:
        A line for each: `switch`, `iterations_per_second`, `seconds` of every step, `peak_bytes`; or `failed`, why.
    """
    lines: dict[str, Line] = {name: {'switch': name, 'train': dict(train)} for name, train in switches.items()}
    steps: dict[str, Step] = {}
    for name, train in switches.items():
        say(f'{settings.device}: {name}')
        try:
            lines[name]['peak_bytes'], step = _peak_bytes(settings, train)
            steps[name] = step or prepare_step(settings, train)
            for iteration in range(1, _WARM_UP + 1):
                steps[name](iteration)
        # A switch that does not work here is a line of the table.
        except (PluginError, RuntimeError) as error:
            steps.pop(name, None)
            lines[name]['failed'] = f'{type(error).__name__}: {first_line(error)}'
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(settings.iters):
        say(f'{settings.device}: turn {turn + 1} of {settings.iters}')
        for name, step in steps.items():
            start = time.perf_counter()
            step(_WARM_UP + turn + 1)
            seconds[name].append(time.perf_counter() - start)
    for name, taken in seconds.items():
        lines[name]['seconds'] = [round(value, 5) for value in taken]
        lines[name]['iterations_per_second'] = 1 / statistics.median(taken)
    return list(lines.values())


def _peak_bytes(settings: Settings, train: Mapping[str, Any]) -> tuple[int | None, Step | None]:
    """Memory of the first steps; on CUDA also what made them, which need not be built again."""
    if settings.device == 'cuda':
        import torch

        step = prepare_step(settings, train)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for iteration in range(1, _WARM_UP + 1):
            step(iteration)
        return torch.cuda.max_memory_allocated() - before, step
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as fresh:
        return fresh.submit(_resident_growth, settings, dict(train)).result(), None


def _resident_growth(settings: Settings, train: Mapping[str, Any]) -> int | None:
    """By how much the first steps let this process grow; None where the system does not tell."""
    step = prepare_step(settings, train)

    def begin() -> None:
        for iteration in range(1, _WARM_UP + 1):
            step(iteration)

    return resident_growth(begin)


def table(results: Mapping[str, list[Line]]) -> str:
    """A Markdown table of measured lines by device; × is against float32, and a device without lines stays empty."""
    devices = list(_DEFAULTS)
    head = ['switch']
    for device in devices:
        head += [f'{device.upper()} it/s', '×', f'{device.upper()} peak MB', '×']
    rows = [head, ['---'] + ['---:'] * (len(head) - 1)]
    by_switch = {device: {line['switch']: line for line in results.get(device) or []} for device in devices}
    for name in dict.fromkeys(name for lines in by_switch.values() for name in lines):
        row = [name]
        for lines in by_switch.values():
            row += _cells(lines.get(name), lines.get(REFERENCE))
        rows.append(row)
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def _cells(line: Line | None, reference: Line | None) -> list[str]:
    if line is None:
        return [''] * 4
    if 'failed' in line:
        return ['does not work here', '', '', '']
    cells = []
    for key, unit, digits in (('iterations_per_second', 1, 3), ('peak_bytes', _MEGABYTE, 0)):
        value, base = line.get(key), (reference or {}).get(key)
        cells += [
            '' if value is None else f'{value / unit:.{digits}f}',
            '' if value is None or not base else f'{value / base:.2f}',
        ]
    return cells


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `benchmark.py train`."""
    parser.add_argument(
        '--device', choices=[*_DEFAULTS, 'all'], default='all', help='all: the GPU too, if there is one'
    )
    parser.add_argument('--net', help='registered network; AST_T on a CPU and AST_B on CUDA if not given')
    parser.add_argument('--batch', type=int, help='images a step; 2 on a CPU, 8 on CUDA')
    parser.add_argument('--size', type=int, help='side of the images; 128 on a CPU, 256 on CUDA')
    parser.add_argument('--iters', type=int, help='timed steps of each switch; 5 on a CPU, 20 on CUDA')
    parser.add_argument('--switches', nargs='+', choices=list(SWITCHES), metavar='NAME', help=', '.join(SWITCHES))
    parser.add_argument('--json', type=Path, metavar='FILE', help='write what was measured, machine and versions')


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write the record."""
    import basicsr.archs  # noqa: F401 - registers, ours too
    import torch

    given = {key: getattr(args, key) for key in ('net', 'batch', 'size', 'iters') if getattr(args, key) is not None}
    if any(value < 1 for value in given.values() if isinstance(value, int)):
        raise OptionError('--batch, --size and --iters must be 1 or more')
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise OptionError('--device cuda: torch finds no GPU here')
    wanted = [device for device in _DEFAULTS if args.device in (device, 'all')]
    names = dict.fromkeys([REFERENCE, *(args.switches or SWITCHES)])
    switches = {name: SWITCHES[name] for name in names}
    record: dict[str, Any] = {'benchmark': 'train', 'settings': {}, 'results': {}}
    for device in wanted:
        is_there = device == 'cpu' or torch.cuda.is_available()
        settings = Settings(**{**_DEFAULTS[device], **(given if is_there else {})}, device=device)
        record['settings'][device] = asdict(settings)
        record['results'][device] = measure(settings, switches, _say) if is_there else None
    print(table(record['results']))
    for line in _remarks(record):
        print(line)
    if args.json is not None:
        benchmark_records.write(args.json, record)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _remarks(record: Mapping[str, Any]) -> list[str]:
    """Under the table: settings, what failed, and why a column is empty."""
    remarks = ['']
    for device, settings in record['settings'].items():
        what = f'{device.upper()}: {settings["net"]}, batch {settings["batch"]} of {settings["size"]}²'
        lines = record['results'][device]
        if lines is None:
            remarks.append(f'{what}: not measured, no GPU is at hand')
            continue
        remarks.append(f'{what}, {settings["iters"]} steps each')
        remarks += [f'{device.upper()}, {line["switch"]}: {line["failed"]}' for line in lines if 'failed' in line]
    return remarks
