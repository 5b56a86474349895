"""LMDBs of images: what is in them, reading PNG files or pixels out of them, and checking them.

An LMDB is a folder `*.lmdb` of degraded or of clean images, as BasicSR has them: `data.mdb`, and `meta_info.txt` with a
line `KEY.png (height,width,channels) compress_level` for each image, in the order of the dataset. `digests.txt` is
ours: a line `BLAKE2B_128  KEY` for each value. With the encoding `raw` the values are pixels and not PNG files, the
lines `KEY.raw (height,width,channels) bits`, and BasicSR cannot decode them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes
from weakref import WeakValueDictionary

import lmdb
import numpy as np
from tqdm import tqdm

from ast_plugin.data.image_files import decode_rgb
from ast_plugin.data.matching import shorten_list
from ast_plugin.data.workers import map_ahead
from ast_plugin.errors import DataError

DATA, META_INFO, DIGESTS = 'data.mdb', 'meta_info.txt', 'digests.txt'
SOURCE = 'source.json'
"""Beside the two LMDBs that were made together: what they were made of, and the digest of either's digests.txt."""
KINDS = ('lq', 'gt')
MAX_KEY_BYTES = 511  # LMDB's own limit

_RAW_MAGIC = b'ASTRAW1\n'
_RAW_HEADER = struct.Struct('<8sIIHH')  # magic, height, width, channels, bytes of a sample
_RAW_DTYPES = {1: np.dtype(np.uint8), 2: np.dtype('<u2')}
_META_LINE = re.compile(r'(.+)\.(png|raw) \((\d+),(\d+),(\d+)\) (\d+)')
_DIGEST_LINE = re.compile(r'([0-9a-f]{32})  (.+)')
_AGAIN = 'write it anew with `basicsr data lmdb --overwrite`'


class Entry(NamedTuple):
    """A line of meta_info.txt: an image's key, `png` or `raw`, [H, W, C], and PNG's level or the bits of a sample."""

    key: str
    encoding: str
    shape: tuple[int, int, int]
    detail: int

    def line(self) -> str:
        """The line, without its end."""
        height, width, channels = self.shape
        return f'{self.key}.{self.encoding} ({height},{width},{channels}) {self.detail}'


def encode_key(name: str) -> str:
    """Return the key for an image of this name, without its ending: letters that BasicSR can read, 511 at most.

    BasicSR takes keys for ASCII and ends them at the first dot; spaces would end them for others. All such bytes are
    written `%20`, as in addresses of the web. What is longer is cut, and told apart by a digest of the whole name.
    """
    key = quote(os.fsencode(name), safe='/~()+,=@!').replace('.', '%2E')
    if len(key) <= MAX_KEY_BYTES:
        return key
    digest = digest_of(os.fsencode(name))
    start = key[: MAX_KEY_BYTES - len(digest) - 1]
    return f'{re.sub("%[0-9A-F]?$", "", start)}~{digest}'


def decode_key(key: str) -> str:
    """Return the name that `encode_key` made a key of; of names that were too long, what is left of them."""
    return os.fsdecode(unquote_to_bytes(key))


def encode_raw(image: np.ndarray) -> bytes:
    """Return pixels with what is needed to find them: RGB [H, W, 3], uint8 or uint16."""
    size = image.dtype.itemsize
    return _RAW_HEADER.pack(_RAW_MAGIC, *image.shape, size) + np.asarray(image, _RAW_DTYPES[size]).tobytes()


def decode_value(value: bytes | memoryview, path: str) -> np.ndarray:
    """Return the pixels of a value, RGB [H, W, 3]; raw ones lie in it, read-only, and are gone when the value goes.

    Raises:
        DataError: if the value is damaged; the message begins with `path`.
    """
    if bytes(value[: len(_RAW_MAGIC)]) != _RAW_MAGIC:
        return decode_rgb(value, path)
    if len(value) >= _RAW_HEADER.size:
        _, *shape, size = _RAW_HEADER.unpack_from(value)
        if size in _RAW_DTYPES and len(value) == _RAW_HEADER.size + math.prod(shape) * size:
            return np.frombuffer(value, _RAW_DTYPES[size], offset=_RAW_HEADER.size).reshape(shape)
    raise DataError(f'{path}: damaged: its {len(value)} bytes are not the pixels that they say')


def digest_of(value: bytes | memoryview) -> str:
    """Return the digest of a value as it stands in digests.txt."""
    return hashlib.blake2b(value, digest_size=16).hexdigest()


def read_meta_info(folder: str | Path) -> Iterator[Entry]:
    """Read which images an LMDB has, in its order, which may have one several times.

    Raises:
        DataError: if the file is not there, or a line is not as BasicSR writes it.
    """
    expected = 'something like "0001.png (256,256,3) 1"; write the LMDB anew with `basicsr data lmdb`'
    for key, encoding, *shape, detail in _read_lines(Path(folder) / META_INFO, _META_LINE, expected):
        yield Entry(key, encoding, tuple(map(int, shape)), int(detail))


def read_digests(folder: str | Path) -> dict[str, str] | None:
    """Read the digest of each value by its key; None where there is no such file, as beside BasicSR's own LMDBs."""
    path = Path(folder) / DIGESTS
    if not path.is_file():
        return None
    return {key: digest for digest, key in _read_lines(path, _DIGEST_LINE, 'a digest, two spaces and a key')}


