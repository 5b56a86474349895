"""What each backend needs for a whole network: seconds, peak memory above the weights, distance from the floor.

  python tools/benchmark.py net --size 512 --json benchmarks/net_cpu.json
  python tools/benchmark.py net --net AST_XS --size 128 --cases forward --turns 1

Lines of a case start from the same weights, as drawn for training, and the same image, and take turns in one process;
a line's time is the median of its turns, its CPU time what all threads spent. Memory is by how much a fresh process
that has computed 128² once grows; on CUDA it is what torch allocates. The floor of a line is its matrix products and
convolutions at the rate of the fastest matrix product, and one copy of what each block reads and writes; a product is
timed between any two calls, each call compared with the floor at its time, and of those the median is given. Cases:

  forward     restoring one image of 256² and one of --size², without gradients
  bfloat16    the latter under autocast
  train       forward and backward of two images of 128²
  photograph  480×720: zero-padded to a square of 768² as the official code does, whole, and whole by `basicsr infer`,
              from reading weights and image to writing the result
  onnx        480×720, whole, beside the exported network in ONNX Runtime on as many threads
  gpu         in bfloat16 on CUDA, by each backend, as a CUDA graph, and torch.compile: forward 512² and training 8×256²
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import basicsr.archs
import cv2
import numpy as np
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from ast_plugin import ops
from ast_plugin.__main__ import main as basicsr
from ast_plugin.checkpoints import save_weights
from ast_plugin.compare.measure import peak_memory
from ast_plugin.devices import keep_freed_memory
from ast_plugin.errors import OptionError
from ast_plugin.evaluation.export import export_network, read_onnx
from ast_plugin.models import network_switches
from ast_plugin.ops.cuda_graphs import Graphs, TrainingGraph
from benchmarks import records
from benchmarks.records import Line, say
from benchmarks.timing import (
    NO_GPU,
    Compute,
    add_ratios,
    in_fresh_process,
    machine_rates,
    measure_paths,
    speed_probe,
    synchronized,
)

CASES = ('forward', 'bfloat16', 'train', 'photograph', 'onnx', 'gpu')
_WARM_UP = (128, 128)
_OFFICIAL_SQUARE = 128  # the official test pads to a square of a multiple of this
_NO_COMPILE = 'not run: inductor takes minutes for all blocks; --compile runs it'

# What AST-B is to reach: at least this share of the floor's speed, which depends less on the processor than a ratio to
# the reference does, and at most this share of the memory of a case's first line.
TARGETS = {
    ('256² forward', 'fused'): (0.75, 0.35),
    ('512² forward', 'fused'): (0.75, 0.35),
    ('512² forward', 'fused, bf16'): (0.70, 0.35),
    ('2×128² forward and backward', 'fused'): (0.70, 0.35),
    ('photograph 480×720', 'fused, whole'): (0.75, None),
}
# The authors' code, AST-B in float32, on two cores with AVX-512 of another machine, whose matrix products ran at this
# rate; measured once for this project.
OFFICIAL_SECONDS = {'256² forward': 2.2, '512² forward': 16.0, '2×128² forward and backward': 4.1}
OFFICIAL_RATE = 193e9


@dataclass(frozen=True)
class Way:
    """One way to compute a case.

    Attributes:
        net: registered name of the network.
        case, path: its row in the table.
        backend: of `ast_plugin.ops`.
        precision: `fp32` or `bf16`, by autocast.
        batch, size: of the images, size as (height, width) in pixels.
        trains: whether gradients are computed.
        square: zero-pad to a square that is a multiple of this first; 0 for what the network does by itself.
        is_command: whether `basicsr infer` computes, with files.
        is_compiled: whether the blocks go through torch.compile.
        is_graphed: whether the network is replayed as a CUDA graph.
        is_exported: whether ONNX Runtime computes.
        device: `cpu` or `cuda`.
    """

    net: str
    case: str = ''
    path: str = ''
    backend: str = 'reference'
    precision: str = 'fp32'
    batch: int = 1
    size: tuple[int, int] = (256, 256)
    trains: bool = False
    square: int = 0
    is_command: bool = False
    is_compiled: bool = False
    is_graphed: bool = False
    is_exported: bool = False
    device: str = 'cpu'

    @property
    def padded(self) -> tuple[int, int]:
        """The size that the network is given."""
        if not self.square:
            return self.size
        side = -(-max(self.size) // self.square) * self.square
        return side, side


def ways(net: str, size: int, cases: Sequence[str], compiles: bool = False) -> dict[str, list[Way]]:
    """The lines of the table by case; the first of each is what the others are compared with.

    Args:
        net: registered name of the network.
        size: side of the large image in pixels.
        cases: of `CASES`.
        compiles: whether cases have a line of torch.compile.
    """
    reference = Way(net, path='reference')
    fused = replace(reference, path='fused', backend='fused')
    half = replace(fused, path='fused, bf16', precision='bf16')
    compiled = replace(reference, path='torch.compile', is_compiled=True)
    found: dict[str, list[Way]] = {}

    def add(case: str, paths: Sequence[Way], **settings) -> None:
        found[case] = [replace(way, case=case, **settings) for way in paths]

    end = [compiled] if compiles else []
    for side in dict.fromkeys((256, size)):
        paths = [fused] * ('forward' in cases) + [half] * ('bfloat16' in cases and side == size)
        if paths:
            add(f'{side}² forward', [reference, *paths, *end], size=(side, side))
    if 'photograph' in cases:
        official = replace(reference, path='reference, 768²', square=_OFFICIAL_SQUARE)
        whole = replace(fused, path='fused, whole')
        command = replace(fused, path='basicsr infer', is_command=True)
        add('photograph 480×720', [official, whole, *end, command], size=(480, 720))
    if 'onnx' in cases:
        exported = replace(reference, path='onnxruntime', is_exported=True)
        add('480×720, exported', [reference, fused, exported], size=(480, 720))
    if 'train' in cases:  # last, as the process keeps from there what it frees
        add('2×128² forward and backward', [reference, fused, *end], batch=2, size=(128, 128), trains=True)
    if 'gpu' in cases:
        by_triton = replace(reference, path='triton', backend='triton')
        paths = [reference, by_triton, replace(by_triton, path='triton, graph', is_graphed=True), *end]
        gpu = {'precision': 'bf16', 'device': 'cuda'}
        add('512² forward, bf16, CUDA', paths, size=(512, 512), **gpu)
        add('8×256² forward and backward, bf16, CUDA', paths, batch=8, size=(256, 256), trains=True, **gpu)
    return found


def prepare(way: Way) -> Compute:
    """Build the network and its input; equal for equal settings.

    Returns:
        A function that computes once and returns the output.
    """
    torch.manual_seed(0)
    network = _network(way).to(way.device)
    x = torch.rand(way.batch, 3, *way.size)
    if way.is_command:
        return _prepare_command(way, network, x[0])
    if way.is_exported:
        return partial(in_onnx_runtime(network), x)
    function = network_switches.apply(network, {'compile': way.is_compiled})
    if way.trains and way.device == 'cpu':
        keep_freed_memory()  # as training does
    if way.is_graphed:
        function = TrainingGraph(network, {}) if way.trains else partial(Graphs(), network)
    height, width = way.size
    top, left = (way.padded[0] - height) // 2, (way.padded[1] - width) // 2
    x = functional.pad(x, (left, way.padded[1] - width - left, top, way.padded[0] - height - top)).to(way.device)

    def compute() -> Tensor:
        network.zero_grad()
        mode = torch.enable_grad() if way.trains else torch.inference_mode()
        with ops.use_backend(way.backend), mode:
            with torch.autocast(way.device, torch.bfloat16, enabled=way.precision == 'bf16'):
                output = function(x)
            if way.trains:
                output.float().square().mean().backward()
            return output.detach()[..., top : top + height, left : left + width].clone()

    return synchronized(compute, way.device)


def _network(way: Way) -> nn.Module:
    return ARCH_REGISTRY.get(way.net)(drop_path_rate=0.0).train(way.trains)


def in_onnx_runtime(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network in ONNX Runtime."""
    with tempfile.TemporaryDirectory(prefix='basicsr_benchmark_') as folder:
        path = Path(folder, 'network.onnx')
        export_network(network, path)
        return read_onnx(path.read_bytes())


