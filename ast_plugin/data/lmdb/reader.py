"""Reading images out of LMDBs: PNG files, or pixels of which only those that are wanted are touched."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import lmdb

from ast_plugin.data.lmdb.format import DATA, META_INFO, Entry, read_meta_info
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
