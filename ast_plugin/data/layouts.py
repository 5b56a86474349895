"""How datasets lie on disk: a row for each layout, and what to say when a dataset is not there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ast_plugin.data.list_files import read_list
from ast_plugin.data.matching import Pair, Template, is_image, match_folders, some
from ast_plugin.errors import DataError, OptionError
from ast_plugin.suggest import did_you_mean


@dataclass(frozen=True)
class Source:
    """Where the options say that pairs are; the keys of PairsDataset."""

    phase: str = 'train'
    dataroot: str | None = None
    dataroot_lq: str | None = None
    dataroot_gt: str | None = None
    lq_template: str | None = None
    gt_template: str | None = None
    split: str | None = None
    list_file: str | None = None


@dataclass(frozen=True)
class Place:
    """Two folders below a root and how images are named in them; `{split}` stands for the split."""

    lq_dir: str
    gt_dir: str
    lq_template: str = '{}'
    gt_template: str = '{}'

    def folders(self, root: Path, split: str) -> tuple[Path, Path]:
        """Return the folders of `split` below `root`."""
        return root / self.lq_dir.replace('{split}', split), root / self.gt_dir.replace('{split}', split)

    def exists(self, root: Path, split: str) -> bool:
        """Tell whether both folders are there; one for both must hold a degraded image, as any folder might be it."""
        lq_dir, gt_dir = self.folders(root, split)
        if lq_dir == gt_dir:
            return _has_image(lq_dir, self.lq_template)
        return lq_dir.is_dir() and gt_dir.is_dir()

    def fits(self, root: Path, split: str) -> bool:
        """Tell whether both folders are there, each with an image that is named as expected."""
        lq_dir, gt_dir = self.folders(root, split)
        return _has_image(lq_dir, self.lq_template) and _has_image(gt_dir, self.gt_template)


def _has_image(folder: Path, template: str) -> bool:
    return folder.is_dir() and any(is_image(name) and Template(template).key(name) for name in os.listdir(folder))


@dataclass(frozen=True)
class Layout:
    """How a dataset lies on disk.

    Attributes:
        title: what the dataset is called.
        description: what is expected where below `dataroot`, in a line.
        find: lists the pairs.
        needs, may_have: names of the options in `Source` that the layout reads.
        splits: what `split` is if not given, in training and otherwise. `.` stands for the root itself.
        places: folders to look in; the first that fits is taken.
        numbers: where a split is no folder, the numbers of its pairs.
    """

    title: str
    description: str
    find: Callable[[Layout, Source], list[Pair]]
    needs: tuple[str, ...] = ('dataroot',)
    may_have: tuple[str, ...] = ('split',)
    splits: tuple[str, str] = ('train', 'test')
    places: tuple[Place, ...] = ()
    numbers: Mapping[str, range] = field(default_factory=dict)

    def split(self, source: Source) -> str:
        """Return the split that is asked for."""
        return source.split or self.splits[source.phase != 'train']


def list_pairs(layout: str, source: Source) -> list[Pair]:
    """List the pairs of a dataset.

    Raises:
        OptionError: if the layout is unknown, or an option is missing or means nothing to it.
        DataError: if the data is not there or not whole; the message names phase, folder and files.
    """
    check_source(layout, source)
    row = LAYOUTS[layout]
    return row.find(row, source)


def check_source(layout: str, source: Source) -> None:
    """Raise OptionError if `source` lacks a key of the layout or has one that means nothing to it."""
    if layout not in LAYOUTS:
        raise OptionError(f'no layout {layout!r}{did_you_mean(layout, LAYOUTS)}; there are {", ".join(LAYOUTS)}')
    row = LAYOUTS[layout]
    given = {key for key, value in vars(source).items() if value is not None and key != 'phase'}
    missing = [key for key in row.needs if key not in given]
    useless = sorted(given - {*row.needs, *row.may_have})
    if missing or useless:
        what = [f'needs {" and ".join(missing)}'] if missing else []
        what += [f'does not use {", ".join(useless)}'] if useless else []
        raise OptionError(f'layout {layout} {", and ".join(what)}; it takes {", ".join(row.needs + row.may_have)}')


def _find_folders(layout: Layout, source: Source) -> list[Pair]:
    """Two folders named one by one."""
    for key, title in (('dataroot_lq', 'The folder of degraded images'), ('dataroot_gt', 'The folder of clean images')):
        folder = Path(getattr(source, key))
        if not folder.is_dir():
            raise _not_there(title, folder, 'there is no such folder', f'datasets.{source.phase}.{key}', layout)
    lq_template, gt_template = source.lq_template or '{}', source.gt_template or '{}'
    return match_folders(source.phase, source.dataroot_lq, source.dataroot_gt, lq_template, gt_template)


def _find_places(layout: Layout, source: Source) -> list[Pair]:
    """The first of the layout's places that is there, its numbers kept to the split."""
    root, split = Path(source.dataroot), layout.split(source)
    present = [place for place in layout.places if place.exists(root, split)]
    if not present:
        raise _root_lacks(layout, source, _missing_folder(layout, root, split))
    place = next((place for place in present if place.fits(root, split)), present[-1])
    pairs = match_folders(source.phase, *place.folders(root, split), place.lq_template, place.gt_template)
    if layout.numbers and '{split}' not in place.lq_dir:
        return _numbered(layout, source, pairs)
    return pairs


