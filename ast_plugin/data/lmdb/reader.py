"""Read images out of LMDBs: PNG files, or pixels of which only the wanted ones are touched; and check them all."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import lmdb
from tqdm import tqdm

from ast_plugin.data.lmdb.format import (
    DATA,
    DIGESTS,
    KINDS,
    SOURCE,
    Entry,
    decode_value,
    digest_of,
    missing_file,
    read_digests,
    read_meta_info,
)
from ast_plugin.data.matching import shorten_list
from ast_plugin.data.workers import map_ahead
from ast_plugin.errors import DataError

Result = TypeVar('Result')

_AGAIN = 'write it anew with `basicsr data lmdb --overwrite`'


class LmdbImages:
    """The images of an LMDB, by key; ours or one that BasicSR has made. `read_meta_info` tells which there are.

    The data is opened when it is first read, once in each process: a worker that was forked opens it for itself. It is
    never locked, so that any number of processes may read it, whoever else has it open.

    Args:
        folder: `*.lmdb`, with data.mdb and meta_info.txt.
    Raises:
        DataError: if the data is missing; on reading, if it is cut or damaged.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(f'{folder}: there is no such LMDB; `basicsr data lmdb` makes one, or correct its dataroot')
        if not (self.folder / DATA).is_file():
            raise missing_file(self.folder / DATA)
        self._opened: _Opened | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_opened': None}

    def count(self) -> int:
        """Count the images in the data, whatever meta_info.txt names."""
        with self._transaction() as transaction:
            return transaction.stat()['entries']

    def read(self, key: str, use: Callable[[memoryview, str], Result]) -> Result:
        """Return `use(value, path)`; the value lies in the mapped file, and is gone when `use` returns.

        Args:
            key: of the image.
            use: takes the value, and the image's place for messages.
        Raises:
            DataError: if the key is not there, or the LMDB cannot be read.
        """
        with self._transaction() as transaction:
            value = transaction.get(key.encode())
            if value is None:
                raise DataError(
                    f'{self.folder}: no image has the key {key!r}, which its meta_info.txt names; '
                    f'`basicsr data check` tells what else is missing, or {_AGAIN}'
                )
            return use(value, f'{self.folder}/{key}')

    @contextmanager
    def _transaction(self) -> Iterator[lmdb.Transaction]:
        opened = self._opened
        if opened is None or opened.process != os.getpid():
            opened = self._opened = _open(self.folder)
        try:
            try:
                transaction = opened.environment.begin(buffers=True)
            except lmdb.MapResizedError:
                # Somebody has added to it since; the map takes its new size.
                opened.environment.set_mapsize(0)
                opened.check_size(self.folder)
                transaction = opened.environment.begin(buffers=True)
            with transaction:
                yield transaction
        except lmdb.Error as error:
            reason = str(error).rpartition(': ')[2]  # without the path
            raise DataError(f'{self.folder / DATA}: cannot be read: {reason}; {_AGAIN}') from error


def holds_pixels(folder: str | os.PathLike) -> bool:
    """Tell whether a folder is an LMDB of the encoding `raw`, by the first line of its meta_info.txt."""
    try:
        return next(read_meta_info(folder)).encoding == 'raw'
    except (DataError, StopIteration):
        return False


class _Opened:
    """An environment, shared by all in this process that read it: LMDB allows one for each file."""

    def __init__(self, folder: Path) -> None:
        self.process = os.getpid()
        self.environment = lmdb.open(os.fsencode(folder), readonly=True, lock=False, readahead=False, create=False)
        self.check_size(folder)

    def check_size(self, folder: Path) -> None:
        """Raise DataError if the file ends before its last page: reading on would kill the process."""
        expected = (self.environment.info()['last_pgno'] + 1) * self.environment.stat()['psize']
        size = (folder / DATA).stat().st_size
        if size < expected:
            self.environment.close()
            raise DataError(f'{folder / DATA}: cut off: {size} bytes of {expected}; copy it again, or {_AGAIN}')

    def __del__(self) -> None:
        if hasattr(self, 'environment'):
            self.environment.close()


