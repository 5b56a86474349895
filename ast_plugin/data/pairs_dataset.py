"""Datasets of degraded/clean image pairs, read from files or LMDBs or synthesized from clean photos.

Each sample depends only on the seed, the epoch and the position.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, ClassVar, Literal

import cv2
import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch.utils.data import Dataset, get_worker_info

from ast_plugin.data import transforms
from ast_plugin.data.image_files import downscale, read_rgb
from ast_plugin.data.layouts import LAYOUTS, Source, check_source, list_pairs
from ast_plugin.data.lmdb.reader import LmdbImages, decode_key, read_meta_info
from ast_plugin.data.matching import Pair, PairTable, check_equal_sizes, shorten_list
from ast_plugin.data.synthesis import Augmentation, Photo, degraded_patch, folder_photos, packaged_photos
from ast_plugin.degradations import DEGRADATIONS, AnyParameters
from ast_plugin.degradations.base import PositiveRange, check_order
from ast_plugin.degradations.rain import RainParameters
from ast_plugin.errors import DataError, OptionError
from ast_plugin.faults import faults_of

Level = Annotated[float, Field(ge=0, le=255)]
Quality = Annotated[int, Field(ge=1, le=100)]
Side = Annotated[int, Field(ge=1)]
UserPath = Annotated[str, AfterValidator(lambda path: path and str(Path(os.path.expanduser(path))))]
CACHE_BYTES = 256 * 2**20
"""Maximum size of the decoded photos that each process caches; photos beyond it are decoded at each access."""


class IoBackend(BaseModel):
    """Storage that images are read from, under BasicSR's key."""

    model_config = ConfigDict(extra='forbid')

    type: Literal['disk'] = Field('disk', description='image files')


class SeededOptions(BaseModel):
    """Keys of BasicSR's data loader, and keys common to all datasets of the plugin."""

    model_config = ConfigDict(extra='forbid', frozen=True)

    type: str = Field('', description='registered name of the dataset')
    name: str = Field('', description='name of the dataset in logs and result folders')
    phase: Literal['train', 'val', 'test'] = Field('train', description='set by BasicSR from the key of the section')
    scale: Literal[1] = Field(1, description='set by BasicSR; degraded and clean images have the same size')
    io_backend: IoBackend = Field(default_factory=IoBackend, description='storage that images are read from')
    seed: int = Field(0, ge=0, description='set by the command to manual_seed of the run')

    batch_size_per_gpu: int = Field(1, ge=1, description='batch size per device')
    num_worker_per_gpu: int = Field(0, ge=0, description='number of data loading workers; 0 loads in the main process')
    dataset_enlarge_ratio: float = Field(1, gt=0, description='number of times each image is used in an epoch')
    prefetch_mode: Literal['cpu', 'cuda'] | None = Field(None, description='prefetcher; cuda requires pin_memory')
    num_prefetch_queue: int = Field(1, ge=1, description='number of batches prefetched with prefetch_mode cpu')
    pin_memory: bool = Field(False, description='load batches into pinned memory for faster transfer to a GPU')
    persistent_workers: bool = Field(False, description='keep workers alive between epochs')

    in_chans: Literal[1, 3] = Field(
        3, description='1: convert to gray, 0.299 R + 0.587 G + 0.114 B; set by the command for one-channel networks'
    )
    bit_depth: Literal[8, 16] = Field(
        8, description='16: reject 8-bit images; set by the command to bit_depth of the run'
    )
    gt_size: int | None = Field(None, ge=1, description='training: side of the square patch in pixels')
    keep_uint8: bool = Field(
        False,
        description='keep 8-bit images as uint8 until they are on the device; set by the command for RestorationModel',
    )
    use_hflip: bool = Field(True, description='training: flip horizontally at random')
    use_rot: bool = Field(True, description='training: flip vertically and transpose at random, independently')
    center_crop: int | None = Field(None, ge=1, description='validation: side of the centre crop; default: no crop')

    @model_validator(mode='after')
    def _patches_fit_a_batch(self) -> SeededOptions:
        if self.phase == 'train' and self.gt_size is None:
            raise ValueError('training requires gt_size, the side of the patches in pixels; for example gt_size: 128')
        return self


