"""Prepare, check, pack and synthesise image pairs for training and testing."""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from ast_plugin.cli import commands, data_synth
from ast_plugin.data import prepare as preparing
from ast_plugin.data.checks import check_files, check_lmdbs, find_extra
from ast_plugin.data.layouts import LAYOUTS, Source, list_pairs, plain_layout, preparable
from ast_plugin.data.lmdb.reader import check_lmdb, check_together
from ast_plugin.data.lmdb.writer import make_plan, write_lmdbs
from ast_plugin.data.manifest import read_manifest
from ast_plugin.data.matching import DataFault, Pair
from ast_plugin.data.prepare import find_splits, find_unused
from ast_plugin.data.workers import num_cores
from ast_plugin.errors import DataError, OptionError, PluginError
from ast_plugin.files import lock_folder
from ast_plugin.names import say, to_columns


def run_command(arguments: Sequence[str]) -> int:
    """Run the command of `basicsr data` that the arguments begin with, and return its exit status."""
    sentences = {
        name: (command.__doc__ or name).partition('.\n')[0] for name, command in COMMANDS.items()
    }  # none with -OO
    summaries = {name: text[0].lower() + text[1:] for name, text in sentences.items()}
    return commands.run_command('basicsr data', arguments, __doc__, summaries, COMMANDS.get)


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr data prepare`."""
    names = preparable()
    parser.epilog = '\n'.join(['layouts:', *to_columns(((name, LAYOUTS[name].title) for name in names), indent='  ')])
    parser.add_argument('layout', metavar='LAYOUT', help=f'one of {", ".join(names)}')
    parser.add_argument('source', metavar='SRC', type=Path, help='folder of the unpacked dataset')
    parser.add_argument('target', metavar='DST', type=Path, help='folder for the manifests')
    parser.add_argument('--split', action='append', default=[], metavar='NAME', help='only this split; may be repeated')
    parser.add_argument('--skip-faulty', action='store_true', help='exclude faulty pairs instead of stopping')
    parser.add_argument(
        '--allow-duplicates', action='store_true', help='accept images that occur in both training and test splits'
    )
    place = parser.add_mutually_exclusive_group()
    for name, text in {'copy': 'copy the images to DST/SPLIT/lq and gt', 'link': 'create links instead'}.items():
        place.add_argument(f'--{name}', dest='place', action='store_const', const=name, help=text)
    parser.add_argument('--workers', type=int, metavar='N', help='reader processes (default: one per core)')
    plain = parser.add_argument_group('plain folders (layout folders)')
    plain.add_argument('--lq', metavar='DIR', help="folder of degraded images under SRC, such as '{split}/input'")
    plain.add_argument('--gt', metavar='DIR', help='folder of clean images under SRC')
    plain.add_argument(
        '--lq-template', metavar='NAME', help="names of degraded images, such as '{}_rain'; '{}_*' for many to one"
    )
    plain.add_argument('--gt-template', metavar='NAME', help="names of clean images, such as '{}_clean.png'")


def prepare(args: argparse.Namespace) -> int:
    """Find and check the pairs of a public dataset as distributed, and write manifests for training.

      basicsr data prepare agan ~/downloads/raindrop prepared/agan
      basicsr data prepare rain100 Rain100L prepared/rain100l --copy        also copy the images, with equal names
      basicsr data prepare folders my_pairs prepared/mine --lq '{split}/noisy' --gt '{split}/clean'

    SRC is the unpacked folder; the pairs may be in subfolders. SRC is never written to. Every image is fully decoded,
    using all cores. Unreadable images, pairs of different sizes, images without a partner and images that occur in both
    training and test splits are listed, and nothing is prepared until they are fixed or excluded. An interrupted run is
    resumed by running the command again. DST receives one manifest per split, such as `train.jsonl`, with names, sizes
    and pixel digests, which `basicsr data check` verifies later.

    Exit status: 0 prepared, 2 rejected or wrong usage.
    """
    commands.check_least(args, workers=1)
    layout = args.layout
    plain = (args.lq, args.gt, args.lq_template, args.gt_template)
    if layout == 'folders':
        layout = plain_layout(*plain)
    elif any(value is not None for value in plain):
        raise OptionError(f'--lq, --gt and their templates are only valid for the layout folders, not for {layout}')
    source, target = Path(os.path.expanduser(args.source)).absolute(), Path(os.path.expanduser(args.target)).resolve()
    splits = find_splits(layout, source, args.split)
    preparation = preparing.Preparation(splits, source, target)
    with lock_folder(target, 'another run is preparing there'):
        num_pairs = sum(len(split.pairs) for split in splits)
        with _progress(num_pairs, 'checking') as bar:
            preparation.check(_num_workers(args, num_pairs), bar.update)
        title = LAYOUTS[args.layout].title if isinstance(layout, str) else layout.title
        say(f'{title} in {source}', '', *preparing.format_table(preparation))
        for heading, lines in (
            ('notes', [*preparing.format_notes(preparation), *find_unused(source, splits)]),
            ('faults', preparing.format_faults(preparation)),
            ('in both training and test', preparing.format_leaks(preparation)),
        ):
            if lines:
                say('', heading, *(f'  {line}' for line in lines))
        faults = preparation.list_faults() if preparation.num_faults or preparation.leaks else None
        _require_acceptance(preparation, faults, args)
        num_good = sum(len(checked.good) for checked in preparation.checked)
        with _progress(num_good if args.place else 0, args.place or '') as bar:
            manifests = preparation.write(args.layout, args.place, bar.update)
        if faults:
            preparation.list_faults()
    say('', f'prepared {num_good:,} pairs', *(f'  {path}' for path in manifests))
    older = sorted(set(target.glob('*.jsonl')) - set(manifests))
    if older:
        say(f'kept from an earlier run: {", ".join(path.name for path in older)}')
    if preparation.num_faults:
        say(f'excluded faults: {preparation.num_faults:,}, listed in {faults}')
    phases = {split.name: split.phase for split in splits}
    lines = preparing.format_options((phases[path.stem], path) for path in manifests)
    say('', 'In an option file, use instead of dataroot and split:', '', *(f'  {line}' for line in lines))
    return 0


def _require_acceptance(preparation: preparing.Preparation, faults: Path | None, args: argparse.Namespace) -> None:
    """Raise DataError for faults and duplicates that the arguments do not accept."""
    lines = []
    if preparation.num_faults and not args.skip_faulty:
        lines.append(f'faults: {preparation.num_faults:,}; fix or remove the files, or exclude them with --skip-faulty')
    if preparation.leaks and not args.allow_duplicates:
        number = sum(leak.num for leak in preparation.leaks)
        lines.append(
            f'{number:,} images in both training and test: remove them from one split, '
            f'or accept them with --allow-duplicates'
        )
    if lines:
        raise DataError('\n'.join([f'nothing was prepared; all problems are listed in {faults}', *lines]))
    if not any(checked.good for checked in preparation.checked):
        raise DataError(f'no pair of {args.source} is usable (all faults are listed in {faults})')


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr data check`."""
    parser.add_argument('path', metavar='PATH', type=Path, help='manifest, folder of manifests, or folder of LMDBs')
    parser.add_argument('--manifest', metavar='FILE', type=Path, help='for LMDBs: manifest they were created from')
    parser.add_argument('--quick', action='store_true', help='only check existence and sizes of files')
    parser.add_argument('--workers', type=int, metavar='N', help='reader processes (default: one per core)')


def check(args: argparse.Namespace) -> int:
    """Verify a prepared dataset or LMDBs against their manifests.

      basicsr data check prepared/agan                        all manifests in the folder
      basicsr data check prepared/agan/train.jsonl --quick    one manifest; only existence and sizes of files
      basicsr data check lmdb/agan --manifest prepared/agan/train.jsonl

    Lists images that are missing, changed, unreadable or new. Changed means different pixels; lossless re-encoding is
    not a change. LMDBs are read completely and compared with the digests stored with them (without digests, the images
    are decoded), and both LMDBs must have been created together. With --manifest, their pixels are compared as well.

    Exit status: 0 unchanged, 1 problems found, 2 nothing to check or wrong usage.
    """
    commands.check_least(args, workers=1)
    path = Path(os.path.expanduser(args.path))
    if (path / 'data.mdb').is_file():
        lmdbs = [path]
    else:
        lmdbs = sorted(folder for folder in path.glob('*.lmdb') if folder.is_dir()) if path.is_dir() else []
    if lmdbs and args.quick:
        raise OptionError('--quick is only valid for image folders; LMDBs are always read completely')
    if args.manifest and not lmdbs:
        raise OptionError(f'--manifest is only valid for LMDBs, and {path} has none')
    num_faults = _check_lmdbs(path, lmdbs, args) if lmdbs else _check_manifests(path, args)
    return 1 if num_faults else 0


def _check_manifests(path: Path, args: argparse.Namespace) -> int:
    manifests = [read_manifest(file) for file in _find_manifests(path)]
    total = 0
    for manifest in manifests:
        with _progress(manifest.num_pairs, manifest.path.name) as bar:
            workers = _num_workers(args, manifest.num_pairs)
            faults = check_files(manifest, workers, quick=args.quick, on_pair=bar.update)
        total += _say_faults(manifest.path, f'{manifest.num_pairs:,} pairs', faults)
    # Other manifests in the same folder may list images that this one does not.
    siblings = [read_manifest(file) for file in _find_manifests(path if path.is_dir() else path.parent)]
    roots = {manifest.root for manifest in manifests}
    extra = find_extra(sibling for sibling in siblings if sibling.root in roots)
    return total + (_say_faults(path, 'images that no manifest lists', extra) if extra else 0)


def _find_manifests(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f'{path}: no such manifest or folder')
    files = sorted(path.glob('*.jsonl'))
    if not files:
        raise DataError(
            f'{path}: expected manifests (*.jsonl) or LMDBs, found none; `basicsr data prepare` writes manifests'
        )
    return files


def _check_lmdbs(path: Path, lmdbs: Sequence[Path], args: argparse.Namespace) -> int:
    manifest = read_manifest(Path(os.path.expanduser(args.manifest))) if args.manifest else None
    results = [(folder, check_lmdb(folder, args.workers or num_cores())) for folder in lmdbs]
    if path not in lmdbs:
        results.append((path, check_together(path)))
    for folder, faults in results:
        if faults or folder in lmdbs:
            say(f'{folder}: {len(faults):,} fault{"s" if len(faults) > 1 else ""}' if faults else f'{folder}: intact')
        for fault in faults:
            say('  ' + fault.replace('\n', ' '))
    total = sum(len(faults) for _, faults in results)
    if manifest:
        folder = path.parent if path in lmdbs else path
        with _progress(manifest.num_pairs, 'comparing') as bar:
            faults = check_lmdbs(folder, manifest, bar.update)
        total += _say_faults(manifest.path, f'{manifest.num_pairs:,} pairs in {folder}', faults)
    return total


def _say_faults(path: Path, what: str, faults: Sequence[DataFault]) -> int:
    kinds = Counter(fault.kind for fault in faults)
    result = ', '.join(f'{count:,} {kind}' for kind, count in kinds.items()) or 'unchanged'
    lines = to_columns(((fault.kind, f'{fault.name}: {fault.text}') for fault in faults), indent='  ')
    say(f'{path}: {what}: {result}', *lines)
    return len(faults)


def add_lmdb_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr data lmdb`."""
    parser.add_argument('source', type=Path, metavar='SRC', help='dataset, folder or manifest')
    parser.add_argument('destination', type=Path, metavar='DST', help='folder for lq.lmdb and gt.lmdb')
    parser.add_argument('--layout', help='layout of the dataset SRC: agan, spad, ... (default: folders lq and gt)')
    parser.add_argument('--phase', choices=('train', 'test'), help='with layout: dataset part (default: train)')
    parser.add_argument('--split', help='with layout: dataset split, if the phase has several: test_b')
    parser.add_argument('--list-file', metavar='FILE', help="layout spad: list file to use instead of the dataset's")
    parser.add_argument('--lq-dir', metavar='DIR', help='without layout: degraded images, under SRC (default: lq)')
    parser.add_argument('--gt-dir', metavar='DIR', help='without layout: clean images, under SRC (default: gt)')
    parser.add_argument('--lq-template', metavar='NAME', help="without layout: degraded image names, '{}_rain.png'")
    parser.add_argument('--gt-template', metavar='NAME', help="without layout: clean image names, '{}_clean.png'")
    parser.add_argument('--encoding', choices=('png', 'raw'), default='png', help='stored format (default: png)')
    parser.add_argument(
        '--compress-level',
        type=int,
        choices=range(10),
        metavar='0..9',
        help='re-encode all PNG files: 0 reads fastest, 9 is smallest (default: keep PNG files unchanged)',
    )
    parser.add_argument('--workers', type=int, metavar='N', help='reader and encoder threads (default: one per core)')
    parser.add_argument(
        '--overwrite', action='store_true', help='replace LMDBs in DST that were created from other files'
    )