def _prepare_command(way: Way, network: nn.Module, image: Tensor) -> Compute:
    """`basicsr infer` on a file, in this process: the start of the interpreter and the libraries is left out."""
    held = tempfile.TemporaryDirectory(prefix='basicsr_benchmark_')
    folder = Path(held.name)
    source, weights, output = folder / 'image.png', folder / 'weights.safetensors', folder / 'restored'
    save_weights(weights, network.state_dict(), {'type': way.net})
    cv2.imwrite(str(source), np.ascontiguousarray((image * 255).round().byte().permute(1, 2, 0).numpy()[..., ::-1]))
    command = ['infer', '-i', str(source), '-o', str(output), '--weights', str(weights), '--device', 'cpu']

    def compute() -> Tensor:
        with ops.use_backend(way.backend), contextlib.redirect_stdout(io.StringIO()):
            status = basicsr(command)
        if status:
            raise RuntimeError(f'basicsr {" ".join(command)} ended with {status}')
        # The folder lives as long as this function, which holds it.
        restored = cv2.imread(str(Path(held.name, output.name, source.name)))
        return torch.from_numpy(np.ascontiguousarray(restored[..., ::-1])).permute(2, 0, 1)[None] / 255

    return compute


def _peak(way: Way, compute: Compute) -> int | None:
    if way.device == 'cuda':
        return peak_memory(compute, 'cuda')
    # What was padded to another size is not compared, nor what reads, compiles or exports in the same call.
    if way.square or way.is_command or way.is_compiled or way.is_exported:
        return None
    return in_fresh_process(_peak_here, way)


