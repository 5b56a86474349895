"""Pairs of folders below a root, and where below a folder of downloads such a root is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ast_plugin.data.matching import Template, list_images
from ast_plugin.errors import DataError

_DEPTH = 6
_MAX_FOLDERS = 5000


@dataclass(frozen=True)
class Place:
    """Two folders below a root and how images are named in them; `{split}` stands for the split.

    Attributes:
        lq_dir, gt_dir: of the degraded and of the clean images.
        lq_template, gt_template: how they are named, see `Template`.
        deep: whether they may lie in folders one level deeper.
    """

    lq_dir: str
    gt_dir: str
    lq_template: str = '{}'
    gt_template: str = '{}'
    deep: bool = False

    @property
    def has_split(self) -> bool:
        """Whether each split has folders of its own."""
        return '{split}' in self.lq_dir

    def folders(self, root: Path, split: str) -> tuple[Path, Path]:
        """Return the folders of `split` below `root`."""
        return root / self.lq_dir.replace('{split}', split), root / self.gt_dir.replace('{split}', split)

    def exists(self, root: Path, split: str) -> bool:
        """Tell whether both folders are there; one for both must hold a degraded image, as any folder might be it."""
        lq_dir, gt_dir = self.folders(root, split)
        if lq_dir == gt_dir:
            return bool(_keys(lq_dir, self.lq_template, self.deep))
        return _is_folder(lq_dir) and _is_folder(gt_dir)

    def fits(self, root: Path, split: str) -> bool:
        """Tell whether both folders are there and at least one image has its partner."""
        lq_dir, gt_dir = self.folders(root, split)
        if not (_is_folder(lq_dir) and _is_folder(gt_dir)):
            return False
        if (lq_dir, self.lq_template) == (gt_dir, self.gt_template):
            return False  # each image would be its own partner
        lq_keys = _keys(lq_dir, self.lq_template, self.deep)
        return bool(lq_keys) and not lq_keys.isdisjoint(_keys(gt_dir, self.gt_template, self.deep))


def make_places(names: Sequence[tuple[str, str]], *templates: tuple[str, str], deep: bool = False) -> tuple[Place, ...]:
    """Return each pair of folders with each pair of templates; equal names where no template is given."""
    return tuple(Place(*folders, *template, deep) for folders in names for template in templates or (('{}', '{}'),))


def choose_place(places: Sequence[Place], root: Path, splits: Sequence[str]) -> tuple[Place, str] | None:
    """Return the first place, and the first of the names of a split, that fits below `root`; None if none does.

    Without one that fits, the last whose folders are there, so that what is said is about them.
    """
    present = [(place, split) for split in splits for place in places if place.exists(root, split)]
    return next((found for found in present if found[0].fits(root, found[1])), present[-1] if present else None)


def search_roots(folder: Path) -> Iterator[tuple[int, Path]]:
    """Walk the folders in `folder`, itself first, each once, level by level: yields depth and folder.

    Links to folders are followed, loops of links are not.

    Raises:
        DataError: if a folder cannot be read, or there are so many that this is no dataset.
    """
    level, seen = [folder], set()
    for depth in range(_DEPTH + 1):
        below = []
        for current in level:
            stat = _stat(current)
            if stat is None or (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            if len(seen) > _MAX_FOLDERS:
                raise DataError(f'{folder} has more than {_MAX_FOLDERS} folders in it; name the folder of one dataset')
            yield depth, current
            below += _inner_folders(current)
        level = below


def _inner_folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.name[0] != '.' and _entry_is_folder(entry))
    except OSError as error:
        raise DataError(
            f'{folder}: this folder cannot be read: {error.strerror}. Make it readable, or move it out of the dataset'
        ) from error


def _entry_is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _keys(folder: Path, template: str, deep: bool) -> set[str]:
    try:
        return set(Template(template).keys(list_images(folder, '', deep)))
    except DataError:
        return set()
