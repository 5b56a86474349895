"""Run time, peak memory and roofline fraction of each backend for a complete network.

  python tools/benchmark.py net --size 512 --json benchmarks/net_cpu.json
  python tools/benchmark.py net --net AST_XS --size 128 --cases forward --turns 1

All paths of a case use the same initial weights and the same image and alternate in one process. Time is the median
over turns, CPU time the sum over all threads. Memory is the growth of a new process that has computed 128² once; on
CUDA, the memory allocated by PyTorch. The roofline is the time of the matrix products and convolutions at the rate of
the fastest matrix product, plus one copy of the inputs and outputs of all blocks. A product is timed between any two
calls; each call is compared with the roofline at that time, and the median is reported. Cases:

  forward     one image of 256² and one of --size², without gradients
  bfloat16    one image of --size² under autocast
  train       forward and backward pass for two images of 128²
  photograph  480×720: zero-padded to a square of 768² as in the official code; unpadded; and by `basicsr infer`,
              including reading weights and image and writing the result
  onnx        480×720, unpadded, compared with the exported network in ONNX Runtime with the same number of threads
  gpu         bfloat16 on CUDA: each backend, CUDA graphs and torch.compile, for forward 512² and training 8×256²
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

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
from ast_plugin.archs.networks import build_network
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
_OFFICIAL_SQUARE = 128  # the official test script pads to a square whose side is a multiple of this
_NO_COMPILE = 'not run: inductor takes minutes for all blocks; enable with --compile'

# Targets for AST-B: minimum fraction of the roofline speed, which depends less on the processor than a ratio to the
# reference, and maximum fraction of the memory of the first path of a case.
TARGETS = {
    ('256² forward', 'fused'): (0.75, 0.35),
    ('512² forward', 'fused'): (0.75, 0.35),
    ('512² forward', 'fused, bf16'): (0.70, 0.35),
    ('2×128² forward and backward', 'fused'): (0.70, 0.35),
    ('photograph 480×720', 'fused, whole'): (0.75, None),
}
# Official code, AST-B in float32, measured once on two AVX-512 cores of a different machine with this rate of matrix
# products.
OFFICIAL_SECONDS = {'256² forward': 2.2, '512² forward': 16.0, '2×128² forward and backward': 4.1}
OFFICIAL_RATE = 193e9


@dataclass(frozen=True)
class Setup:
    """Settings of a path of a case, a method of computing it.

    Attributes:
        network: options of the network, with its registered name as `type`.
        case, path: labels of the row in the table.
        backend: backend of `ast_plugin.ops`.
        precision: `fp32`, or `bf16` by autocast.
        batch, size: batch size and (height, width) in pixels.
        trains: whether gradients are computed.
        square: zero-pad to a square whose side is a multiple of this; 0 for the network's own padding only.
        is_command: whether to run `basicsr infer` on files.
        is_compiled: whether to compile the blocks with torch.compile.
        is_graphed: whether to replay the network as a CUDA graph.
        is_exported: whether to run the exported network in ONNX Runtime.
        device: `cpu` or `cuda`.
    """

    network: Mapping[str, Any]
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
        """Size of the network input after zero padding."""
        if not self.square:
            return self.size
        side = -(-max(self.size) // self.square) * self.square
        return side, side


def list_setups(net: str, size: int, cases: Sequence[str], compiles: bool = False) -> dict[str, list[Setup]]:
    """Return the paths of each case; the others are compared with the first.

    Args:
        net: registered name of the network.
        size: side of the large image in pixels.
        cases: names in `CASES`.
        compiles: whether to include torch.compile.
    """
    reference = Setup({'type': net, 'drop_path_rate': 0.0}, path='reference')
    fused = replace(reference, path='fused', backend='fused')
    half = replace(fused, path='fused, bf16', precision='bf16')
    compiled = replace(reference, path='torch.compile', is_compiled=True)
    found: dict[str, list[Setup]] = {}

    def add(case: str, paths: Sequence[Setup], **settings) -> None:
        found[case] = [replace(setup, case=case, **settings) for setup in paths]

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
    if 'train' in cases:  # last on the CPU, as it makes the process retain freed memory
        add('2×128² forward and backward', [reference, fused, *end], batch=2, size=(128, 128), trains=True)
    if 'gpu' in cases:
        by_triton = replace(reference, path='triton', backend='triton')
        paths = [reference, by_triton, replace(by_triton, path='triton, graph', is_graphed=True), *end]
        gpu = {'precision': 'bf16', 'device': 'cuda'}
        add('512² forward, bf16, CUDA', paths, size=(512, 512), **gpu)
        add('8×256² forward and backward, bf16, CUDA', paths, batch=8, size=(256, 256), trains=True, **gpu)
    return found


def prepare(setup: Setup) -> Compute:
    """Build the network and its input deterministically; return a function that computes the output once."""
    torch.manual_seed(0)
    network = build_network(setup.network).train(setup.trains).to(setup.device)
    x = torch.rand(setup.batch, 3, *setup.size)
    if setup.is_command:
        return _prepare_command(setup, network, x[0])
    if setup.is_exported:
        return partial(in_onnx_runtime(network), x)
    function = network_switches.apply(network, {'compile': setup.is_compiled})
    if setup.trains and setup.device == 'cpu':
        keep_freed_memory()  # as in training
    if setup.is_graphed:
        function = TrainingGraph(network, {}) if setup.trains else partial(Graphs(), network)
    height, width = setup.size
    top, left = (setup.padded[0] - height) // 2, (setup.padded[1] - width) // 2
    x = functional.pad(x, (left, setup.padded[1] - width - left, top, setup.padded[0] - height - top)).to(setup.device)

    def compute() -> Tensor:
        network.zero_grad()
        mode = torch.enable_grad() if setup.trains else torch.inference_mode()
        with ops.use_backend(setup.backend), mode:
            with torch.autocast(setup.device, torch.bfloat16, enabled=setup.precision == 'bf16'):
                output = function(x)
            if setup.trains:
                output.float().square().mean().backward()
            return output.detach()[..., top : top + height, left : left + width].clone()

    return synchronized(compute, setup.device)


def in_onnx_runtime(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Export a network and return a function that runs it in ONNX Runtime."""
    with tempfile.TemporaryDirectory(prefix='basicsr_benchmark_') as folder:
        path = Path(folder, 'network.onnx')
        export_network(network, path)
        return read_onnx(path.read_bytes())


