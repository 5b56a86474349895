"""Datasets of pairs of degraded and clean images: those of files and LMDBs, and those made from clean photos.

Every sample depends on seed, epoch and position alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, ClassVar, Literal

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch.utils.data import Dataset, get_worker_info

from ast_plugin.data import transforms
from ast_plugin.data.image_files import read_rgb
from ast_plugin.data.layouts import LAYOUTS, Source, check_source, list_pairs
from ast_plugin.data.lmdb.reader import LmdbImages, decode_key, read_meta_info
from ast_plugin.data.matching import Pair, PairTable, check_equal_sizes, shorten_list
from ast_plugin.data.synthesis import Photo, degraded_patch, folder_photos, packaged_photos
from ast_plugin.degradations import DEGRADATIONS, AnyParameters
from ast_plugin.degradations.base import PositiveRange
from ast_plugin.degradations.rain import RainParameters
from ast_plugin.errors import DataError, OptionError
from ast_plugin.faults import faults_of

CACHE_BYTES = 256 * 2**20
"""Size of the decoded photos that each process keeps; the rest is decoded anew each time."""


class IoBackend(BaseModel):
    """Where images are read from, as BasicSR calls it."""

    model_config = ConfigDict(extra='forbid')

    type: Literal['disk'] = Field('disk', description='image files')


class SeededOptions(BaseModel):
    """Keys that BasicSR's loader reads, and those of patches."""

    model_config = ConfigDict(extra='forbid', frozen=True)

    type: str = Field('', description='registered name of the dataset')
    name: str = Field('', description='what logs and result folders call it')
    phase: Literal['train', 'val', 'test'] = Field('train', description='put in by BasicSR from the key of the section')
    scale: Literal[1] = Field(1, description='put in by BasicSR; degraded and clean images have one size')
    io_backend: IoBackend = Field(default_factory=IoBackend, description='where images are read from')
    seed: int = Field(0, ge=0, description="put in by the command: the run's manual_seed")

    batch_size_per_gpu: int = Field(1, ge=1, description='patches a device gets at a time')
    num_worker_per_gpu: int = Field(0, ge=0, description='processes that prepare them; 0: the training process itself')
    dataset_enlarge_ratio: float = Field(1, gt=0, description='how often an epoch sees each image')
    prefetch_mode: Literal['cpu', 'cuda'] | None = Field(None, description='cuda needs pin_memory')
    num_prefetch_queue: int = Field(1, ge=1, description='batches that prefetch_mode cpu keeps ready')
    pin_memory: bool = Field(False, description='faster copies to a GPU')
    persistent_workers: bool = Field(False, description='keep the workers from epoch to epoch')

    in_chans: Literal[1, 3] = Field(
        3, description='1: gray pairs, 0.299 R + 0.587 G + 0.114 B of colours; put in by the command for such a network'
    )
    bit_depth: Literal[8, 16] = Field(
        8, description="16: refuse images of 8 bits; put in by the command: the run's bit_depth"
    )
    gt_size: int | None = Field(None, ge=1, description='training: side of the square patch in pixels')
    keep_uint8: bool = Field(
        False,
        description='images of 8 bits stay so up to the device; put in by the command where RestorationModel trains',
    )
    use_hflip: bool = Field(True, description='training: flip left and right')
    use_rot: bool = Field(True, description='training: flip up and down, and turn; with use_hflip all eight symmetries')
    center_crop: int | None = Field(None, ge=1, description='validation: side of the central square, else whole images')

    @model_validator(mode='after')
    def _patches_fit_a_batch(self) -> SeededOptions:
        if self.phase == 'train' and self.gt_size is None:
            raise ValueError('training needs gt_size, the side of the patches in pixels; for instance gt_size: 128')
        return self


