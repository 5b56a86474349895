"""Measure: python tools/benchmark.py train [--json FILE] …; the work is done by the package's `compare`."""

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ast_plugin.compare import benchmark_records
from ast_plugin.errors import PluginError

BENCHMARKS = {
    'train': 'ast_plugin.compare.benchmark_training',
    'data': 'ast_plugin.compare.benchmark_reading',
    'synthesis': 'ast_plugin.compare.benchmark_synthesis',
    'net': 'ast_plugin.compare.benchmark_network',
    'ops': 'ast_plugin.compare.benchmark_ops',
    'table': 'ast_plugin.compare.benchmark_table',
}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark that the arguments name."""
    parser = argparse.ArgumentParser(prog='benchmark.py', description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    for name, module_name in BENCHMARKS.items():
        module = importlib.import_module(module_name)
        command = commands.add_parser(
            name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        if getattr(args, 'json', None):
            benchmark_records.check_writable(args.json)
        return args.run(args)
    except PluginError as error:
        print(f'benchmark.py: error: {error}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main())
