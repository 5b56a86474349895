"""What our datasets share: checked options, and samples that depend on seed, epoch and position alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch.utils.data import Dataset, get_worker_info

from ast_plugin.data import transforms
from ast_plugin.errors import DataError, OptionError
from ast_plugin.faults import faults_of


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
        3,
        description='1: gray pairs, 0.299 R + 0.587 G + 0.114 B of colours; put in by the command for such a network',
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

    def __len__(self) -> int:
        raise NotImplementedError

    def load(self, number: int, generator: np.random.Generator) -> dict[str, Any]:
        """Return image `number` as a sample: see `sample`."""
        raise NotImplementedError

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        if isinstance(index, tuple):
            epoch, position = index
        elif -len(self) <= index < len(self):
            epoch, position = 0, index % len(self)
        else:
            raise IndexError(f'datasets.{self.options.phase} has {len(self)} images; got index {index}')
        generator = np.random.default_rng([self.options.seed, epoch, position])
        if get_worker_info() is None:
            return self.load(position % len(self), generator)
        # Workers are the parallelism: threads of OpenCV's on top of them would fight for the same cores.
        cv2.setNumThreads(0)
        try:
            return self.load(position % len(self), generator)
        except DataError as error:
            raise WorkerDataError(str(error)) from None

    collate = staticmethod(transforms.collate)

    def check_depth(self, image: np.ndarray, path: str | PurePath) -> np.ndarray:
        """Return an image; raise DataError if it has 8 bits where the run is to have 16."""
        if self.options.bit_depth == 16 and image.dtype == np.uint8:
            raise DataError(f'{path}: has 8 bits, bit_depth is 16: give images of 16 bits, or set bit_depth to 8')
        return image

    def sample(self, lq: np.ndarray, gt: np.ndarray, lq_path: str | PurePath, gt_path: str | PurePath) -> dict:
        """Return what models take: `lq`, `gt`, [C, H, W], and where they come from.

        RGB [H, W, 3] becomes gray where `in_chans` is 1.

        Images are float32 in [0, 1], as BasicSR's models want them; with `keep_uint8` those of 8 bits are uint8.
        """
        keep = self.options.keep_uint8
        lq, gt = (transforms.to_channels(image, self.options.in_chans) for image in (lq, gt))
        return {
            'lq': transforms.to_tensor(lq, keep),
            'gt': transforms.to_tensor(gt, keep),
            'lq_path': str(lq_path),
            'gt_path': str(gt_path),
        }
