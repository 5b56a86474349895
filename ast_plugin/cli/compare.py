"""Compare networks: train what needs training, measure all alike, and write tables, plots and a report.

  basicsr compare -opt compare/quick
  basicsr compare -opt my_comparison.yml --force_yml train:total_iter=1000

A compare file is an option file with a list `networks` in the place of `network_g`, and a section `compare`. Everything
goes to comparisons/NAME: table.md, table.csv, images.csv, the plots, and report.html, one file that needs no network.
Given again, the command goes on where it was ended: what is done for the same options is not done again.

Exit status: 0 all were compared, 1 some failed (the report says which and why), 2 nothing was begun.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ast_plugin.cli import commands
from ast_plugin.names import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr compare`."""
    commands.add_file_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Check everything, then train, measure and report."""
    from ast_plugin.compare.report import write_outputs
    from ast_plugin.compare.run import Comparison, make_plan

    plan = make_plan(args.opt, args.root, args.force_yml)
    plan.folder.mkdir(parents=True, exist_ok=True)
    with _terminated_like_interrupted():
        try:
            results = Comparison(plan, say).run()
        except (KeyboardInterrupt, SystemExit):
            say('basicsr: stopped; the same command goes on from here', file=sys.stderr)
            raise
    report = write_outputs(plan, results)
    say('', *results.to_markdown().split('\n'), '', f'Report: {report}')
    failed = [row for row in results.rows if row.failed]
    for row in failed:
        say(f'basicsr: error: {row.name}: {row.failed}', file=sys.stderr)
    incomparable = results.incomparable()
    for metric in incomparable:
        say(f'basicsr: error: {metric}: no image was measured for all rows, so there is no mean', file=sys.stderr)
    return 1 if failed or incomparable else 0


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM end the comparison as Ctrl-C does: what runs is asked to save itself, and waited for."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
