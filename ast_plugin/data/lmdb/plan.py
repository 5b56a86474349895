"""What goes into a pair of LMDBs: which images, under which keys, and how each is encoded."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np

from ast_plugin.data.image_files import decode_rgb
from ast_plugin.data.lmdb.format import Entry, digest_of, encode_key, encode_raw, png_level
from ast_plugin.data.matching import is_image, some
from ast_plugin.data.pair_table import Pair, PairTable
from ast_plugin.errors import DataError

Encoding = Literal['png', 'raw']

_LEVEL = 1
"""Level of PNG files that we make of other formats: as BasicSR's; more costs time and gains a twentieth."""

_FORMAT = 1  # a change of what is written for the same plan makes unfinished work useless


class Value(NamedTuple):
    """An image as an LMDB has it: its line in meta_info.txt, its digest, its bytes."""

    entry: Entry
    digest: str
    data: bytes


@dataclass(frozen=True)
class Plan:
    """What is to be written.

    Attributes:
        items: the pairs by their keys in the LMDBs; a pair that the dataset has twice is here once.
        order: the keys in the dataset's order, some of them twice perhaps.
        encoding: `png`: files, those that are PNG in RGB as they are; `raw`: pixels.
        compress_level: encode all PNG files anew with this level, 0 to 9.
    """

    items: PairTable
    order: tuple[str, ...]
    encoding: Encoding = 'png'
    compress_level: int | None = None

    @cached_property
    def digest(self) -> str:
        """Changes when anything does that decides the result: settings, order, or a file's place, size and time."""
        state = hashlib.blake2b(json.dumps([_FORMAT, self.encoding, self.compress_level, self.order]).encode())
        for item in self.items:
            stamps = [(os.path.abspath(path), *_stamp(path)) for path in (item.lq, item.gt)]
            state.update(json.dumps([item.key, stamps]).encode())
        return state.hexdigest()[:32]

    def encode(self, item: Pair) -> tuple[Value, Value]:
        """Read a pair and return what goes into the two LMDBs.

        Raises:
            DataError: if an image cannot be read, or the two differ in size.
        """
        (lq_data, lq), (gt_data, gt) = map(_read, (item.lq, item.gt))
        if lq.shape != gt.shape:
            raise DataError(
                f'the images of a pair must have one size; {item.lq} has {lq.shape[1]}x{lq.shape[0]} pixels, '
                f'{item.gt} has {gt.shape[1]}x{gt.shape[0]}. Replace or remove them'
            )
        return self._value(item.key, lq_data, lq), self._value(item.key, gt_data, gt)

    def _value(self, key: str, data: bytes, image: np.ndarray) -> Value:
        if self.encoding == 'raw':
            data, detail = encode_raw(image), 8 * image.dtype.itemsize
        elif self.compress_level is None and _is_rgb_png(data):
            # Files of others decode as fast as what OpenCV would make of them, often faster, and cost no time now.
            detail = png_level(data)
        else:
            detail = _LEVEL if self.compress_level is None else self.compress_level
            bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
            data = cv2.imencode('.png', bgr, [cv2.IMWRITE_PNG_COMPRESSION, detail])[1].tobytes()
        return Value(Entry(key, self.encoding, image.shape, detail), digest_of(data), data)


def make_plan(pairs: Sequence[Pair], encoding: Encoding = 'png', compress_level: int | None = None) -> Plan:
    """Find a key for each pair: its own without the ending of a file, where that leaves them different.

    Raises:
        DataError: if there are no pairs, or different pairs have the same key.
    """
    if not pairs:
        raise DataError('there are no pairs to pack')
    unique = {(pair.key, pair.lq, pair.gt): pair for pair in pairs}
    stems = Counter(_stem(key) for key, _, _ in unique)
    keys = {full: encode_key(_stem(full[0]) if stems[_stem(full[0])] == 1 else full[0]) for full in unique}
    twice = [key for key, count in Counter(keys.values()).items() if count > 1]
    if twice:
        files = [pair.lq for full, pair in unique.items() if keys[full] == twice[0]]
        raise DataError(
            f'{len(twice)} keys belong to several pairs: {some(twice)}; the first to {some(files)}. Rename these files'
        )
    items = PairTable(Pair(keys[full], pair.lq, pair.gt) for full, pair in unique.items())
    order = tuple(keys[pair.key, pair.lq, pair.gt] for pair in pairs)
    return Plan(items, order, encoding, compress_level)


def _stem(name: str) -> str:
    name = name.lstrip('/')
    return os.path.splitext(name)[0] if is_image(name) else name


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f'{path}: cannot be read: {error.strerror}') from error
    return status.st_size, status.st_mtime_ns


def _read(path: str) -> tuple[bytes, np.ndarray]:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f'{path}: cannot be read: {error.strerror}') from error
    return data, decode_rgb(data, path)


def _is_rgb_png(data: bytes) -> bool:
    """Whether a file, which could be decoded, is a PNG in RGB; its header says so after 25 bytes."""
    return data.startswith(b'\x89PNG') and data[25] == 2
