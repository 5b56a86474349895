"""Match degraded and clean images by a key that a name template extracts from file names, never by position."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ast_plugin.data.image_files import FORMAT_OF, count_reasons, why_no_image
from ast_plugin.errors import DataError, OptionError
from ast_plugin.names import printable

_ENCODING = ('utf-8', 'surrogateescape')  # file names need not be valid UTF-8
LEFT_OUT = 'left out'  # kind of files that are ignored, which is not a fault
_REMEDIES = {
    'no partner': 'Add the partners, remove these, or correct lq_template and gt_template',
    'several partners': 'Keep one partner of each, or include the suffixes in lq_template and gt_template',
    'no number': 'Rename or move them',
    'line not understood': 'Each line is a pair: /dir/lq.png /dir_gt/gt.png; separate names with spaces by a tab',
    'missing': 'Unpack the folders there, or correct the list',
}


@dataclass(frozen=True, slots=True)
class Pair:
    """Paths of a degraded image and its clean partner, and their common key."""

    key: str
    lq: str
    gt: str


@dataclass(frozen=True, slots=True)
class DataFault:
    """A problem with a file or a pair."""

    kind: str  # short label, equal for all faults of one kind
    name: str  # the file, or the line of a list
    text: str  # description and remedy, as one self-contained line


class PairTable(Sequence[Pair]):
    """Sequence of pairs stored in one byte buffer; 640,000 pairs take 60 MB, a quarter of the memory of objects.

    Forked workers share the buffer permanently, as reading changes no reference counts. `root`, the common prefix of
    all paths including the separator, is stored once.
    """

    def __init__(self, pairs: Iterable[Pair] = (), root: str = '') -> None:
        self._root, cut = root, len(root)
        text, ends = bytearray(), array('Q', [0])
        for pair in pairs:
            lq, gt = pair.lq[cut:], pair.gt[cut:]
            # SPAD's keys equal its degraded names and need not be stored twice.
            text += f'{"" if pair.key == lq else pair.key}\0{lq}\0{gt}'.encode(*_ENCODING)
            ends.append(len(text))
        self._text, self._ends = text, ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Pair:
        if not -len(self) <= index < len(self):
            raise IndexError(f'there are {len(self)} pairs; got index {index}')
        start, end = self._ends[index % len(self)], self._ends[index % len(self) + 1]
        key, lq, gt = self._text[start:end].decode(*_ENCODING).split('\0')
        return Pair(key or lq, self._root + lq, self._root + gt)


class Template:
    """A pattern of file names with one `{}` for the key.

    `{}_rain` matches images of any format whose stem ends in `_rain`; `{}_rain.png` matches PNG files only. `*` matches
    anything, for several images with one key: `{}_*` gives `0001_0.8_0.2.jpg` the key `0001`.
    """

    def __init__(self, text: str) -> None:
        if text.count('{}') != 1 or text.count('*') > 1 or '/' in text:
            raise OptionError(
                f'a name template contains one {{}}, at most one * and no folder, e.g. {{}}_rain.png; got {text!r}'
            )
        self.text = text
        self.has_suffix = is_image(text.replace('{}', 'x').replace('*', 'x'))
        self.is_many = '*' in text
        # Non-greedy: the key ends at the first occurrence of the following text, so it includes nothing matched by `*`.
        pattern = re.escape(text).replace(re.escape('{}'), '(.+?)' if self.is_many else '(.+)')
        flags = re.DOTALL | (re.IGNORECASE if self.has_suffix else 0)
        self._pattern = re.compile(pattern.replace(re.escape('*'), '.*'), flags)

    def fill(self, key: str) -> str:
        """Return the file name of `key`, ending in `.*` if the template has no extension."""
        return self.text.replace('{}', key) + ('' if self.has_suffix else '.*')

    def keys(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Group the matching `names` by their keys."""
        by_key = defaultdict(list)
        for name in names:
            last = os.path.basename(name)
            match = self._pattern.fullmatch(last if self.has_suffix else os.path.splitext(last)[0])
            if match:
                by_key[match[1]].append(name)
        return dict(by_key)