def _peak_here(way: Way) -> int | None:
    # What libraries take at their first call belongs to no line. A pass for training would leave gradients behind.
    prepare(replace(way, size=_WARM_UP, batch=1, trains=False))()
    return peak_memory(prepare(way))


def count(way: Way) -> tuple[int, int]:
    """Operations of matrix products and convolutions, and bytes that blocks read and write, from shapes alone."""
    with torch.device('meta'):
        operations, numbers = count_pass(_network(way), torch.empty(way.batch, 3, *way.padded))
    # A backward pass has two products for each of the forward pass; torch's own count of it overlooks groups.
    passes = 3 if way.trains else 1
    return passes * operations, passes * numbers * (2 if way.precision == 'bf16' else 4)


def count_pass(network: nn.Module, x: Tensor) -> tuple[int, int]:
    """Operations of matrix products and convolutions of a pass, and how many numbers blocks read and write."""
    numbers = []
    for block in network_switches.blocks(network):
        block.register_forward_hook(lambda module, args, output: numbers.append(args[0].numel() + output.numel()))
    with ops.use_backend('reference'), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    return counter.get_total_flops(), sum(numbers)


def measure_case(case: str, cases_ways: Sequence[Way], turns: int, rates: dict[str, float]) -> list[Line]:
    """Measure the ways of a case.

    Args:
        case: its name.
        cases_ways: its lines.
        turns: timed calls of each.
        rates: of the machine, see `timing.machine_rates`.
    Returns:
        A line for each, see `timing.measure_paths`, with `operations` and `floor` in seconds; torch.compile's says why
        where it was not run.
    """
    by_path = {way.path: way for way in cases_ways}

    def peak(path: str, compute: Compute) -> int | None:
        say(f'{case}, {path}: memory')
        return _peak(by_path[path], compute)

    probe = speed_probe(rates, cases_ways[0].device)
    lines = measure_paths(case, {path: partial(prepare, way) for path, way in by_path.items()}, turns, peak, probe)
    for path, way in by_path.items():
        operations, moved = count(way)
        lines[path] |= {'operations': operations, 'floor': operations / rates[way.precision] + moved / rates['copy']}
    add_ratios(list(lines.values()))
    lines.setdefault('torch.compile', {'case': case, 'path': 'torch.compile', 'skipped': _NO_COMPILE})
    return list(lines.values())


