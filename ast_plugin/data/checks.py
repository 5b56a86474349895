"""Read every image of a dataset completely, so that damaged files are found before training.

`check_split` checks the pairs of a split and caches the results. `find_leaks` and `find_duplicates` compare the pixels
of many images. `check_files`, `find_extra` and `check_lmdbs` compare a dataset with its manifest.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from ast_plugin.data.image_files import (
    SUFFIXES,
    check_size,
    decode_image,
    decode_rgb,
    find_jpeg_frame,
    read_bytes,
    sniff_format,
)
from ast_plugin.data.lmdb.reader import KINDS, LmdbImages, read_meta_info
from ast_plugin.data.lmdb.writer import make_plan
from ast_plugin.data.manifest import Entry, Manifest
from ast_plugin.data.matching import DataFault, Pair, PairTable, list_others
from ast_plugin.data.workers import map_in_processes
from ast_plugin.errors import DataError, MemoryShortage, one_line, out_of_memory

_NUM_EXAMPLES = 3
_DEGRADED_AND_CLEAN = ('degraded', 'clean')
_PNG_KINDS = {0: ('gray',), 3: ('palette',), 4: ('gray', 'transparency'), 6: ('transparency',)}
_JPEG_KINDS = {1: ('gray',), 4: ('CMYK',)}
# Messages that libjpeg prints to stderr when it fills missing parts with gray. Messages about superfluous bytes are
# ignored, as they lose nothing.
_JPEG_LOSSES = (
    b'remature end',
    b'bad Huffman code',
    b'Corrupt JPEG data: found marker',
    b'Invalid SOS',
    b'bad component',
)


class Finding(NamedTuple):
    """Properties of a readable image."""

    size: tuple[int, int]  # (height, width) in pixels, upright
    num_bytes: int  # size of the file
    digest: str  # of the pixels, see `digest_pixels`
    traits: tuple[str, ...]  # short labels of differences from plain 8-bit RGB


def check_pair(pair: Pair) -> tuple[Finding, Finding] | DataFault:
    """Read both images of a pair and compare their sizes."""
    lq, gt = findings = [_find(path) for path in (pair.lq, pair.gt)]
    for finding in findings:
        if isinstance(finding, DataFault):
            return finding
    if lq.size == gt.size:
        return lq, gt
    text = f'{lq.size[1]}x{lq.size[0]} pixels, its clean partner {pair.gt} {gt.size[1]}x{gt.size[0]}'
    factors = {gt.size[0] / lq.size[0], gt.size[1] / lq.size[1]}
    if lq.size == gt.size[::-1]:
        text += '; one of them is rotated by 90 degrees'
    elif len(factors) == 1 and (factor := factors.pop()) > 1 and factor.is_integer():
        text += f'; the degraded image is {factor:.0f} times smaller, but super-resolution is not supported'
    return DataFault('sizes differ', pair.lq, text)


def _find(path: str) -> Finding | DataFault:
    try:
        return check_image(path)
    except (DataError, MemoryShortage, MemoryError) as error:
        kind = 'too large for memory' if out_of_memory(error) else 'unreadable'
        return DataFault(kind, path, one_line(error).removeprefix(f'{path}: '))


def check_image(path: str | os.PathLike) -> Finding:
    """Read an image as training does, with stricter checks.

    Raises:
        DataError: if it cannot be read completely, is animated, or declares too many pixels.
    """
    path = Path(path)
    data = read_bytes(path)
    kind = sniff_format(data)
    size, traits = _read_header(data, kind)
    if size:
        check_size(path, *reversed(size))
        with _error_stream() if kind == 'JPEG' else nullcontext([]) as lines:
            pixels = decode_rgb(data, path)
        if any(loss in line for line in lines for loss in _JPEG_LOSSES):
            raise DataError(f'{path}: the JPEG file is damaged: {lines[0].decode(errors="replace").strip()}')
    else:
        image = decode_image(data, path)
        pixels = np.repeat(image.color[..., None], 3, axis=2) if image.is_gray else image.color
        traits = ('gray',) if image.is_gray else ()
        traits += ('transparency',) if image.alpha is not None else ()
        traits += ('16 bits',) if pixels.dtype == np.uint16 else ()
    if path.suffix.lower() not in SUFFIXES[kind]:
        traits += (f'{kind} named {path.suffix}',)
    return Finding(pixels.shape[:2], len(data), digest_pixels(pixels), traits)


def digest_pixels(pixels: np.ndarray) -> str:
    """Return a BLAKE2b digest, 32 hexadecimal digits, of RGB pixels [H, W, 3], their size and their bit depth."""
    state = hashlib.blake2b(f'{pixels.shape} {pixels.dtype.itemsize}\n'.encode(), digest_size=16)
    state.update(np.ascontiguousarray(pixels))
    return state.hexdigest()


@dataclass(frozen=True)
class Split:
    """A split found in a dataset."""

    name: str  # for example train or test_a
    phase: str  # train or test
    pairs: PairTable  # matched pairs
    faults: list[DataFault]  # of all other files
    where: Path  # folder of the degraded images, or the list; for display


@dataclass
class CheckedSplit:
    """Results of checking a split; only numbers are stored for each good pair.

    Of each digest, the first 8 bytes are stored: two different images among a million share them with probability 1e-7.
    """

    split: Split
    faults: list[DataFault]  # of unmatched files, followed by those of pairs
    num_pairs: int = 0  # number of pairs checked, good or faulty
    good: array = field(default_factory=lambda: array('Q'))  # indices of the good pairs in the split
    digests: tuple[array, array] = field(default_factory=lambda: (array('Q'), array('Q')))  # degraded, clean
    sizes: Counter = field(default_factory=Counter)  # number of good pairs by (height, width)
    num_bytes: int = 0  # total file size of the good pairs
    traits: Counter = field(default_factory=Counter)  # number of images by trait

    def add(self, checked: tuple[Finding, Finding] | DataFault) -> None:
        """Add the result of the next pair."""
        self.num_pairs += 1
        if isinstance(checked, DataFault):
            self.faults.append(checked)
            return
        self.good.append(self.num_pairs - 1)
        self.sizes[checked[0].size] += 1
        for finding, digests in zip(checked, self.digests, strict=True):
            self.num_bytes += finding.num_bytes
            self.traits.update(finding.traits)
            digests.append(int(finding.digest[:16], 16))

    def good_pairs(self) -> Iterator[Pair]:
        """Yield the pairs without faults."""
        return (self.split.pairs[number] for number in self.good)


def check_split(split: Split, journal: Path, workers: int, on_pair: Callable[[], None] = int) -> CheckedSplit:
    """Check the pairs of a split, and write one line per pair, in order, to a journal.

    Lines of an earlier run are reused if size and modification time of both files are unchanged. Lines truncated by an
    interrupted run are checked again.

    Args:
        split: the split.
        journal: the file; a new one is written next to it and replaces it at the end.
        workers: number of processes.
        on_pair: called after each pair.
    Raises:
        DataError: if the journal cannot be written.
    """
    checked, new = CheckedSplit(split, list(split.faults)), journal.with_name(f'{journal.name}.new')
    try:
        journal.touch()
        if new.is_file():
            _adopt_lines(new, journal)
        with open(journal, encoding='utf-8', errors='replace') as known, open(new, 'w', encoding='utf-8') as file:
            items = zip(split.pairs, itertools.chain(known, itertools.repeat('')), strict=False)
            for line in map_in_processes(_check_line, items, workers, prepare=_limit_threads):
                file.write(line + '\n')
                checked.add(_parse(line))
                on_pair()
        os.replace(new, journal)
    except OSError as error:
        raise DataError(f'cannot write {new}: {error.strerror or error}. Nothing was prepared') from error
    return checked


def _adopt_lines(new: Path, journal: Path) -> None:
    """Replace the first lines of a journal by those of an interrupted run, whose last line may be truncated."""
    merged = new.with_suffix('.part')
    with open(new, 'rb') as first, open(journal, 'rb') as rest, open(merged, 'wb') as file:
        for line, older in itertools.zip_longest(first, rest, fillvalue=b''):
            file.write(line if line.endswith(b'\n') else older)
    os.replace(merged, journal)


def read_findings(journal: Path) -> Iterator[tuple[Finding, Finding]]:
    """Yield the findings of each good pair in a journal."""
    with open(journal, encoding='utf-8') as file:
        yield from (checked for checked in map(_parse, file) if not isinstance(checked, DataFault))


def _check_line(item: tuple[Pair, str]) -> str:
    """Return the journal line of a pair, reusing the known one if it is up to date."""
    pair, known = item
    stamp = [pair.lq, pair.gt, *_stamp(pair.lq), *_stamp(pair.gt)]
    try:
        if known and json.loads(known)[0] == stamp:
            _parse(known)
            return known.rstrip('\n')
    except (ValueError, TypeError, LookupError, RecursionError):
        pass  # truncated, or not a journal
    checked = check_pair(pair)
    return json.dumps([stamp, *([astuple(checked)] if isinstance(checked, DataFault) else checked)])


def _parse(line: str) -> tuple[Finding, Finding] | DataFault:
    _, *values = json.loads(line)
    if len(values) == 1:
        return DataFault(*values[0])
    lq, gt = (Finding(tuple(size), num_bytes, digest, tuple(traits)) for size, num_bytes, digest, traits in values)
    return lq, gt


def _stamp(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


class Duplicates(NamedTuple):
    """Images with equal pixels in two splits, or within one."""

    first: str  # names of the splits
    second: str
    kind: str  # degraded or clean
    examples: tuple[tuple[str, str], ...]  # a few pairs of files: in the first split, in the second
    num: int  # number of images of the second split that are also in the first


def find_leaks(splits: Sequence[CheckedSplit]) -> list[Duplicates]:
    """Find test images that are also training images."""
    trained, tested = ([one for one in splits if one.split.phase == phase] for phase in ('train', 'test'))
    leaks = (find_duplicates(train, test, kind) for train in trained for test in tested for kind in _DEGRADED_AND_CLEAN)
    return [leak for leak in leaks if leak.num]


def find_duplicates(first: CheckedSplit, second: CheckedSplit, kind: str) -> Duplicates:
    """Find degraded or clean images of one split that are also in another, or repeated within one."""
    side = _DEGRADED_AND_CLEAN.index(kind)
    places: dict[int, int] = {}
    for place, digest in enumerate(first.digests[side]):
        places.setdefault(digest, place)
    hits = [
        (places[digest], place)
        for place, digest in enumerate(second.digests[side])
        if digest in places and not (first is second and places[digest] == place)
    ]

    def path(checked: CheckedSplit, place: int) -> str:
        pair = checked.split.pairs[checked.good[place]]
        return (pair.lq, pair.gt)[side]

    examples = tuple((path(first, one), path(second, other)) for one, other in hits[:_NUM_EXAMPLES])
    return Duplicates(first.split.name, second.split.name, kind, examples, len(hits))


def check_files(
    manifest: Manifest, workers: int, *, quick: bool = False, on_pair: Callable[[], None] = int
) -> list[DataFault]:
    """Find images of a manifest that are missing, changed or unreadable, and keys used by several pairs.

    A file rewritten with the same pixels counts as unchanged.

    Args:
        manifest: manifest of the dataset.
        workers: number of processes.
        quick: check only existence and file sizes.
        on_pair: called after each pair.
    Raises:
        DataError: if the manifest is damaged.
    """
    faults: list[DataFault] = []
    owners: dict[int, int] = {}
    entries, same = itertools.tee(manifest.entries())
    results = map_in_processes(partial(_check_entry, manifest.root, quick), same, workers, prepare=_limit_threads)
    for number, (entry, found) in enumerate(zip(entries, results, strict=True), 2):
        images = hash((entry.lq, entry.gt))
        if owners.setdefault(hash(entry.key), images) != images:
            text = f'line {number} uses it for another pair than an earlier line'
            faults.append(DataFault('key twice', entry.key, text))
        faults += found
        on_pair()
    return faults


def find_extra(manifests: Iterable[Manifest]) -> list[DataFault]:
    """Find images in the folders of a dataset that were added after its manifests were written."""
    known = (
        os.path.join(manifest.root, name)
        for manifest in manifests
        for names in itertools.chain([manifest.others], ((entry.lq, entry.gt) for entry in manifest.entries()))
        for name in names
    )
    return [DataFault('extra', path, 'added after the manifest was written') for path in list_others(known)]


def check_lmdbs(folder: Path, manifest: Manifest, on_pair: Callable[[], None] = int) -> list[DataFault]:
    """Compare the pixels of `lq.lmdb` and `gt.lmdb` in a folder with a manifest.

    Raises:
        DataError: if one of them is missing or cannot be opened.
    """
    faults = []
    sides = [LmdbImages(folder / f'{kind}.lmdb') for kind in KINDS]
    entries = list(manifest.entries())
    order = make_plan(PairTable(Pair(entry.key, entry.lq, entry.gt) for entry in entries)).order
    for entry, key in zip(entries, order, strict=True):
        for images, name, digest in zip(sides, (entry.lq, entry.gt), entry.digests, strict=True):
            path = f'{images.folder}/{key}'
            try:
                with images.image(key) as image:
                    if digest_pixels(image) != digest:
                        faults.append(DataFault('changed', path, f'its pixels differ from {name} in {manifest.path}'))
            except DataError as error:
                faults.append(DataFault('missing or damaged', path, str(error)))
        on_pair()
    for images in sides:
        for key in sorted({entry.key for entry in read_meta_info(images.folder)} - set(order)):
            faults.append(DataFault('extra', f'{images.folder}/{key}', f'not in {manifest.path}'))
    return faults


def _check_entry(root: Path, quick: bool, entry: Entry) -> list[DataFault]:
    sides = zip((entry.lq, entry.gt), entry.bytes, entry.digests, strict=True)
    faults = [_check_file(os.path.join(root, name), quick, entry.size, *side) for name, *side in sides]
    return [fault for fault in faults if fault]


def _check_file(path: str, quick: bool, size: tuple[int, int], num_bytes: int, digest: str) -> DataFault | None:
    try:
        found_bytes = os.stat(path).st_size
    except FileNotFoundError:
        return DataFault('missing', path, 'no such file')
    except OSError as error:
        return DataFault('unreadable', path, error.strerror)
    if quick:
        text = f'{found_bytes:,} bytes, but {num_bytes:,} in the manifest'
        return None if found_bytes == num_bytes else DataFault('changed', path, text)
    found = _find(path)
    if isinstance(found, DataFault):
        return found
    if found.size != size:
        text = f'{found.size[1]}x{found.size[0]} pixels, but {size[1]}x{size[0]} in the manifest'
        return DataFault('changed', path, text)
    return None if found.digest == digest else DataFault('changed', path, 'its pixels differ from the manifest')


def _limit_threads() -> None:
    """Restrict OpenCV to one thread, as the processes already run in parallel."""
    cv2.setNumThreads(1)


def _read_header(data: bytes, kind: str | None) -> tuple[tuple[int, int] | None, tuple[str, ...]]:
    """Return size and traits of a PNG or JPEG from its header; the size is None if full decoding is required."""
    if kind == 'PNG' and len(data) > 33:
        size = int.from_bytes(data[20:24], 'big'), int.from_bytes(data[16:20], 'big')
        return size, _PNG_KINDS.get(data[25], ()) + (('16 bits',) if data[24] == 16 else ())
    if kind == 'JPEG' and (frame := find_jpeg_frame(data)):
        _, height, width, channels, _ = frame
        return (height, width), _JPEG_KINDS.get(channels, ())
    return None, ()


@contextmanager
def _error_stream() -> Iterator[list[bytes]]:
    """Collect what C libraries write to stderr inside the block: libjpeg reports data loss only there."""
    lines: list[bytes] = []
    with tempfile.TemporaryFile() as stream:
        before = os.dup(2)
        os.dup2(stream.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(before, 2)
            os.close(before)
            stream.seek(0)
            lines += stream.read().splitlines()
