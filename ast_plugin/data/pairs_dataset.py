"""Pairs of degraded and clean images from files or LMDBs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import Field, model_validator

from ast_plugin.data import transforms
from ast_plugin.data.image_files import decode_rgb, read_rgb
from ast_plugin.data.layouts import LAYOUTS, Source, check_source, list_pairs
from ast_plugin.data.lmdb.format import decode_key, is_raw, view_raw
from ast_plugin.data.lmdb.reader import LmdbImages
from ast_plugin.data.matching import Pair, PairTable, shorten_list
from ast_plugin.data.seeded_dataset import IoBackend, SeededDataset, SeededOptions
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
                f'{f"and {shorten_list(sorted(lonely))} are in one of them alone" if lonely else "and have none"}. '
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


class PairsIoBackend(IoBackend):
    """Where pairs are read from, as BasicSR calls it."""

    type: Literal['disk', 'lmdb'] = Field('disk', description='image files, or LMDBs in dataroot_lq and dataroot_gt')


class PairSizeError(DataError):
    """The images of a pair differ in size."""


class PairsOptions(SeededOptions):
    """Keys of PairsDataset."""

    io_backend: PairsIoBackend = Field(default_factory=PairsIoBackend, description='where images are read from')
    layout: str = Field('folders', description=f'how the images lie on disk: {", ".join(LAYOUTS)}')
    dataroot: str | None = Field(None, description='root of the dataset; every layout but folders')
    dataroot_lq: str | None = Field(None, description='layout folders: degraded images; or their LMDB')
    dataroot_gt: str | None = Field(None, description='layout folders: clean images; or their LMDB')
    lq_template: str | None = Field(None, description="layout folders: degraded names, '{}_rain.png'; {} is the key")
    gt_template: str | None = Field(None, description="layout folders: clean names, '{}_clean.png'; {} is the key")
    split: str | None = Field(None, description='part of the dataset: by itself train in training, test otherwise')
    list_file: str | None = Field(None, description='layout spad: another list than real_world, real_test_1000.txt')

    manifest: str | None = Field(None, description='layout manifest: a file that `basicsr data prepare` has written')

    def source(self) -> Source:
        """Return what the layout is asked to list."""
        values = {key: getattr(self, key) for key in Source.__dataclass_fields__}
        for key in ('dataroot', 'dataroot_lq', 'dataroot_gt', 'manifest'):
            values[key] = values[key] and str(Path(values[key]).expanduser())
        return Source(**values)

    @model_validator(mode='after')
    def _layout_takes_these_keys(self) -> PairsOptions:
        check_source(self.layout, self.source())
        if self.io_backend.type == 'lmdb' and (self.layout != 'folders' or self.lq_template or self.gt_template):
            raise ValueError(
                'io_backend lmdb takes dataroot_lq and dataroot_gt, two LMDBs, and neither layout nor names'
            )
        return self


class PairsDataset(SeededDataset):
    """Degraded and clean images, matched by key, out of files or, with `io_backend: {type: lmdb}`, out of LMDBs.

    In training, patches of `gt_size` from anywhere in the image, flipped and turned; otherwise whole images, or their
    centres. All reading happens when a sample is asked for; that every image has its partner is checked at once.
    Of files, their LMDB with PNG and their LMDB with raw pixels the samples are the same, bit for bit.

    Raises:
        DataError: if the data is not there or not whole; later, if a file cannot be read or a pair differs in size.
    """

    options_type = PairsOptions

    def __init__(self, opt: Mapping[str, Any]) -> None:
        super().__init__(opt)
        source = self.options.source()
        if self.options.io_backend.type == 'lmdb':
            self.pairs = LmdbPairs(source.dataroot_lq, source.dataroot_gt, source.phase)
        else:
            self.pairs = FilePairs(list_pairs(self.options.layout, source))

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, number: int, generator: np.random.Generator) -> dict[str, Any]:
        """Return pair `number` as a sample."""
        lq_path, gt_path = self.pairs.paths(number)

        def make_sample(lq: np.ndarray, gt: np.ndarray) -> dict[str, Any]:
            self._check_shapes(lq, gt, lq_path, gt_path)
            return self.sample(*self._cut([lq, gt], generator), lq_path, gt_path)

        try:
            return self.pairs.read(number, make_sample)
        except PairSizeError:
            raise
        except DataError as error:
            pair = f'(of the pair {lq_path}, {gt_path})'
            raise DataError(f'datasets.{self.options.phase}: {error} {pair}') from error

    def _cut(self, images: list[np.ndarray], generator: np.random.Generator) -> list[np.ndarray]:
        if self.is_train:
            images = transforms.random_crop(images, self.options.gt_size, generator)
            return transforms.random_flip(images, self.options.use_hflip, self.options.use_rot, generator)
        return transforms.center_crop(images, self.options.center_crop) if self.options.center_crop else images

    def _check_shapes(self, lq: np.ndarray, gt: np.ndarray, lq_path: str, gt_path: str) -> None:
        if lq.shape != gt.shape:
            raise PairSizeError(
                f'datasets.{self.options.phase}: the images of a pair must have one size; {lq_path} has '
                f'{lq.shape[1]}x{lq.shape[0]} pixels, {gt_path} has {gt.shape[1]}x{gt.shape[0]}. Replace or remove them'
            )
