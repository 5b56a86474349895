"""Pairs of degraded and clean images from files or LMDBs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from ast_plugin.data import transforms
from ast_plugin.data.image_files import read_rgb
from ast_plugin.data.layouts import LAYOUTS, Source, check_source, list_pairs
from ast_plugin.data.lmdb.format import decode_key, decode_value, read_meta_info
from ast_plugin.data.lmdb.reader import LmdbImages
from ast_plugin.data.matching import Pair, PairTable, check_equal_sizes, shorten_list
from ast_plugin.data.seeded_dataset import IoBackend, SeededDataset, SeededOptions
from ast_plugin.errors import DataError


class PairsIoBackend(IoBackend):
    """Where pairs are read from, as BasicSR calls it."""

    type: Literal['disk', 'lmdb'] = Field('disk', description='image files, or LMDBs in dataroot_lq and dataroot_gt')


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
        """Return the keys that the layout reads."""
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
        self.lmdbs: tuple[LmdbImages, LmdbImages] | None = None
        if self.options.io_backend.type == 'lmdb':
            self.lmdbs, self.pairs = _open_lmdbs(source)
        else:
            self.pairs = list_pairs(self.options.layout, source)

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, number: int, generator: np.random.Generator) -> dict[str, Any]:
        """Return pair `number` as a sample."""
        pair = self.pairs[number]

        def make_sample(lq: np.ndarray, gt: np.ndarray) -> dict[str, Any]:
            check_equal_sizes(pair, self.check_depth(lq, pair.lq), self.check_depth(gt, pair.gt))
            return self.sample(*self._cut([lq, gt], generator), pair.lq, pair.gt)

        try:
            if self.lmdbs is None:
                return make_sample(read_rgb(pair.lq), read_rgb(pair.gt))
            # Raw pixels are views into the mapped files, and gone afterwards.
            lq_images, gt_images = self.lmdbs
            return lq_images.read(
                pair.key,
                lambda *lq: gt_images.read(pair.key, lambda *gt: make_sample(decode_value(*lq), decode_value(*gt))),
            )
        except DataError as error:
            message = str(error)
            where = '' if pair.lq in message and pair.gt in message else f' (of the pair {pair.lq}, {pair.gt})'
            raise DataError(f'datasets.{self.options.phase}: {message}{where}') from error

    def _cut(self, images: list[np.ndarray], generator: np.random.Generator) -> list[np.ndarray]:
        if self.is_train:
            images = transforms.random_crop(images, self.options.gt_size, generator)
            return transforms.random_flip(images, self.options.use_hflip, self.options.use_rot, generator)
        return transforms.center_crop(images, self.options.center_crop) if self.options.center_crop else images


def _open_lmdbs(source: Source) -> tuple[tuple[LmdbImages, LmdbImages], PairTable]:
    """Open two LMDBs, and list their pairs in the order of meta_info.txt under the names that they had as files."""
    folders = source.dataroot_lq, source.dataroot_gt
    try:
        lq, gt = map(LmdbImages, folders)
        keys, gt_keys = ([entry.key for entry in read_meta_info(folder)] for folder in folders)
    except DataError as error:
        raise DataError(f'datasets.{source.phase}: {error}') from error
    unmatched = sorted(set(keys) ^ set(gt_keys))
    if unmatched or not keys:
        found = f'and {shorten_list(unmatched)} are in one of them alone' if unmatched else 'and have none'
        raise DataError(
            f'datasets.{source.phase}: {folders[0]} and {folders[1]} must have the same keys, {found}. '
            f'Take two LMDBs that were made together'
        )
    names = ((key, f'{decode_key(key)}.png') for key in keys)
    pairs = (Pair(key, f'{lq.folder}/{name}', f'{gt.folder}/{name}') for key, name in names)
    root = os.path.commonprefix([f'{lq.folder}/', f'{gt.folder}/'])  # noqa: RUF071 (a table cuts off letters)
    return (lq, gt), PairTable(pairs, root)
