"""Run time, memory and roofline fraction of AST and of comparable networks.

  python tools/benchmark.py peers --json benchmarks/peers_cpu.json
  python tools/benchmark.py peers --cases equal --turns 5

The networks of a case restore the same image of 256² and alternate in one process, on a CPU in float32; the others are
compared with the first. Networks from spandrel require the extra `baselines`, ONNX Runtime the extra `onnx`. The
roofline is that of `benchmark.py net`. Cases:

  equal      networks of options/compare/synthetic.yml: 7 ± 1 GMACs
  published  sizes published by the authors, of options/compare/derain.yml
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from ast_plugin.options.reading import find, read
from benchmarks import records
from benchmarks.net import Setup, measure_case
from benchmarks.timing import machine_rates

_SIZE = 256
_PUBLISHED = ('AST-B', 'NAFNet', 'Restormer', 'Uformer-B', 'SwinIR')


def list_setups(case: str) -> list[Setup]:
    """Return the networks of a case; AST comes first, on several backends."""
    entries = read(find('compare/synthetic' if case == 'equal' else 'compare/derain'))['networks']
    networks = {entry['name']: entry['network_g'] for entry in entries}
    ours, *others = networks if case == 'equal' else _PUBLISHED
    first = Setup(networks[ours], case, ours, backend='auto', size=(_SIZE, _SIZE))
    found = [first, replace(first, path=f'{ours}, by plain operators', backend='reference')]
    if case == 'equal':  # exporting AST-B takes minutes
        found.append(replace(first, path=f'{ours}, by ONNX Runtime', is_exported=True))
    return found + [replace(first, network=networks[name], path=name) for name in others]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `benchmark.py peers`."""
    cases = ['equal', 'published']
    parser.add_argument('--cases', nargs='+', choices=cases, default=cases, help='cases (default: all)')
    records.add_count(parser, '--turns', 3, 'timed calls per network')
    records.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write the record."""
    rates = machine_rates()
    lines = [line for case in args.cases for line in measure_case(list_setups(case), args.turns, rates)]
    print(records.backend_table(lines))
    records.write(args.json, 'peers', {'turns': args.turns, 'size': _SIZE}, lines, rates=rates)
    return 0
