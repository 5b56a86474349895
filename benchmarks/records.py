"""Print the table of a record that `benchmark.py net` or `ops` has written, as the README has it.

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
    """Tell the user what is going on, apart from the tables."""
    print(text, file=sys.stderr, flush=True)


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Declare `--json`, where the record goes."""
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the measurements, machine and versions')


def check_writable(path: Path) -> None:
    """Check that a record can be written before it is measured, which can take an hour.

    Raises:
        DataError: if not.
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
    """Write a record as JSON, the file whole or not at all; nothing where no path was given.

    Args:
        path: of the file.
        benchmark: name of the subcommand.
        settings: what was measured.
        results: its lines, or lines by name.
        more: other entries.
    """
    if path is None:
        return
    content = {'benchmark': benchmark, 'settings': settings, **more, 'results': results}
    content |= {'machine': describe_machine(), 'versions': installed_versions()}
    write_file(path, (json.dumps(content, indent=2) + '\n').encode())


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], num_texts: int = 1) -> str:
    """A Markdown table; short rows are filled up with empty cells.

    Args:
        header: names of the columns.
        rows: cells of each line.
        num_texts: so many columns at the left are texts, the others numbers.
    """
    rule = ['---'] * num_texts + ['---:'] * (len(header) - num_texts)
    filled = [[*row, *[''] * (len(header) - len(row))] for row in rows]
    return '\n'.join(f'| {" | ".join(row)} |' for row in (header, rule, *filled))


def backend_table(lines: Sequence[Line]) -> str:
    """The table of backends; × is against the first line of the case, and a line that was not run says why."""
    columns: dict[str, Callable[[Line], str]] = {
        'median': lambda line: _seconds(line['median']),
        'fastest': lambda line: _seconds(line['fastest']),
        '× faster': lambda line: f'{line["faster"]:.2f}',
        'CPU time': lambda line: _seconds(line['cpu']),
        '× less': lambda line: f'{line["less_cpu"]:.2f}',
        'peak MB': lambda line: f'{line["peak_bytes"] / MEGABYTE:.0f}',
        '× memory': lambda line: f'{line["of_memory"]:.2f}',
        'of the floor': lambda line: f'{line["of_floor"]:.0%}',
        'off by': lambda line: f'{line["error"]:.0e}',
    }
    rows = []
    for line in lines:
        cells = [line['skipped']] if 'skipped' in line else [_cell(text, line) for text in columns.values()]
        rows.append([line['case'], line['path'], *cells])
    return markdown(['what', 'path', *columns], rows, num_texts=2)


def _cell(text: Callable[[Line], str], line: Line) -> str:
    try:
        return text(line)
    except (KeyError, TypeError):  # the line has no such figure, or None
        return ''


def _seconds(value: float) -> str:
    return f'{value:.2f} s' if value >= 1 else f'{value * 1000:.1f} ms'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `benchmark.py table`."""
    parser.add_argument('records', nargs='+', type=Path, metavar='FILE', help='JSON of `benchmark.py net` or `ops`')


def run(args: argparse.Namespace) -> int:
    """Print a table for each record, with the machine under it."""
    for path in args.records:
        try:
            record = json.loads(path.read_text(encoding='utf-8'))
            text = backend_table(record['results'])
            machine = '{processor}, {threads} threads, load {load} at the end'.format(**record['machine'])
            torch_version = record['versions']['torch']
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f'{path} is no record of `benchmark.py net` or `ops`: {error!r}') from error
        print(text)
        print(f'\n{machine}; torch {torch_version}')
    return 0
