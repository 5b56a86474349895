"""Pairs of degraded and clean images from files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from ast_plugin.data import transforms
from ast_plugin.data.image_files import read_rgb
from ast_plugin.data.layouts import LAYOUTS, Source, check_source, list_pairs
from ast_plugin.data.matching import Pair
from ast_plugin.data.seeded_dataset import SeededDataset, SeededOptions
from ast_plugin.errors import DataError


class PairsOptions(SeededOptions):
    """Keys of PairsDataset."""

    layout: str = Field('folders', description=f'how the images lie on disk: {", ".join(LAYOUTS)}')
    dataroot: str | None = Field(None, description='root of the dataset; every layout but folders')
    dataroot_lq: str | None = Field(None, description='layout folders: degraded images')
    dataroot_gt: str | None = Field(None, description='layout folders: clean images')
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
        return self


class PairsDataset(SeededDataset):
    """Degraded and clean images, matched by key.

    In training, patches of `gt_size` from anywhere in the image, flipped and turned; otherwise whole images, or their
    centres. All reading happens when a sample is asked for; that every image has its partner is checked at once.

    Raises:
        DataError: if the data is not there or not whole; later, if a file cannot be read or a pair differs in size.
    """

    options_type = PairsOptions

    def __init__(self, opt: Mapping[str, Any]) -> None:
        super().__init__(opt)
        self.pairs = list_pairs(self.options.layout, self.options.source())

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, number: int, generator: np.random.Generator) -> dict[str, Any]:
        """Return pair `number` as a sample."""
        pair = self.pairs[number]
        images = self._read(pair)
        if self.is_train:
            images = transforms.random_crop(images, self.options.gt_size, generator)
            images = transforms.random_flip(images, self.options.use_hflip, self.options.use_rot, generator)
        elif self.options.center_crop:
            images = transforms.center_crop(images, self.options.center_crop)
        return self.sample(*images, pair.lq, pair.gt)

    def _read(self, pair: Pair) -> list[np.ndarray]:
        phase = self.options.phase
        try:
            lq, gt = read_rgb(pair.lq), read_rgb(pair.gt)
        except DataError as error:
            raise DataError(f'datasets.{phase}: {error} (of the pair {pair.lq}, {pair.gt})') from error
        if lq.shape != gt.shape:
            raise DataError(
                f'datasets.{phase}: the images of a pair must have one size; {pair.lq} has {lq.shape[1]}x{lq.shape[0]} '
                f'pixels, {pair.gt} has {gt.shape[1]}x{gt.shape[0]}. Replace or remove them'
            )
        return [lq, gt]