def _missing_folder(layout: Layout, root: Path, split: str) -> str:
    """Name the folder whose partner is there, or else the first that was looked for."""
    missing = layout.places[0].folders(root, split)[0]
    for place in layout.places:
        lonely = [folder for folder in place.folders(root, split) if not folder.is_dir()]
        if len(lonely) == 1:
            missing = lonely[0]
            break
    return f'{missing.relative_to(root).as_posix()}/'


def _numbered(layout: Layout, source: Source, pairs: list[Pair]) -> list[Pair]:
    """Keep the pairs whose numbers belong to the split."""
    split = layout.split(source)
    where = f'datasets.{source.phase}'
    if split not in layout.numbers:
        raise OptionError(f'{where}.split: {layout.title} has {", ".join(layout.numbers)}; got {split!r}')
    odd = [pair.lq for pair in pairs if not pair.key.isdecimal()]
    if odd:
        raise DataError(f'{where}: pairs of {layout.title} are numbered, not so: {some(odd)}. Rename or move them')
    wanted = layout.numbers[split]
    chosen = [pair for pair in pairs if int(pair.key) in wanted]
    if not chosen:
        raise DataError(
            f'{where}: {source.dataroot} has no pair of the split {split!r} of {layout.title}, '
            f'numbers {wanted[0]} to {wanted[-1]}; it has {some(pair.key for pair in pairs)}. Add them, or set split'
        )
    return chosen


_SPAD_LISTS = {'train': 'real_world.txt', 'test': 'real_test_1000.txt'}


def _find_listed(layout: Layout, source: Source) -> list[Pair]:
    """The pairs of SPAD's list files, or of another list."""
    root, split = Path(source.dataroot), layout.split(source)
    if source.list_file is None and split not in _SPAD_LISTS:
        raise OptionError(
            f'datasets.{source.phase}.split: {layout.title} has {", ".join(_SPAD_LISTS)}; got {split!r}. '
            f'For another list set list_file'
        )
    name = source.list_file or _SPAD_LISTS[split]
    if not (root / name).is_file():
        raise _root_lacks(layout, source, name)
    return read_list(root / name, root, source.phase)


def _root_lacks(layout: Layout, source: Source, what: str) -> DataError:
    """Return the error that `what` is missing below dataroot."""
    root = Path(source.dataroot)
    fault = f'{what} is missing' if root.is_dir() else f'there is no such folder, and so no {what}'
    return _not_there(layout.title, root, fault, f'datasets.{source.phase}.dataroot', layout)


