"""LMDBs of images: format, reading and checking.

An LMDB is a folder `*.lmdb` of degraded or of clean images, in BasicSR's format: `data.mdb`, and `meta_info.txt` with a
line `KEY.png (height,width,channels) compress_level` for each image, in the order of the dataset. The plugin adds
`digests.txt`, with a line `BLAKE2B_128  KEY` for each value. With the encoding `raw`, values are pixels instead of PNG
files, lines are `KEY.raw (height,width,channels) bits`, and BasicSR cannot decode them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
import threading
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
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
"""File next to two LMDBs created together: their sources, and the digest of each digests.txt."""
KINDS = ('lq', 'gt')
MAX_KEY_BYTES = 511  # LMDB's own limit

_RAW_MAGIC = b'ASTRAW1\n'
_RAW_HEADER = struct.Struct('<8sIIHH')  # magic, height, width, channels, bytes per sample
_RAW_DTYPES = {1: np.dtype(np.uint8), 2: np.dtype('<u2')}
_META_LINE = re.compile(r'(.+)\.(png|raw) \((\d+),(\d+),(\d+)\) (\d+)')
_DIGEST_LINE = re.compile(r'([0-9a-f]{32})  (.+)')
_AGAIN = 'write it again with `basicsr data lmdb --overwrite`'


class Entry(NamedTuple):
    """A line of meta_info.txt: key, `png` or `raw`, [H, W, C], and the PNG compression level or the bits per sample."""

    key: str
    encoding: str
    shape: tuple[int, int, int]
    detail: int

    def line(self) -> str:
        """Return the line, without line ending."""
        height, width, channels = self.shape
        return f'{self.key}.{self.encoding} ({height},{width},{channels}) {self.detail}'


def encode_key(name: str) -> str:
    """Return the key of an image name without extension, at most 511 ASCII characters that BasicSR can parse.

    BasicSR expects ASCII keys and ends them at the first dot; other tools end them at spaces. Such bytes are written as
    `%20`, as in URLs. Longer keys are truncated and made unique by a digest of the complete name.
    """
    key = quote(os.fsencode(name), safe='/~()+,=@!').replace('.', '%2E')
    if len(key) <= MAX_KEY_BYTES:
        return key
    digest = digest_of(os.fsencode(name))
    start = key[: MAX_KEY_BYTES - len(digest) - 1]
    return f'{re.sub("%[0-9A-F]?$", "", start)}~{digest}'


def decode_key(key: str) -> str:
    """Return the image name of a key made by `encode_key`; of truncated names, the remaining part."""
    return os.fsdecode(unquote_to_bytes(key))


def encode_raw(image: np.ndarray) -> bytes:
    """Encode the pixels of RGB [H, W, 3], uint8 or uint16, preceded by a header."""
    size = image.dtype.itemsize
    return _RAW_HEADER.pack(_RAW_MAGIC, *image.shape, size) + np.asarray(image, _RAW_DTYPES[size]).tobytes()


def decode_value(value: bytes | memoryview, path: str) -> np.ndarray:
    """Decode a value to RGB [H, W, 3]; raw pixels are a read-only view of the value, valid only as long as it is."""
    if bytes(value[: len(_RAW_MAGIC)]) != _RAW_MAGIC:
        return decode_rgb(value, path)
    if len(value) >= _RAW_HEADER.size:
        _, *shape, size = _RAW_HEADER.unpack_from(value)
        if size in _RAW_DTYPES and len(value) == _RAW_HEADER.size + math.prod(shape) * size:
            return np.frombuffer(value, _RAW_DTYPES[size], offset=_RAW_HEADER.size).reshape(shape)
    raise DataError(f'{path}: damaged: its {len(value)} bytes do not match the size in its header')


def digest_of(value: bytes | memoryview) -> str:
    """Return the digest of a value, as stored in digests.txt."""
    return hashlib.blake2b(value, digest_size=16).hexdigest()


def read_meta_info(folder: str | Path) -> Iterator[Entry]:
    """Yield the images of an LMDB, in its order; an image may occur several times."""
    expected = 'for example "0001.png (256,256,3) 1"; write the LMDB again with `basicsr data lmdb`'
    for key, encoding, *shape, detail in _read_lines(Path(folder) / META_INFO, _META_LINE, expected):
        yield Entry(key, encoding, tuple(map(int, shape)), int(detail))


def read_digests(folder: str | Path) -> dict[str, str] | None:
    """Read the digest of each value, by key; None if the file does not exist, as in LMDBs created by BasicSR."""
    path = Path(folder) / DIGESTS
    if not path.is_file():
        return None
    return {key: digest for digest, key in _read_lines(path, _DIGEST_LINE, 'a digest, two spaces and a key')}


def _read_lines(path: Path, pattern: re.Pattern, expected: str) -> Iterator[tuple[str, ...]]:
    """Yield the groups of each non-empty line."""
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
        f'{path}: no such file; an LMDB of images is a folder *.lmdb with {DATA} and {META_INFO}, as '
        f'written by `basicsr data lmdb`'
    )


def holds_pixels(folder: str | os.PathLike) -> bool:
    """Return whether a folder is an LMDB of the encoding `raw`, by the first line of its meta_info.txt."""
    try:
        return next(read_meta_info(folder)).encoding == 'raw'
    except (DataError, StopIteration):
        return False


def check_shared(where: str, datasets: Mapping[str, Mapping[str, Any]], sharing: Collection[str]) -> None:
    """Raise DataError for an LMDB that is used twice, unless all its users share it.

    Others, such as BasicSR's, open it again, which lmdb forbids within a process and its forks: training would fail
    after a validation.

    Args:
        where: name of the section with the datasets, for messages.
        datasets: options of each dataset, by key.
        sharing: keys of the datasets that read through `LmdbImages`.
    """
    users = defaultdict(list)
    for key, options in datasets.items():
        if (options.get('io_backend') or {}).get('type') == 'lmdb':
            for name, folder in options.items():
                if name.startswith('dataroot') and isinstance(folder, str):
                    users[os.path.realpath(folder)].append((key, name))
    for folder, places in users.items():
        if len(places) > 1 and not all(key in sharing for key, _ in places):
            names = ' and '.join(f'{key}.{name}' for key, name in places)
            raise DataError(
                f"{where}: {names} are the same LMDB, {folder}, which datasets other than the plugin's cannot open "
                f'twice. Set type: PairsDataset in all of them, or copy the LMDB'
            )


class LmdbImages:
    """Images of an LMDB by key, created by the plugin or by BasicSR. `read_meta_info` lists them.

    The data is opened on first access, once per process, also in forked workers. It is never locked, so any number of
    processes may read it.

    Args:
        folder: `*.lmdb`, with data.mdb and meta_info.txt.
    Raises:
        DataError: if the data is missing; on reading, if it is truncated or damaged, or a key does not exist.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(f'{folder}: no such LMDB; write it with `basicsr data lmdb`, or correct its dataroot')
        if not (self.folder / DATA).is_file():
            raise _missing_file(self.folder / DATA)
        self._opened: tuple[lmdb.Environment | None, int] = (None, 0)  # with the id of the process that opened it

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_opened': (None, 0)}

    def count(self) -> int:
        """Return the number of images in the data, regardless of meta_info.txt."""
        with self._transaction() as transaction:
            return transaction.stat()['entries']

    @contextmanager
    def value(self, key: str) -> Iterator[memoryview]:
        """Yield the value of a key, a view of the memory-mapped file that is valid only inside the block."""
        with self._transaction() as transaction:
            value = transaction.get(key.encode())
            if value is None:
                raise DataError(
                    f'{self.folder}: no image has the key {key!r}, which is listed in its meta_info.txt; '
                    f'`basicsr data check` reports what else is missing, or {_AGAIN}'
                )
            yield value

    @contextmanager
    def image(self, key: str) -> Iterator[np.ndarray]:
        """Yield the pixels of a key, RGB [H, W, 3] and read-only, valid only inside the block."""
        with self.value(key) as value:
            yield decode_value(value, f'{self.folder}/{key}')

    @contextmanager
    def _transaction(self) -> Iterator[lmdb.Transaction]:
        environment, process = self._opened
        if process != os.getpid():
            with _opening:
                environment = _open(self.folder)
            self._opened = (environment, os.getpid())
        try:
            try:
                transaction = environment.begin(buffers=True)
            except lmdb.MapResizedError:  # another process has added data: adopt the new map size
                environment.set_mapsize(0)
                _check_size(environment, self.folder)
                transaction = environment.begin(buffers=True)
            with transaction:
                yield transaction
        except lmdb.Error as error:
            reason = str(error).rpartition(': ')[2]  # without the path
            raise DataError(f'{self.folder / DATA}: cannot be read: {reason}; {_AGAIN}') from error


