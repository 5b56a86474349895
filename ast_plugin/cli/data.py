"""Prepare, check, pack and synthesise the pairs of images that networks learn from."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

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
from ast_plugin.names import say, to_columns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr data`: a command, and what is left to it."""
    summaries = {name: (text or name).partition('.\n')[0] for name, (text, *_) in COMMANDS.items()}  # none with -OO
    listed = commands.listed({name: text[0].lower() + text[1:] for name, text in summaries.items()})
    parser.usage = 'basicsr data COMMAND ...'
    parser.epilog = f'{listed}\n\n`basicsr data COMMAND --help` says more, with examples.'
    parser.add_argument('command', nargs='?', help=argparse.SUPPRESS)
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(parser=parser)


def run(args: argparse.Namespace) -> int:
    """Run the command that the arguments name."""
    if args.command is None:
        args.parser.print_help(sys.stderr)
        return 2
    if args.command not in COMMANDS:
        args.parser.error(commands.unknown(args.command, COMMANDS))
    description, add_command_arguments, run_command = COMMANDS[args.command]
    parser = argparse.ArgumentParser(
        prog=f'basicsr data {args.command}',
        description=inspect.cleandoc(description or ''),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_command_arguments(parser)
    parsed = parser.parse_args(args.arguments)
    if getattr(parsed, 'workers', None) is not None and parsed.workers < 1:
        raise OptionError(f'--workers is {parsed.workers}: expected 1 or more')
    return run_command(parsed)


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr data prepare`."""
    names = preparable()
    parser.epilog = '\n'.join(['layouts:', *to_columns(((name, LAYOUTS[name].title) for name in names), indent='  ')])
    parser.add_argument('layout', metavar='LAYOUT', help=f'one of {", ".join(names)}')
    parser.add_argument('source', metavar='SRC', type=Path, help='folder of the dataset, unpacked')
    parser.add_argument('target', metavar='DST', type=Path, help='folder for the manifests')
    parser.add_argument('--split', action='append', default=[], metavar='NAME', help='only this split; may be repeated')
    parser.add_argument('--skip-faulty', action='store_true', help='leave out what is faulty, and prepare the rest')
    parser.add_argument(
        '--allow-duplicates', action='store_true', help='prepare although images to test with are trained on'
    )
    place = parser.add_mutually_exclusive_group()
    for name, text in {'copy': 'copy the images to DST/SPLIT/lq and gt', 'link': 'make links to them instead'}.items():
        place.add_argument(f'--{name}', dest='place', action='store_const', const=name, help=text)
    parser.add_argument('--workers', type=int, metavar='N', help='processes that read (default: one a core)')
    plain = parser.add_argument_group('plain folders (layout folders)')
    plain.add_argument('--lq', metavar='DIR', help="degraded images below SRC, such as '{split}/input'")
    plain.add_argument('--gt', metavar='DIR', help='clean images below SRC')
    plain.add_argument('--lq-template', metavar='NAME', help="their names, such as '{}_rain', '{}_*' for many to one")
    plain.add_argument('--gt-template', metavar='NAME', help="names of the clean ones, such as '{}_clean.png'")


def prepare(args: argparse.Namespace) -> int:
    """Find and check the pairs of a dataset as it is distributed, and write manifests to train from.

      basicsr data prepare agan ~/downloads/raindrop prepared/agan
      basicsr data prepare rain100 Rain100L prepared/rain100l --copy        the images too, under equal names
      basicsr data prepare folders my_pairs prepared/mine --lq '{split}/noisy' --gt '{split}/clean'

    SRC is the folder as it was unpacked; the pairs may lie some folders deeper. It is never written to. Every image is
    read to its last byte on all cores: unreadable ones, pairs of two sizes, images without a partner and such that are
    in the training and the test part alike are named, and nothing is prepared until they are mended or left out. A run
    that was killed goes on where it was. DST gets a manifest for each split, `train.jsonl` for example, with names,
    sizes and digests of the pixels, which `basicsr data check` verifies later.

    Exit status: 0 prepared, 2 refused or wrong usage.
    """
    layout = args.layout
    plain = (args.lq, args.gt, args.lq_template, args.gt_template)
    if layout == 'folders':
        layout = plain_layout(*plain)
    elif any(value is not None for value in plain):
        raise OptionError(f'--lq, --gt and their templates are for the layout folders, not for {layout}')
    source, target = args.source.expanduser().absolute(), args.target.expanduser().resolve()
    splits = find_splits(layout, source, args.split)
    preparation = preparing.Preparation(splits, source, target)
    with preparation.lock():
        num_pairs = sum(len(split.pairs) for split in splits)
        with _progress(num_pairs, 'checking') as bar:
            preparation.check(_num_workers(args, num_pairs), bar.update)
        title = LAYOUTS[args.layout].title if isinstance(layout, str) else layout.title
        say(f'{title} in {source}', '', *preparing.format_table(preparation))
        for heading, lines in (
            ('notes', [*preparing.format_notes(preparation), *find_unused(source, splits)]),
            ('faults', preparing.format_faults(preparation)),
            ('in training and test alike', preparing.format_leaks(preparation)),
        ):
            if lines:
                say('', heading, *(f'  {line}' for line in lines))
        faults = preparation.list_faults() if preparation.num_faults or preparation.leaks else None
        _refuse(preparation, faults, args)
        num_good = sum(len(checked.good) for checked in preparation.checked)
        with _progress(num_good if args.place else 0, args.place or '') as bar:
            manifests = preparation.write(args.layout, args.place, bar.update)
        if faults:
            preparation.list_faults()
    say('', f'prepared {num_good:,} pairs', *(f'  {path}' for path in manifests))
    older = sorted(set(target.glob('*.jsonl')) - set(manifests))
    if older:
        say(f'there from an earlier run, and left as it is: {", ".join(path.name for path in older)}')
    if preparation.num_faults:
        say(f'left out for faults: {preparation.num_faults:,}, listed in {faults}')
    phases = {split.name: split.phase for split in splits}
    lines = preparing.format_options((phases[path.stem], path) for path in manifests)
    say('', 'For an option file, in place of dataroot and split:', '', *(f'  {line}' for line in lines))
    return 0


def _refuse(preparation: preparing.Preparation, faults: Path | None, args: argparse.Namespace) -> None:
    """Stop where the user has to decide."""
    lines = []
    if preparation.num_faults and not args.skip_faulty:
        lines.append(
            f'faults: {preparation.num_faults:,}; mend or remove the files, or leave them out with --skip-faulty'
        )
    if preparation.leaks and not args.allow_duplicates:
        number = sum(leak.num for leak in preparation.leaks)
        lines.append(
            f'{number:,} images in training and test alike: remove them from one side, '
            f'or accept them with --allow-duplicates'
        )
    if lines:
        raise DataError('\n'.join([f'nothing was prepared; all that is wrong is listed in {faults}', *lines]))
    if not any(checked.good for checked in preparation.checked):
        raise DataError(f'no pair of {args.source} can be used (all faults in {faults})')


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr data check`."""
    parser.add_argument('path', metavar='PATH', type=Path, help='a manifest, a folder of manifests, or of LMDBs')
    parser.add_argument('--manifest', metavar='FILE', type=Path, help='of LMDBs: the manifest that they were made of')
    parser.add_argument('--quick', action='store_true', help='do not read the images, only compare sizes of files')
    parser.add_argument('--workers', type=int, metavar='N', help='processes that read (default: one a core)')


def check(args: argparse.Namespace) -> int:
    """Verify a prepared dataset, or LMDBs, against the manifests that were made of it.

      basicsr data check prepared/agan                        every manifest in the folder
      basicsr data check prepared/agan/train.jsonl --quick    one of them; only presence and sizes of files
      basicsr data check lmdb/agan --manifest prepared/agan/train.jsonl

    Names the images that are missing, changed (other pixels; a file written anew without loss is the same), unreadable,
    or that have come since. LMDBs are read whole and compared with the digests that were written with them, or else
    decoded, and must be the two that were made together; with --manifest also with the pixels they were made of.

    Exit status: 0 all as it was, 1 something is wrong, 2 there is nothing to check or wrong usage.
    """
    path = args.path.expanduser()
    if (path / 'data.mdb').is_file():
        lmdbs = [path]
    else:
        lmdbs = sorted(folder for folder in path.glob('*.lmdb') if folder.is_dir()) if path.is_dir() else []
    if lmdbs and args.quick:
        raise OptionError('--quick is for folders of images; LMDBs are always read whole')
    if args.manifest and not lmdbs:
        raise OptionError(f'--manifest is for LMDBs, and {path} has none')
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
    # Manifests beside the one that was named may know images that it does not.
    siblings = [read_manifest(file) for file in _find_manifests(path if path.is_dir() else path.parent)]
    roots = {manifest.root for manifest in manifests}
    extra = find_extra(sibling for sibling in siblings if sibling.root in roots)
    return total + (_say_faults(path, 'images that no manifest has', extra) if extra else 0)


def _find_manifests(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f'{path}: there is no such manifest or folder')
    files = sorted(path.glob('*.jsonl'))
    if not files:
        raise DataError(f'{path}: no manifest (*.jsonl) and no LMDB in it; `basicsr data prepare` writes manifests')
    return files


def _check_lmdbs(path: Path, lmdbs: Sequence[Path], args: argparse.Namespace) -> int:
    manifest = read_manifest(args.manifest.expanduser()) if args.manifest else None
    results = [(folder, check_lmdb(folder, args.workers or num_cores())) for folder in lmdbs]
    if path not in lmdbs:
        results.append((path, check_together(path)))
    for folder, faults in results:
        if faults or folder in lmdbs:
            say(f'{folder}: {len(faults):,} fault{"s" if len(faults) > 1 else ""}' if faults else f'{folder}: whole')
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
    result = ', '.join(f'{count:,} {kind}' for kind, count in kinds.items()) or 'all as they were'
    lines = to_columns(((fault.kind, f'{fault.name}: {fault.text}') for fault in faults), indent='  ')
    say(f'{path}: {what}: {result}', *lines)
    return len(faults)


def add_lmdb_arguments(parser: argparse.ArgumentParser) -> None:
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


def pack_lmdb(args: argparse.Namespace) -> int:
    """Pack pairs of images into two LMDBs, lq.lmdb and gt.lmdb, which are read faster than many files.

      basicsr data lmdb datasets/AGAN-Data datasets/agan_train --layout agan --phase train
      basicsr data lmdb datasets/mine datasets/mine_lmdb --encoding raw
      basicsr data lmdb manifests/train.jsonl datasets/train_raw --encoding raw

    SRC is the root of a dataset whose layout is named, a folder with the folders lq and gt, or a manifest that `basicsr
    data prepare` wrote. Both LMDBs are verified before DST appears. If this is interrupted or killed, the same command
    goes on where it was; where DST is there already, of the same files, it is only verified again.

    Encoding png keeps PNG files in RGB as they are, others are encoded, and BasicSR reads it as well (type:
    PairedImageDataset, io_backend: {type: lmdb}). Encoding raw keeps pixels, of which a patch is read without decoding
    the image: several times as fast, for some twice the space. BasicSR cannot read it; PairsDataset can:

      datasets:
        train:
          type: PairsDataset
          dataroot_lq: DST/lq.lmdb
          dataroot_gt: DST/gt.lmdb
          io_backend: {type: lmdb}
    """
    if args.encoding == 'raw' and args.compress_level is not None:
        raise OptionError('--compress-level is for --encoding png; raw pixels are not compressed')
    try:
        pairs = _list_pairs(args)
    except PluginError as error:
        raise type(error)(_advise(str(error), args)) from error
    plan = make_plan(pairs, args.encoding, args.compress_level)
    num_pairs, num_resumed, num_bytes = write_lmdbs(plan, args.destination, args.workers, args.overwrite)
    pairs = f'{num_pairs} pairs' + (f', {num_resumed} of them written before' if num_resumed else '')
    say(f'{args.destination}: {pairs}, {num_bytes / 2**20:.1f} MB, encoding {args.encoding}, verified')
    return 0


def _advise(message: str, args: argparse.Namespace) -> str:
    """What is wrong with SRC, in the words of this command in the place of those of an option file."""
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
            f'\nTo leave them out: basicsr data prepare {args.layout} SRC PREPARED --skip-faulty, then basicsr data '
            f'lmdb PREPARED/{args.split or args.phase}.jsonl DST'
        )
    return message


def _list_pairs(args: argparse.Namespace) -> Sequence[Pair]:
    """The pairs of SRC, whichever of the three it is."""
    source: Path = args.source.expanduser()
    is_manifest = source.is_file()
    useless = [] if not is_manifest else ['layout']
    useless += ['lq_dir', 'gt_dir', 'lq_template', 'gt_template'] if is_manifest or args.layout else []
    useless += ['split', 'list_file'] if is_manifest or not args.layout else []
    given = [f'--{key.replace("_", "-")}' for key in useless if getattr(args, key) is not None]
    if given:
        kind = 'a manifest' if is_manifest else f'layout {args.layout}' if args.layout else 'a folder without --layout'
        raise OptionError(f'{source}: {kind} does not use {", ".join(given)}')
    if is_manifest:
        return read_manifest(source).pairs()
    if not source.is_dir():
        raise DataError(f'{source}: there is no such dataset, folder or manifest')
    if args.layout and args.layout != 'folders':
        where = {'dataroot': str(source), 'split': args.split, 'list_file': args.list_file}
        return list_pairs(args.layout, Source(args.phase, **where))
    lq_dir, gt_dir = source / (args.lq_dir or 'lq'), source / (args.gt_dir or 'gt')
    for folder in (lq_dir, gt_dir):
        if not folder.is_dir():
            raise DataError(
                f'{source}: expected the folders {lq_dir.name} and {gt_dir.name} in it, {folder.name} is missing. Name '
                f'them with --lq-dir and --gt-dir, or say with --layout how the dataset lies on disk'
            )
    where = {'dataroot_lq': str(lq_dir), 'dataroot_gt': str(gt_dir)}
    templates = {'lq_template': args.lq_template, 'gt_template': args.gt_template}
    return list_pairs('folders', Source(args.phase, **where, **templates))


def _num_workers(args: argparse.Namespace, num_items: int) -> int:
    # Starting processes takes longer than reading a few images.
    return args.workers or (num_cores() if num_items > 50 else 1)


def _progress(total: int, title: str) -> tqdm:
    return tqdm(total=total, desc=title, unit='pair', dynamic_ncols=True, leave=False, disable=None if total else True)


COMMANDS = {  # what each says of itself, its arguments, and the function that runs it
    'prepare': (prepare.__doc__, add_prepare_arguments, prepare),
    'lmdb': (pack_lmdb.__doc__, add_lmdb_arguments, pack_lmdb),
    'check': (check.__doc__, add_check_arguments, check),
    'synth': (data_synth.__doc__, data_synth.add_arguments, data_synth.run),
}
