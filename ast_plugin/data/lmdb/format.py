"""What is in our LMDBs: keys, values and the two text files beside the data.

An LMDB is a folder `*.lmdb` of degraded or of clean images, as BasicSR has them: `data.mdb`, and `meta_info.txt` with a
line `KEY.png (height,width,channels) compress_level` for each image, in the order of the dataset. `digests.txt` is
ours: a line `BLAKE2B_128  KEY` for each value. With the encoding `raw` the values are pixels and not PNG files, the
lines `KEY.raw (height,width,channels) bits`, and BasicSR cannot decode them.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes

import numpy as np

from ast_plugin.data.image_files import decode_rgb
from ast_plugin.errors import DataError

DATA, META_INFO, DIGESTS = 'data.mdb', 'meta_info.txt', 'digests.txt'
SOURCE = 'source.json'
"""Beside the two LMDBs that were made together: what they were made of, and the digest of either's digests.txt."""
KINDS = ('lq', 'gt')
MAX_KEY_BYTES = 511  # LMDB's own limit
_DIGEST_BYTES = 16

RAW_MAGIC = b'ASTRAW1\n'
_RAW_HEADER = struct.Struct('<8sIIHH')  # magic, height, width, channels, bytes of a sample
_RAW_DTYPES = {1: np.dtype(np.uint8), 2: np.dtype('<u2')}
_META_LINE = re.compile(r'(.+)\.(png|raw) \((\d+),(\d+),(\d+)\) (\d+)')
# What a zlib stream says of itself is one of four grades; each stands for these levels' middle.
_LEVEL_OF_GRADE = (1, 3, 6, 9)


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
    return _RAW_HEADER.pack(RAW_MAGIC, *image.shape, size) + np.asarray(image, _RAW_DTYPES[size]).tobytes()


def decode_value(value: bytes | memoryview, path: str) -> np.ndarray:
    """Return the pixels of a value, RGB [H, W, 3]; raw ones lie in it, read-only, and are gone when the value goes.

    Raises:
        DataError: if the value is damaged; the message begins with `path`.
    """
    if bytes(value[: len(RAW_MAGIC)]) != RAW_MAGIC:
        return decode_rgb(value, path)
    if len(value) >= _RAW_HEADER.size:
        _, *shape, size = _RAW_HEADER.unpack_from(value)
        if size in _RAW_DTYPES and len(value) == _RAW_HEADER.size + math.prod(shape) * size:
            return np.frombuffer(value, _RAW_DTYPES[size], offset=_RAW_HEADER.size).reshape(shape)
    raise DataError(f'{path}: damaged: its {len(value)} bytes are not the pixels that they say')


def png_level(data: bytes) -> int:
    """Return the level that the compressed data of a PNG file says it was made with, as near as it says."""
    position = 8  # behind the signature
    while position + 10 <= len(data):
        length, kind = struct.unpack_from('>I4s', data, position)
        if kind == b'IDAT' and length >= 2:
            return _LEVEL_OF_GRADE[data[position + 9] >> 6]
        position += length + 12
    return 0


def digest_of(value: bytes | memoryview) -> str:
    """Return the digest of a value as it stands in digests.txt."""
    return hashlib.blake2b(value, digest_size=_DIGEST_BYTES).hexdigest()


def read_meta_info(folder: str | Path) -> Iterator[Entry]:
    """Read which images an LMDB has, in its order, which may have one several times.

    Raises:
        DataError: if the file is not there, or a line is not as BasicSR writes it.
    """
    path = Path(folder) / META_INFO
    for number, line in enumerate(_lines(path), 1):
        match = _META_LINE.fullmatch(line)
        if match:
            key, encoding, *shape, detail = match.groups()
            yield Entry(key, encoding, tuple(map(int, shape)), int(detail))
        elif line.strip():
            raise DataError(
                f'{path}: line {number} is {line!r}, expected something like "0001.png (256,256,3) 1"; '
                f'write the LMDB anew with `basicsr data lmdb`'
            )


def read_digests(folder: str | Path) -> dict[str, str] | None:
    """Read the digest of each value by its key; None where there is no such file, as beside BasicSR's own LMDBs."""
    path = Path(folder) / DIGESTS
    if not path.is_file():
        return None
    digests = {}
    for number, line in enumerate(_lines(path), 1):
        digest, separator, key = line.partition('  ')
        if not separator or len(digest) != 2 * _DIGEST_BYTES:
            raise DataError(f'{path}: line {number} is {line!r}, expected a digest, two spaces and a key')
        digests[key] = digest
    return digests


def missing_file(path: Path) -> DataError:
    """Return the error that an LMDB lacks a file."""
    return DataError(
        f'{path}: there is no such file; an LMDB of images is a folder *.lmdb with {DATA} and {META_INFO}, as '
        f'`basicsr data lmdb` writes it'
    )


def _lines(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding='utf-8') as file:
            for line in file:
                yield line.rstrip('\r\n')
    except FileNotFoundError:
        raise missing_file(path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'{path}: cannot be read: {getattr(error, "strerror", None) or error}') from error