_shared: weakref.WeakValueDictionary[str, _Opened] = weakref.WeakValueDictionary()


def _open(folder: Path) -> _Opened:
    place = os.path.realpath(folder)
    opened = _shared.get(place)
    if opened is not None and opened.process == os.getpid():
        return opened
    if opened is not None:
        # Inherited over a fork: LMDB forbids its use, and the library a second one beside it.
        opened.environment.close()
    try:
        opened = _shared[place] = _Opened(folder)
    except lmdb.Error as error:
        reason, remedy = str(error).rpartition(': ')[2], _AGAIN
        if 'already open' in str(error):
            reason = 'it is open already'
            remedy = 'a dataset of another type has it open in this process; let one type of dataset read it'
        raise DataError(f'{folder / DATA}: cannot be opened: {reason}; {remedy}') from error
    return opened


def check_lmdb(folder: str | Path, num_workers: int = 1) -> list[str]:
    """Read every image of an LMDB on threads, and compare it with its digest or else decode it; return the faults."""
    try:
        images, digests = LmdbImages(folder), read_digests(folder)
        entries = {entry.key: entry for entry in read_meta_info(folder)}
        count = images.count()
    except DataError as error:
        return [str(error)]
    faults = []
    if count > len(entries):
        faults.append(f'{folder}: holds {count} images, of which meta_info.txt names {len(entries)}')
    if digests is not None and digests.keys() != entries.keys():
        odd = sorted(digests.keys() ^ entries.keys())
        faults.append(f'{folder}: meta_info.txt and digests.txt name different keys: {shorten_list(odd)}')

    def find_fault(entry: Entry) -> str | None:
        digest = None if digests is None else digests.get(entry.key)
        try:
            return images.read(entry.key, lambda value, path: _check_value(value, path, entry, digest))
        except DataError as error:
            return str(error)

    found = map_ahead(ThreadPoolExecutor(max(1, num_workers)), find_fault, entries.values(), 256)
    title = f'verify {images.folder.name}'
    with tqdm(found, total=len(entries), desc=title, unit='image', leave=False, disable=None) as bar:
        return faults + [fault for fault in bar if fault]


def _check_value(value: memoryview, path: str, entry: Entry, digest: str | None) -> str | None:
    if digest is not None:
        return None if digest_of(value) == digest else f'{path}: differs from what was written: damaged'
    (height, width), (rows, columns) = entry.shape[:2], decode_value(value, path).shape[:2]
    if (height, width) == (rows, columns):
        return None
    return f'{path}: has {columns}x{rows} pixels, meta_info.txt says {width}x{height}'


def check_together(folder: str | Path) -> list[str]:
    """Find out whether the two LMDBs in a folder are those that were made together, neither lost nor in other places.

    Returns:
        A line on each fault; none for a folder without source.json. `check_lmdb` tells whether an LMDB is whole.
    """
    folder = Path(folder)
    if not (folder / SOURCE).is_file():
        return []
    faults = [f'{folder}: {kind}.lmdb is missing' for kind in KINDS if not (folder / f'{kind}.lmdb').is_dir()]
    try:
        written = json.loads((folder / SOURCE).read_bytes())['digests']
        found = {kind: digest_of((folder / f'{kind}.lmdb' / DIGESTS).read_bytes()) for kind in KINDS if not faults}
        wrong = [kind for kind in found if written[kind] != found[kind]]
    except FileNotFoundError:
        return [*faults, f'{folder}: lacks digests.txt of an LMDB; copy it again']
    except (OSError, ValueError, LookupError, TypeError):
        return [*faults, f'{folder / SOURCE}: does not say what was written; write both anew with --overwrite']
    if [written[kind] for kind in reversed(KINDS)] == [*found.values()] and wrong:
        return [*faults, f"{folder}: lq.lmdb and gt.lmdb are in each other's place"]
    return faults + [f'{folder / kind}.lmdb: is not the one that was written here' for kind in wrong]
