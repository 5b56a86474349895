"""Find the splits of a dataset in a folder of unpacked downloads."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ast_plugin.data.image_files import count_reasons, why_no_image
from ast_plugin.data.layouts import (
    LAYOUTS,
    SPAD_LISTS,
    Layout,
    Place,
    Source,
    below_split,
    make_places,
    match_place,
    read_list,
    walk_folders,
)
from ast_plugin.data.matching import LEFT_OUT, DataFault, Pair, PairTable, shorten_list
from ast_plugin.errors import DataError, OptionError, did_you_mean
from ast_plugin.names import printable

_ARCHIVES = ('.zip', '.tar', '.gz', '.tgz', '.xz', '.bz2', '.rar', '.7z')

# Usual names of plain folders of pairs.
_PLAIN = 'lq gt, LQ GT, input target, input gt, input groundtruth, degraded clean, noisy clean, rainy clean, '
_PLAIN += 'rain norain, rain clean, hazy clear, hazy gt, hazy GT, data gt, low high, blur sharp, source target'


@dataclass(frozen=True)
class Split:
    """A part of a dataset that was found."""

    name: str  # train or test_a for example
    phase: str  # train or test
    pairs: PairTable  # those that have a partner
    faults: list[DataFault]  # what is wrong with the others
    where: Path  # the folder of the degraded images, or the list, for the user to see


def preparable() -> list[str]:
    """Return the names of the layouts that datasets are distributed in."""
    return [name for name in LAYOUTS if name != 'manifest']


def plain_layout(lq: str | None, gt: str | None, lq_template: str | None, gt_template: str | None) -> Layout:
    """Return the layout of two folders below a root, with usual names where none are given.

    Args:
        lq, gt: the folders, with `{split}` where each split has its own.
        lq_template, gt_template: how images are named in them.
    Raises:
        OptionError: if only one folder is given, or only one of them has `{split}`.
    """
    if (lq is None) != (gt is None) or ('{split}' in (lq or '')) != ('{split}' in (gt or '')):
        raise OptionError('--lq and --gt go together, and either both or none have {split} in them')
    names = ((lq, gt),) if lq and gt else below_split(*_PLAIN.split(', '))
    description = 'input/ and target/, lq/ and gt/ or such, in train/ and test/ or directly; --lq and --gt name others'
    if lq:
        description = f'{lq}/ and {gt}/, with partners of equal names or as --lq-template and --gt-template say'
    places = make_places(names, (lq_template or '{}', gt_template or '{}'))
    aliases = {'train': ('Train', 'training', '.'), 'test': ('Test', 'testing'), 'val': ('valid', 'validation')}
    title = 'A dataset of plain folders'
    return Layout(title, description, places, test_splits=('test', 'val'), aliases=aliases, has_scenes=True)


def find_splits(layout: str | Layout, source: Path, wanted: Sequence[str] = ()) -> list[Split]:
    """Find the splits of a dataset in a folder, or in folders inside it.

    Args:
        layout: a name of `preparable`, or a layout.
        source: the folder.
        wanted: splits to find, which then must be there; otherwise all that there are.
    Raises:
        DataError: if nothing is found, or more than can be told apart; the message tells what was expected.
        OptionError: if there is no such layout or split.
    """
    row = layout if isinstance(layout, Layout) else _find_layout(layout)
    known = row.train_splits + row.test_splits
    for name in wanted:
        if name not in known:
            raise OptionError(f'{row.title} has no split {name}{did_you_mean(name, known)} (it has {", ".join(known)})')
    if source.is_file():
        what = 'an archive: unpack it, and name the folder' if _is_archive(source.name) else 'a file: name the folder'
        raise DataError(f'{source} is {what} with the dataset')
    if not source.is_dir():
        raise DataError(f'{source}: there is no such folder; expected the folder of the dataset as it was unpacked')
    folders = list(walk_folders(source))
    splits, seen = [], set()
    for name in wanted or known:
        phase = 'train' if name in row.train_splits else 'test'
        split = _find_list(row, folders, name, phase)
        split = split or (row.has_scenes and _find_scenes(row, source, folders, name, phase, bool(wanted))) or None
        split = split or _find_place(row, source, folders, name, phase, bool(wanted))
        if split is None and wanted:
            raise _nothing_found(row, source, f'the split {name} of {row.title}')
        # The root itself may go for several splits; the first has it, unless numbers divide it.
        if split and (row.numbers or split.where not in seen):
            seen.add(split.where)
            splits.append(split)
    if not splits:
        raise _nothing_found(row, source, row.title)
    return splits


def _find_layout(layout: str) -> Layout:
    if layout not in preparable():
        names = preparable()
        raise OptionError(f'no layout {layout}{did_you_mean(layout, names)} (there are {", ".join(names)})')
    return plain_layout(None, None, None, None) if layout == 'folders' else LAYOUTS[layout]


def _find_list(row: Layout, folders: Sequence[tuple[int, Path]], name: str, phase: str) -> Split | None:
    """The split in a list file of SPAD's, as near to the top as there is one."""
    if 'list_file' not in row.may_have or name not in SPAD_LISTS:
        return None
    lists = [(depth, folder / SPAD_LISTS[name]) for depth, folder in folders]
    lists = [(depth, path) for depth, path in lists if path.is_file()]
    if not lists:
        return None
    path = _choose_only(row, name, [path for depth, path in lists if depth == lists[0][0]])
    pairs, faults = read_list(path, path.parent, phase)
    return Split(name, phase, pairs, faults, path)


