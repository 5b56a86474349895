"""Clean photos to synthesise pairs from: those that come inside installed packages, or any folder."""

from __future__ import annotations

import importlib.util
import inspect
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from ast_plugin.data import transforms
from ast_plugin.data.degraded_patches import degraded_patch
from ast_plugin.data.image_files import read_image, read_rgb
from ast_plugin.data.matching import list_images
from ast_plugin.degradations.degradations import DEGRADATIONS, Degradation
from ast_plugin.errors import DataError, did_you_mean


@dataclass(frozen=True)
class Photo:
    """A photo: what it is called in options and results, and its file."""

    name: str
    path: Path


@dataclass(frozen=True)
class _Packaged:
    name: str
    package: str
    file: str  # below the package's folder
    split: str


# Colour photos of scenes, each scene in one split only. What else these packages hold is gray, drawn, seen
# through a microscope or a telescope, or a retina, and would teach a network little about photos.
_PACKAGED = (
    _Packaged('astronaut', 'skimage', 'data/astronaut.png', 'train'),
    _Packaged('coffee', 'skimage', 'data/coffee.png', 'train'),
    _Packaged('rocket', 'skimage', 'data/rocket.jpg', 'train'),
    _Packaged('motorcycle_left', 'skimage', 'data/motorcycle_left.png', 'train'),
    _Packaged('motorcycle_right', 'skimage', 'data/motorcycle_right.png', 'train'),
    _Packaged('flower', 'sklearn', 'datasets/images/flower.jpg', 'train'),
    _Packaged('chelsea', 'skimage', 'data/chelsea.png', 'val'),
    _Packaged('china', 'sklearn', 'datasets/images/china.jpg', 'val'),
)

_VAL_SHARE = 5  # one photo of a folder in so many is kept for validation


def packaged_photos(split: str = 'all', names: list[str] | None = None) -> list[Photo]:
    """List the photos inside scikit-image and scikit-learn, without importing or downloading anything.

    Args:
        split: `train`, `val` or `all`; the split of a photo never changes.
        names: those wanted, instead of a split.
    Raises:
        DataError: if a package or one of its files is missing, or a name is none of these photos.
    """
    rows = _PACKAGED
    if names is not None:
        rows = tuple(_chosen(name, {row.name: row for row in rows}, 'the packaged photos') for name in names)
    elif split != 'all':
        rows = tuple(row for row in rows if row.split == split)
    return [Photo(row.name, _package_file(row.package, row.file)) for row in rows]


def folder_photos(folder: str | Path, phase: str, split: str = 'all', names: list[str] | None = None) -> list[Photo]:
    """List the photos of a folder.

    Args:
        folder: where they lie; folders in it are not searched.
        phase: whose they are, for messages.
        split: `train`, `val` or `all`. One in five is for validation; the name alone decides which.
        names: those wanted, by name with or without extension, instead of a split.
    Raises:
        DataError: if the folder is missing or has no photo in that split, or a name is not in it.
    """
    photos = [Photo(Path(name).stem, Path(folder) / name) for name in list_images(folder, phase)]
    if names is not None:
        by_name = {photo.name: photo for photo in photos} | {photo.path.name: photo for photo in photos}
        return [_chosen(name, by_name, str(folder)) for name in names]
    if split == 'all':
        return photos
    wanted = [photo for photo in photos if (zlib.crc32(photo.name.encode()) % _VAL_SHARE == 0) == (split == 'val')]
    if not wanted:
        raise DataError(
            f'datasets.{phase}: none of the {len(photos)} photos in {folder} falls into the split {split!r}, '
            f'which their names decide. Name some with `photos: [...]`, or take another folder with `split: all`'
        )
    return wanted


def _chosen(name: str, known: dict, where: str):
    if name not in known:
        raise DataError(f'there is no photo {name!r} in {where}{did_you_mean(name, known)}')
    return known[name]