class WorkerDataError(DataError):
    """A DataError of a worker process, from whose message torch's traceback of the worker is cut off again."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f'{WorkerDataError.__name__}: ')[2].rstrip('\n'))


class SeededDataset(Dataset):
    """A dataset whose every sample is a function of (seed, epoch, position), whatever process prepares it.

    An index is `(epoch, position)`, as `EpochSampler` gives it, with positions beyond the length going round; or a
    plain number, which is of epoch 0 and ends at the length.

    Args:
        opt: the section of the option file; kept as it is in `opt`, and checked in `options`.
    Raises:
        OptionError: if a key is unknown or its value wrong.
    """

    options_type: ClassVar[type[SeededOptions]] = SeededOptions
    index_carries_epoch = True

    def __init__(self, opt: Mapping[str, Any]) -> None:
        super().__init__()
        self.opt = opt
        try:
            self.options = self.options_type.model_validate(dict(opt))
        except ValidationError as error:
            faults = faults_of(error, self.options_type, dict(opt), ('datasets', opt.get('phase', 'train')))
            raise OptionError('\n'.join(map(str, faults))) from None
        self.is_train = self.options.phase == 'train'

    def load(self, number: int, generator: np.random.Generator) -> dict[str, Any]:
        """Return pair `number` as a sample: see `sample`."""
        raise NotImplementedError

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        if isinstance(index, tuple):
            epoch, position = index
        elif -len(self) <= index < len(self):
            epoch, position = 0, index % len(self)
        else:
            raise IndexError(f'datasets.{self.options.phase} has {len(self)} images; got index {index}')
        generator = np.random.default_rng([self.options.seed, epoch, position])
        is_worker = get_worker_info() is not None
        if is_worker:  # workers are the parallelism: threads of OpenCV's on top would fight for the same cores
            cv2.setNumThreads(0)
        try:
            return self.load(position % len(self), generator)
        except DataError as error:
            kind = WorkerDataError if is_worker else DataError
            raise kind(f'datasets.{self.options.phase}: {error}') from None

    collate = staticmethod(transforms.collate)

    def check_depth(self, image: np.ndarray, path: str | PurePath) -> np.ndarray:
        """Return an image; raise DataError if it has 8 bits where the run is to have 16."""
        if self.options.bit_depth == 16 and image.dtype == np.uint8:
            raise DataError(f'{path}: has 8 bits, bit_depth is 16: give images of 16 bits, or set bit_depth to 8')
        return image

    def sample(self, lq: np.ndarray, gt: np.ndarray, lq_path: str | PurePath, gt_path: str | PurePath) -> dict:
        """Return what models take: `lq`, `gt`, [C, H, W], and where they come from.

        RGB [H, W, 3] becomes gray where `in_chans` is 1. Images are float32 in [0, 1], as BasicSR's models want them;
        with `keep_uint8` those of 8 bits are uint8.
        """
        lq, gt = (
            transforms.to_tensor(transforms.to_channels(image, self.options.in_chans), self.options.keep_uint8)
            for image in (lq, gt)
        )
        return {'lq': lq, 'gt': gt, 'lq_path': str(lq_path), 'gt_path': str(gt_path)}


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
        pair = self.pairs[number]
        try:
            if self.lmdbs is None:
                return self._make_sample(pair, read_rgb(pair.lq), read_rgb(pair.gt), generator)
            # Raw pixels are views into the mapped files, and gone afterwards.
            with self.lmdbs[0].image(pair.key) as lq, self.lmdbs[1].image(pair.key) as gt:
                return self._make_sample(pair, lq, gt, generator)
        except DataError as error:
            message = str(error)
            where = '' if pair.lq in message and pair.gt in message else f' (of the pair {pair.lq}, {pair.gt})'
            raise DataError(f'{message}{where}') from error

    def _make_sample(self, pair: Pair, lq: np.ndarray, gt: np.ndarray, generator: np.random.Generator) -> dict:
        check_equal_sizes(pair, self.check_depth(lq, pair.lq), self.check_depth(gt, pair.gt))
        images, options = [lq, gt], self.options
        if self.is_train:
            images = transforms.random_crop(images, options.gt_size, generator)
            images = transforms.random_flip(images, options.use_hflip, options.use_rot, generator)
        elif options.center_crop:
            images = transforms.center_crop(images, options.center_crop)
        return self.sample(*images, pair.lq, pair.gt)


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


class SyntheticPairsOptions(SeededOptions):
    """Keys of SyntheticPairsDataset."""

    source: Literal['packaged', 'folder'] = Field('packaged', description='photos inside of packages, or dataroot_gt')
    dataroot_gt: str | None = Field(None, description='source folder: the folder of clean photos')
    split: Literal['train', 'val', 'all'] | None = Field(
        None, description='part of the photos; by itself train in training and val otherwise, which share none'
    )
    photos: list[str] | None = Field(None, min_length=1, description='names of photos, instead of a split')
    num_per_photo: int = Field(1, ge=1, description='pairs made of each photo; in training, an epoch')
    degradation: AnyParameters | Annotated[list[AnyParameters], Field(min_length=1)] = Field(
        default_factory=RainParameters,
        description='what is put over the photos: type, and its own parameters; of a list, each pair gets one',
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
    drawn from its number alone: it is the same in every run, whatever the seed. Of a list of degradations each patch
    gets one with equal probability, and the pairs of validation take turns.

    Raises:
        DataError: if there are no photos.
    """

    options_type = SyntheticPairsOptions

    def __init__(self, opt: Mapping[str, Any]) -> None:
        super().__init__(opt)
        options = self.options
        split = options.split or ('train' if self.is_train else 'val')
        if options.source == 'packaged':
            self.photos = packaged_photos(split, options.photos)
        else:
            folder = Path(options.dataroot_gt).expanduser()
            self.photos = folder_photos(folder, options.phase, split, options.photos)
        self.degradations = options.degradation if isinstance(options.degradation, list) else [options.degradation]
        self._cache: dict[Path, np.ndarray] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.photos) * self.options.num_per_photo

    def load(self, number: int, generator: np.random.Generator) -> dict[str, Any]:
        # Pairs of one photo lie `len(photos)` apart.
        options = self.options
        repeat, photo_number = divmod(number, len(self.photos))
        photo = self.photos[photo_number]
        image = self._read(photo)
        several = len(self.degradations)
        if self.is_train:
            parameters = self.degradations[generator.integers(several) if several > 1 else 0]
            lq, gt, _ = degraded_patch(
                image,
                options.gt_size,
                generator,
                DEGRADATIONS[parameters.type],
                parameters,
                use_hflip=options.use_hflip,
                use_rot=options.use_rot,
                clean_share=options.clean_share,
                gamma=options.gamma,
            )
        else:
            if options.center_crop:
                (image,) = transforms.center_crop([image], options.center_crop)
            gt = transforms.to_float(image)
            parameters = self.degradations[(photo_number + repeat) % several]
            lq, _ = DEGRADATIONS[parameters.type].apply(gt, np.random.default_rng(number), parameters)
        # Images of the results are called after lq_path, so each pair has a name of its own.
        name = photo.name if options.num_per_photo == 1 else f'{photo.name}_{repeat + 1}'
        return self.sample(lq, gt, f'{name}.png', photo.path)

    def _read(self, photo: Photo) -> np.ndarray:
        image = self._cache.get(photo.path)
        if image is None:
            image = self.check_depth(read_rgb(photo.path), photo.path)
            if self._cached_bytes + image.nbytes <= CACHE_BYTES:
                self._cache[photo.path] = image
                self._cached_bytes += image.nbytes
        return image