def match_folders(
    phase: str,
    lq_dir: str | Path,
    gt_dir: str | Path,
    lq_template: str = '{}',
    gt_template: str = '{}',
    deep: bool = False,
) -> tuple[list[Pair], list[DataFault]]:
    """Pair the images of two folders, which may be the same, by their keys.

    Files that do not match their template are ignored. Extensions may differ. If a folder has several files with one
    key, both folders must have the same names, which then are the keys. With `*` in `lq_template`, several degraded
    images may share a clean one, and their own names are the keys.

    Args:
        phase: phase of the dataset, for messages.
        lq_dir, gt_dir: folders of the degraded and of the clean images.
        lq_template, gt_template: templates of their names, see `Template`.
        deep: see `list_images`.
    Returns:
        The pairs, and a fault for each image with no partner or several.
    Raises:
        DataError: if a folder is missing or has no matching image, or both images of a pair are the same file.
    """
    lq, gt = _Side(lq_dir, lq_template, phase, deep), _Side(gt_dir, gt_template, phase, deep)
    if os.path.samefile(lq_dir, gt_dir):
        gt.folder = lq.folder  # one may be a link to the other
    # A clean image without a degraded one is a fault, except in datasets with many images of one key.
    pairs, faults = [], lq.unmatched(gt) + ([] if lq.template.is_many else gt.unmatched(lq))
    faults += _find_left_out(lq, gt)
    for key in sorted(lq.files.keys() & gt.files.keys()):
        lq_names, gt_names = lq.files[key], gt.files[key]
        if len(gt_names) == 1 and lq.template.is_many:
            pairs += [Pair(os.path.splitext(name)[0], lq.path(name), gt.path(gt_names[0])) for name in lq_names]
        elif len(lq_names) == len(gt_names) == 1:
            pairs.append(Pair(key, lq.path(lq_names[0]), gt.path(gt_names[0])))
        elif lq_names == gt_names:
            pairs += [Pair(name, lq.path(name), gt.path(name)) for name in lq_names]
        else:
            text = f'{" or ".join(lq_names)} with {" or ".join(gt_names)}'
            faults += [DataFault('several partners', lq.path(name), text) for name in lq_names]
    own_partners = [pair.lq for pair in pairs if pair.lq == pair.gt]
    if own_partners:
        raise DataError(
            f'datasets.{phase}: degraded and clean image are the same file: {shorten_list(own_partners)}. '
            f'In one folder, lq_template and gt_template must distinguish them'
        )
    return pairs, faults


def raise_faults(phase: str, faults: Iterable[DataFault]) -> None:
    """Raise DataError if there are faults, with one line per kind: number, first few names and remedy.

    Ignored files are not faults; they are logged as a warning.
    """
    by_kind = defaultdict(list)
    for fault in faults:
        if fault.kind == LEFT_OUT:
            text = printable(f'datasets.{phase}: left out of {fault.name}: {fault.text}')
            logging.getLogger('basicsr').warning(text)
            continue
        by_kind[fault.kind].append(f'{fault.name} ({fault.text})')
    lines = [f'{len(names)} x {kind}: {shorten_list(names)}. {_REMEDIES[kind]}' for kind, names in by_kind.items()]
    if lines:
        raise DataError('\n'.join(f'datasets.{phase}: {line}' for line in lines))


def check_equal_sizes(pair: Pair, lq: np.ndarray, gt: np.ndarray) -> None:
    """Raise DataError if the two images of a pair, [H, W, 3] each, differ in size."""
    if lq.shape != gt.shape:
        raise DataError(
            f'the images of a pair must have the same size; {pair.lq} has {lq.shape[1]}x{lq.shape[0]} pixels, '
            f'{pair.gt} has {gt.shape[1]}x{gt.shape[0]}. Replace or remove them'
        )


class _Side:
    """One side of the pairs: the images of a folder, grouped by key."""

    def __init__(self, folder: str | Path, template: str, phase: str, deep: bool) -> None:
        self.folder, self.template = folder, Template(template)
        names = list_images(folder, phase, deep)
        self.files = self.template.keys(names)
        if not self.files:
            raise DataError(
                f'datasets.{phase}: none of the {len(names)} images in folder {folder} is named '
                f'{self.template.fill("{}")} (found: {shorten_list(names)}). Correct the template or the folder'
            )

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def unmatched(self, other: _Side) -> list[DataFault]:
        """Return a fault for each image whose key is missing in `other`, in order."""
        keys = sorted(self.files.keys() - other.files.keys())
        by_fold = {fold(key): key for key in other.files} if keys else {}
        faults = []
        for key in keys:
            near = by_fold.get(fold(key))
            hint = f'; {other.files[near][0]} differs only in {difference_of(key, near)}, rename one' if near else ''
            text = f'no {other.template.fill(key)} in {other.folder}{hint}'
            faults += [DataFault('no partner', self.path(name), text) for name in self.files[key]]
        return faults


