"""Where the images of pairs are read from: files, or LMDBs of PNG files or of pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from ast_plugin.data.image_files import decode_rgb, read_rgb
from ast_plugin.data.lmdb.format import decode_key, is_raw, view_raw
from ast_plugin.data.lmdb.reader import LmdbImages
from ast_plugin.data.matching import some
from ast_plugin.data.pair_table import Pair, PairTable
from ast_plugin.errors import DataError

Result = TypeVar('Result')
Use = Callable[[np.ndarray, np.ndarray], Result]
"""What is done with a degraded and a clean image, RGB [H, W, 3] of 8 or 16 bits, which may be gone afterwards."""


class FilePairs(Sequence[Pair]):
    """Pairs of image files."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, number: int) -> Pair:
        return self._pairs[number]

    def paths(self, number: int) -> tuple[str, str]:
        """Say where the images of a pair lie."""
        return self._pairs[number].lq, self._pairs[number].gt

    def read(self, number: int, use: Use[Result]) -> Result:
        """Return `use(lq, gt)`.

        Raises:
            DataError: if one of them cannot be read.
        """
        pair = self._pairs[number]
        return use(read_rgb(pair.lq), read_rgb(pair.gt))


class LmdbPairs(Sequence[Pair]):
    """Pairs out of two LMDBs, in the order of meta_info.txt.

    Args:
        lq_dir, gt_dir: the LMDBs, which have the same keys.
        phase: whose they are, for messages.
    Raises:
        DataError: if one of them is not there or not whole, or has keys that the other lacks.
    """

    def __init__(self, lq_dir: str | Path, gt_dir: str | Path, phase: str) -> None:
        try:
            self._lq, self._gt = LmdbImages(lq_dir), LmdbImages(gt_dir)
            keys, gt_keys = ([entry.key for entry in images.entries()] for images in (self._lq, self._gt))
        except DataError as error:
            raise DataError(f'datasets.{phase}: {error}') from error
        lonely = set(keys) ^ set(gt_keys)
        if not keys or lonely:
            raise DataError(
                f'datasets.{phase}: {lq_dir} and {gt_dir} must have the same keys, '
                f'{f"and {some(sorted(lonely))} are in one of them alone" if lonely else "and have none"}. '
                f'Take two LMDBs that were made together'
            )
        self._pairs = PairTable(Pair(key, key, key) for key in keys)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, number: int) -> Pair:
        return Pair(self._pairs[number].key, *self.paths(number))

    def paths(self, number: int) -> tuple[str, str]:
        """Say where the images of a pair lie; the names that they had as files, so that results are called so."""
        name = decode_key(self._pairs[number].key)
        return f'{self._lq.folder}/{name}.png', f'{self._gt.folder}/{name}.png'

    def read(self, number: int, use: Use[Result]) -> Result:
        """Return `use(lq, gt)`; of pixels, views that lie in the mapped files.

        Raises:
            DataError: if one of them is missing or damaged.
        """
        key = self._pairs[number].key

        def with_lq(lq_value: memoryview) -> Result:
            lq = _pixels(lq_value, self._lq.path(key))
            return self._gt.read(key, lambda gt_value: use(lq, _pixels(gt_value, self._gt.path(key))))

        return self._lq.read(key, with_lq)


def _pixels(value: memoryview, path: str) -> np.ndarray:
    if not is_raw(value):
        return decode_rgb(value, path)
    try:
        return view_raw(value)
    except ValueError as error:
        raise DataError(f'{path}: damaged: {error}') from error
