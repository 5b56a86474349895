"""Find and check the pairs of a dataset as it is distributed, and write manifests to train from.

  basicsr data prepare agan ~/downloads/raindrop prepared/agan
  basicsr data prepare rain100 Rain100L prepared/rain100l --copy        the images too, under equal names
  basicsr data prepare folders my_pairs prepared/mine --lq '{split}/noisy' --gt '{split}/clean'

SRC is the folder as it was unpacked; the pairs may lie some folders deeper. It is never written to. Every image is
read to its last byte on all cores: unreadable ones, pairs of two sizes, images without a partner and such that are
in the training and the test part alike are named, and nothing is prepared until they are mended or left out. A run
that was killed goes on where it was. DST gets a manifest for each split, `train.jsonl` for example, with names, sizes
and digests of the pixels, which `basicsr data check` verifies later.

Exit status: 0 prepared, 2 refused or wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ast_plugin.cli.data import say
from ast_plugin.errors import DataError, OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ast_plugin.data.layouts import Layout
    from ast_plugin.data.prepare.preparation import Checks, Preparation
    from ast_plugin.data.prepare.splits import Split


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr data prepare`."""
    from ast_plugin.data.layouts import LAYOUTS
    from ast_plugin.data.prepare.splits import preparable

    names = preparable()
    width = max(map(len, names))
    parser.epilog = 'layouts:\n' + '\n'.join(f'  {name:{width}}  {LAYOUTS[name].title}' for name in names)
    parser.add_argument('layout', metavar='LAYOUT', help=f'one of {", ".join(names)}')
    parser.add_argument('source', metavar='SRC', type=Path, help='folder of the dataset, unpacked')
    parser.add_argument('target', metavar='DST', type=Path, help='folder for the manifests')
    parser.add_argument('--split', action='append', default=[], metavar='NAME', help='only this split; may be repeated')
    parser.add_argument('--skip-faulty', action='store_true', help='leave out what is faulty, and prepare the rest')
    parser.add_argument(
        '--allow-duplicates', action='store_true', help='prepare although images to test with are trained on'
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        '--copy', dest='place', action='store_const', const='copy', help='copy the images to DST/SPLIT/lq and gt'
    )
    place.add_argument(
        '--link', dest='place', action='store_const', const='link', help='make links to them there instead'
    )
    parser.add_argument('--workers', type=int, metavar='N', help='processes that read (default: one a core)')
    plain = parser.add_argument_group('plain folders (layout folders)')
    plain.add_argument('--lq', metavar='DIR', help="degraded images below SRC, such as '{split}/input'")
    plain.add_argument('--gt', metavar='DIR', help='clean images below SRC')
    plain.add_argument('--lq-template', metavar='NAME', help="their names, such as '{}_rain', '{}_*' for many to one")
    plain.add_argument('--gt-template', metavar='NAME', help="names of the clean ones, such as '{}_clean.png'")


def run(args: argparse.Namespace) -> int:
    """Prepare the dataset."""
    from ast_plugin.data.prepare.preparation import Preparation
    from ast_plugin.data.prepare.splits import find_splits

    layout = _layout(args)
    source, target = args.source.expanduser().absolute(), args.target.expanduser().resolve()
    splits = find_splits(layout, source, args.split)
    preparation = Preparation(splits, source, target)
    with preparation.lock():
        checks = _check(preparation, splits, args.workers)
        _show(checks, source, layout if isinstance(layout, str) else layout.title)
        faults = preparation.list_faults(checks) if checks.num_faults or checks.leaks else None
        _refuse(checks, faults, args)
        return _write(preparation, checks, faults, args)


def _show(checks: Checks, source: Path, title: str) -> None:
    """Print what was found."""
    from ast_plugin.data.prepare import preparation as prepare_report

    say(f'{_title(title)} in {source}\n')
    say('\n'.join(prepare_report.format_table(checks, source)))
    for heading, lines in (
        ('notes', prepare_report.format_notes(checks)),
        ('faults', prepare_report.format_faults(checks, source)),
        ('in training and test alike', prepare_report.format_leaks(checks, source)),
    ):
        if lines:
            say('\n  '.join([f'\n{heading}', *lines]))
    sys.stdout.flush()


def _layout(args: argparse.Namespace) -> str | Layout:
    from ast_plugin.data.prepare.splits import plain_layout

    if args.workers is not None and args.workers < 1:
        raise OptionError(f'--workers is {args.workers}: expected a number of processes, 1 or more')
    plain = (args.lq, args.gt, args.lq_template, args.gt_template)
    if args.layout == 'folders':
        return plain_layout(*plain)
    if any(value is not None for value in plain):
        raise OptionError(f'--lq, --gt and their templates are for the layout folders, not for {args.layout}')
    return args.layout


def _title(layout: str) -> str:
    from ast_plugin.data.layouts import LAYOUTS

    return LAYOUTS[layout].title if layout in LAYOUTS else layout


def _check(preparation: Preparation, splits: Sequence[Split], workers: int | None) -> Checks:
    from ast_plugin.data.workers import num_cores

    total = sum(len(split.pairs) for split in splits)
    # Starting processes takes longer than reading a few images.
    workers = workers or (num_cores() if total > 50 else 1)
    with _bar(total, 'checking') as bar:
        return preparation.check(workers, bar.update)


def _refuse(checks: Checks, faults: Path | None, args: argparse.Namespace) -> None:
    """Stop where the user has to decide."""
    lines = []
    if checks.num_faults and not args.skip_faulty:
        lines.append(f'faults: {checks.num_faults:,}; mend or remove the files, or leave them out with --skip-faulty')
    if checks.leaks and not args.allow_duplicates:
        number = sum(leak.num for leak in checks.leaks)
        lines.append(
            f'{number:,} images in training and test alike: remove them from one side, '
            f'or accept them with --allow-duplicates'
        )
    if lines:
        raise DataError('\n'.join([f'nothing was prepared; all that is wrong is listed in {faults}', *lines]))
    if not any(len(checked.good) for checked in checks.splits):
        raise DataError(f'no pair of {args.source} can be used (all faults in {faults})')


def _write(preparation: Preparation, checks: Checks, faults: Path | None, args: argparse.Namespace) -> int:
    from ast_plugin.data.prepare import preparation as prepare_report

    total = sum(len(checked.good) for checked in checks.splits)
    with _bar(total, {'copy': 'copying', 'link': 'linking'}.get(args.place, ''), shown=bool(args.place)) as bar:
        manifests = preparation.write(checks, args.layout, args.place, bar.update)
    if faults:
        preparation.list_faults(checks)
    say('\n  '.join([f'\nprepared {total:,} pairs', *map(str, manifests)]))
    older = sorted(set(preparation.target.glob('*.jsonl')) - set(manifests))
    if older:
        say(f'there from an earlier run, and left as it is: {", ".join(path.name for path in older)}')
    if checks.num_faults:
        say(f'left out for faults: {checks.num_faults:,}, listed in {faults}')
    phases = {checked.split.name: checked.split.phase for checked in checks.splits}
    lines = prepare_report.format_options((phases[path.stem], path) for path in manifests)
    say('\n  '.join(['\nFor an option file, in place of dataroot and split:\n', *lines]))
    return 0


def _bar(total: int, title: str, shown: bool = True):
    from tqdm import tqdm

    return tqdm(
        total=total, desc=title, unit='pair', dynamic_ncols=True, file=sys.stderr, leave=False,
        disable=not (shown and sys.stderr.isatty()),
    )  # fmt: skip
