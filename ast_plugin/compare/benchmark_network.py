"""What each backend needs for a whole network: seconds, peak memory above the weights, distance from the floor.

  python tools/benchmark.py net --size 512 --json benchmarks/net_cpu.json
  python tools/benchmark.py net --net AST_XS --size 128 --cases forward --turns 1

Lines of a case start from the same weights, as drawn for training, and the same picture, and take turns in one
process; a line's time is the median of its turns, its CPU time what all threads spent. Memory is by how much a fresh
process that has computed 128² once grows. The floor of a line is its matrix products and convolutions at the
rate of the fastest matrix product of this run, and one copy of what each block reads and writes. Cases:

  forward     restoring one picture of 256² and one of --size², without gradients
  bfloat16    the latter under autocast
  train       forward and backward of two pictures of 128²
  photograph  480×720: zero-padded to a square of 768² as the official code does, whole, and whole by `basicsr infer`,
              from reading weights and picture to writing the result
  gpu         in bfloat16 on CUDA, forward 512² and training 8×256²; see `benchmark_cuda`
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ast_plugin.compare import benchmark_records
from ast_plugin.compare.benchmark_backends import (
    Line,
    add_ratios,
    computing,
    machine_rates,
    table,
    take_turns,
)
from ast_plugin.compare.benchmark_targets import official, reached
from ast_plugin.compare.resident_memory import resident_growth
from ast_plugin.errors import OptionError

if TYPE_CHECKING:
    import torch

CASES = ('forward', 'bfloat16', 'train', 'photograph', 'gpu')
_PHOTOGRAPH = (480, 720)
_WARM_UP = (128, 128)
_OFFICIAL_SQUARE = 128  # the official test pads to a square of a multiple of this
_NO_COMPILE = 'not run: inductor takes minutes for a whole network; --compile runs it'


@dataclass(frozen=True)
class Way:
    """One way to compute a case.

    Attributes:
        case, path: its row in the table.
        net: registered name of the network.
        backend: of `ast_plugin.ops`.
        precision: `fp32` or `bf16`, by autocast.
        batch, size: of the pictures, size as (height, width).
        trains: whether gradients are computed.
        square: zero-pad to a square that is a multiple of this first; 0 for what the network does by itself.
        is_command: whether `basicsr infer` computes, with files.
        is_compiled: whether the network goes through torch.compile.
    """

    case: str
    path: str
    net: str
    backend: str
    precision: str
    batch: int
    size: tuple[int, int]
    trains: bool = False
    square: int = 0
    is_command: bool = False
    is_compiled: bool = False

    @property
    def padded(self) -> tuple[int, int]:
        """The size that the network is given."""
        if not self.square:
            return self.size
        side = -(-max(self.size) // self.square) * self.square
        return side, side


def ways(net: str, size: int, cases: list[str], compiles: bool = False) -> list[Way]:
    """The lines of the table; the first of each case is what the others are compared with."""
    found: list[Way] = []

    def add(case: str, batch: int, picture: tuple[int, int], rows: dict[str, tuple[str, str, int]], trains=False):
        for path, (backend, precision, square) in rows.items():
            found.append(Way(case, path, net, backend, precision, batch, picture, trains, square))
        if compiles:
            found.append(Way(case, 'torch.compile', net, 'reference', 'fp32', batch, picture, trains, is_compiled=True))

    plain = {'reference': ('reference', 'fp32', 0), 'fused': ('fused', 'fp32', 0)}
    half = {'fused, bf16': ('fused', 'bf16', 0)}
    for side in dict.fromkeys((256, size)) if 'forward' in cases or 'bfloat16' in cases else ():
        rows = {'reference': plain['reference']}
        rows |= plain if 'forward' in cases else {}
        rows |= half if 'bfloat16' in cases and side == size else {}
        add(f'{side}² forward', 1, (side, side), rows)
    if 'train' in cases:
        add('2×128² forward and backward', 2, (128, 128), plain, trains=True)
    if 'photograph' in cases:
        square = {'reference, 768²': ('reference', 'fp32', _OFFICIAL_SQUARE)}
        add('photograph 480×720', 1, _PHOTOGRAPH, {**square, 'fused, whole': plain['fused']})
        whole = next(way for way in found if way.path == 'fused, whole')
        found.append(replace(whole, path='basicsr infer', is_command=True))
    return found


def prepare(way: Way) -> Callable[[], torch.Tensor]:
    """Build the network and its input; the same for the same settings.

    Returns:
        A function that computes once and returns the output.
    """
    import torch
    from basicsr.utils.registry import ARCH_REGISTRY

    torch.manual_seed(0)
    network = ARCH_REGISTRY.get(way.net)(drop_path_rate=0.0).train(way.trains)
    x = torch.rand(way.batch, 3, *way.size)
    if way.is_command:
        return _prepare_command(way, network, x[0])
    if way.is_compiled:
        network = torch.compile(network, dynamic=False)
    height, width = way.size
    top, left = (way.padded[0] - height) // 2, (way.padded[1] - width) // 2
    x = torch.nn.functional.pad(x, (left, way.padded[1] - width - left, top, way.padded[0] - height - top))

    def compute() -> torch.Tensor:
        with computing(way.backend, way.precision):
            if not way.trains:
                with torch.inference_mode():
                    return network(x)[..., top : top + height, left : left + width].clone()
            network.zero_grad()
            output = network(x)
            output.square().mean().backward()
            return output.detach()

    return compute


def _prepare_command(way: Way, network: torch.nn.Module, picture: torch.Tensor) -> Callable[[], torch.Tensor]:
    """`basicsr infer` on a file, in this process: what the interpreter and the libraries take to start is left out."""
    import cv2
    import numpy as np
    import torch

    from ast_plugin.__main__ import main as basicsr
    from ast_plugin.checkpoints import save_weights

    held = tempfile.TemporaryDirectory(prefix='basicsr_benchmark_')
    folder = Path(held.name)
    source, weights, output = folder / 'picture.png', folder / 'weights.safetensors', folder / 'restored'
    save_weights(weights, network.state_dict(), {'type': way.net})
    cv2.imwrite(str(source), np.ascontiguousarray((picture * 255).round().byte().permute(1, 2, 0).numpy()[..., ::-1]))
    command = ['infer', '-i', str(source), '-o', str(output), '--weights', str(weights), '--device', 'cpu']

    def compute() -> torch.Tensor:
        with computing(way.backend, way.precision), contextlib.redirect_stdout(io.StringIO()):
            status = basicsr(command)
        if status:
            raise RuntimeError(f'basicsr {" ".join(command)} ended with {status}')
        # The folder lives as long as this function, which holds it.
        restored = cv2.imread(str(Path(held.name, output.name, source.name)))
        return torch.from_numpy(np.ascontiguousarray(restored[..., ::-1])).permute(2, 0, 1)[None] / 255

    return compute


def _memory(way: Way) -> int | None:
    # What libraries take at their first call belongs to no line. A pass for training would leave gradients behind.
    prepare(replace(way, size=_WARM_UP, batch=1, trains=False))()
    return resident_growth(prepare(way))


def count(way: Way) -> tuple[int, int]:
    """Operations of matrix products and convolutions, and bytes that blocks read and write, from shapes alone."""
    import torch
    from basicsr.utils.registry import ARCH_REGISTRY
    from torch.utils.flop_counter import FlopCounterMode

    from ast_plugin import ops
    from ast_plugin.models import network_switches

    with torch.device('meta'):
        network = ARCH_REGISTRY.get(way.net)(drop_path_rate=0.0).train(way.trains)
        x = torch.empty(way.batch, 3, *way.padded)
    numbers = []
    for block in network_switches.blocks(network):
        block.register_forward_hook(lambda module, args, output: numbers.append(args[0].numel() + output.numel()))
    with ops.use_backend('reference'), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    # A backward pass has two products for each of the forward pass; torch's own count of it overlooks groups.
    passes = 3 if way.trains else 1
    return passes * counter.get_total_flops(), passes * sum(numbers) * (2 if way.precision == 'bf16' else 4)


def measure(
    lines: list[Way],
    turns: int,
    rates: dict[str, float],
    say: Callable[[str], None],
    keep: Callable[[list[Line]], None],
) -> list[Line]:
    """Measure ways, case by case; `keep` is given what there is after each, as a run can take long.

    Returns:
        A line for each: `seconds` of every turn, `peak_bytes`, `floor` in seconds, `error` of the output against the
        case's first; after those of a case torch.compile's where it was not run, with why.
    """
    measured: list[Line] = []
    for case in dict.fromkeys(way.case for way in lines):
        here = [way for way in lines if way.case == case]
        found = []
        for way in here:
            peak = None
            # What was padded to another size is not compared, nor what reads its weights or compiles in the same call.
            if not (way.square or way.is_command or way.is_compiled):
                say(f'{case}, {way.path}: memory')
                with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as fresh:
                    peak = fresh.submit(_memory, way).result()
            operations, moved = count(way)
            floor = operations / rates[way.precision] + moved / rates['copy']
            found.append({'case': case, 'path': way.path, 'operations': operations, 'floor': floor, 'peak_bytes': peak})
        say(f'{case}: {turns} turns')
        functions = {index: prepare(way) for index, way in enumerate(here)}
        outputs = {index: function() for index, function in functions.items()}
        for index, taken in take_turns(functions, turns).items():
            found[index].update(taken)
            # Pictures that were padded otherwise differ at their edges.
            if here[index].padded == here[0].padded:
                found[index]['error'] = float((outputs[index] - outputs[0]).norm() / outputs[0].norm())
        add_ratios(found)
        measured += found
        if not any(way.is_compiled for way in here):
            measured.append({'case': case, 'path': 'torch.compile', 'skipped': _NO_COMPILE})
        keep(measured)
    return measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `benchmark.py net`."""
    parser.add_argument('--net', default='AST_B', help='registered AST (default: %(default)s)')
    parser.add_argument('--size', type=int, default=512, help='side of the large picture (default: %(default)s)')
    parser.add_argument('--turns', type=int, default=3, help='timed calls of each line (default: %(default)s)')
    parser.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES), metavar='CASE', help=', '.join(CASES))
    parser.add_argument('--compile', action='store_true', help='torch.compile, too: minutes for each line')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write what was measured, machine and versions')


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write the record."""
    import basicsr.archs  # noqa: F401 - registers, ours too
    from basicsr.utils.registry import ARCH_REGISTRY

    if args.size < 1 or args.turns < 1:
        raise OptionError('--size and --turns must be 1 or more')
    if args.net not in ARCH_REGISTRY:
        raise OptionError(f'--net {args.net}: no network of that name is registered, see `basicsr list arch`')
    if 'drop_path_rate' not in inspect.signature(ARCH_REGISTRY.get(args.net)).parameters:
        raise OptionError(f'--net {args.net}: expected an AST, such as AST_XS')
    rates = machine_rates()
    settings = {'net': args.net, 'size': args.size, 'turns': args.turns}
    record: dict[str, Any] = {'benchmark': 'net', 'settings': settings, 'rates': rates, 'results': []}

    def keep(lines: list[Line]) -> None:
        record['results'] = lines
        if args.json is not None:
            benchmark_records.write(args.json, record)

    lines = measure(ways(args.net, args.size, args.cases, args.compile), args.turns, rates, _say, keep)
    if 'gpu' in args.cases:
        from ast_plugin.compare import benchmark_cuda

        keep(lines + benchmark_cuda.measure(args.net, args.turns, _say))
    print(table(record['results']))
    for remark in remarks(record):
        print(remark)
    return 0


def remarks(record: dict[str, Any]) -> list[str]:
    """Under the table: what was run, and what the machine can do."""
    settings, rates = record['settings'], record['rates']
    giga = {key: f'{rate / 1e9:.0f}' for key, rate in rates.items()}
    return [
        '',
        f'{settings["net"]}, {settings["turns"]} turns each. Matrix products: {giga["fp32"]} GFLOP/s in float32 '
        f'(torch.nn.functional.linear: {giga["fp32_torch"]}), {giga["bf16"]} in bfloat16; copies: {giga["copy"]} GB/s.',
        *(reached(record['results']) if settings['net'] == 'AST_B' else ()),
        *(official(record['results'], rates['fp32_torch']) if settings['net'] == 'AST_B' else ()),
    ]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
