"""What each backend needs for a block's two halves, and what torch.compile makes of them.

  python tools/benchmark.py ops
  python tools/benchmark.py ops --sides 64 --no-compile --json ops.json
  python tools/benchmark.py ops --device cuda --sides 256 128 64 32

Each half is x + f(norm(x)), f being FRFN or ASSA, on a map as AST-B has at 256²: alone, and forward and backward. Lines
of a case start from the same weights and map and take turns in one process. The floor is the matrix products and
convolutions at the rate of the fastest matrix product of this run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ast_plugin.compare import benchmark_records
from ast_plugin.compare.benchmark_backends import Line, add_ratios, computing, machine_rates, table, take_turns
from ast_plugin.errors import OptionError, first_line

if TYPE_CHECKING:
    import torch

_CHANNELS_AT_256 = {256: 64, 128: 128, 64: 256, 32: 512, 16: 512}  # of AST-B's decoder and bottleneck, by side


def _half(
    kind: str, side: int, precision: str, trains: bool, device: str
) -> tuple[Callable[[str, bool], Callable], int]:
    """A half of a block: what makes its call from a backend and whether to compile, and operations of a call."""
    import torch

    from ast_plugin.archs.blocks import ASSA, FRFN, ASTBlock
    from ast_plugin.compare.benchmark_cuda import finished
    from ast_plugin.ops.residual import Residual

    channels = _CHANNELS_AT_256[side]
    torch.compiler.reset()  # of one function it compiles eight variants and no more, and there are more halves
    torch.manual_seed(0)
    block = ASTBlock(ASSA(channels, max(1, channels // 32), shift_size=4), FRFN(channels), channels).to(device)
    branch, norm = (block.attn, block.norm1) if kind == 'ASSA' else (block.ffn, block.norm2)
    x = torch.randn(1, side, side, channels).to(device).requires_grad_(trains)

    def half(x: torch.Tensor) -> torch.Tensor:
        return branch(x, residual=Residual(norm.weight, norm.bias, norm.eps))

    def make(backend: str, compiled: bool) -> Callable[[], torch.Tensor]:
        function = torch.compile(half, dynamic=False) if compiled else half

        def compute() -> torch.Tensor:
            with computing(backend, precision, device), torch.set_grad_enabled(trains):
                y = function(x)
                if trains:
                    y.sum().backward()
                return y.detach()

        return finished(compute, torch.device(device))

    # Linear layers 12·C² and, of attention, 4·C² and two products of a window's 64 tokens; 3×3 convolutions.
    attention = 4 * channels**2 + 2 * 64 * channels
    feed_forward = 12 * channels**2 + 9 * (channels // 4) ** 2 + 9 * 4 * channels
    products = side**2 * (attention if kind == 'ASSA' else feed_forward)
    return make, 2 * products * (3 if trains else 1)


def measure(
    sides: list[int],
    turns: int,
    compiles: bool,
    rates: dict[str, float],
    say: Callable[[str], None],
    device: str = 'cpu',
) -> list[Line]:
    """Measure every half at every side; a line for each path, see `benchmark_network.measure`."""
    lines: list[Line] = []
    for side in sides:
        for kind in ('FRFN', 'ASSA'):
            for precision, trains in (('fp32', False), ('bf16', False), ('fp32', True)):
                suffix = ', forward and backward' if trains else ''
                case = f'{kind} {side}²×{_CHANNELS_AT_256[side]} {precision}{suffix}'
                say(case)
                make, operations = _half(kind, side, precision, trains, device)
                fastest = 'fused' if device == 'cpu' else 'triton'
                paths = {'reference': ('reference', False), fastest: (fastest, False)}
                if compiles:
                    paths['torch.compile'] = ('reference', True)
                lines += _case(case, {path: make(*way) for path, way in paths.items()}, turns)
                for line in lines:
                    if line['case'] == case:
                        line['floor'] = operations / rates[precision]
                if not compiles:
                    lines.append({'case': case, 'path': 'torch.compile', 'skipped': 'not run: --no-compile'})
                add_ratios([line for line in lines if line['case'] == case])
    return lines


def _case(case: str, functions: dict[str, Callable[[], torch.Tensor]], turns: int) -> list[Line]:
    lines = {path: {'case': case, 'path': path} for path in functions}
    outputs = {}
    for path, function in list(functions.items()):
        try:
            outputs[path] = function().float()
        # An installation without a compiler has the other paths.
        except RuntimeError as error:
            lines[path]['skipped'] = f'failed: {first_line(error)[:80]}'
            del functions[path]
    for path, taken in take_turns(functions, turns).items():
        lines[path].update(taken)
        lines[path]['error'] = float((outputs[path] - outputs['reference']).norm() / outputs['reference'].norm())
    return list(lines.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `benchmark.py ops`."""
    sides = list(_CHANNELS_AT_256)
    parser.add_argument('--sides', nargs='+', type=int, choices=sides, default=[128, 32], help='of the maps')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu', help='default: %(default)s')
    parser.add_argument('--turns', type=int, default=7, help='timed calls of each line (default: %(default)s)')
    parser.add_argument('--no-compile', action='store_true', help='leave out torch.compile, which takes minutes')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write what was measured, machine and versions')


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write the record."""
    if args.turns < 1:
        raise OptionError('--turns must be 1 or more')
    if args.device == 'cuda':
        import torch

        from ast_plugin.compare import benchmark_cuda

        if not torch.cuda.is_available():
            raise OptionError('--device cuda: torch finds no GPU here')
        rates = benchmark_cuda.rates(torch.device('cuda'), 8192)
    else:
        rates = machine_rates()
    lines = measure(args.sides, args.turns, not args.no_compile, rates, _say, args.device)
    settings = {'turns': args.turns, 'device': args.device}
    record: dict[str, Any] = {'benchmark': 'ops', 'settings': settings, 'rates': rates, 'results': lines}
    print(table(lines))
    if args.json is not None:
        benchmark_records.write(args.json, record)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)
