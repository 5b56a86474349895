"""Lists of pairs in a text file, as SPAD comes with: each line `/dir/lq.png /dir_gt/gt.png`."""

from __future__ import annotations

import os
from pathlib import Path

from ast_plugin.data.matching import Pair, is_image, some
from ast_plugin.errors import DataError


def read_list(list_path: Path, root: Path, phase: str) -> list[Pair]:
    """Read a list of pairs, in its order; blank lines, a byte order mark and any line ends are tolerated.

    Args:
        list_path: the list. Where names have spaces, a tab between the two makes the line clear.
        root: what the names are relative to, in spite of the slash that they begin with.
        phase: whose list it is, for messages.
    Raises:
        DataError: if a line is not two images, a file that it names is missing, or one image has several partners.
    """
    pairs, faults = [], []
    # Names need not be UTF-8 to be opened.
    with open(list_path, encoding='utf-8-sig', errors='surrogateescape') as lines:
        for number, line in enumerate(map(str.strip, lines), 1):
            cuts = _cuts(line, root)
            if len(cuts) == 1:
                lq, gt = (name.lstrip('/') for name in cuts[0])
                pairs.append(Pair(lq, f'{root}/{lq}', f'{root}/{gt}'))
            elif line:
                faults.append(f'line {number}, {line!r}')
    if faults:
        raise DataError(
            f'datasets.{phase}: {list_path} has {len(faults)} lines that are not two image files '
            f'such as /dir/lq.png /dir_gt/gt.png: {some(faults)}. '
            f'Correct them; a tab between the two makes names with spaces clear'
        )
    if not pairs:
        raise DataError(f'datasets.{phase}: {list_path} is empty; each line names a pair: /dir/lq.png /dir_gt/gt.png')
    _check_files(pairs, list_path, root, phase)
    return pairs


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


def _check_files(pairs: list[Pair], list_path: Path, root: Path, phase: str) -> None:
    """Look files up in listings of their folders: SPAD's million names, asked for one by one, take minutes."""
    listings: dict[str, set[str]] = {}

    def is_there(path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in listings:
            listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        return name in listings[folder]

    missing = [path for pair in pairs for path in (pair.lq, pair.gt) if not is_there(path)]
    if missing:
        raise DataError(
            f'datasets.{phase}: {len(missing)} files that {list_path} names are missing below {root}: {some(missing)}. '
            f'Unpack the folders there, or correct the list'
        )
    partners: dict[str, str] = {}
    torn = [pair.lq for pair in pairs if partners.setdefault(pair.lq, pair.gt) != pair.gt]
    if torn:
        raise DataError(f'datasets.{phase}: {list_path} gives several clean partners to {some(torn)}. Keep one of each')
