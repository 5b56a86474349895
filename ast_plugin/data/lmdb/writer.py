"""Write pairs of LMDBs atomically and reproducibly.

Everything is written to a staging folder next to the destination, `.NAME.part`, and renamed after it has been read back
and verified. Pairs are committed in batches that depend only on the pairs. A run with the same plan resumes after the
last commit of an interrupted one; a run with another plan starts from scratch. The resulting files are byte-identical
in either case: LMDB keeps data in memory between commits and copies it into unused bytes of pages, so it is closed
after each commit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import lmdb
import numpy as np
from tqdm import tqdm

from ast_plugin.data.image_files import decode_rgb, read_bytes
from ast_plugin.data.image_metadata import png_chunks
from ast_plugin.data.lmdb.reader import (
    DATA,
    DIGESTS,
    KINDS,
    META_INFO,
    SOURCE,
    Entry,
    LmdbImages,
    check_lmdb,
    check_together,
    digest_of,
    encode_key,
    encode_raw,
)
from ast_plugin.data.matching import Pair, PairTable, check_equal_sizes, is_image, shorten_list
from ast_plugin.data.workers import map_ahead, num_cores
from ast_plugin.errors import DataError
from ast_plugin.files import PARTIAL_SUFFIX, lock_folder, replace_folder, replace_text
from ast_plugin.names import file_name

Encoding = Literal['png', 'raw']

COMMIT_PAIRS = 64
COMMIT_BYTES = 32 * 2**20
"""Size of a batch: it is committed when it has this many pairs or bytes, which bounds memory and loss by a kill."""

_FORMAT = 1  # to be incremented if the output for the same plan changes, which invalidates unfinished work
_LEVEL = 1  # for PNG files made from other formats, as in BasicSR; higher levels take longer and save only 5 percent
# A zlib stream records its level as one of four grades; these are typical levels of each.
_LEVEL_OF_GRADE = (1, 3, 6, 9)
_SMALLEST_MAP = 2**24
_PAGE = 4096
_STAGED = 'pair'  # subfolder of the staging folder that becomes the destination
_JOURNAL, _PLAN, _OLD = 'pairs.jsonl', 'plan.json', 'old'


class Value(NamedTuple):
    """An image as stored in an LMDB: key, line in meta_info.txt, digest and bytes."""

    key: str
    line: str
    digest: str
    data: bytes


@dataclass(frozen=True)
class Plan:
    """Content of two LMDBs to be written."""

    items: PairTable  # the distinct pairs, by their keys in the LMDBs
    order: tuple[str, ...]  # keys in the order of the dataset, possibly repeated
    encoding: Encoding = 'png'  # png: PNG files, RGB ones unchanged; raw: pixels
    compress_level: int | None = None  # level 0 to 9 to re-encode all PNG files with

    @cached_property
    def digest(self) -> str:
        """Digest of all that determines the result: settings, order, and path, size and time of each file."""
        state = hashlib.blake2b(json.dumps([_FORMAT, self.encoding, self.compress_level, self.order]).encode())
        for item in self.items:
            stamps = []
            for path in (item.lq, item.gt):
                try:
                    status = os.stat(path)
                except OSError as error:
                    raise DataError(f'{path}: cannot be read: {error.strerror}') from error
                stamps.append((os.path.abspath(path), status.st_size, status.st_mtime_ns))
            state.update(json.dumps([item.key, stamps]).encode())
        return state.hexdigest()[:32]

    def encode(self, item: Pair) -> tuple[Value, Value]:
        """Read a pair and return its values in the two LMDBs."""
        lq_data, gt_data = read_bytes(item.lq), read_bytes(item.gt)
        lq, gt = decode_rgb(lq_data, item.lq), decode_rgb(gt_data, item.gt)
        check_equal_sizes(item, lq, gt)
        return self._value(item.key, lq_data, lq), self._value(item.key, gt_data, gt)

    def _value(self, key: str, data: bytes, image: np.ndarray) -> Value:
        if self.encoding == 'raw':
            data, detail = encode_raw(image), 8 * image.dtype.itemsize
        elif self.compress_level is None and data.startswith(b'\x89PNG') and data[25] == 2:
            # An existing RGB PNG decodes as fast as OpenCV's or faster, and needs no encoding.
            detail = _png_level(data)
        else:
            detail = _LEVEL if self.compress_level is None else self.compress_level
            bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
            data = cv2.imencode('.png', bgr, [cv2.IMWRITE_PNG_COMPRESSION, detail])[1].tobytes()
        return Value(key, Entry(key, self.encoding, image.shape, detail).line(), digest_of(data), data)


def _png_level(data: bytes) -> int:
    """Return the approximate compression level recorded in a PNG file."""
    starts = (start for name, start, end in png_chunks(data) if name == b'IDAT' and end - start >= 14)
    return next((_LEVEL_OF_GRADE[data[start + 9] >> 6] for start in starts), 0)


def make_plan(pairs: Sequence[Pair], encoding: Encoding = 'png', compress_level: int | None = None) -> Plan:
    """Choose a key for each pair: its own key, without file extension if that is unique.

    Raises:
        DataError: if there are no pairs, or different pairs have the same key.
    """
    if not pairs:
        raise DataError('there are no pairs to pack')
    unique = dict.fromkeys(pairs)
    stems = Counter(_stem(pair.key) for pair in unique)
    keys = {pair: encode_key(_stem(pair.key) if stems[_stem(pair.key)] == 1 else pair.key) for pair in unique}
    twice = [key for key, count in Counter(keys.values()).items() if count > 1]
    if twice:
        files = [pair.lq for pair in unique if keys[pair] == twice[0]]
        raise DataError(
            f'{len(twice)} keys belong to several pairs: {shorten_list(twice)}; the first to {shorten_list(files)}. '
            f'Rename these files'
        )
    items = PairTable(Pair(keys[pair], pair.lq, pair.gt) for pair in unique)
    return Plan(items, tuple(keys[pair] for pair in pairs), encoding, compress_level)


def _stem(name: str) -> str:
    name = name.lstrip('/')
    return os.path.splitext(name)[0] if is_image(name) else name


class Outcome(NamedTuple):
    """Result of packing: number of pairs, number of pairs reused from an earlier run, and total size in bytes."""

    num_pairs: int
    num_resumed: int
    num_bytes: int


def write_lmdbs(
    plan: Plan, destination: str | Path, num_workers: int | None = None, overwrite: bool = False
) -> Outcome:
    """Write `lq.lmdb` and `gt.lmdb` into the folder `destination`.

    Args:
        plan: content of the LMDBs.
        destination: folder that is created once both are written and verified.
        num_workers: number of threads that read and encode; default: one per core. Does not affect the result.
        overwrite: replace a destination that holds LMDBs of another plan.
    Raises:
        DataError: if an image cannot be read, the destination exists, or the disk is full; committed pairs are kept
            for the next run.
    """
    destination = Path(os.path.abspath(os.path.expanduser(destination)))
    if os.path.exists(destination):
        destination = destination.resolve()  # write to the folder that a link points to, instead of replacing the link
    if not destination.name:
        raise DataError(f'{destination}: exists and is not a pair of LMDBs; choose another destination')
    staging = destination.with_name(file_name(f'.{destination.name}', '.part'))
    num_workers = num_workers or num_cores()
    with _explain_errors(destination, staging):
        if _is_taken(destination, plan, overwrite):
            faults = check_together(destination) + _find_faults(destination, num_workers)
            if faults:
                raise DataError(
                    f'{destination}: exists, but is damaged: {shorten_list(faults)}. Replace it with --overwrite'
                )
            if _is_of(staging, plan):  # left by a run killed between the final rename and cleanup
                shutil.rmtree(staging)
            num_done = len(plan.items)
        else:
            destination.parent.mkdir(parents=True, exist_ok=True)
            staging.mkdir(exist_ok=True)
            with lock_folder(staging, 'another process is writing there'):
                num_done = _adopt(staging, plan)
                _write_values(staging, plan, num_done, num_workers)
                _write_texts(staging, plan)
                _verify(staging, num_workers)
                _is_taken(destination, plan, overwrite)  # it may have been created in the meantime
                replace_folder(staging / _STAGED, destination, staging / _OLD)
                shutil.rmtree(staging)
        num_bytes = sum((destination / f'{kind}.lmdb' / DATA).stat().st_size for kind in KINDS)
        return Outcome(len(plan.items), num_done, num_bytes)


def _is_taken(destination: Path, plan: Plan, overwrite: bool) -> bool:
    """Return whether the destination already holds the result of the plan; raise DataError if it must be kept."""
    if not os.path.lexists(destination) or (destination.is_dir() and not any(destination.iterdir())):
        return False
    names = set(os.listdir(destination)) if destination.is_dir() else set()
    if not names or not names <= {SOURCE, *(f'{kind}.lmdb' for kind in KINDS)}:
        raise DataError(f'{destination}: exists and is not a pair of LMDBs; choose another destination')
    if overwrite:
        return False
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if json.loads((destination / SOURCE).read_text(encoding='utf-8')).get('plan') == plan.digest:
            return True
    raise DataError(
        f'{destination}: exists with LMDBs of other images, settings or file times; choose another destination, or '
        f'replace them with --overwrite'
    )


def _find_faults(folder: Path, num_workers: int) -> list[str]:
    return [fault for kind in KINDS for fault in check_lmdb(folder / f'{kind}.lmdb', num_workers)]


@contextlib.contextmanager
def _explain_errors(destination: Path, staging: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, lmdb.Error) as error:
        reason = getattr(error, 'strerror', None) or str(error).rpartition(': ')[2]
        free = ''
        with contextlib.suppress(OSError):  # LMDB reports a full disk as an input/output error
            free = f' ({shutil.disk_usage(staging).free / 2**20:.0f} MB are free there)'
        raise DataError(
            f'{destination}: cannot be written: {reason}{free}. Fix the cause, for example free some space, and run '
            f'the same command again: it resumes from {staging}'
        ) from error


def _adopt(staging: Path, plan: Plan) -> int:
    """Prepare the staging folder for this plan, and return the number of pairs that both of its LMDBs contain."""
    if _is_of(staging, plan) and (num_done := _num_committed(staging, plan)) is not None:
        return num_done
    marker = staging / _PLAN
    marker.unlink(missing_ok=True)
    for entry in staging.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    for kind in KINDS:
        _folder(staging, kind).mkdir(parents=True)
    (staging / _JOURNAL).touch()
    with replace_text(marker) as file:
        file.write(plan.digest)
    return 0


def _is_of(staging: Path, plan: Plan) -> bool:
    marker = staging / _PLAN
    return marker.is_file() and marker.read_bytes() == plan.digest.encode()


def _num_committed(staging: Path, plan: Plan) -> int | None:
    """Return the number of pairs in both LMDBs and the journal, truncating the journal; None if they are inconsistent.

    The journal is written first, then degraded, then clean images, so each may be one batch ahead of the next.
    """
    try:
        folders = [_folder(staging, kind) for kind in KINDS]
        counts = [LmdbImages(folder).count() if (folder / DATA).exists() else 0 for folder in folders]
        num_done = min(counts)
        with open(staging / _JOURNAL, 'rb+') as journal:
            for item in islice(plan.items, num_done):
                if json.loads(journal.readline())[0] != item.key:
                    return None
            journal.truncate(journal.tell())
    except (OSError, ValueError, LookupError):  # includes DataError
        return None
    return num_done if counts[0] >= counts[1] else None


def _folder(staging: Path, kind: str) -> Path:
    return staging / _STAGED / f'{kind}.lmdb'


def _write_values(staging: Path, plan: Plan, num_done: int, num_workers: int) -> None:
    # Reading, decoding, encoding and hashing all release the GIL.
    pool = ThreadPoolExecutor(num_workers)
    values = map_ahead(pool, plan.encode, islice(plan.items, num_done, None), 2 * num_workers)
    with (
        open(staging / _JOURNAL, 'ab') as journal,
        contextlib.closing(values),
        tqdm(total=len(plan.items), initial=num_done, desc='pack', unit='pair', disable=None) as bar,
    ):
        for batch in _batches(values):
            for lq, gt in batch:
                journal.write(json.dumps([lq.key, lq.line, lq.digest, gt.line, gt.digest]).encode() + b'\n')
            journal.flush()
            os.fsync(journal.fileno())
            for kind, side in zip(KINDS, zip(*batch, strict=True), strict=True):
                _commit(_folder(staging, kind), side, num_done)
            num_done += len(batch)
            bar.update(len(batch))


def _batches(pairs: Iterable[tuple[Value, Value]]) -> Iterator[list[tuple[Value, Value]]]:
    batch, size = [], 0
    for pair in pairs:
        batch.append(pair)
        size += sum(len(value.data) for value in pair)
        if len(batch) >= COMMIT_PAIRS or size >= COMMIT_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _commit(folder: Path, values: Sequence[Value], num_before: int) -> None:
    """Add a batch atomically, unless it already exists."""
    present = (folder / DATA).stat().st_size if (folder / DATA).exists() else 0
    needed = present + sum(len(value.data) + 2 * _PAGE for value in values)
    map_size = max(_SMALLEST_MAP, 2 ** math.ceil(math.log2(needed * 1.1)))
    while True:
        with contextlib.closing(lmdb.open(os.fsencode(folder), map_size=map_size, lock=False)) as environment:
            if environment.stat()['entries'] > num_before:
                return
            try:
                with environment.begin(write=True) as transaction:
                    for value in values:
                        transaction.put(value.key.encode(), value.data)
                return
            except lmdb.MapFullError:
                map_size *= 2


def _write_texts(staging: Path, plan: Plan) -> None:
    for left_over in (staging / _STAGED).rglob(f'.*{PARTIAL_SUFFIX}'):  # from a run that was killed
        left_over.unlink()
    digests = {}
    for number, kind in enumerate(KINDS):
        folder = _folder(staging, kind)
        with replace_text(folder / META_INFO) as file:
            file.writelines(f'{record[1 + 2 * number]}\n' for record in _records(staging, plan.order))
        with replace_text(folder / DIGESTS) as file:
            keys = [item.key for item in plan.items]
            file.writelines(f'{record[2 + 2 * number]}  {record[0]}\n' for record in _records(staging, keys))
        digests[kind] = digest_of((folder / DIGESTS).read_bytes())
    with replace_text(staging / _STAGED / SOURCE) as file:
        source = {'plan': plan.digest, 'encoding': plan.encoding, 'pairs': len(plan.items), 'digests': digests}
        file.write(json.dumps(source) + '\n')


def _records(staging: Path, keys: Sequence[str]) -> Iterator[list[str]]:
    """Yield the journal record of each key, as written by `_write_values`, in which keys are ordered by first use."""
    kept = {key: None for key, count in Counter(keys).items() if count > 1}
    with open(staging / _JOURNAL, encoding='utf-8') as journal:
        for key in keys:
            record = kept.get(key) or json.loads(next(journal))
            if key in kept:
                kept[key] = record
            yield record


def _verify(staging: Path, num_workers: int) -> None:
    """Read everything back; after a failure, the next run starts from scratch."""
    faults = _find_faults(staging / _STAGED, num_workers)
    if faults:
        (staging / _PLAN).unlink()
        raise DataError(
            f'{len(faults)} images differ from what was written: {shorten_list(faults)}. The disk or the memory of '
            f'this machine is faulty; the same command starts from scratch'
        )