def measure(
    cases: dict[str, list[Way]], turns: int, rates: dict[str, float], keep: Callable[[list[Line]], None]
) -> list[Line]:
    """Measure case by case; without a GPU its lines say so.

    Args:
        cases: of `ways`.
        turns: timed calls of each line.
        rates: of the machine's CPU.
        keep: given the lines there are after each case, as a run can take long.
    """
    lines: list[Line] = []
    has_gpu = torch.cuda.is_available()
    gpu_rates = machine_rates('cuda') if has_gpu and any(found[0].device == 'cuda' for found in cases.values()) else {}
    for case, found in cases.items():
        is_on_gpu = found[0].device == 'cuda'
        if is_on_gpu and not has_gpu:
            lines += [{'case': case, 'path': way.path, 'skipped': f'not run: {NO_GPU}'} for way in found]
        else:
            lines += measure_case(case, found, turns, gpu_rates if is_on_gpu else rates)
        keep(lines)
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `benchmark.py net`."""
    parser.add_argument('--net', default='AST_B', help='registered AST (default: %(default)s)')
    parser.add_argument('--size', type=int, default=512, help='side of the large image (default: %(default)s)')
    parser.add_argument('--turns', type=int, default=3, help='timed calls of each line (default: %(default)s)')
    parser.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES), metavar='CASE', help=', '.join(CASES))
    parser.add_argument('--compile', action='store_true', help='torch.compile, too: minutes for each line')
    records.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write the record."""
    if args.size < 1 or args.turns < 1:
        raise OptionError('--size and --turns must be 1 or more')
    if args.net not in ARCH_REGISTRY:
        raise OptionError(f'--net {args.net}: no network of that name is registered, see `basicsr list arch`')
    if 'drop_path_rate' not in inspect.signature(ARCH_REGISTRY.get(args.net)).parameters:
        raise OptionError(f'--net {args.net}: expected an AST, such as AST_XS')
    rates = machine_rates()
    settings = {'net': args.net, 'size': args.size, 'turns': args.turns}

    def keep(lines: list[Line]) -> None:
        records.write(args.json, 'net', settings, lines, rates=rates)

    lines = measure(ways(args.net, args.size, args.cases, args.compile), args.turns, rates, keep)
    print(records.backend_table(lines))
    giga = {key: f'{rate / 1e9:.0f}' for key, rate in rates.items()}
    print(
        f'\n{args.net}, {args.turns} turns each. Matrix products: {giga["fp32"]} GFLOP/s in float32 '
        f'(torch.nn.functional.linear: {giga["fp32_torch"]}), {giga["bf16"]} in bfloat16; copies: {giga["copy"]} GB/s.'
    )
    if args.net == 'AST_B':
        print(*target_remarks(lines), *official_remarks(lines, rates['fp32_torch']), sep='\n')
    return 0


def target_remarks(lines: Sequence[Line]) -> list[str]:
    """For each line that has a target, whether it was reached."""
    remarks = []
    for line in lines:
        speed, share = TARGETS.get((line['case'], line['path']), (None, None))
        if speed is None or 'of_floor' not in line:
            continue
        parts, is_reached = [f'{line["of_floor"]:.0%} of the floor of at least {speed:.0%}'], line['of_floor'] >= speed
        if share is not None and 'of_memory' in line:
            parts.append(f'{line["of_memory"]:.2f} of the memory of at most {share}')
            is_reached = is_reached and line['of_memory'] <= share
        verdict = 'reached' if is_reached else 'NOT reached'
        remarks.append(f'{line["case"]}, {line["path"]}: {verdict}: {", ".join(parts)}.')
    return remarks


def official_remarks(lines: Sequence[Line], rate: float) -> list[str]:
    """How long our reference takes, and the official network would at the rate of this run's matrix product."""
    return [
        f'{line["case"]}: the reference takes {line["median"]:.2f} s, the official network '
        f'{OFFICIAL_SECONDS[line["case"]] * OFFICIAL_RATE / rate:.2f} s '
        f'({OFFICIAL_SECONDS[line["case"]]} s at {OFFICIAL_RATE / 1e9:.0f} GFLOP/s, scaled).'
        for line in lines
        if line['path'] == 'reference' and 'median' in line and line['case'] in OFFICIAL_SECONDS
    ]