def _find_place(
    row: Layout, source: Path, folders: Sequence[tuple[int, Path]], name: str, phase: str, is_wanted: bool
) -> Split | None:
    """The split in a pair of folders, as near to the top as there is one."""
    names = row.names(name)
    names += ('.',) if is_wanted and '.' not in names else ()
    candidates = [(depth, root, names) for depth, root in folders]
    if source.absolute().name in names:
        candidates.insert(0, (-1, source.absolute().parent, (source.absolute().name,)))
    others = {alias for other in row.train_splits + row.test_splits if other != name for alias in row.names(other)}
    hits: dict[Path, tuple[Path, Place, str]] = {}
    level = None
    for depth, root, known in candidates:
        if hits and depth > level:
            break
        for alias in known:
            if alias == '.' and (hits or not others.isdisjoint(root.parts[len(source.parts) :])):
                continue  # in the folder of another split
            # Folders that do not say the split are of the one whose folder they lie in, see `_find_scenes`.
            places = (place for place in row.places if place.has_split or alias == '.' or not row.has_scenes)
            place = next((place for place in places if place.fits(root, alias)), None)
            if place:
                level = depth
                hits[Path(os.path.normpath(place.folders(root, alias)[0]))] = root, place, alias
    if not hits:
        return None
    folder = _choose_only(row, name, list(hits))
    root, place, alias = hits[folder]
    pairs, faults = match_place(row, Source(phase, str(root), split=name), place, alias)
    return Split(name, phase, PairTable(pairs), _without_left_out(faults), folder)


def _without_left_out(faults: Sequence[DataFault]) -> list[DataFault]:
    return [fault for fault in faults if fault.kind != LEFT_OUT]  # `find_unused` knows more


def _find_scenes(
    row: Layout, source: Path, folders: Sequence[tuple[int, Path]], name: str, phase: str, is_wanted: bool
) -> Split | None:
    """The split in several pairs of folders, a scene each, in the split's folder or, of training, outside of others.

    Keys of pairs begin with their scene.
    """
    own = {alias for alias in row.names(name) if alias != '.'}
    others = {alias for other in row.train_splits + row.test_splits if other != name for alias in row.names(other)}
    inside, outside = [], []
    for _, root in folders:
        parts = set(root.relative_to(source).parts)
        place = next((place for place in row.places if place.fits(root, '.')), None)
        if place and parts & own:
            inside.append((root, place))
        elif place and not parts & others and ('.' in row.names(name) or is_wanted):
            outside.append((root, place))
    scenes = inside or outside
    if len(scenes) < 2 and (not inside or (inside[0][1].has_split and inside[0][0].name in own)):
        return None
    top = Path(os.path.commonpath([root for root, _ in scenes]))
    pairs, faults = [], []
    for root, place in scenes:
        found, wrong = match_place(row, Source(phase, str(root), split=name), place, '.')
        scene = root.relative_to(top).as_posix()
        pairs += [Pair(f'{scene}/{pair.key}'.removeprefix('./'), pair.lq, pair.gt) for pair in found]
        faults += wrong
    return Split(name, phase, PairTable(pairs), _without_left_out(faults), top)


def find_unused(source: Path, splits: Sequence[Split]) -> list[str]:
    """Return lines on the files of a dataset's folder that no split has, by folder and by reason."""
    known, others, lines = set(), Counter(), []
    for split in splits:
        known.update(hash(os.path.normpath(path)) for pair in split.pairs for path in (pair.lq, pair.gt))
        known.update(hash(os.path.normpath(fault.name)) for fault in split.faults)
        known.add(hash(os.path.normpath(split.where)))
    for _, folder in walk_folders(source):
        paths = [entry.path for entry in os.scandir(folder) if not entry.is_dir() or entry.name.startswith('.')]
        paths = [path for path in paths if hash(os.path.normpath(path)) not in known]
        reasons = [why_no_image(path) for path in paths]
        others.update(filter(None, reasons))
        if None in reasons:
            count = reasons.count(None)
            where = printable(os.path.relpath(folder, source))
            lines.append(f'left out: {where}: {count:,} image{"s" * (count > 1)} of no pair')
    more = [f'left out: images of no pair in {len(lines) - 10} more folders'] if len(lines) > 10 else []
    return lines[:10] + more + ([f'left out: {count_reasons(others)}'] if others else [])


def _choose_only(row: Layout, name: str, places: list[Path]) -> Path:
    if len(places) > 1:
        names = shorten_list(map(str, places))
        raise DataError(f'the split {name} of {row.title} may be in {names}. Name the folder of one of them')
    return places[0]


def _nothing_found(row: Layout, source: Path, what: str) -> DataError:
    """Return the error that nothing was found, with a list of the files that are there."""
    names = sorted(os.listdir(source))
    archives = [name for name in names if _is_archive(name)]
    remedy = f'Unpack {shorten_list(archives)} first' if archives else 'Name its folder, or another layout'
    present = f'{shorten_list(names, 8) or "nothing"}{_describe_unmatched(row, source)}'
    return DataError(f'{what} is not in {source}: expected {row.description}; there is {present}. {remedy}')


def _describe_unmatched(row: Layout, source: Path) -> str:
    """Name folders that are as expected, if no image in them has a partner."""
    for name in row.train_splits + row.test_splits:
        for alias in row.names(name):
            for place in row.places:
                lq_dir, gt_dir = place.folders(source, alias)
                if lq_dir != gt_dir and place.exists(source, alias):
                    lq, gt = (os.path.relpath(folder, source) for folder in (lq_dir, gt_dir))
                    return f', but no image of {lq} has a partner in {gt}'
    return ''


def _is_archive(name: str) -> bool:
    return name.lower().endswith(_ARCHIVES)