def _prepare_command(setup: Setup, network: nn.Module, image: Tensor) -> Compute:
    """Prepare `basicsr infer` on a file, in this process to exclude the startup of Python and the libraries."""
    held = tempfile.TemporaryDirectory(prefix='basicsr_benchmark_')
    folder = Path(held.name)
    source, weights, output = folder / 'image.png', folder / 'weights.safetensors', folder / 'restored'
    save_weights(weights, network.state_dict(), dict(setup.network))
    cv2.imwrite(str(source), np.ascontiguousarray((image * 255).round().byte().permute(1, 2, 0).numpy()[..., ::-1]))
    command = ['infer', '-i', str(source), '-o', str(output), '--weights', str(weights), '--device', 'cpu']

    def compute() -> Tensor:
        with ops.use_backend(setup.backend), contextlib.redirect_stdout(io.StringIO()):
            status = basicsr(command)
        if status:
            raise RuntimeError(f'basicsr {" ".join(command)} ended with {status}')
        # This closure keeps the temporary folder alive.
        restored = cv2.imread(str(Path(held.name, output.name, source.name)))
        return torch.from_numpy(np.ascontiguousarray(restored[..., ::-1])).permute(2, 0, 1)[None] / 255

    return compute


def _peak(setup: Setup, compute: Compute) -> int | None:
    if setup.device == 'cuda':
        return peak_memory(compute, 'cuda')
    # Not comparable: other padded sizes, and calls that also read files, compile or export.
    if setup.square or setup.is_command or setup.is_compiled or setup.is_exported:
        return None
    return in_fresh_process(_peak_here, setup)


def _peak_here(setup: Setup) -> int | None:
    # Excludes one-time allocations of libraries. A training pass would leave gradients behind.
    prepare(replace(setup, size=_WARM_UP, batch=1, trains=False))()
    return peak_memory(prepare(setup))


def count(setup: Setup) -> tuple[int, int]:
    """Return FLOPs of matrix products and convolutions and bytes of block inputs and outputs, on meta tensors."""
    elements = []
    network = build_network(setup.network).train(setup.trains).to('meta')  # not all networks can be built there
    for block in network_switches.blocks(network):
        block.register_forward_hook(lambda module, args, output: elements.append(args[0].numel() + output.numel()))
    with ops.use_backend('reference'), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(setup.batch, 3, *setup.padded, device='meta'))
    # A backward pass has two products per forward product; PyTorch's own count of it ignores groups.
    passes = 3 if setup.trains else 1
    return passes * counter.get_total_flops(), passes * sum(elements) * (2 if setup.precision == 'bf16' else 4)


def measure_case(setups: Sequence[Setup], turns: int, rates: dict[str, float]) -> list[Line]:
    """Measure all paths of a case.

    Args:
        setups: paths of the case.
        turns: timed calls per path.
        rates: rates of the machine, see `timing.machine_rates`.
    Returns:
        One row per path, see `timing.measure_paths`, with `operations` and the roofline `floor` in seconds.
    """
    by_path, case = {setup.path: setup for setup in setups}, setups[0].case

    def peak(path: str, compute: Compute) -> int | None:
        say(f'{case}, {path}: memory')
        return _peak(by_path[path], compute)

    probe = speed_probe(rates, setups[0].device)
    lines = measure_paths(case, {path: partial(prepare, setup) for path, setup in by_path.items()}, turns, peak, probe)
    for path, setup in by_path.items():
        operations, moved = count(setup)
        lines[path] |= {'operations': operations, 'floor': operations / rates[setup.precision] + moved / rates['copy']}
    add_ratios(list(lines.values()))
    return list(lines.values())


