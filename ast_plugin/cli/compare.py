"""Compare networks: train them, measure all of them under equal conditions, and write tables, plots and a report.

  basicsr compare -opt compare/quick
  basicsr compare -opt my_comparison.yml --force_yml train:total_iter=1000

A compare file is an option file with a list `networks` instead of `network_g`, and a section `compare`. Entries with
weights are measured without training. The results are written to comparisons/NAME: table.md, table.csv, images.csv, the
plots, and report.html, a single file that works offline. An interrupted comparison is resumed by running the command
again; finished work with unchanged options is reused.

Exit status: 0 all networks compared, 1 some failed (the report lists them with the reason), 2 nothing was started.
"""

from __future__ import annotations

import argparse
import signal
import sys

from ast_plugin.cli import commands
from ast_plugin.names import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr compare`."""
    commands.add_file_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Check the compare file, then train, measure and report."""
    from ast_plugin.compare.report import write_outputs
    from ast_plugin.compare.run import Comparison, make_plan

    plan = make_plan(args.opt, args.root, args.force_yml)
    plan.folder.mkdir(parents=True, exist_ok=True)
    # SIGTERM is handled like Ctrl-C: running jobs are asked to save their state, and the command waits for them.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        results = Comparison(plan, say).run()
    except (KeyboardInterrupt, SystemExit):
        say('basicsr: stopped; run the same command again to resume', file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    report = write_outputs(plan, results)
    say('', *results.to_markdown().split('\n'), '', f'Report: {report}')
    failed = [row for row in results.rows if row.failed]
    for row in failed:
        say(f'basicsr: error: {row.name}: {row.failed}', file=sys.stderr)
    incomparable = results.incomparable()
    for metric in incomparable:
        say(f'basicsr: error: {metric}: no image was measured for all rows, so there is no mean', file=sys.stderr)
    return 1 if failed or incomparable else 0