def _read_lines(path: Path, pattern: re.Pattern, expected: str) -> Iterator[tuple[str, ...]]:
    """Yield the groups of each line that is not empty."""
    try:
        with open(path, encoding='utf-8') as file:
            for number, line in enumerate(file, 1):
                line = line.rstrip('\r\n')
                if match := pattern.fullmatch(line):
                    yield match.groups()
                elif line.strip():
                    raise DataError(f'{path}: line {number} is {line!r}, expected {expected}')
    except FileNotFoundError:
        raise _missing_file(path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'{path}: cannot be read: {getattr(error, "strerror", None) or error}') from error


def _missing_file(path: Path) -> DataError:
    return DataError(
        f'{path}: there is no such file; an LMDB of images is a folder *.lmdb with {DATA} and {META_INFO}, as '
        f'`basicsr data lmdb` writes it'
    )


def holds_pixels(folder: str | os.PathLike) -> bool:
    """Tell whether a folder is an LMDB of the encoding `raw`, by the first line of its meta_info.txt."""
    try:
        return next(read_meta_info(folder)).encoding == 'raw'
    except (DataError, StopIteration):
        return False


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
            raise _missing_file(self.folder / DATA)
        self._opened: tuple[lmdb.Environment | None, int] = (None, 0)  # with the process that opened it

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_opened': (None, 0)}

    def count(self) -> int:
        """Count the images in the data, whatever meta_info.txt names."""
        with self._transaction() as transaction:
            return transaction.stat()['entries']

    @contextmanager
    def value(self, key: str) -> Iterator[memoryview]:
        """Lend the value of a key, which lies in the mapped file and is gone when the block ends.

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
            yield value

    @contextmanager
    def image(self, key: str) -> Iterator[np.ndarray]:
        """Lend the pixels of a key, RGB [H, W, 3] and read-only, which are gone when the block ends.

        Raises:
            DataError: if the key is not there, the image is damaged, or the LMDB cannot be read.
        """
        with self.value(key) as value:
            yield decode_value(value, f'{self.folder}/{key}')

    @contextmanager
    def _transaction(self) -> Iterator[lmdb.Transaction]:
        environment, process = self._opened
        if process != os.getpid():
            environment = _open(self.folder)
            self._opened = (environment, os.getpid())
        try:
            try:
                transaction = environment.begin(buffers=True)
            except lmdb.MapResizedError:  # somebody has added to it since: the map takes its new size
                environment.set_mapsize(0)
                _check_size(environment, self.folder)
                transaction = environment.begin(buffers=True)
            with transaction:
                yield transaction
        except lmdb.Error as error:
            reason = str(error).rpartition(': ')[2]  # without the path
            raise DataError(f'{self.folder / DATA}: cannot be read: {reason}; {_AGAIN}') from error


# LMDB allows one environment for each file and process: all that read it here share it, and the last closes it.
_shared: WeakValueDictionary[tuple[str, int], lmdb.Environment] = WeakValueDictionary()


def _open(folder: Path) -> lmdb.Environment:
    place, process = os.path.realpath(folder), os.getpid()
    environment = _shared.get((place, process))
    if environment is not None:
        return environment
    for (other, _), inherited in list(_shared.items()):
        if other == place:
            inherited.close()  # over a fork: LMDB forbids its use, and the library a second one beside it
    try:
        environment = lmdb.open(os.fsencode(folder), readonly=True, lock=False, readahead=False, create=False)
    except lmdb.Error as error:
        reason, remedy = str(error).rpartition(': ')[2], _AGAIN
        if 'already open' in str(error):
            reason = 'it is open already'
            remedy = 'a dataset of another type has it open in this process; let one type of dataset read it'
        raise DataError(f'{folder / DATA}: cannot be opened: {reason}; {remedy}') from error
    _check_size(environment, folder)
    _shared[place, process] = environment
    return environment


def _check_size(environment: lmdb.Environment, folder: Path) -> None:
    """Raise DataError if the file ends before its last page: reading on would kill the process."""
    expected = (environment.info()['last_pgno'] + 1) * environment.stat()['psize']
    size = (folder / DATA).stat().st_size
    if size < expected:
        environment.close()
        raise DataError(f'{folder / DATA}: cut off: {size} bytes of {expected}; copy it again, or {_AGAIN}')


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
        path, digest = f'{images.folder}/{entry.key}', (digests or {}).get(entry.key)
        try:
            if digest is not None:
                with images.value(entry.key) as value:
                    return None if digest_of(value) == digest else f'{path}: differs from what was written: damaged'
            with images.image(entry.key) as image:
                (height, width), (rows, columns) = entry.shape[:2], image.shape[:2]
        except DataError as error:
            return str(error)
        if (height, width) == (rows, columns):
            return None
        return f'{path}: has {columns}x{rows} pixels, meta_info.txt says {width}x{height}'

    found = map_ahead(ThreadPoolExecutor(max(1, num_workers)), find_fault, entries.values(), 256)
    title = f'verify {images.folder.name}'
    with tqdm(found, total=len(entries), desc=title, unit='image', leave=False, disable=None) as bar:
        return faults + [fault for fault in bar if fault]


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