# LMDB allows one environment per file and process. All readers in a process share it, and the last one closes it.
_shared: WeakValueDictionary[tuple[str, int], lmdb.Environment] = WeakValueDictionary()
_opening = threading.Lock()
if hasattr(os, 'register_at_fork'):  # a child forked while another thread holds the lock would wait forever
    os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_opening.release)


def _open(folder: Path) -> lmdb.Environment:
    place, process = os.path.realpath(folder), os.getpid()
    environment = _shared.get((place, process))
    if environment is not None:
        return environment
    for (other, _), inherited in list(_shared.items()):
        if other == place:
            inherited.close()  # inherited over a fork: LMDB forbids its use, and the library forbids a second one
    try:
        environment = lmdb.open(os.fsencode(folder), readonly=True, lock=False, readahead=False, create=False)
    except lmdb.Error as error:
        reason, remedy = str(error).rpartition(': ')[2], _AGAIN
        if 'already open' in str(error):
            reason = 'it is already open'
            remedy = 'in this process, a dataset of another type has it open; use one type of dataset for it'
        raise DataError(f'{folder / DATA}: cannot be opened: {reason}; {remedy}') from error
    _check_size(environment, folder)
    _shared[place, process] = environment
    return environment


def _check_size(environment: lmdb.Environment, folder: Path) -> None:
    """Raise DataError if the file is truncated: reading beyond its end would kill the process."""
    expected = (environment.info()['last_pgno'] + 1) * environment.stat()['psize']
    size = (folder / DATA).stat().st_size
    if size < expected:
        environment.close()
        raise DataError(f'{folder / DATA}: truncated: {size} bytes of {expected}; copy it again, or {_AGAIN}')