class WorkerDataError(DataError):
    """DataError raised in a worker process, without the worker traceback that torch adds to the message."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f'{WorkerDataError.__name__}: ')[2].rstrip('\n'))


class SeededDataset(Dataset):
    """Dataset whose samples depend only on (seed, epoch, position), whichever process loads them.

    An index is either `(epoch, position)`, as yielded by `EpochSampler`, where positions beyond the length wrap around,
    or an integer below the length, which belongs to epoch 0.

    Args:
        opt: section of the option file; stored unchanged as `opt`, validated as `options`.
    Raises:
        OptionError: if a key is unknown or its value is invalid.
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
        """Return pair `number` as a sample, see `sample`."""
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
        if is_worker:  # workers already run in parallel; OpenCV threads would compete with them for the cores
            cv2.setNumThreads(0)
        try:
            return self.load(position % len(self), generator)
        except DataError as error:
            kind = WorkerDataError if is_worker else DataError
            raise kind(f'datasets.{self.options.phase}: {error}') from None

    collate = staticmethod(transforms.collate)

    def check_depth(self, image: np.ndarray, path: str | PurePath) -> np.ndarray:
        """Return `image` unchanged; raise DataError if it is an 8-bit image and `bit_depth` is 16."""
        if self.options.bit_depth == 16 and image.dtype == np.uint8:
            raise DataError(f'{path}: has 8 bits, bit_depth is 16: use 16-bit images, or set bit_depth to 8')
        return image

    def sample(self, lq: np.ndarray, gt: np.ndarray, lq_path: str | PurePath, gt_path: str | PurePath) -> dict:
        """Return the input of a model: tensors `lq` and `gt`, [C, H, W], and their paths.

        RGB [H, W, 3] is converted to gray if `in_chans` is 1. Images are float32 in [0, 1], as in BasicSR; with
        `keep_uint8`, 8-bit images stay uint8.
        """
        lq, gt = (
            transforms.to_tensor(transforms.to_channels(image, self.options.in_chans), self.options.keep_uint8)
            for image in (lq, gt)
        )
        return {'lq': lq, 'gt': gt, 'lq_path': str(lq_path), 'gt_path': str(gt_path)}


class PairsIoBackend(IoBackend):
    """Storage that pairs are read from, under BasicSR's key."""

    type: Literal['disk', 'lmdb'] = Field('disk', description='image files, or LMDBs in dataroot_lq and dataroot_gt')


class PairsOptions(SeededOptions):
    """Keys of PairsDataset."""

    io_backend: PairsIoBackend = Field(default_factory=PairsIoBackend, description='storage that images are read from')
    layout: str = Field('folders', description=f'directory layout of the dataset: {", ".join(LAYOUTS)}')
    dataroot: UserPath | None = Field(None, description='root of the dataset; not for layouts folders and manifest')
    dataroot_lq: UserPath | None = Field(None, description='layout folders: degraded images, or their LMDB')
    dataroot_gt: UserPath | None = Field(None, description='layout folders: clean images, or their LMDB')
    lq_template: str | None = Field(
        None, description="layout folders: names of degraded images, e.g. '{}_rain.png'; {} is the key of the pair"
    )
    gt_template: str | None = Field(
        None, description="layout folders: names of clean images, e.g. '{}_clean.png'; {} is the key of the pair"
    )
    split: str | None = Field(None, description='split of the dataset; default: train in training, test otherwise')
    list_file: str | None = Field(
        None, description='layout spad: list of pairs; default: real_world.txt for train, real_test_1000.txt for test'
    )
    manifest: UserPath | None = Field(None, description='layout manifest: file written by `basicsr data prepare`')

    def source(self) -> Source:
        """Return the keys that describe the location of the dataset."""
        return Source(**{key: getattr(self, key) for key in Source.__dataclass_fields__})

    @model_validator(mode='after')
    def _layout_takes_these_keys(self) -> PairsOptions:
        check_source(self.layout, self.source())
        if self.io_backend.type == 'lmdb' and (self.layout != 'folders' or self.lq_template or self.gt_template):
            raise ValueError(
                'io_backend lmdb takes two LMDBs, dataroot_lq and dataroot_gt; remove layout and the templates'
            )
        return self


