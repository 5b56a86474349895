"""Lists of pairs in a text file, as SPAD comes with: each line `/dir/lq.png /dir_gt/gt.png`."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np

from ast_plugin.data.matching import Fault, Faults, Pair, is_image, some
from ast_plugin.data.pair_table import PairTable
from ast_plugin.errors import DataError


def read_list(list_path: Path, root: Path, phase: str, faults: Faults | None = None) -> PairTable:
    """Read a list of pairs, in its order; blank lines, a byte order mark and any line ends are tolerated.

    Args:
        list_path: the list. Where names have spaces, a tab between the two makes the line clear.
        root: what the names are relative to, in spite of the slash that they begin with.
        phase: whose list it is, for messages.
        faults: where given, lines that cannot be used are noted there and left out.
    Raises:
        DataError: if a line is not two images, a file that it names is missing, or one image has several partners.
    """
    unread = Faults()
    pairs = PairTable(_pairs(list_path, root, unread), f'{root}/')
    hashes, folders = _hashes(pairs)
    missing, torn = _missing(pairs, hashes, folders, list_path), _torn(pairs, hashes, list_path)
    if missing or torn:
        bad = {fault.name for fault in missing + torn}
        pairs = PairTable((pair for pair in pairs if pair.lq not in bad and pair.gt not in bad), f'{root}/')
    if faults is not None:
        faults += unread + missing + torn
    elif unread:
        raise DataError(
            f'datasets.{phase}: {list_path} has {len(unread)} lines that are not two image files '
            f'such as /dir/lq.png /dir_gt/gt.png: {some(fault.name for fault in unread)}. '
            f'Correct them; a tab between the two makes names with spaces clear'
        )
    elif missing:
        raise DataError(
            f'datasets.{phase}: {len(missing)} files that {list_path} names are missing below {root}: '
            f'{some(fault.name for fault in missing)}. Unpack the folders there, or correct the list'
        )
    elif torn:
        raise DataError(
            f'datasets.{phase}: {list_path} gives several clean partners to {some(fault.name for fault in torn)}. '
            f'Keep one of each'
        )
    if not pairs and not faults:
        raise DataError(f'datasets.{phase}: {list_path} is empty; each line names a pair: /dir/lq.png /dir_gt/gt.png')
    return pairs


def _pairs(list_path: Path, root: Path, unread: Faults) -> Iterator[Pair]:
    """Read line by line, as SPAD's list has 640,000."""
    # Names need not be UTF-8 to be opened.
    with _opened(list_path) as lines:
        for number, line in enumerate(map(str.strip, lines), 1):
            cuts = _cuts(line, root) if line else []
            if len(cuts) == 1:
                lq, gt = (name.lstrip('/') for name in cuts[0])
                yield Pair(lq, f'{root}/{lq}', f'{root}/{gt}')
            elif line:
                text = f'{list_path}: not two image files such as /dir/lq.png /dir_gt/gt.png'
                unread.append(Fault('line not understood', f'line {number}, {line!r}', text))


def _opened(list_path: Path) -> TextIO:
    try:
        return open(list_path, encoding='utf-8-sig', errors='surrogateescape')
    except OSError as error:
        raise DataError(f'{list_path}: cannot be read: {error.strerror}') from error


def _cuts(line: str, root: Path) -> list[tuple[str, str]]:
    """Return the ways to read a line as two image files; of several, those whose files exist."""
    fields = line.split('\t') if '\t' in line else line.split()
    if len(fields) == 2:
        return [(fields[0].strip(), fields[1].strip())] if all(map(is_image, fields)) else []
    spaces = [place for place, letter in enumerate(line) if letter == ' ']
    cuts = {(line[:place].strip(), line[place:].strip()) for place in spaces}
    cuts = [cut for cut in cuts if all(map(is_image, cut)) and cut[0].startswith('/') == cut[1].startswith('/')]
    if len(cuts) > 1:
        cuts = [cut for cut in cuts if all((root / name.lstrip('/')).is_file() for name in cut)]
    return cuts


def _hashes(pairs: PairTable) -> tuple[np.ndarray, set[str]]:
    """Return hashes of all paths, [N, 2], and the folders that they lie in.

    Hashes of 8 bytes stand for the names: that one of a million is taken for another has a chance of 1 in 10^7.
    """
    hashes, folders = array('q'), set()
    for pair in pairs:
        for path in (pair.lq, pair.gt):
            hashes.append(hash(path))
            folders.add(path[: path.rindex('/')])
    return np.frombuffer(hashes, np.int64).reshape(-1, 2), folders


def _missing(pairs: PairTable, hashes: np.ndarray, folders: set[str], list_path: Path) -> Faults:
    """Look files up in listings of their folders: SPAD's million names, asked for one by one, take minutes."""
    there = np.fromiter((hash(path) for folder in folders for path in _files(folder)), np.int64)
    there.sort()
    if not len(there):
        absent = np.ones(hashes.shape, bool)
    else:
        absent = there[np.minimum(np.searchsorted(there, hashes), len(there) - 1)] != hashes
    places = np.argwhere(absent)
    names = dict.fromkeys(pairs[int(row)].gt if is_gt else pairs[int(row)].lq for row, is_gt in places)
    return Faults(Fault('missing', name, f'named in {list_path}') for name in names)


def _files(folder: str) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            yield from (f'{folder}/{entry.name}' for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise DataError(f'{folder}: this folder of the list cannot be read: {error.strerror}') from error


def _torn(pairs: PairTable, hashes: np.ndarray, list_path: Path) -> Faults:
    """Find degraded images that have several clean partners."""
    lq, gt = hashes.T
    order = np.argsort(lq, kind='stable')
    again = (lq[order][1:] == lq[order][:-1]) & (gt[order][1:] != gt[order][:-1])
    names = dict.fromkeys(pairs[int(place)].lq for place in order[1:][again])
    return Faults(Fault('several partners', name, f'{list_path} gives it several clean partners') for name in names)
