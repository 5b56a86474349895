"""Run time, memory and roofline fraction of AST and of comparable networks.

  python tools/benchmark.py peers --json benchmarks/peers_cpu.json
  python tools/benchmark.py peers --cases equal --turns 5

The networks of a case restore the same image of 256² and alternate in one process, on a CPU in float32; the others are
compared with the first. Networks from spandrel require the extra `baselines`, ONNX Runtime the extra `onnx`. The
roofline is that of `benchmark.py net`. Cases:

  equal      networks of options/compare/synthetic.yml: 7 ± 1 GMACs
  published  sizes published by the authors
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ast_plugin import ops
from ast_plugin.archs.networks import build_network
from ast_plugin.compare.measure import peak_memory
from ast_plugin.errors import OptionError
from ast_plugin.options.reading import find, read
from benchmarks import records
from benchmarks.net import count_pass, in_onnx_runtime
from benchmarks.records import Line, say
from benchmarks.timing import Compute, add_ratios, in_fresh_process, machine_rates, measure_paths, speed_probe

_SIZE = 256

CASES: dict[str, dict[str, Mapping[str, Any]]] = {
    'equal': {entry['name']: entry['network_g'] for entry in read(find('compare/synthetic'))['networks']},
    'published': {
        'AST_B': {'type': 'AST_B', 'img_size': 128},
        'NAFNet, width 64': {
            'type': 'Spandrel',
            'name': 'NAFNet',
            'width': 64,
            'middle_blk_num': 1,
            'enc_blk_nums': [1, 1, 1, 28],
            'dec_blk_nums': [1, 1, 1, 1],
        },
        'Restormer': {'type': 'Spandrel', 'name': 'Restormer'},
        'Uformer-B': {
            'type': 'Spandrel',
            'name': 'Uformer',
            'img_size': 128,
            'embed_dim': 32,
            'win_size': 8,
            'modulator': True,
            'depths': [1, 2, 8, 8, 2, 8, 8, 2, 1],
        },
        'SwinIR-S': {
            'type': 'SwinIR',
            'upscale': 1,
            'img_size': 64,
            'window_size': 8,
            'mlp_ratio': 2,
            'upsampler': '',
            'resi_connection': '1conv',
            'embed_dim': 60,
            'depths': [6, 6, 6, 6],
            'num_heads': [6, 6, 6, 6],
        },
    },
}
REFERENCE, EXPORTED = 'by plain operators', 'by ONNX Runtime'


def lines_of(case: str) -> dict[str, tuple[Mapping[str, Any], str]]:
    """Return options and backend of each row by its name; AST comes first, with several backends."""
    networks = CASES[case]
    ours, *others = networks
    ways = {ours: 'auto', f'{ours}, {REFERENCE}': 'reference'}
    if case == 'equal':  # exporting AST-B takes minutes
        ways[f'{ours}, {EXPORTED}'] = EXPORTED
    found = {name: (networks[ours], way) for name, way in ways.items()}
    return found | {name: (networks[name], 'auto') for name in others}


def prepare(options: Mapping[str, Any], way: str, size: int = _SIZE) -> Compute:
    """Build a network and its input deterministically; return a function that computes the output once."""
    torch.manual_seed(0)
    network, x = build_network(dict(options)).eval(), torch.rand(1, 3, size, size)
    if way == EXPORTED:
        return partial(in_onnx_runtime(network), x)

    def compute() -> torch.Tensor:
        with ops.use_backend(way), torch.inference_mode():
            return network(x)

    return compute


def count(options: Mapping[str, Any]) -> tuple[int, int]:
    """Return FLOPs of matrix products and convolutions and bytes of block inputs and outputs."""
    side = _SIZE // 2  # the cost of all networks is linear in the number of pixels
    operations, numbers = count_pass(build_network(dict(options)).eval(), torch.rand(1, 3, side, side))
    return 4 * operations, 4 * 4 * numbers


def _peak(options: Mapping[str, Any], way: str) -> int | None:
    prepare(options, way, 128)()  # excludes one-time allocations of libraries
    return peak_memory(prepare(options, way))


def measure(cases: Sequence[str], turns: int, rates: dict[str, float]) -> list[Line]:
    """Measure all networks of some cases.

    Args:
        cases: names in `CASES`.
        turns: timed calls per network.
        rates: rates of the machine, see `timing.machine_rates`.
    Returns:
        One row per network, see `timing.measure_paths`, with `operations` and the roofline `floor` in seconds.
    """
    lines: list[Line] = []
    probe = speed_probe(rates)
    for case in cases:
        ways = lines_of(case)

        def peak(path: str, compute: Compute, case=case, ways=ways) -> int | None:
            say(f'{case}, {path}: memory')
            options, way = ways[path]
            return None if way == EXPORTED else in_fresh_process(_peak, options, way)

        found = measure_paths(case, {path: partial(prepare, *way) for path, way in ways.items()}, turns, peak, probe)
        for path, line in found.items():
            operations, moved = count(ways[path][0])
            line |= {'operations': operations, 'floor': operations / rates['fp32'] + moved / rates['copy']}
        add_ratios(list(found.values()))
        lines += found.values()
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `benchmark.py peers`."""
    parser.add_argument('--cases', nargs='+', choices=list(CASES), default=list(CASES), help='cases (default: all)')
    parser.add_argument('--turns', type=int, default=3, help='timed calls per network (default: %(default)s)')
    records.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write the record."""
    if args.turns < 1:
        raise OptionError('--turns must be 1 or more')
    rates = machine_rates()
    lines = measure(args.cases, args.turns, rates)
    print(records.backend_table(lines))
    records.write(args.json, 'peers', {'turns': args.turns, 'size': _SIZE}, lines, rates=rates)
    return 0
