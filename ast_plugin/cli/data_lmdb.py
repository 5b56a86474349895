"""Pack pairs of images into two LMDBs, lq.lmdb and gt.lmdb, which are read faster than many files.

  basicsr data lmdb datasets/AGAN-Data datasets/agan_train --layout agan --phase train
  basicsr data lmdb datasets/mine datasets/mine_lmdb --encoding raw
  basicsr data lmdb manifests/train.jsonl datasets/train_raw --encoding raw

SRC is the root of a dataset whose layout is named, a folder with the folders lq and gt, or a manifest that `basicsr
data prepare` wrote. Both LMDBs are verified before DST appears. If this is interrupted or killed, the same command goes
on where it was; where DST is there already, of the same files, it is only verified again.

Encoding png keeps PNG files in RGB as they are, others are encoded, and BasicSR reads it as well (type:
PairedImageDataset, io_backend: {type: lmdb}). Encoding raw keeps pixels, of which a patch is read without decoding the
image: several times as fast, for some twice the space. BasicSR cannot read it; PairsDataset can:

  datasets:
    train:
      type: PairsDataset
      dataroot_lq: DST/lq.lmdb
      dataroot_gt: DST/gt.lmdb
      io_backend: {type: lmdb}
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ast_plugin.errors import DataError, OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ast_plugin.data.matching import Pair


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr data lmdb`."""
    parser.add_argument('source', type=Path, metavar='SRC', help='dataset, folder or manifest')
    parser.add_argument('destination', type=Path, metavar='DST', help='folder that gets lq.lmdb and gt.lmdb')
    parser.add_argument('--layout', help='how the dataset SRC lies on disk: agan, spad, ... (by itself lq and gt)')
    parser.add_argument('--phase', choices=('train', 'test'), default='train', help='part of the dataset (train)')
    parser.add_argument('--split', help='part of the dataset where phase does not say which: test_b')
    parser.add_argument('--list-file', metavar='FILE', help="layout spad: another list than the dataset's own")
    parser.add_argument('--lq-dir', metavar='DIR', help='without layout: degraded images, below SRC (lq)')
    parser.add_argument('--gt-dir', metavar='DIR', help='without layout: clean images, below SRC (gt)')
    parser.add_argument('--lq-template', metavar='NAME', help="without layout: degraded names, '{}_rain.png'")
    parser.add_argument('--gt-template', metavar='NAME', help="without layout: clean names, '{}_clean.png'")
    parser.add_argument('--encoding', choices=('png', 'raw'), default='png', help='what is stored (png)')
    parser.add_argument(
        '--compress-level',
        type=int,
        choices=range(10),
        metavar='0..9',
        help='encode every PNG anew: 0 is read fastest, 9 is smallest; by itself PNG files stay as they are',
    )
    parser.add_argument('--workers', type=int, metavar='N', help='threads that read and encode (one a core)')
    parser.add_argument('--overwrite', action='store_true', help='replace LMDBs that DST has of something else')


def run(args: argparse.Namespace) -> int:
    """Write and verify both LMDBs."""
    if args.encoding == 'raw' and args.compress_level is not None:
        raise OptionError('--compress-level is for --encoding png; raw pixels are not compressed')
    if args.workers is not None and args.workers < 1:
        raise OptionError(f'--workers: expected 1 or more, got {args.workers}')

    from ast_plugin.data.lmdb.writer import make_plan, write_lmdbs

    plan = make_plan(_pairs(args), args.encoding, args.compress_level)
    outcome = write_lmdbs(plan, args.destination, args.workers, args.overwrite)
    resumed = f', {outcome.num_resumed} of them written before' if outcome.num_resumed else ''
    print(
        f'{args.destination}: {outcome.num_pairs} pairs{resumed}, {outcome.num_bytes / 2**20:.1f} MB, '
        f'encoding {args.encoding}, verified'
    )
    return 0


def _pairs(args: argparse.Namespace) -> Sequence[Pair]:
    """The pairs of SRC, whichever of the three it is."""
    source: Path = args.source.expanduser()
    folder_options = {key: getattr(args, key) for key in ('lq_dir', 'gt_dir', 'lq_template', 'gt_template')}
    layout_options = {'split': args.split, 'list_file': args.list_file}
    is_manifest = source.is_file()
    useless = {}
    if is_manifest or args.layout:
        useless |= folder_options
    if is_manifest or not args.layout:
        useless |= layout_options
    if is_manifest:
        useless |= {'layout': args.layout}
    given = [f'--{key.replace("_", "-")}' for key, value in useless.items() if value is not None]
    if given:
        kind = 'a manifest' if is_manifest else f'layout {args.layout}' if args.layout else 'a folder without --layout'
        raise OptionError(f'{source}: {kind} does not use {", ".join(given)}')
    if is_manifest:
        from ast_plugin.data.manifest import read_manifest

        return read_manifest(source).pairs()
    if not source.is_dir():
        raise DataError(f'{source}: there is no such dataset, folder or manifest')
    return _listed(source, args, folder_options, layout_options)


def _listed(source: Path, args: argparse.Namespace, folder_options: dict, layout_options: dict) -> Sequence[Pair]:
    from ast_plugin.data.layouts import Source, list_pairs

    if args.layout and args.layout != 'folders':
        return list_pairs(args.layout, Source(phase=args.phase, dataroot=str(source), **layout_options))
    lq_dir, gt_dir = source / (args.lq_dir or 'lq'), source / (args.gt_dir or 'gt')
    for folder in (lq_dir, gt_dir):
        if not folder.is_dir():
            raise DataError(
                f'{source}: expected the folders {lq_dir.name} and {gt_dir.name} in it, {folder.name} is missing. Name '
                f'them with --lq-dir and --gt-dir, or say with --layout how the dataset lies on disk'
            )
    templates = {key: folder_options[key] for key in ('lq_template', 'gt_template')}
    folders = Source(phase=args.phase, dataroot_lq=str(lq_dir), dataroot_gt=str(gt_dir), **templates)
    return list_pairs('folders', folders)
