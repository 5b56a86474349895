"""Print the table of a record that `benchmark.py net` or `ops` has written, as the README has it.

python tools/benchmark.py table benchmarks/net_cpu.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ast_plugin.compare.benchmark_backends import table
from ast_plugin.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `benchmark.py table`."""
    parser.add_argument('records', nargs='+', type=Path, metavar='FILE', help='JSON of `benchmark.py net` or `ops`')


def run(args: argparse.Namespace) -> int:
    """Print a table for each record, with the machine under it."""
    for path in args.records:
        try:
            record = json.loads(path.read_text(encoding='utf-8'))
            text = table(record['results'])
            machine = '{processor}, {threads} threads, load {load} at the end'.format(**record['machine'])
            torch_version = record['versions']['torch']
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f'{path} is no record of `benchmark.py net` or `ops`: {error!r}') from error
        print(text)
        print(f'\n{machine}; torch {torch_version}')
    return 0
