"""Iterations per second and peak memory of each training option, compared with float32.

  python tools/benchmark.py train
  python tools/benchmark.py train --net AST_XS --size 64 --iters 3 --json benchmarks/train_cpu.json

A training step covers everything from a batch on the device to updated weights: mixup, network, losses, gradients,
optimiser and moving average. All options start from the same weights and alternate step by step, so that other load on
the machine affects them equally; time is the median over steps. Memory is the peak of the first two steps, excluding
the network's weights: growth of the resident set size of a new process on a CPU, memory allocated by PyTorch on CUDA.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import basicsr.archs  # noqa: F401 - registers, ours too
import torch
from basicsr.utils.registry import ARCH_REGISTRY

from ast_plugin.compare.measure import peak_memory
from ast_plugin.errors import OptionError, PluginError, first_line
from ast_plugin.losses import ASTCharbonnierLoss
from ast_plugin.models import network_switches
from ast_plugin.models.optimizers import build_optimizer
from ast_plugin.models.training_step import Precision, TrainingStep, build_mixup, update_average
from benchmarks import records
from benchmarks.records import MEGABYTE, Line, say
from benchmarks.timing import NO_GPU, in_fresh_process, take_turns

REFERENCE = 'fp32'
SWITCHES: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    'bf16': {'precision': 'bf16'},
    'fp16': {'precision': 'fp16'},
    'channels_last': {'channels_last': True},
    'compile': {'compile': True},
    'cuda_graph': {'cuda_graph': True},
    'bf16, cuda_graph': {'precision': 'bf16', 'cuda_graph': True},
    'accumulate: 2': {'accumulate': 2},
    'gradient_checkpointing': {'gradient_checkpointing': True},
    'fused': {'optim_g': {'fused': True}},
    'clip_grad_norm': {'clip_grad_norm': 0.01},
    'ema_decay': {'ema_decay': 0.999},
    'mixing: mixup': {'mixing': {'type': 'mixup', 'start_epoch': 1}},
    'mixing: cutmix': {'mixing': {'type': 'cutmix', 'start_epoch': 1}},
}
_WARM_UP = 2  # untimed steps, which compile, allocate and create the optimiser state


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Attributes:
        net: registered name of a network of scale 1.
        batch: batch size.
        size: side of the square images in pixels.
        iters: number of timed steps.
        device: `cpu` or `cuda`.
    """

    net: str
    batch: int
    size: int
    iters: int
    device: str


DEFAULTS = {'cpu': Settings('AST_T', 2, 128, 5, 'cpu'), 'cuda': Settings('AST_B', 8, 256, 20, 'cuda')}


class Steps:
    """Training steps of `RestorationModel` without its files and logs.

    Args:
        settings: settings, which determine initial weights and images.
        train: options, as in the section `train` of an option file.
    Raises:
        OptionError: if an option is not applicable.
    """

    def __init__(self, settings: Settings, train: Mapping[str, Any]) -> None:
        self.train, self.device, self.iteration = train, torch.device(settings.device), 0
        torch.manual_seed(0)
        build = ARCH_REGISTRY.get(settings.net)
        self.network = network_switches.apply(build().train(), train).to(self.device)
        self.average = build().to(self.device).eval() if train.get('ema_decay') else None
        options = {'lr': 1e-4, 'weight_decay': 0.02, **train.get('optim_g', {})}
        optimizer = build_optimizer('AdamW', self.network.parameters(), **options)
        precision = Precision(train.get('precision', 'fp32'), self.device)
        self.step = TrainingStep(self.network, optimizer, precision, train, batch=settings.batch)
        self.mixing = build_mixup(train, seed=0, rank=0)
        self.loss = ASTCharbonnierLoss()
        self.images = torch.rand(2, settings.batch, 3, settings.size, settings.size, device=self.device)

    def __call__(self) -> None:
        """Run the next step and wait until it has finished."""
        self.iteration += 1
        lq, gt = self.images
        images = (lq, gt) if self.mixing is None else self.mixing(lq, gt, self.iteration)
        self.step(*images, lambda output, target: {'l_pix': self.loss(output, target)}, self.iteration)
        if self.average is not None:
            update_average(self.average, self.network, self.train['ema_decay'])
        if self.device.type == 'cuda':
            torch.cuda.synchronize()

    def warm_up(self) -> int | None:
        """Run the first steps; return their peak memory."""
        return peak_memory(lambda: [self() for _ in range(_WARM_UP)], self.device)


