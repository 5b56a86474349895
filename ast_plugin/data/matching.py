"""Finding the partners among image files: by the key that a name template finds in them, never by position."""

from __future__ import annotations

import os
import re
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ast_plugin.data.image_files import SUFFIXES
from ast_plugin.errors import DataError, OptionError

# Names of files need not be UTF-8.
_ENCODING = ('utf-8', 'surrogateescape')


@dataclass(frozen=True, slots=True)
class Pair:
    """Paths of a degraded image and its clean partner, and the key that they share."""

    key: str
    lq: str
    gt: str


class PairTable(Sequence[Pair]):
    """A list of pairs kept as one run of bytes: 640,000 take some 60 MB, as objects of their own four times that.

    Workers that are forked share it for good: reading it writes nothing, not even counts of references.

    Args:
        pairs: in order; each path begins with `root`, which is then kept once.
        root: what all paths begin with, the separator included; empty if they have nothing in common.
    """

    def __init__(self, pairs: Iterable[Pair] = (), root: str = '') -> None:
        self._root, cut = root, len(root)
        text, ends = bytearray(), array('Q', [0])
        for pair in pairs:
            lq, gt = pair.lq[cut:], pair.gt[cut:]
            # SPAD's keys are its degraded names, which need no second place.
            text += f'{"" if pair.key == lq else pair.key}\0{lq}\0{gt}'.encode(*_ENCODING)
            ends.append(len(text))
        self._text, self._ends = text, ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int | slice) -> Pair | PairTable:
        if isinstance(index, slice):
            return PairTable((self._pair(number) for number in range(*index.indices(len(self)))), self._root)
        if not -len(self) <= index < len(self):
            raise IndexError(f'there are {len(self)} pairs; got index {index}')
        return self._pair(index % len(self))

    def __iter__(self) -> Iterator[Pair]:
        return map(self._pair, range(len(self)))

    def _pair(self, number: int) -> Pair:
        key, lq, gt = self._text[self._ends[number] : self._ends[number + 1]].decode(*_ENCODING).split('\0')
        return Pair(key or lq, self._root + lq, self._root + gt)


IMAGE_SUFFIXES = frozenset(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)

NUM_SHOWN = 3
"""How many of many faulty files a message names."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a file or a pair.

    Attributes:
        kind: a few words, the same for all faults of the kind.
        name: the file, or the line of a list.
        text: what is wrong with it, and what to do, in a line that says it all.
    """

    kind: str
    name: str
    text: str


class Faults(list[Fault]):
    """A list that collects faults, so that the pairs without one can be listed all the same."""


def is_image(name: str) -> bool:
    """Tell by its ending whether a file that is not hidden is an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not os.path.basename(name).startswith('.')


def shorten_list(items: Iterable[str]) -> str:
    """List the first few of `items`, and say how many more there are."""
    items = list(items)
    rest = f' and {len(items) - NUM_SHOWN} more' if len(items) > NUM_SHOWN else ''
    return ', '.join(items[:NUM_SHOWN]) + rest


def printable(name: str) -> str:
    """Show a name in one line of text: names may hold anything but a slash, also ends of lines and bytes of no text."""
    shown = name.encode('utf-8', 'backslashreplace').decode()
    return shown.translate({ord('\n'): '\\n', ord('\r'): '\\r', ord('\t'): '\\t'})


def list_images(folder: str | Path, phase: str, deep: bool = False) -> list[str]:
    """Return the sorted names of the images that lie directly in `folder`.

    Args:
        folder: where to look.
        phase: whose folder it is, for messages.
        deep: where no image lies directly in it, look in the folders in it, too; names then are `folder/name`.
    Raises:
        DataError: if there is no such folder, it cannot be read, or no image is in it.
    """
    try:
        names = _image_names(folder)
        if deep and not names:
            inner = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
            names = [f'{name}/{image}' for name in inner for image in _image_names(os.path.join(folder, name))]
    except OSError as error:
        reason = {FileNotFoundError: 'there is no such folder', NotADirectoryError: 'it is not a folder'}
        raise DataError(
            f'datasets.{phase}: {reason.get(type(error), error.strerror)}: {error.filename or folder}. '
            f'Put the images there, or correct its dataroot in the option file'
        ) from None
    if not names:
        raise DataError(
            f'datasets.{phase}: no image in folder {folder} (folders in it are not searched; '
            f'images end in {", ".join(sorted(IMAGE_SUFFIXES))}). Put the images there, or correct its dataroot'
        )
    return names


def _image_names(folder: str | Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if is_image(entry.name))


class Template:
    """A pattern of file names with one `{}`, which stands for the key.

    `{}_rain` is any image whose name without its ending ends in `_rain`; `{}_rain.png` is only those that are PNG.
    A `*` stands for anything, of several images with one key: `{}_*` gives `0001_0.8_0.2.jpg` the key `0001`.
    """

    def __init__(self, text: str) -> None:
        if text.count('{}') != 1 or text.count('*') > 1 or '/' in text:
            raise OptionError(
                f'a name template has one {{}}, at most one * and no folder, such as {{}}_rain.png; got {text!r}'
            )
        self.text = text
        self.has_suffix = is_image(text.replace('{}', 'x').replace('*', 'x'))
        self.is_many = '*' in text
        # The key ends where what follows it begins first, and so has no part of what `*` stands for.
        pattern = re.escape(text).replace(re.escape('{}'), '(.+?)' if self.is_many else '(.+)')
        flags = re.DOTALL | (re.IGNORECASE if self.has_suffix else 0)
        self._pattern = re.compile(pattern.replace(re.escape('*'), '.*'), flags)

    def key(self, name: str) -> str | None:
        """Return what `{}` stands for in a file name; None if the name is of another kind."""
        name = name.rpartition('/')[2]
        match = self._pattern.fullmatch(name if self.has_suffix else os.path.splitext(name)[0])
        return match and match[1]

    def fill(self, key: str) -> str:
        """Return the name that belongs to `key`; `.*` where the ending is free."""
        return self.text.replace('{}', key) + ('' if self.has_suffix else '.*')

    def keys(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Group those of `names` that fit by their keys."""
        found = defaultdict(list)
        for name in names:
            key = self.key(name)
            if key is not None:
                found[key].append(name)
        return dict(found)