class PairsDataset(SeededDataset):
    """Degraded/clean image pairs, matched by key, from files or, with `io_backend: {type: lmdb}`, from LMDBs.

    Training samples are random crops of `gt_size`, flipped and rotated at random. Otherwise samples are whole images
    or centre crops. Pairs are matched and checked for missing partners at construction; images are read on access.
    Samples are bit-identical from files, from an LMDB of PNG files and from an LMDB of raw pixels.

    Raises:
        DataError: if data is missing or incomplete; on access, if a file cannot be read or the sizes of a pair differ.
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
            # Raw pixels are views into the memory-mapped file and become invalid outside of this block.
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
    """Open two LMDBs and list their pairs in the order of meta_info.txt, under their original file names."""
    folders = source.dataroot_lq, source.dataroot_gt
    try:
        lq, gt = map(LmdbImages, folders)
        keys, gt_keys = ([entry.key for entry in read_meta_info(folder)] for folder in folders)
    except DataError as error:
        raise DataError(f'datasets.{source.phase}: {error}') from error
    if lq.folder.samefile(gt.folder):
        raise DataError(
            f'datasets.{source.phase}: dataroot_lq and dataroot_gt must be two LMDBs; both are {folders[0]}. Set them '
            f'to the LMDB of the degraded and that of the clean images'
        )
    unmatched = sorted(set(keys) ^ set(gt_keys))
    if unmatched or not keys:
        found = f'but only one has {shorten_list(unmatched)}' if unmatched else 'but have none'
        raise DataError(
            f'datasets.{source.phase}: {folders[0]} and {folders[1]} must have the same keys, {found}. '
            f'Use two LMDBs created together by `basicsr data lmdb`'
        )
    names = ((key, f'{decode_key(key)}.png') for key in keys)
    pairs = (Pair(key, f'{lq.folder}/{name}', f'{gt.folder}/{name}') for key, name in names)
    root = os.path.commonprefix([f'{lq.folder}/', f'{gt.folder}/'])  # noqa: RUF071 (a PairTable removes characters)
    return (lq, gt), PairTable(pairs, root)


class SyntheticPairsOptions(SeededOptions):
    """Keys of SyntheticPairsDataset."""

    source: Literal['packaged', 'folder'] = Field(
        'packaged', description='packaged: photos of scikit-image and scikit-learn; folder: photos in dataroot_gt'
    )
    dataroot_gt: UserPath | None = Field(None, description='source folder: folder of clean photos')
    split: Literal['train', 'val', 'all'] | None = Field(
        None, description='split of the photos; default: train in training, val otherwise, which are disjoint'
    )
    photos: list[str] | None = Field(None, min_length=1, description='names of photos to use instead of a split')
    num_per_photo: int = Field(1, ge=1, description='number of pairs per photo; in training, per photo and epoch')
    degradation: AnyParameters | Annotated[list[AnyParameters], Field(min_length=1)] = Field(
        default_factory=RainParameters,
        description='type and parameters of the degradation, or a list of them, one of which is applied to each pair',
    )
    clean_share: float = Field(0, ge=0, le=1, description='training: fraction of patches that are not degraded')
    shorter_side: Annotated[tuple[Side, Side], AfterValidator(check_order)] | None = Field(
        None, description='training: range of the shorter side in pixels to which larger photos are downscaled'
    )
    gamma: PositiveRange = Field(
        (1, 1), description='training: range of the exponent applied to the clean patch; above 1 darkens it'
    )
    rgb_permute: float = Field(
        0, ge=0, le=1, description='training: fraction of clean patches whose RGB channels are put in random order'
    )
    camera_share: float = Field(
        0,
        ge=0,
        le=1,
        description='training: fraction of pairs that get camera noise and 8-bit JPEG compression, both patches alike',
    )
    noise_range: Annotated[tuple[Level, Level], AfterValidator(check_order)] = Field(
        (0, 8), description='training: range of the standard deviation of this noise, relative to 255'
    )
    jpeg_range: Annotated[tuple[Quality, Quality], AfterValidator(check_order)] = Field(
        (50, 100), description='training: range of the JPEG quality of this compression'
    )

    @model_validator(mode='after')
    def _source_has_its_folder(self) -> SyntheticPairsOptions:
        if (self.source == 'folder') != (self.dataroot_gt is not None):
            raise ValueError('dataroot_gt, a folder of clean photos, must be set with source: folder, and only then')
        return self

    @model_validator(mode='after')
    def _patches_fit_downscaled_photos(self) -> SyntheticPairsOptions:
        if self.phase == 'train' and self.shorter_side and self.shorter_side[0] < self.gt_size:
            raise ValueError(
                f'shorter_side: {list(self.shorter_side)} is smaller than gt_size: {self.gt_size}; patches would be '
                f'padded by reflection. Set both values of shorter_side to at least {self.gt_size}'
            )
        return self


class SyntheticPairsDataset(SeededDataset):
    """Clean photos and their synthetically degraded versions.

    In training, each sample is a patch and a degradation drawn from (seed, epoch, position). The patch is flipped
    before it is degraded, so that rain always falls down. In validation, the degradation of a pair depends only on its
    number, so it is the same in every run and for every seed. From a list of degradations, each training patch draws
    one uniformly, and validation pairs cycle through the list.

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
            self.photos = folder_photos(options.dataroot_gt, options.phase, split, options.photos)
        self.degradations = options.degradation if isinstance(options.degradation, list) else [options.degradation]
        self._augmentation = Augmentation(*(getattr(options, key) for key in Augmentation._fields))
        self._cache: dict[Path, np.ndarray] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.photos) * self.options.num_per_photo

    def load(self, number: int, generator: np.random.Generator) -> dict[str, Any]:
        # Pairs of the same photo are `len(photos)` apart.
        options = self.options
        repeat, photo_number = divmod(number, len(self.photos))
        photo = self.photos[photo_number]
        image = self._read(photo)
        several = len(self.degradations)
        if self.is_train:
            if options.shorter_side:
                image = downscale(image, int(generator.integers(*options.shorter_side, endpoint=True)))
            parameters = self.degradations[generator.integers(several) if several > 1 else 0]
            degradation = DEGRADATIONS[parameters.type]
            lq, gt, _ = degraded_patch(image, options.gt_size, generator, degradation, parameters, self._augmentation)
        else:
            if options.center_crop:
                (image,) = transforms.center_crop([image], options.center_crop)
            gt = transforms.to_float(image)
            parameters = self.degradations[(photo_number + repeat) % several]
            lq, _ = DEGRADATIONS[parameters.type].apply(gt, np.random.default_rng(number), parameters)
        # Result images are named after lq_path, so each pair needs a unique name.
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
