"""Measure speed and memory: python tools/benchmark.py train [--json FILE] …"""

import argparse
import sys

from ast_plugin.errors import PluginError
from benchmarks import data, net, ops, peers, records, start, synthesis, train

BENCHMARKS = {
    'train': train,
    'start': start,
    'data': data,
    'synthesis': synthesis,
    'net': net,
    'peers': peers,
    'ops': ops,
    'table': records,
}


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser; parsed arguments contain the `run` function of the selected benchmark."""
    parser = argparse.ArgumentParser(prog='benchmark.py', description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    for name, module in BENCHMARKS.items():
        command = commands.add_parser(
            name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark selected by the arguments; return the exit status."""
    args = make_parser().parse_args(argv)
    try:
        if getattr(args, 'json', None):
            records.check_writable(args.json)
        return args.run(args)
    except PluginError as error:
        print(f'benchmark.py: error: {error}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main())
