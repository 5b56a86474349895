"""Clean photographs to synthesise pairs from: those that come inside installed packages, or any folder."""

from __future__ import annotations

import importlib.util
import zlib
from dataclasses import dataclass
from pathlib import Path

from ast_plugin.data.matching import list_images
from ast_plugin.errors import DataError, did_you_mean


@dataclass(frozen=True)
class Photo:
    """A photograph: what it is called in options and results, and its file."""

    name: str
    path: Path


@dataclass(frozen=True)
class _Packaged:
    name: str
    package: str
    file: str  # below the package's folder
    split: str


# Colour photographs of scenes, each scene in one split only. What else these packages hold is gray, drawn, seen
# through a microscope or a telescope, or a retina, and would teach a network little about photographs.
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

_VAL_SHARE = 5  # one photograph of a folder in so many is kept for validation


def packaged_photos(split: str = 'all', names: list[str] | None = None) -> list[Photo]:
    """List the photographs inside scikit-image and scikit-learn, without importing or downloading anything.

    Args:
        split: `train`, `val` or `all`; the split of a photograph never changes.
        names: those wanted, instead of a split.
    Raises:
        DataError: if a package or one of its files is missing, or a name is none of these photographs.
    """
    rows = _PACKAGED
    if names is not None:
        rows = tuple(_chosen(name, {row.name: row for row in rows}, 'the packaged photographs') for name in names)
    elif split != 'all':
        rows = tuple(row for row in rows if row.split == split)
    return [Photo(row.name, _package_file(row.package, row.file)) for row in rows]


def folder_photos(folder: str | Path, phase: str, split: str = 'all', names: list[str] | None = None) -> list[Photo]:
    """List the photographs of a folder.

    Args:
        folder: where they lie; folders in it are not searched.
        phase: whose they are, for messages.
        split: `train`, `val` or `all`. One in five is for validation; the name alone decides which.
        names: those wanted, by name with or without extension, instead of a split.
    Raises:
        DataError: if the folder is missing or has no photograph in that split, or a name is not in it.
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
            f'datasets.{phase}: none of the {len(photos)} photographs in {folder} falls into the split {split!r}, '
            f'which their names decide. Name some with `photos: [...]`, or take another folder with `split: all`'
        )
    return wanted


def _chosen(name: str, known: dict, where: str):
    if name not in known:
        raise DataError(f'there is no photograph {name!r} in {where}{did_you_mean(name, known)}')
    return known[name]


def _package_file(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        missing = package if path is None else f'{path.name} of {package}'
        raise DataError(
            f'the packaged photographs need {missing}, which is not installed: pip install "ast_plugin[photos]", '
            f'or name a folder of photographs with `source: folder` and `dataroot_gt`'
        )
    return path