def _package_file(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        missing = package if path is None else f'{path.name} of {package}'
        raise DataError(
            f'the packaged photos need {missing}, which is not installed: pip install "ast_plugin[photos]", '
            f'or name a folder of photos with `source: folder` and `dataroot_gt`'
        )
    return path


@dataclass(frozen=True)
class Recipe:
    """How pairs are made.

    Attributes:
        task: a name of `DEGRADATIONS`.
        parameters: its ranges.
        seed: of the whole run.
        count: pairs of each photo.
        size: side of square patches in pixels, or None for whole photos.
    """

    task: str
    parameters: BaseModel
    seed: int = 0
    count: int = 1
    size: int | None = None

    @property
    def degradation(self) -> Degradation:
        """The row of the task."""
        return DEGRADATIONS[self.task]


@dataclass(frozen=True)
class SynthesizedPair:
    """A pair as it is written: RGB [H, W, 3] in the depth of the photo, uint8 or uint16; the mask [H, W] uint8."""

    name: str
    lq: np.ndarray
    gt: np.ndarray
    mask: np.ndarray | None

    @property
    def psnr(self) -> float:
        """Decibels of the degraded image against the clean one; infinite where they are the same."""
        full = np.iinfo(self.gt.dtype).max
        error = np.mean((self.lq.astype(np.float64) - self.gt) ** 2) / full**2
        return float('inf') if error == 0 else float(-10 * np.log10(error))


def make_pairs(name: str, path: Path, recipe: Recipe, depth_path: Path | None = None) -> Iterator[SynthesizedPair]:
    """Make the pairs of one photo.

    Args:
        name: what its pairs are called: `name_1`, `name_2` and so on; with the seed it decides what is drawn.
        path: the photo.
        recipe: what to make.
        depth_path: a map of distances, see `read_depth`.
    Raises:
        DataError: if a file cannot be read, or the photo is smaller than the patches.
    """
    image = read_rgb(path)
    height, width = image.shape[:2]
    if recipe.size is not None and recipe.size > min(height, width):
        raise DataError(
            f'{path}: has {width}x{height} pixels, fewer than a patch of {recipe.size}; leave it out, or ask for less'
        )
    depth = None if depth_path is None else read_depth(depth_path, (height, width))
    digits = len(str(recipe.count))
    for number in range(1, recipe.count + 1):
        generator = np.random.default_rng([recipe.seed, zlib.crc32(name.encode()), number])
        yield _make_pair(f'{name}_{number:0{digits}}', image, recipe, generator, depth)


def _make_pair(
    name: str, image: np.ndarray, recipe: Recipe, generator: np.random.Generator, depth: np.ndarray | None
) -> SynthesizedPair:
    if recipe.size is None:
        clean = transforms.to_float(image)
        options = {} if depth is None else {'depth': depth}
        degraded, mask = recipe.degradation.apply(clean, generator, recipe.parameters, **options)
    else:
        degraded, clean, mask = degraded_patch(
            image, recipe.size, generator, recipe.degradation, recipe.parameters, depth=depth
        )
    return SynthesizedPair(
        name,
        _to_integers(degraded, image.dtype),
        _to_integers(clean, image.dtype),
        None if mask is None else _to_integers(mask, np.dtype(np.uint8)),
    )


def _to_integers(image: np.ndarray, dtype: np.dtype) -> np.ndarray:
    # In float64: float32 would miss some of the values of 16 bits.
    return np.rint(image.astype(np.float64) * np.iinfo(dtype).max).astype(dtype)


def takes_depth(task: str) -> bool:
    """Tell whether a degradation is another one with a map of distances."""
    return 'depth' in inspect.signature(DEGRADATIONS[task].apply).parameters


def read_depth(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Read a map of distances in any unit: .npy, .npz with one array, or a gray image of 8 or 16 bits, 0 is unknown.

    Returns:
        [H, W] float32, NaN where unknown.
    Raises:
        DataError: if it cannot be read or is not of `shape`.
    """
    if path.suffix.lower() in ('.npy', '.npz'):
        depth = _load_array(path)
    else:
        color = read_image(path).color
        if color.ndim != 2:
            raise DataError(f'{path}: a map of distances is gray or an array in .npy or .npz; this image has colours')
        depth = np.where(color == 0, np.float32('nan'), color.astype(np.float32))
    if depth.shape != shape:
        raise DataError(f'{path}: a map of distances has the size of its photo, {shape}; this has {depth.shape}')
    return depth.astype(np.float32)


def _load_array(path: Path) -> np.ndarray:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            if len(loaded.files) != 1:
                raise DataError(f'{path}: expected one array, got {len(loaded.files)}: {", ".join(loaded.files[:3])}')
            loaded = loaded[loaded.files[0]]
    except (OSError, ValueError, EOFError, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f'{path}: cannot be read as an array: {error}') from error
    if loaded.ndim != 2 or loaded.dtype.kind not in 'fiu':
        raise DataError(f'{path}: expected an array of numbers [H, W]; got {loaded.dtype} {list(loaded.shape)}')
    return loaded