def _find_left_out(*sides: _Side) -> Iterator[DataFault]:
    """Yield the number of files in each folder that belong to neither side, by reason."""
    by_folder = defaultdict(list)
    for side in sides:
        by_folder[os.path.normpath(side.folder)].append(side)
    for inside in by_folder.values():
        folder = str(inside[0].folder)
        taken = {name.partition('/')[0] for side in inside for names in side.files.values() for name in names}
        names = ' or '.join(side.template.fill('{}') for side in inside)
        reasons = Counter()
        for entry in os.scandir(folder):
            if entry.name in taken or os.path.normpath(entry.path) in by_folder:
                continue
            if not entry.is_dir():
                reasons[why_no_image(entry.path) or f'not named {names}'] += 1
            elif any(map(is_image, next(os.walk(entry.path), ('', [], []))[2])):  # unreadable folders yield nothing
                reasons['folders with images'] += 1
        if reasons:
            yield DataFault(LEFT_OUT, folder, count_reasons(reasons))


def fold(key: str) -> str:
    """Return a form of a name that is equal for names that some file systems do not distinguish."""
    return unicodedata.normalize('NFC', key).casefold()


def difference_of(one: str, other: str) -> str:
    """Return the difference between two names with equal `fold`."""
    if unicodedata.normalize('NFC', one) == unicodedata.normalize('NFC', other):
        return 'the Unicode form of its accents (NFC and NFD)'
    return 'the case of its letters'


def list_images(folder: str | Path, phase: str, deep: bool = False) -> list[str]:
    """Return the sorted names of the images directly in a folder.

    Args:
        folder: the folder.
        phase: phase of the dataset, for messages.
        deep: whether to search the subfolders if the folder has no image; names then are `subfolder/name`.
    Raises:
        DataError: if the folder does not exist, cannot be read, or has no image.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if is_image(entry.name) and not entry.is_dir())
        if deep and not names:
            inner = (entry for entry in os.scandir(folder) if entry.is_dir())
            names = sorted(f'{one.name}/{name}' for one in inner for name in os.listdir(one) if is_image(name))
    except OSError as error:
        reason = {FileNotFoundError: 'no such folder', NotADirectoryError: 'it is not a folder'}
        raise DataError(
            f'datasets.{phase}: {reason.get(type(error), error.strerror)}: {error.filename or folder}. '
            f'Put the images there, or correct its dataroot in the option file'
        ) from None
    if not names and os.path.exists(os.path.join(folder, 'data.mdb')):
        raise DataError(f'datasets.{phase}: {folder} is an LMDB: set io_backend: {{type: lmdb}} next to its dataroot')
    if not names:
        raise DataError(
            f'datasets.{phase}: no image in folder {folder} (subfolders are not searched; '
            f'supported extensions: {", ".join(sorted(FORMAT_OF))}). Put the images there, or correct its dataroot'
        )
    return names


def list_others(paths: Iterable[str]) -> list[str]:
    """List the images in the folders of `paths` that are not among `paths`, ordered by folder."""
    known, folders, others = set(), set(), []
    for path in paths:
        known.add(hash(path))
        folders.add(os.path.dirname(path))
    for folder in sorted(folders):
        with suppress(DataError):  # a folder without images
            found = (f'{folder}/{name}' if folder else name for name in list_images(folder, ''))  # relative, as `paths`
            others += [path for path in found if hash(path) not in known]
    return others


def is_image(name: str) -> bool:
    """Return whether a file is a supported image, by its extension, and is not hidden."""
    return os.path.splitext(name)[1].lower() in FORMAT_OF and not os.path.basename(name).startswith('.')


def shorten_list(items: Iterable[str], num_shown: int = 3) -> str:
    """Join the first `num_shown` items, followed by the number of the remaining ones."""
    items = list(items)
    rest = f' and {len(items) - num_shown} more' if len(items) > num_shown else ''
    return ', '.join(items[:num_shown]) + rest
