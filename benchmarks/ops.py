"""Run time of the two branches of a block with each backend and torch.compile.

  python tools/benchmark.py ops
  python tools/benchmark.py ops --sides 64 --no-compile --json ops.json
  python tools/benchmark.py ops --device cuda --sides 256 128 64 32

Each branch is x + f(norm(x)), where f is FRFN or ASSA, on a feature map of AST-B for an image of 256²: forward only,
and forward and backward. All paths of a case use the same weights and map and alternate in one process. The roofline is
the time of the matrix products and convolutions at the rate of the fastest matrix product of the run.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ast_plugin import ops
from ast_plugin.archs.blocks import ASTBlock
from ast_plugin.errors import OptionError
from ast_plugin.ops import Residual
from benchmarks import records
from benchmarks.records import Line, say
from benchmarks.timing import NO_GPU, Compute, add_ratios, machine_rates, measure_paths, synchronized

_CHANNELS_AT_256 = {256: 64, 128: 128, 64: 256, 32: 512, 16: 512}  # map side -> channels, in AST-B's decoder


class Half:
    """Branch of a block with a feature map.

    Args:
        kind: `FRFN` or `ASSA`.
        side: side of the map.
        precision: `fp32`, or `bf16` by autocast.
        trains: whether gradients are computed.
        device: `cpu` or `cuda`.
    """

    def __init__(self, kind: str, side: int, precision: str, trains: bool, device: str) -> None:
        torch.compiler.reset()  # the limit of eight recompilations per function would be exceeded
        torch.manual_seed(0)
        channels = _CHANNELS_AT_256[side]
        block = ASTBlock(channels, max(1, channels // 32), shift_size=4).to(device)
        self.branch, self.norm = (block.attn, block.norm1) if kind == 'ASSA' else (block.ffn, block.norm2)
        self.x = torch.randn(1, side, side, channels).to(device).requires_grad_(trains)
        self.precision, self.trains, self.device = precision, trains, device
        # Per position: attention has linear layers (4·C²) and two products with the 64 tokens of the window; FRFN has
        # linear layers (12·C²), a 3×3 convolution of C/4 channels and a depthwise one of 4·C.
        attention = 4 * channels**2 + 2 * 64 * channels
        feed_forward = 12 * channels**2 + 9 * (channels // 4) ** 2 + 9 * 4 * channels
        self.operations = 2 * side**2 * (attention if kind == 'ASSA' else feed_forward) * (3 if trains else 1)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x + f(norm(x))."""
        return self.branch(x, residual=Residual(self.norm.weight, self.norm.bias, self.norm.eps))

    def prepare(self, backend: str, is_compiled: bool) -> Compute:
        """Return a function that computes the output once."""
        function = torch.compile(self.__call__, dynamic=False) if is_compiled else self

        def compute() -> Tensor:
            with ops.use_backend(backend), torch.set_grad_enabled(self.trains):
                with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == 'bf16'):
                    y = function(self.x)
                if self.trains:
                    y.sum().backward()
                return y.detach()

        return synchronized(compute, self.device)


def measure(
    sides: Sequence[int], turns: int, compiles: bool, rates: dict[str, float], device: str = 'cpu'
) -> list[Line]:
    """Measure both branches for every size of the map.

    Args:
        sides: sides of the maps.
        turns: timed calls per path.
        compiles: whether to measure torch.compile.
        rates: rates of the machine, see `timing.machine_rates`.
        device: `cpu` or `cuda`.
    Returns:
        One row per path, see `timing.measure_paths`, with the roofline `floor` in seconds.
    """
    lines: list[Line] = []
    fastest = 'fused' if device == 'cpu' else 'triton'
    paths = {'reference': ('reference', False), fastest: (fastest, False)}
    if compiles:
        paths['torch.compile'] = ('reference', True)
    modes = (('fp32', False), ('bf16', False), ('fp32', True))
    for side, kind, (precision, trains) in itertools.product(sides, ('FRFN', 'ASSA'), modes):
        case = f'{kind} {side}²×{_CHANNELS_AT_256[side]} {precision}' + (', forward and backward' if trains else '')
        say(case)
        half = Half(kind, side, precision, trains, device)
        calls = {path: partial(half.prepare, *how) for path, how in paths.items()}
        found = list(measure_paths(case, calls, turns).values())
        for line in found:
            line['floor'] = half.operations / rates[precision]
        add_ratios(found)
        if not compiles:
            found.append({'case': case, 'path': 'torch.compile', 'skipped': 'not run: --no-compile'})
        lines += found
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `benchmark.py ops`."""
    sides = list(_CHANNELS_AT_256)
    parser.add_argument('--sides', nargs='+', type=int, choices=sides, default=[128, 32], help='sides of the maps')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu', help='device (default: %(default)s)')
    records.add_count(parser, '--turns', 7, 'timed calls per path')
    parser.add_argument('--no-compile', action='store_true', help='omit torch.compile, which takes minutes')
    records.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write the record."""
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise OptionError(f'--device cuda: {NO_GPU}')
    rates = machine_rates(args.device)
    lines = measure(args.sides, args.turns, not args.no_compile, rates, args.device)
    print(records.backend_table(lines))
    records.write(args.json, 'ops', {'turns': args.turns, 'device': args.device}, lines, rates=rates)
    return 0