def pack_lmdb(args: argparse.Namespace) -> int:
    """Pack image pairs into two LMDBs, lq.lmdb and gt.lmdb, which are faster to read than many files.

      basicsr data lmdb datasets/AGAN-Data datasets/agan_train --layout agan --phase train
      basicsr data lmdb datasets/mine datasets/mine_lmdb --encoding raw
      basicsr data lmdb manifests/train.jsonl datasets/train_raw --encoding raw

    SRC is the root of a dataset with --layout, a folder with subfolders lq and gt, or a manifest written by `basicsr
    data prepare`. Both LMDBs are verified before DST is created. An interrupted run is resumed by running the command
    again. If DST already exists and was created from the same files, it is only verified.

    Encoding png stores RGB PNG files unchanged and encodes all other files. BasicSR can read it (type:
    PairedImageDataset, io_backend: {type: lmdb}). Encoding raw stores pixels, so that a patch is read without decoding
    the image: several times faster, at about twice the size. BasicSR cannot read it; PairsDataset can:

      datasets:
        train:
          type: PairsDataset
          dataroot_lq: DST/lq.lmdb
          dataroot_gt: DST/gt.lmdb
          io_backend: {type: lmdb}
    """
    commands.check_least(args, workers=1)
    if args.encoding == 'raw' and args.compress_level is not None:
        raise OptionError('--compress-level is only valid for --encoding png; raw pixels are not compressed')
    try:
        pairs = _list_pairs(args)
    except PluginError as error:
        raise type(error)(_advise(str(error), args)) from error
    plan = make_plan(pairs, args.encoding, args.compress_level)
    num_pairs, num_resumed, num_bytes = write_lmdbs(plan, args.destination, args.workers, args.overwrite)
    pairs = f'{num_pairs} pairs' + (f', {num_resumed} of them from an earlier run' if num_resumed else '')
    say(f'{args.destination}: {pairs}, {num_bytes / 2**20:.1f} MB, encoding {args.encoding}, verified')
    return 0


