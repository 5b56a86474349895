"""Files inside Qt's binary resources (.rcc), in which games and teaching programs keep their pictures.

Format: `qres`, then version and the places of tree, data and names as big-endian numbers of four bytes, from version 3
on flags. A node of the tree is 14 bytes (22 from version 2 on): place of its name, flags (1 zlib, 2 folder, 4 zstd),
then of a folder the number of its first child, of a file its place in the data; names are a length of two bytes, a hash
of four, and UTF-16; data is a length of four bytes and the bytes.
Source: Qt's documentation of the resource compiler and the layout that its files show.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from ast_plugin.errors import DataError

MAGIC = b'qres'
_ZLIB, _FOLDER, _ZSTD = 1, 2, 4
_LARGEST = 256 * 2**20  # bytes that a compressed file may unpack to


def resource_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield every file of a .rcc, its path inside and its bytes; those packed by zstd are left out.

    Raises:
        DataError: if the file is no resource, is cut off or points outside of itself.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f'{path}: cannot be read: {error.strerror}') from error
    try:
        yield from _walk(content)
    except (struct.error, IndexError, UnicodeDecodeError, zlib.error, ValueError) as error:
        raise DataError(f'{path}: the resource file is damaged: {error}') from error


def _walk(content: bytes) -> Iterator[tuple[str, bytes]]:
    if content[:4] != MAGIC:
        raise ValueError(f'it begins with {content[:4]!r}, not with {MAGIC!r}')
    version, tree, data, names = struct.unpack_from('>4I', content, 4)
    if not 1 <= version <= 3:
        raise ValueError(f'version {version} is not known, only 1 to 3 are')
    node_size = 14 if version == 1 else 22
    pending, seen = [(0, '')], set()
    while pending:
        number, prefix = pending.pop()
        if number in seen:
            raise ValueError('a folder holds itself')
        seen.add(number)
        name_place, flags, first, second = struct.unpack_from('>IHII', content, tree + number * node_size)
        name = prefix + _name(content, names + name_place) if number else ''
        if flags & _FOLDER:
            children = range(second, second + first)
            if tree + children.stop * node_size > len(content):
                raise ValueError('its tree goes beyond its end')
            pending += [(child, f'{name}/' if name else '') for child in reversed(children)]
        elif not flags & _ZSTD:
            yield name, _data(content, data + second, bool(flags & _ZLIB))


def _name(content: bytes, place: int) -> str:
    (length,) = struct.unpack_from('>H', content, place)
    return _bytes(content, place + 6, 2 * length).decode('utf-16-be')


def _data(content: bytes, place: int, packed: bool) -> bytes:
    (length,) = struct.unpack_from('>I', content, place)
    data = _bytes(content, place + 4, length)
    if not packed:
        return data
    # Qt puts the unpacked length of four bytes before what zlib packed.
    unpacker = zlib.decompressobj()
    unpacked = unpacker.decompress(data[4:], _LARGEST)
    if not unpacker.eof:
        raise ValueError('a packed file is cut off, or unpacks to more than can be')
    return unpacked


def _bytes(content: bytes, place: int, length: int) -> bytes:
    part = content[place : place + length]
    if len(part) != length:
        raise ValueError('it is cut off')
    return part
