"""Verify a prepared dataset, or LMDBs, against the manifests that were made of it.

  basicsr data check prepared/agan                        every manifest in the folder
  basicsr data check prepared/agan/train.jsonl --quick    one of them; only that files are there and have their sizes
  basicsr data check lmdb/agan --manifest prepared/agan/train.jsonl

Names the images that are missing, changed (other pixels; a file written anew without loss is the same), unreadable,
or that have come since. LMDBs are read whole and compared with the digests that were written with them, or else
decoded, and must be the two that were made together; with --manifest also with the pixels they were made of.

Exit status: 0 all as it was, 1 something is wrong, 2 there is nothing to check or wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from ast_plugin.cli.data import say
from ast_plugin.errors import DataError, OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ast_plugin.data.manifest import Manifest
    from ast_plugin.data.matching import Fault

_LMDB_FILE = 'data.mdb'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr data check`."""
    parser.add_argument('path', metavar='PATH', type=Path, help='a manifest, a folder of manifests, or of LMDBs')
    parser.add_argument('--manifest', metavar='FILE', type=Path, help='of LMDBs: what they were made of')
    parser.add_argument('--quick', action='store_true', help='do not read the images, only compare sizes of files')
    parser.add_argument('--workers', type=int, metavar='N', help='processes that read (default: one a core)')


def run(args: argparse.Namespace) -> int:
    """Verify what the arguments name.

    Returns:
        0 if all is as it was, otherwise 1.
    """
    if args.workers is not None and args.workers < 1:
        raise OptionError(f'--workers is {args.workers}: expected a number of processes, 1 or more')
    path = args.path.expanduser()
    lmdbs = _lmdbs(path)
    if lmdbs:
        if args.quick:
            raise OptionError('--quick is for folders of images; LMDBs are always read whole')
        return _check_lmdbs(path, lmdbs, args)
    if args.manifest:
        raise OptionError(f'--manifest is for LMDBs, and {path} has none')
    return _check_manifests(path, args)


def _lmdbs(path: Path) -> list[Path]:
    if (path / _LMDB_FILE).is_file():
        return [path]
    return sorted(folder for folder in path.glob('*.lmdb') if folder.is_dir()) if path.is_dir() else []


def _check_manifests(path: Path, args: argparse.Namespace) -> int:
    from ast_plugin.data.manifest import read_manifest
    from ast_plugin.data.prepare.checks import check_files, find_extra

    manifests = [read_manifest(file) for file in _manifest_files(path)]
    total = 0
    for manifest in manifests:
        with _bar(manifest.num_pairs, manifest.path.name) as bar:
            faults = check_files(manifest, _workers(args, manifest.num_pairs), quick=args.quick, on_pair=bar.update)
        _report(manifest.path, f'{manifest.num_pairs:,} pairs', faults)
        total += len(faults)
    # Manifests beside the one that was named may know what it does not.
    siblings = [read_manifest(file) for file in _manifest_files(path if path.is_dir() else path.parent)]
    roots = {manifest.root for manifest in manifests}
    extra = find_extra(sibling for sibling in siblings if sibling.root in roots)
    if extra:
        _report(path, 'images that no manifest has', extra)
    return 1 if total or extra else 0


def _manifest_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f'{path}: there is no such manifest or folder')
    files = sorted(path.glob('*.jsonl'))
    if not files:
        raise DataError(f'{path}: no manifest (*.jsonl) and no LMDB in it; `basicsr data prepare` writes manifests')
    return files


def _check_lmdbs(path: Path, lmdbs: Sequence[Path], args: argparse.Namespace) -> int:
    from ast_plugin.data.lmdb.reader import check_lmdb, check_together
    from ast_plugin.data.manifest import read_manifest

    manifest = read_manifest(args.manifest.expanduser()) if args.manifest else None
    total = 0
    for folder in lmdbs:
        total += _say_faults(folder, check_lmdb(folder, _workers(args, 1000)), 'whole')
    if path not in lmdbs:
        total += _say_faults(path, check_together(path), '')
    sys.stdout.flush()
    if manifest:
        total += _compare_lmdbs(path, manifest)
    return 1 if total else 0


def _say_faults(folder: Path, faults: Sequence[str], otherwise: str) -> int:
    plural = 's' if len(faults) > 1 else ''
    result = f'{len(faults):,} fault{plural}' if faults else otherwise
    if result:
        say(f'{folder}: {result}')
    for fault in faults:
        say('  ' + fault.replace('\n', ' '))
    return len(faults)


def _compare_lmdbs(path: Path, manifest: Manifest) -> int:
    from ast_plugin.data.prepare.checks import check_lmdbs

    folder = path.parent if (path / _LMDB_FILE).is_file() else path
    with _bar(manifest.num_pairs, 'comparing') as bar:
        faults = check_lmdbs(folder, manifest, bar.update)
    _report(manifest.path, f'{manifest.num_pairs:,} pairs in {folder}', faults)
    return len(faults)


def _report(path: Path, what: str, faults: Sequence[Fault]) -> None:
    kinds = Counter(fault.kind for fault in faults)
    result = ', '.join(f'{count:,} {kind}' for kind, count in kinds.items()) or 'all as they were'
    say(f'{path}: {what}: {result}')
    width = max(map(len, kinds), default=0)
    for fault in faults:
        say(f'  {fault.kind:{width}}  {fault.name}: {fault.text}'.replace('\n', '\\n'))
    sys.stdout.flush()


def _workers(args: argparse.Namespace, num_items: int) -> int:
    from ast_plugin.data.workers import num_cores

    return args.workers or (num_cores() if num_items > 50 else 1)


def _bar(total: int, title: str):
    from tqdm import tqdm

    shown = sys.stderr.isatty()
    return tqdm(
        total=total, desc=title, unit='pair', dynamic_ncols=True, file=sys.stderr, leave=False, disable=not shown
    )