def _not_there(title: str, folder: Path, fault: str, key: str, layout: Layout) -> DataError:
    """Return an error of three lines, each of which stands alone."""
    return DataError(
        f'{title} is not at {folder}: {fault} ({key}).\n'
        f'Put it there ({layout.description}), or set {key} to where it is.\n'
        f'To try without it: basicsr train -opt AST_quickstart'
    )


def _places(names: tuple[tuple[str, str], ...], *templates: tuple[str, str]) -> tuple[Place, ...]:
    return tuple(Place(*folders, *template) for folders in names for template in templates or (('{}', '{}'),))


LAYOUTS = {
    'folders': Layout(
        'A pair of folders',
        'degraded images in dataroot_lq, clean ones of the same names, or as the templates say, in dataroot_gt',
        _find_folders,
        needs=('dataroot_lq', 'dataroot_gt'),
        may_have=('lq_template', 'gt_template'),
    ),
    'spad': Layout(
        'SPAD',
        'real_world.txt for training, real_test_1000.txt for testing, '
        'with lines "/dir/lq.png /dir_gt/gt.png", and the folders that they name',
        _find_listed,
        may_have=('split', 'list_file'),
    ),
    'agan': Layout(
        'AGAN-Data',
        'train/, test_a/ and test_b/, each with data/12_rain.png and gt/12_clean.png',
        _find_places,
        splits=('train', 'test_a'),
        places=_places((('{split}/data', '{split}/gt'),), ('{}_rain', '{}_clean')),
    ),
    'densehaze': Layout(
        'Dense-Haze',
        'input/ and gt/ with 01.png to 55.png, or hazy/01_hazy.png and GT/01_GT.png, or all in one folder; '
        '1 to 50 are for training, 51 to 55 for testing',
        _find_places,
        places=(
            *_places((('{split}/input', '{split}/gt'), ('input', 'gt')), ('{}_hazy', '{}_GT'), ('{}', '{}')),
            *_places((('{split}/hazy', '{split}/GT'), ('hazy', 'GT'), ('.', '.')), ('{}_hazy', '{}_GT')),
        ),
        numbers={'train': range(1, 51), 'test': range(51, 56)},
    ),
    'snow100k': Layout(
        'Snow100K',
        'train/ and test/, each with synthetic/ and gt/ of the same names; split names other folders than these',
        _find_places,
        places=_places((('{split}/synthetic', '{split}/gt'),)),
    ),
    'istd': Layout(
        'ISTD',
        'train/train_A/ with shadows and train/train_C/ without, of the same names, and test/ likewise',
        _find_places,
        places=_places((('{split}/{split}_A', '{split}/{split}_C'), ('{split}_A', '{split}_C'))),
    ),
    'srd': Layout(
        'SRD',
        'train/shadow/1.jpg and train/shadow_free/1_no_shadow.jpg, or train_A/ and train_C/, and test likewise',
        _find_places,
        places=_places(
            (
                ('{split}/shadow', '{split}/shadow_free'),
                ('{split}/{split}_A', '{split}/{split}_C'),
                ('{split}_A', '{split}_C'),
            ),
            ('{}', '{}_no_shadow'),
            ('{}', '{}'),
        ),
    ),
    'moire': Layout(
        'TIP-2018',
        'trainData/source/1_source.png and trainData/target/1_target.png, and testData/ likewise; '
        'or train/ and test/, or both kinds in one folder',
        _find_places,
        places=_places(
            (
                ('{split}Data/source', '{split}Data/target'),
                ('{split}/source', '{split}/target'),
                ('{split}Data', '{split}Data'),
                ('{split}', '{split}'),
            ),
            ('{}_source', '{}_target'),
        ),
    ),
}
"""Every layout by the name that the option `layout` calls it."""