def measure(settings: Settings, switches: Mapping[str, Mapping[str, Any]]) -> list[Line]:
    """Measure training options, alternating between them.

    Args:
        settings: settings of all measurements.
        switches: options of `train` by name.
    Returns:
        One row each: `switch`, `iterations_per_second`, `seconds` of every step, `peak_bytes`; or the reason in
        `failed`.
    """
    lines: dict[str, Line] = {name: {'switch': name, 'train': dict(train)} for name, train in switches.items()}
    all_steps: dict[str, Steps] = {}
    for name, train in switches.items():
        say(f'{settings.device}: {name}')
        try:
            if settings.device == 'cpu':
                lines[name]['peak_bytes'] = in_fresh_process(peak_of_first_steps, settings, dict(train))
            steps = Steps(settings, train)
            peak = steps.warm_up()
            lines[name].setdefault('peak_bytes', peak)
            all_steps[name] = steps
        except (PluginError, RuntimeError) as error:  # reported in the table
            lines[name]['failed'] = f'{type(error).__name__}: {first_line(error)}'
    say(f'{settings.device}: {settings.iters} turns')
    for name, taken in take_turns(all_steps, settings.iters).items():
        lines[name]['seconds'] = taken['seconds']
        lines[name]['iterations_per_second'] = 1 / statistics.median(taken['seconds'])
    return list(lines.values())


def peak_of_first_steps(settings: Settings, train: Mapping[str, Any]) -> int | None:
    """Return the peak memory of the first steps in this process."""
    return Steps(settings, train).warm_up()


def table(results: Mapping[str, Sequence[Line] | None]) -> str:
    """Format rows by device as a Markdown table; × is the ratio to float32. Devices without rows stay empty."""
    head = ['switch']
    for device in DEFAULTS:
        head += [f'{device.upper()} it/s', '×', f'{device.upper()} peak MB', '×']
    by_switch = [{line['switch']: line for line in results.get(device) or []} for device in DEFAULTS]
    rows = []
    for name in dict.fromkeys(name for lines in by_switch for name in lines):
        rows.append([name])
        for lines in by_switch:
            rows[-1] += _cells(lines.get(name, {}), lines.get(REFERENCE, {}))
    return records.markdown(head, rows)


def _cells(line: Line, reference: Line) -> list[str]:
    if 'failed' in line:
        return ['not supported', '', '', '']
    cells = []
    for key, unit, digits in (('iterations_per_second', 1, 3), ('peak_bytes', MEGABYTE, 0)):
        value, base = line.get(key), reference.get(key)
        cells.append('' if value is None else f'{value / unit:.{digits}f}')
        cells.append('' if value is None or not base else f'{value / base:.2f}')
    return cells


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `benchmark.py train`."""
    parser.add_argument('--device', choices=[*DEFAULTS, 'all'], default='all', help='all includes the GPU if available')
    parser.add_argument('--net', help='registered network (default: AST_T on a CPU, AST_B on CUDA)')
    records.add_count(parser, '--batch', None, 'batch size (default: 2 on a CPU, 8 on CUDA)')
    records.add_count(parser, '--size', None, 'side of the images (default: 128 on a CPU, 256 on CUDA)')
    records.add_count(parser, '--iters', None, 'timed steps per option (default: 5 on a CPU, 20 on CUDA)')
    parser.add_argument('--switches', nargs='+', choices=list(SWITCHES), metavar='NAME', help=', '.join(SWITCHES))
    records.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write the record."""
    given = {key: getattr(args, key) for key in ('net', 'batch', 'size', 'iters') if getattr(args, key) is not None}
    if given.get('net', 'AST_T') not in ARCH_REGISTRY:
        raise OptionError(f'--net {args.net}: not a registered network, see `basicsr list arch`')
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise OptionError(f'--device cuda: {NO_GPU}')
    switches = {name: SWITCHES[name] for name in dict.fromkeys([REFERENCE, *(args.switches or SWITCHES)])}
    all_settings, results = {}, {}
    for device in [*DEFAULTS] if args.device == 'all' else [args.device]:
        is_there = device == 'cpu' or torch.cuda.is_available()
        settings = replace(DEFAULTS[device], **(given if is_there else {}))
        all_settings[device] = settings
        own = {name: train for name, train in switches.items() if device == 'cuda' or not train.get('cuda_graph')}
        results[device] = measure(settings, own) if is_there else None
    print(table(results), '', *remarks(all_settings, results), sep='\n')
    records.write(args.json, 'train', {device: asdict(settings) for device, settings in all_settings.items()}, results)
    return 0


def remarks(all_settings: Mapping[str, Settings], results: Mapping[str, Sequence[Line] | None]) -> list[str]:
    """Return the notes below the table: settings, failures, and devices that were not measured."""
    texts = []
    for device, settings in all_settings.items():
        what = f'{device.upper()}: {settings.net}, batch {settings.batch} of {settings.size}²'
        lines = results[device]
        texts.append(f'{what}, {settings.iters} steps each' if lines else f'{what}: not measured, no GPU found')
        texts += [f'{device.upper()}, {line["switch"]}: {line["failed"]}' for line in lines or () if 'failed' in line]
    return texts