def match_folders(
    phase: str,
    lq_dir: str | Path,
    gt_dir: str | Path,
    lq_template: str = '{}',
    gt_template: str = '{}',
    *,
    deep: bool = False,
    faults: Faults | None = None,
) -> list[Pair]:
    """Pair the images of two folders, which may be one, by their keys.

    Files that do not fit their template are left out. Endings may differ; where one key has several files in a
    folder, both folders must have the same names, which then are the keys. With a `*` in `lq_template` several
    degraded images may share a clean one; their own names are the keys.

    Args:
        phase: whose pairs they are, for messages.
        lq_dir, gt_dir: folders of the degraded and of the clean images.
        lq_template, gt_template: how they are named.
        deep: see `list_images`.
        faults: where given, images without a partner are noted there and left out.
    Raises:
        DataError: if a folder is missing, has no image that fits, an image has no partner, or has several.
        OptionError: if a template is none.
    """
    lq = _Side(lq_dir, Template(lq_template), phase, deep)
    gt = _Side(gt_dir, Template(gt_template), phase, deep)
    unmatched = lq.unmatched(gt)
    # A clean image without a degraded one is an oversight, unless its dataset has many more of either.
    unmatched += [] if lq.template.is_many else gt.unmatched(lq)
    pairs, unclear = _match(lq, gt)
    own_partners = [pair.lq for pair in pairs if pair.lq == pair.gt]
    if own_partners:
        raise DataError(
            f'datasets.{phase}: degraded and clean image are one file: {shorten_list(own_partners)}. '
            f'In one folder, lq_template and gt_template must tell them apart'
        )
    if faults is not None:
        faults += unmatched + unclear
    elif unmatched:
        _raise_unmatched(phase, *((lq, gt) if lq.unmatched(gt) else (gt, lq)))
    elif unclear:
        raise DataError(
            f'datasets.{phase}: it is not clear which image of {lq_dir} belongs to which of {gt_dir}: '
            f'{shorten_list(fault.text for fault in unclear)}. '
            f'Remove what is too much, or name the endings in lq_template and gt_template'
        )
    return pairs


class _Side:
    """One half of the pairs: the images of a folder by their keys."""

    def __init__(self, folder: str | Path, template: Template, phase: str, deep: bool) -> None:
        self.folder, self.template = folder, template
        names = list_images(folder, phase, deep)
        self.files = template.keys(names)
        if not self.files:
            raise DataError(
                f'datasets.{phase}: none of the {len(names)} images in folder {folder} is named {template.fill("{}")} '
                f'(there are {shorten_list(names)}). Correct the template or the folder'
            )

    def path(self, name: str) -> str:
        """Return the path of a file."""
        return os.path.join(self.folder, name)

    def unmatched(self, other: _Side) -> list[Fault]:
        """Return a fault for each image whose key `other` lacks, in order."""
        keys = sorted(self.files.keys() - other.files.keys())
        by_lower = {key.lower(): key for key in other.files} if keys else {}
        faults = []
        for key in keys:
            near = by_lower.get(key.lower())
            hint = f'; {other.files[near][0]} differs only in the case of its letters, rename one' if near else ''
            text = f'no {other.template.fill(key)} in {other.folder}{hint}'
            faults += [Fault('no partner', self.path(name), text) for name in self.files[key]]
        return faults


def _match(lq: _Side, gt: _Side) -> tuple[list[Pair], list[Fault]]:
    pairs, unclear = [], []
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
            unclear += [Fault('several partners', lq.path(name), text) for name in lq_names]
    return pairs, unclear


def _raise_unmatched(phase: str, own: _Side, other: _Side) -> None:
    faults = own.unmatched(other)
    names = [os.path.relpath(fault.name, own.folder) for fault in faults]
    hint = next((fault.text.partition('; ')[2] for fault in faults if '; ' in fault.text), '')
    first = faults[0].text.removeprefix('no ').partition(f' in {other.folder}')[0]
    raise DataError(
        f'datasets.{phase}: {len(names)} of {len(own.files)} images in {own.folder} have no partner in {other.folder}: '
        f'{shorten_list(names)} (the first would be {first}{hint and "; " + hint}). '
        f'Add the partners, remove these, or correct lq_template and gt_template'
    )