def check_lmdb(folder: str | Path, num_workers: int = 1) -> list[str]:
    """Read all images of an LMDB in threads, verify their digests or else decode them, and return the faults."""
    try:
        images, digests = LmdbImages(folder), read_digests(folder)
        entries = {entry.key: entry for entry in read_meta_info(folder)}
        count = images.count()
    except DataError as error:
        return [str(error)]
    faults = []
    if count > len(entries):
        faults.append(f'{folder}: holds {count} images, but meta_info.txt lists {len(entries)}')
    if digests is not None and digests.keys() != entries.keys():
        odd = sorted(digests.keys() ^ entries.keys())
        faults.append(f'{folder}: meta_info.txt and digests.txt have different keys: {shorten_list(odd)}')

    def find_fault(entry: Entry) -> str | None:
        path, digest = f'{images.folder}/{entry.key}', (digests or {}).get(entry.key)
        try:
            if digest is not None:
                with images.value(entry.key) as value:
                    return None if digest_of(value) == digest else f'{path}: damaged: differs from its digest'
            with images.image(entry.key) as image:
                (height, width), (rows, columns) = entry.shape[:2], image.shape[:2]
        except DataError as error:
            return str(error)
        if (height, width) == (rows, columns):
            return None
        return f'{path}: has {columns}x{rows} pixels, but {width}x{height} in meta_info.txt'

    found = map_ahead(ThreadPoolExecutor(max(1, num_workers)), find_fault, entries.values(), 256)
    title = f'verify {images.folder.name}'
    with tqdm(found, total=len(entries), desc=title, unit='image', leave=False, disable=None) as bar:
        return faults + [fault for fault in bar if fault]


def check_together(folder: str | Path) -> list[str]:
    """Return a line for each LMDB in a folder that is missing, swapped, or was not created together with the other.

    There are none for a folder without source.json. `check_lmdb` checks the content of an LMDB.
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
        return [*faults, f'{folder}: digests.txt of an LMDB is missing; copy it again']
    except (OSError, ValueError, LookupError, TypeError):
        return [*faults, f'{folder / SOURCE}: damaged; write both LMDBs again with --overwrite']
    if [written[kind] for kind in reversed(KINDS)] == [*found.values()] and wrong:
        return [*faults, f'{folder}: lq.lmdb and gt.lmdb are swapped']
    return faults + [f'{folder / kind}.lmdb: is not the one written here' for kind in wrong]
