"""Pairs made from clean photos."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from ast_plugin.data import transforms
from ast_plugin.data.image_files import read_rgb
from ast_plugin.data.seeded_dataset import SeededDataset, SeededOptions
from ast_plugin.data.synthesis import Photo, degraded_patch, folder_photos, packaged_photos
from ast_plugin.degradations import DEGRADATIONS, AnyParameters
from ast_plugin.degradations.parameters import PositiveRange
from ast_plugin.degradations.rain import RainParameters
from ast_plugin.errors import DataError

CACHE_BYTES = 256 * 2**20
"""Size of the decoded photos that each process keeps; the rest is decoded anew each time."""


class SyntheticPairsOptions(SeededOptions):
    """Keys of SyntheticPairsDataset."""

    source: Literal['packaged', 'folder'] = Field('packaged', description='photos inside of packages, or dataroot_gt')
    dataroot_gt: str | None = Field(None, description='source folder: the folder of clean photos')
    split: Literal['train', 'val', 'all'] | None = Field(
        None, description='part of the photos; by itself train in training and val otherwise, which share none'
    )
    photos: list[str] | None = Field(None, min_length=1, description='names of photos, instead of a split')
    num_per_photo: int = Field(1, ge=1, description='pairs made of each photo; in training, an epoch')
    degradation: AnyParameters = Field(
        default_factory=RainParameters, description='what is put over the photos: type, and its own parameters'
    )
    clean_share: float = Field(0, ge=0, le=1, description='training: share of the patches that are not degraded')
    gamma: PositiveRange = Field(
        (1, 1), description='training: range of the exponent of the clean patch; above 1 makes it darker'
    )

    @model_validator(mode='after')
    def _source_has_its_folder(self) -> SyntheticPairsOptions:
        if (self.source == 'folder') != (self.dataroot_gt is not None):
            raise ValueError('dataroot_gt, a folder of clean photos, goes with source: folder, and only with it')
        return self


class SyntheticPairsDataset(SeededDataset):
    """Clean photos and what a seeded degradation makes of them.

    In training each sample is another patch under another degradation, drawn from (seed, epoch, position); the patch
    is flipped before it is degraded, so that rain keeps falling down. In validation the degradation of each pair is
    drawn from its number alone: it is the same in every run, whatever the seed.

    Raises:
        DataError: if there are no photos.
    """

    options_type = SyntheticPairsOptions

    def __init__(self, opt: Mapping[str, Any]) -> None:
        super().__init__(opt)
        self.photos = self._find_photos()
        self.degradation = DEGRADATIONS[self.options.degradation.type]
        self._cache: dict[Path, np.ndarray] = {}
        self._cached_bytes = 0

    def _find_photos(self) -> list[Photo]:
        options = self.options
        split = options.split or ('train' if self.is_train else 'val')
        if options.source == 'packaged':
            return packaged_photos(split, options.photos)
        return folder_photos(Path(options.dataroot_gt).expanduser(), options.phase, split, options.photos)

    def __len__(self) -> int:
        return len(self.photos) * self.options.num_per_photo

    def load(self, number: int, generator: np.random.Generator) -> dict[str, Any]:
        """Return pair `number`; pairs of one photo lie `len(photos)` apart."""
        options = self.options
        repeat, photo_number = divmod(number, len(self.photos))
        photo = self.photos[photo_number]
        image = self._read(photo)
        if self.is_train:
            lq, gt, _ = degraded_patch(
                image,
                options.gt_size,
                generator,
                self.degradation,
                options.degradation,
                use_hflip=options.use_hflip,
                use_rot=options.use_rot,
                clean_share=options.clean_share,
                gamma=options.gamma,
            )
        else:
            if options.center_crop:
                (image,) = transforms.center_crop([image], options.center_crop)
            gt = transforms.to_float(image)
            lq, _ = self.degradation.apply(gt, np.random.default_rng(number), options.degradation)
        # Images of the results are called after lq_path, so each pair has a name of its own.
        name = photo.name if options.num_per_photo == 1 else f'{photo.name}_{repeat + 1}'
        return self.sample(lq, gt, f'{name}.png', photo.path)

    def _read(self, photo: Photo) -> np.ndarray:
        image = self._cache.get(photo.path)
        if image is None:
            try:
                image = self.check_depth(read_rgb(photo.path), photo.path)
            except DataError as error:
                raise DataError(f'datasets.{self.options.phase}: {error}') from error
            if self._cached_bytes + image.nbytes <= CACHE_BYTES:
                self._cache[photo.path] = image
                self._cached_bytes += image.nbytes
        return image