def _advise(message: str, args: argparse.Namespace) -> str:
    """Rewrite an error message about an option file in terms of the arguments of this command."""
    message = message.partition('\nTo try without it')[0]
    for keys, words in (
        (r'datasets\.\w+\.(split|list_file|\w+_template)', r'--\1'),
        (r'datasets\.\w+\.\w+', 'SRC'),
        (r'datasets\.\w+: ', ''),
        (r', or correct lq_template and gt_template' if args.layout else r'$^', ''),
        (r'(?<!-)\b(lq|gt)_template', r'--\1-template'),
        (r'correct its dataroot( in the option file)?', 'correct SRC'),
        (r'\blist_file\b', '--list-file'),
    ):
        message = re.sub(keys, words, message)
    if args.layout in preparable() and message.count(' x '):
        message += (
            f'\nTo exclude them: basicsr data prepare {args.layout} SRC PREPARED --skip-faulty, then basicsr data '
            f'lmdb PREPARED/{args.split or args.phase or "train"}.jsonl DST'
        )
    return message


def _list_pairs(args: argparse.Namespace) -> Sequence[Pair]:
    """Return the pairs of SRC, which is a dataset, a folder or a manifest."""
    source: Path = Path(os.path.expanduser(args.source))
    is_manifest = source.is_file()
    layout = None if args.layout == 'folders' else args.layout
    useless = [] if not is_manifest else ['layout']
    useless += ['lq_dir', 'gt_dir', 'lq_template', 'gt_template'] if is_manifest or layout else []
    useless += ['phase', 'split', 'list_file'] if is_manifest or not layout else []
    given = [f'--{key.replace("_", "-")}' for key in useless if getattr(args, key) is not None]
    if given:
        kind = 'a manifest' if is_manifest else f'layout {args.layout}' if args.layout else 'a folder without --layout'
        raise OptionError(f'{source}: {kind} does not support {", ".join(given)}')
    if is_manifest:
        return read_manifest(source).pairs()
    if not source.is_dir():
        raise DataError(f'{source}: no such dataset, folder or manifest')
    if layout:
        where = {'dataroot': str(source), 'split': args.split, 'list_file': args.list_file}
        return list_pairs(layout, Source(args.phase or 'train', **where))
    lq_dir, gt_dir = source / (args.lq_dir or 'lq'), source / (args.gt_dir or 'gt')
    for folder in (lq_dir, gt_dir):
        if not folder.is_dir():
            raise DataError(
                f'{source}: expected subfolders {lq_dir.name} and {gt_dir.name}, {folder.name} is missing. Specify '
                f'them with --lq-dir and --gt-dir, or the layout of the dataset with --layout'
            )
    where = {'dataroot_lq': str(lq_dir), 'dataroot_gt': str(gt_dir)}
    templates = {'lq_template': args.lq_template, 'gt_template': args.gt_template}
    return list_pairs('folders', Source(**where, **templates))


def _num_workers(args: argparse.Namespace, num_items: int) -> int:
    # Starting processes takes longer than reading a few images.
    return args.workers or (num_cores() if num_items > 50 else 1)


def _progress(total: int, title: str) -> tqdm:
    return tqdm(total=total, desc=title, unit='pair', dynamic_ncols=True, leave=False, disable=None if total else True)


def _command(run: Callable[[argparse.Namespace], int], add_arguments: Callable) -> SimpleNamespace:
    return SimpleNamespace(__doc__=run.__doc__, add_arguments=add_arguments, run=run)


COMMANDS = {
    'prepare': _command(prepare, add_prepare_arguments),
    'lmdb': _command(pack_lmdb, add_lmdb_arguments),
    'check': _command(check, add_check_arguments),
    'synth': data_synth,
}
