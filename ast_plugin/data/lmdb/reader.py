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

from ast_plugin.data.image_files import decode_rgb
from ast_plugin.data.lmdb.format import (
    DATA,
    DIGESTS,
    KINDS,
    META_INFO,
    SOURCE,
    Entry,
    digest_of,
    is_raw,
    read_digests,
    read_meta_info,
    view_raw,
)
from ast_plugin.data.matching import shorten_list
from ast_plugin.data.workers import map_ahead
from ast_plugin.errors import DataError

Result = TypeVar('Result')

_AGAIN = 'write it anew with `basicsr data lmdb --overwrite`'


class LmdbImages:
    """The images of an LMDB, by key; ours or one that BasicSR has made.

    The data is opened when it is first read, once in each process: a worker that was forked opens it for itself. It is
    never locked, so that any number of processes may read it, whoever else has it open.

    Args:
        folder: `*.lmdb`, with data.mdb and meta_info.txt.
    Raises:
        DataError: if one of them is missing or not what it should be; on reading, if the data is cut or damaged.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(
                f'{self.folder}: there is no such LMDB; `basicsr data lmdb` makes one, or correct its dataroot'
            )
        if not (self.folder / DATA).is_file():
            raise DataError(
                f'{self.folder / DATA}: there is no such file; an LMDB of images has {DATA} and {META_INFO}, as '
                f'`basicsr data lmdb` writes it'
            )
        self._opened: _Opened | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_opened': None}

    def entries(self) -> Iterator[Entry]:
        """Read which images there are, in the order of the dataset, which may have one several times.

        Raises:
            DataError: if meta_info.txt is not there, or a line of it is not as it should be.
        """
        return read_meta_info(self.folder)

    def path(self, key: str) -> str:
        """Say where an image lies, for messages."""
        return f'{self.folder}/{key}'

    def count(self) -> int:
        """Count the images in the data, whatever meta_info.txt names."""
        with self._transaction() as transaction:
            return transaction.stat()['entries']

    def read(self, key: str, use: Callable[[memoryview], Result]) -> Result:
        """Return `use(value)`; the value lies in the mapped file, and is gone when `use` returns.

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
            return use(value)

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
            raise DataError(f'{self.folder / DATA}: cannot be read: {_reason(error)}; {_AGAIN}') from error


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
        self.environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, create=False)
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
        remedy = _AGAIN
        if 'already open' in str(error):
            remedy = 'a dataset of another type has it open in this process; let one type of dataset read it'
        raise DataError(f'{folder / DATA}: cannot be opened: {_reason(error)}; {remedy}') from error
    return opened


def _reason(error: lmdb.Error) -> str:
    """What LMDB says, without the path that it begins with."""
    return str(error).rpartition(': ')[2] if 'already open' not in str(error) else 'it is open already'


def check_lmdb(folder: str | Path, num_workers: int = 1) -> list[str]:
    """Read every image of an LMDB on `num_workers` threads, and compare it with its digest or else decode it.

    Returns:
        A line on each fault; nothing if all is well.
    """
    try:
        images = LmdbImages(folder)
        digests = read_digests(folder)
        entries = list({entry.key: entry for entry in images.entries()}.values())
        faults = _check_keys(images, entries, digests)
    except DataError as error:
        return [str(error)]

    def check_entry(entry: Entry) -> str | None:
        try:
            return images.read(entry.key, lambda value: _check_value(images, entry, digests, value))
        except DataError as error:
            return str(error)

    pool = ThreadPoolExecutor(max(1, num_workers))
    with tqdm(
        map_ahead(pool, check_entry, entries, 256),
        total=len(entries),
        desc=f'verify {images.folder.name}',
        unit='image',
        leave=False,
        disable=None,
    ) as found:
        return faults + [fault for fault in found if fault]


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
        faults.append(f"{folder}: lq.lmdb and gt.lmdb are in each other's place")
    else:
        faults += [f'{folder / kind}.lmdb: is not the one that was written here' for kind in wrong]
    return faults


def _check_keys(images: LmdbImages, entries: list[Entry], digests: dict[str, str] | None) -> list[str]:
    """Compare the images of an LMDB with those that its text files name."""
    faults = []
    count = images.count()
    if count > len(entries):
        faults.append(f'{images.folder}: holds {count} images, of which meta_info.txt names {len(entries)}')
    if digests is not None and digests.keys() != {entry.key for entry in entries}:
        odd = sorted(digests.keys() ^ {entry.key for entry in entries})
        faults.append(f'{images.folder}: meta_info.txt and digests.txt name different keys: {shorten_list(odd)}')
    return faults


def _check_value(images: LmdbImages, entry: Entry, digests: dict[str, str] | None, value: memoryview) -> str | None:
    path = images.path(entry.key)
    if digests is not None and entry.key in digests:
        return None if digest_of(value) == digests[entry.key] else f'{path}: differs from what was written: damaged'
    try:
        shape = (view_raw(value) if is_raw(value) else decode_rgb(value, path)).shape
    except ValueError as error:  # DataError is one
        return str(error) if path in str(error) else f'{path}: damaged: {error}'
    height, width = entry.shape[:2]
    if shape[:2] != (height, width):
        return f'{path}: has {shape[1]}x{shape[0]} pixels, meta_info.txt says {width}x{height}'
    return None