def measure(
    cases: dict[str, list[Setup]], turns: int, rates: dict[str, float], keep: Callable[[list[Line]], None]
) -> list[Line]:
    """Measure all cases; rows of GPU cases are marked as not run without a GPU.

    Args:
        cases: paths by case, see `list_setups`.
        turns: timed calls per path.
        rates: rates of the CPU, see `timing.machine_rates`.
        keep: called with all rows so far after each case, to save intermediate results.
    """
    lines: list[Line] = []
    has_gpu = torch.cuda.is_available()
    gpu_rates = machine_rates('cuda') if has_gpu and any(found[0].device == 'cuda' for found in cases.values()) else {}
    for case, found in cases.items():
        is_on_gpu = found[0].device == 'cuda'
        if is_on_gpu and not has_gpu:
            lines += [{'case': case, 'path': setup.path, 'skipped': f'not run: {NO_GPU}'} for setup in found]
        else:
            lines += measure_case(found, turns, gpu_rates if is_on_gpu else rates)
            if not any(setup.is_compiled for setup in found):
                lines.append({'case': case, 'path': 'torch.compile', 'skipped': _NO_COMPILE})
        keep(lines)
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `benchmark.py net`."""
    parser.add_argument('--net', default='AST_B', help='registered AST (default: %(default)s)')
    records.add_count(parser, '--size', 512, 'side of the large image')
    records.add_count(parser, '--turns', 3, 'timed calls per path')
    parser.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES), metavar='CASE', help=', '.join(CASES))
    parser.add_argument('--compile', action='store_true', help='measure torch.compile, too: minutes per path')
    records.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write the record."""
    if args.net not in ARCH_REGISTRY:
        raise OptionError(f'--net {args.net}: not a registered network, see `basicsr list arch`')
    if 'drop_path_rate' not in inspect.signature(ARCH_REGISTRY.get(args.net)).parameters:
        raise OptionError(f'--net {args.net}: expected an AST, such as AST_XS')
    rates = machine_rates()
    settings = {'net': args.net, 'size': args.size, 'turns': args.turns}

    def keep(lines: list[Line]) -> None:
        records.write(args.json, 'net', settings, lines, rates=rates)

    lines = measure(list_setups(args.net, args.size, args.cases, args.compile), args.turns, rates, keep)
    print(records.backend_table(lines))
    giga = {key: f'{rate / 1e9:.0f}' for key, rate in rates.items()}
    print(
        f'\n{args.net}, {args.turns} turns per path. Matrix products: {giga["fp32"]} GFLOP/s in float32 '
        f'(torch.nn.functional.linear: {giga["fp32_torch"]}), {giga["bf16"]} in bfloat16; copies: {giga["copy"]} GB/s.'
    )
    if args.net == 'AST_B':
        print(*target_remarks(lines), *official_remarks(lines, rates['fp32_torch']), sep='\n')
    return 0


def target_remarks(lines: Sequence[Line]) -> list[str]:
    """Report for each path with a target whether it was reached."""
    remarks = []
    for line in lines:
        speed, share = TARGETS.get((line['case'], line['path']), (None, None))
        if speed is None or 'of_floor' not in line:
            continue
        is_reached = line['of_floor'] >= speed
        parts = [f'{line["of_floor"]:.0%} of the roofline (target: at least {speed:.0%})']
        if share is not None and 'of_memory' in line:
            parts.append(f'{line["of_memory"]:.2f} of the memory (target: at most {share})')
            is_reached = is_reached and line['of_memory'] <= share
        verdict = 'reached' if is_reached else 'NOT reached'
        remarks.append(f'{line["case"]}, {line["path"]}: {verdict}: {", ".join(parts)}.')
    return remarks


def official_remarks(lines: Sequence[Line], rate: float) -> list[str]:
    """Compare the reference with the official network, scaled to the matrix product rate of this run."""
    return [
        f'{line["case"]}: the reference takes {line["median"]:.2f} s, the official network '
        f'{OFFICIAL_SECONDS[line["case"]] * OFFICIAL_RATE / rate:.2f} s '
        f'({OFFICIAL_SECONDS[line["case"]]} s at {OFFICIAL_RATE / 1e9:.0f} GFLOP/s, scaled).'
        for line in lines
        if line['path'] == 'reference' and 'median' in line and line['case'] in OFFICIAL_SECONDS
    ]
