"""Print the table of a record of `benchmark.py net`, `peers` or `ops`.

python tools/benchmark.py table benchmarks/net_cpu.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ast_plugin.compare.measure import describe_machine, installed_versions
from ast_plugin.errors import DataError
from ast_plugin.files import write_file

Line = dict[str, Any]
MEGABYTE = 2**20


def say(text: str) -> None:
    """Print progress to stderr, separate from the tables."""
    print(text, file=sys.stderr, flush=True)


def add_count(parser: argparse.ArgumentParser, name: str, default: int | None, text: str, smallest: int = 1) -> None:
    """Declare an option that takes an integer of at least `smallest`; the default is added to its help `text`."""

    def count(value: str) -> int:
        if int(value) < smallest:
            raise argparse.ArgumentTypeError(f'expected {smallest} or more, got {value}')
        return int(value)

    shown = text if default is None else f'{text} (default: {default})'
    parser.add_argument(name, type=count, default=default, metavar='N', help=shown)


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Declare `--json`, the path of the record."""
    parser.add_argument('--json', type=Path, metavar='FILE', help='write measurements, machine and versions as JSON')


def check_writable(path: Path) -> None:
    """Check that a record can be written, before measurements that may take an hour.

    Raises:
        DataError: if it cannot be written.
    """
    is_new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open('a').close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise DataError(f'--json {path}: cannot be written: {error.strerror}') from error


def write(path: Path | None, benchmark: str, settings: Mapping[str, Any], results: Any, **more: Any) -> None:
    """Write a record as JSON, atomically.

    Args:
        path: output file; None writes nothing.
        benchmark: name of the subcommand.
        settings: settings of the benchmark.
        results: rows, or rows by name.
        more: additional entries.
    """
    if path is None:
        return
    content = {'benchmark': benchmark, 'settings': settings, **more, 'results': results}
    content |= {'machine': describe_machine(), 'versions': installed_versions()}
    write_file(path, (json.dumps(content, indent=2) + '\n').encode())


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], num_texts: int = 1) -> str:
    """Format a Markdown table; short rows are filled with empty cells.

    Args:
        header: names of the columns.
        rows: cells of each row.
        num_texts: number of text columns on the left; the other columns are right-aligned numbers.
    """
    rule = ['---'] * num_texts + ['---:'] * (len(header) - num_texts)
    filled = [[*row, *[''] * (len(header) - len(row))] for row in rows]
    return '\n'.join(f'| {" | ".join(row)} |' for row in (header, rule, *filled))


def backend_table(lines: Sequence[Line]) -> str:
    """Format the table of paths; ratios refer to the first row of a case, and rows that were not run have a reason."""
    columns: dict[str, Callable[[Line], str]] = {
        'median': lambda line: _seconds(line['median']),
        'fastest': lambda line: _seconds(line['fastest']),
        'speed-up': lambda line: f'{line["faster"]:.2f}',
        'CPU time': lambda line: _seconds(line['cpu']),
        'CPU speed-up': lambda line: f'{line["less_cpu"]:.2f}',
        'peak MB': lambda line: f'{line["peak_bytes"] / MEGABYTE:.0f}',
        'memory ratio': lambda line: f'{line["of_memory"]:.2f}',
        'of roofline': lambda line: f'{line["of_floor"]:.0%}',
        'error': lambda line: f'{line["error"]:.0e}',
    }
    rows = []
    for line in lines:
        cells = [line['skipped']] if 'skipped' in line else [_cell(text, line) for text in columns.values()]
        rows.append([line['case'], line['path'], *cells])
    return markdown(['case', 'path', *columns], rows, num_texts=2)


def _cell(text: Callable[[Line], str], line: Line) -> str:
    try:
        return text(line)
    except (KeyError, TypeError):  # not measured
        return ''


def _seconds(value: float) -> str:
    return f'{value:.2f} s' if value >= 1 else f'{value * 1000:.1f} ms'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `benchmark.py table`."""
    parser.add_argument(
        'records', nargs='+', type=Path, metavar='FILE', help='JSON of `benchmark.py net`, `peers` or `ops`'
    )


def run(args: argparse.Namespace) -> int:
    """Print a table for each record, followed by the machine."""
    for path in args.records:
        try:
            record = json.loads(path.read_text(encoding='utf-8'))
            text = backend_table(record['results'])
            machine = '{processor}, {threads} threads, load {load} at the end'.format(**record['machine'])
            torch_version = record['versions']['torch']
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f'{path} is not a record of `benchmark.py net`, `peers` or `ops`: {error!r}') from error
        print(text)
        print(f'\n{machine}; torch {torch_version}')
    return 0
