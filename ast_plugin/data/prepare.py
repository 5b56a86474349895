"""Find the splits of an unpacked dataset, write their manifests for training, and describe them."""

from __future__ import annotations

import itertools
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import yaml
from tqdm import tqdm

from ast_plugin.data.checks import (
    CheckedSplit,
    Duplicates,
    Split,
    check_split,
    find_duplicates,
    find_leaks,
    read_findings,
)
from ast_plugin.data.image_files import count_reasons, why_no_image
from ast_plugin.data.layouts import (
    LAYOUTS,
    SPAD_LISTS,
    Layout,
    MatchResult,
    Place,
    Source,
    match_place,
    plain_layout,
    preparable,
    read_list,
)
from ast_plugin.data.manifest import Entry, Manifest, write_manifest
from ast_plugin.data.matching import LEFT_OUT, Pair, PairTable, is_image, list_others, shorten_list
from ast_plugin.errors import DataError, OptionError, did_you_mean
from ast_plugin.files import partials_of, replace_text
from ast_plugin.names import printable, to_columns

FAULTS = 'faults.txt'
_MAX_DEPTH = 6
_MAX_FOLDERS = 5000
_ARCHIVES = ('.zip', '.tar', '.gz', '.tgz', '.xz', '.bz2', '.rar', '.7z')
_OURS = '.prepared'  # marks folders that a later run may change
_NUM_SHOWN = 5  # faults shown per kind
_TRAITS = {
    'gray': 'in gray; read as RGB',
    'palette': 'with a palette; read as RGB',
    'transparency': 'with transparency, which is dropped',
    '16 bits': 'with 16 bits',
    'CMYK': 'in CMYK; converted to RGB',
}


def find_splits(layout: str | Layout, source: Path, wanted: Sequence[str] = ()) -> list[Split]:
    """Find the splits of a dataset in a folder or its subfolders.

    Args:
        layout: a layout, or its name as listed by `preparable`.
        source: the folder.
        wanted: names of required splits; by default, all existing splits are returned.
    Raises:
        DataError: if nothing is found, or the choice is ambiguous; the message states what was expected.
        OptionError: if the layout or split is unknown.
    """
    if isinstance(layout, str):
        names = preparable()
        if layout not in names:
            raise OptionError(f'unknown layout {layout}{did_you_mean(layout, names)} (available: {", ".join(names)})')
        layout = plain_layout() if layout == 'folders' else LAYOUTS[layout]
    for name in wanted:
        if name not in layout.splits:
            near, known = did_you_mean(name, layout.splits), ', '.join(layout.splits)
            raise OptionError(f'{layout.title} has no split {name}{near} (available: {known})')
    if source.is_file():
        what = 'an archive: unpack it and give' if _is_archive(source.name) else 'a file: give'
        raise DataError(f'{source} is {what} the folder of the dataset')
    if not source.is_dir():
        raise DataError(f'{source}: no such folder; expected the folder of the unpacked dataset')
    search = _Search(layout, source, bool(wanted))
    splits: dict[tuple[str, Path], Split] = {}
    for name in wanted or layout.splits:
        split = search.find(name)
        if split is None and wanted:
            raise _nothing_found(layout, source, f'the split {name} of {layout.title}')
        # The root may match several splits; the first one gets it, unless the pairs are split by number.
        if split:
            splits.setdefault((name if layout.numbers else '', split.where), split)
    if not splits:
        raise _nothing_found(layout, source, layout.title)
    return list(splits.values())


def find_unused(source: Path, splits: Sequence[Split]) -> list[str]:
    """Describe the files in the folder of a dataset that belong to no split, one line per folder or reason."""
    known, others, lines = set(), Counter(), []
    for split in splits:
        known.update(hash(os.path.normpath(path)) for pair in split.pairs for path in (pair.lq, pair.gt))
        known.update(hash(os.path.normpath(fault.name)) for fault in split.faults)
        known.add(hash(os.path.normpath(split.where)))
    for folder in itertools.chain(*_list_folders(source)):
        paths = [entry.path for entry in os.scandir(folder) if not entry.is_dir() or entry.name.startswith('.')]
        reasons = Counter(why_no_image(path) for path in paths if hash(os.path.normpath(path)) not in known)
        if count := reasons.pop(None, 0):
            where = printable(os.path.relpath(folder, source))
            lines.append(f'left out: {where}: {count:,} unpaired image{"s" * (count > 1)}')
        others += reasons
    more = [f'left out: unpaired images in {len(lines) - 10} more folders'] if len(lines) > 10 else []
    return lines[:10] + more + ([f'left out: {count_reasons(others)}'] if others else [])


class _Search:
    """Search for the splits of a dataset in a folder; `is_wanted` if the splits are requested by name."""

    def __init__(self, layout: Layout, source: Path, is_wanted: bool) -> None:
        self.layout, self.source, self.is_wanted = layout, source, is_wanted
        self.levels = _list_folders(source)

    def find(self, name: str) -> Split | None:
        """Return a split, or None if it does not exist."""
        return self._find_list(name) or self._find_scenes(name) or self._find_place(name)

    def _find_list(self, name: str) -> Split | None:
        """Return the split in one of SPAD's list files, the one closest to the root."""
        if 'list_file' not in self.layout.may_have or name not in SPAD_LISTS:
            return None
        phase = self.layout.phase(name)
        for level in self.levels:
            if lists := [path for folder in level if (path := folder / SPAD_LISTS[name]).is_file()]:
                path = self._choose_only(name, lists)
                return Split(name, phase, *read_list(path, path.parent, phase), path)
        return None

    def _find_scenes(self, name: str) -> Split | None:
        """Return the split as several pairs of folders, one per scene, prefixing keys with the scene.

        Scenes are searched in the folder of the split or, for the training split, outside those of other splits.
        """
        if not self.layout.has_scenes:
            return None
        own = {alias for alias in self.layout.names(name) if alias != '.'}
        others = self._names_of_others(name)
        inside, outside = [], []
        for root in itertools.chain(*self.levels):
            parts = set(root.relative_to(self.source).parts)
            place = next((place for place in self.layout.places if place.rank(root, '.') == 2), None)
            if place and parts & own:
                inside.append((root, place))
            elif place and not parts & others and ('.' in self.layout.names(name) or self.is_wanted):
                outside.append((root, place))
        scenes = inside or outside
        if len(scenes) < 2 and (not inside or (inside[0][1].has_split and inside[0][0].name in own)):
            return None
        top = Path(os.path.commonpath([root for root, _ in scenes]))
        pairs, faults = [], []
        for root, place in scenes:
            found, wrong = self._match(name, root, place, '.')
            scene = root.relative_to(top).as_posix()
            pairs += [Pair(f'{scene}/{pair.key}'.removeprefix('./'), pair.lq, pair.gt) for pair in found]
            faults += wrong
        return Split(name, self.layout.phase(name), PairTable(pairs), faults, top)

    def _find_place(self, name: str) -> Split | None:
        """Return the split in a pair of folders, the one closest to the root."""
        names = self.layout.names(name)
        names += ('.',) if self.is_wanted and '.' not in names else ()
        levels = [list(itertools.product(level, names)) for level in self.levels]
        source = self.source.absolute()
        if source.name in names:
            levels.insert(0, [(source.parent, source.name)])
        others = self._names_of_others(name)
        for level in levels:
            hits: dict[Path, tuple[Path, Place, str]] = {}
            for root, alias in level:
                if alias == '.' and (hits or not others.isdisjoint(root.parts[len(self.source.parts) :])):
                    continue  # in the folder of another split
                # Folders without a split in their names belong to the split of an outer folder, see `_find_scenes`.
                places = (p for p in self.layout.places if p.has_split or alias == '.' or not self.layout.has_scenes)
                if place := next((place for place in places if place.rank(root, alias) == 2), None):
                    hits[Path(os.path.normpath(place.folders(root, alias)[0]))] = root, place, alias
            if hits:
                folder = self._choose_only(name, list(hits))
                pairs, faults = self._match(name, *hits[folder])
                return Split(name, self.layout.phase(name), PairTable(pairs), faults, folder)
        return None

    def _match(self, name: str, root: Path, place: Place, alias: str) -> MatchResult:
        source = Source(self.layout.phase(name), str(root), split=name)
        pairs, faults = match_place(self.layout, source, place, alias)
        return pairs, [fault for fault in faults if fault.kind != LEFT_OUT]  # `find_unused` reports more

    def _names_of_others(self, name: str) -> set[str]:
        """Return the possible folder names of all other splits."""
        return {alias for other in self.layout.splits if other != name for alias in self.layout.names(other)}

    def _choose_only(self, name: str, places: list[Path]) -> Path:
        if len(places) > 1:
            names = shorten_list(map(str, places))
            raise DataError(
                f'the split {name} of {self.layout.title} may be in {names}. Give the folder of one of them'
            )
        return places[0]


def _list_folders(folder: Path) -> list[list[Path]]:
    """Return `folder` and its subfolders by depth, each once; links are followed."""
    levels, seen = [[folder]], {os.path.realpath(folder)}
    for _ in range(_MAX_DEPTH):
        below = []
        for current in levels[-1]:
            try:
                names = sorted(name for name in os.listdir(current) if name[0] != '.')
            except OSError as error:
                raise DataError(
                    f'{current}: this folder cannot be read: {error.strerror}. Make it readable, or move it out of '
                    f'the dataset'
                ) from error
            for path in (current / name for name in names):
                if os.path.isdir(path) and (place := os.path.realpath(path)) not in seen:
                    seen.add(place)
                    below.append(path)
            if len(seen) > _MAX_FOLDERS:
                raise DataError(f'{folder} has more than {_MAX_FOLDERS} subfolders; give the folder of one dataset')
        levels.append(below)
    return levels


def _nothing_found(layout: Layout, source: Path, what: str) -> DataError:
    """Return the error for a dataset or split that was not found, listing the existing files."""
    names = sorted(os.listdir(source))
    archives = [name for name in names if _is_archive(name)]
    remedy = f'Unpack {shorten_list(archives)} first' if archives else 'Give its folder, or another layout'
    present = f'{shorten_list(names, 8) or "nothing"}{_describe_unmatched(layout, source)}'
    return DataError(f'{what} was not found in {source}: expected {layout.description}; got {present}. {remedy}')


def _describe_unmatched(layout: Layout, source: Path) -> str:
    """Name two folders that match the layout, but whose images have no partners."""
    for alias, place in itertools.product(itertools.chain(*map(layout.names, layout.splits)), layout.places):
        lq_dir, gt_dir = place.folders(source, alias)
        if lq_dir != gt_dir and place.rank(source, alias):
            lq, gt = (os.path.relpath(folder, source) for folder in (lq_dir, gt_dir))
            return f', but no image of {lq} has a partner in {gt}'
    return ''


def _is_archive(name: str) -> bool:
    return name.lower().endswith(_ARCHIVES)


class Preparation:
    """A dataset being prepared into a folder.

    The folder never looks complete before it is: manifests of an earlier run are removed first, and new ones are
    written last and atomically. Until then, results are kept in hidden journals.

    Args:
        splits: splits of the dataset.
        source: folder of the dataset; never written to.
        target: folder to prepare into; created if missing.
    Raises:
        DataError: if the target cannot be written, or is inside the dataset.
    """

    def __init__(self, splits: Sequence[Split], source: Path, target: Path) -> None:
        self.splits, self.source, self.target = splits, source, target
        self.checked: list[CheckedSplit] = []
        self.leaks: list[Duplicates] = []  # test images that are also training images
        if target.resolve().is_relative_to(source.resolve()):
            raise DataError(f'{target} is inside the dataset {source}, which must not change; choose another folder')
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f'{target}: this folder cannot be created: {error.strerror or error}') from error

    @property
    def num_faults(self) -> int:
        """Number of faults of all splits."""
        return sum(len(checked.faults) for checked in self.checked)

    def check(self, workers: int, on_pair: Callable[[], None] = int) -> None:
        """Read all images, except those already checked by an interrupted or failed run."""
        self.checked = [check_split(split, self._journal(split), workers, on_pair) for split in self.splits]
        self.leaks = find_leaks(self.checked)

    def list_faults(self) -> Path:
        """Write all faults to a file, one per line, and return its path."""
        path = self.target / FAULTS
        rows = [(one.split.name, fault.kind, fault.name, fault.text) for one in self.checked for fault in one.faults]
        rows += [
            (leak.second, f'also in {leak.first}', tested, trained)
            for leak in self.leaks
            for trained, tested in leak.examples
        ]
        with replace_text(path) as file:
            file.writelines('\t'.join(map(printable, row)) + '\n' for row in rows)
        return path

    def write(self, layout: str, place: str | None, on_pair: Callable[[], None] = int) -> list[Path]:
        """Write the manifests, and copies of or links to the good pairs if requested.

        Args:
            layout: name of the layout in the manifests.
            place: `copy` or `link` to create folders of equal names in the target; None to leave images in place.
            on_pair: called after each pair copied or linked.
        Returns:
            The manifests; a split without good pairs has none.
        Raises:
            DataError: if the disk is full or a file cannot be written; manifests written until then are complete.
        """
        paths = {split.name: self.target / f'{split.name}.jsonl' for split in self.splits}
        for path in [*paths.values(), self.target / FAULTS]:
            for old in (path, *partials_of(path)):
                _remove(old)
        good = [checked for checked in self.checked if checked.good]
        for checked in good:
            split, others = checked.split, []
            if place:
                root = self._place(checked, place, on_pair)
                names = _name_copies(checked)
            else:
                folders = {os.path.dirname(path) for pair in split.pairs for path in (pair.lq, pair.gt)}
                root = Path(os.path.commonpath([os.path.abspath(folder) for folder in folders]))
                names = ((pair.key, _below(pair.lq, root), _below(pair.gt, root)) for pair in checked.good_pairs())
                paths_of_good = (path for pair in checked.good_pairs() for path in (pair.lq, pair.gt))
                others = [_below(path, root) for path in list_others(paths_of_good)]
            entries = (
                Entry(*name, lq.size, (lq.num_bytes, gt.num_bytes), (lq.digest, gt.digest))
                for name, (lq, gt) in zip(names, read_findings(self._journal(split)), strict=True)
            )
            path, num_pairs = paths[split.name], len(checked.good)
            write_manifest(Manifest(path, layout, split.phase, root, num_pairs, tuple(others)), entries)
        for split in self.splits:
            self._journal(split).unlink()
        return [paths[checked.split.name] for checked in good]

    def _journal(self, split: Split) -> Path:
        return self.target / f'.{split.name}.checked'

    def _place(self, checked: CheckedSplit, how: str, on_pair: Callable[[], None]) -> Path:
        """Copy or link the good pairs to `SPLIT/lq` and `SPLIT/gt`, under equal names except for extensions."""
        folder, unfinished = self.target / checked.split.name, self.target / f'.{checked.split.name}.part'
        try:
            if folder.exists():
                # Only folders of an earlier run may be reused, as their unneeded files are removed.
                if not (folder / _OURS).is_file():
                    raise DataError(
                        f'{folder} exists and is not from an earlier run; move it, or choose another folder'
                    )
                if unfinished.exists():
                    shutil.rmtree(unfinished)
                os.replace(folder, unfinished)
            for side in ('lq', 'gt'):
                (unfinished / side).mkdir(parents=True, exist_ok=True)
            (unfinished / _OURS).touch()
            wanted: set[int] = set()
            copies: dict[int, Path] = {}
            for pair, (_, *names) in zip(checked.good_pairs(), _name_copies(checked), strict=True):
                for path, name in zip((pair.lq, pair.gt), names, strict=True):
                    # RESIDE has up to 35 degraded images per clean one, which is stored once.
                    first = copies.setdefault(hash(path), unfinished / name)
                    _put(path, unfinished / name, how, first)
                    wanted.add(hash(name))
                on_pair()
            for side in ('lq', 'gt'):  # remove files of an earlier run that are no longer needed
                for name in os.listdir(unfinished / side):
                    if hash(f'{side}/{name}') not in wanted:
                        (unfinished / side / name).unlink()
            os.replace(unfinished, folder)
        except OSError as error:
            raise DataError(
                f'cannot {how} to {error.filename2 or error.filename or unfinished}: {error.strerror or error}. '
                f'Free some space or choose another folder, and run the command again: it resumes where it stopped'
            ) from error
        return folder.resolve()


def format_table(prepared: Preparation) -> list[str]:
    """Return a table with one line per split."""
    rows = [('split', 'pairs', 'faulty', 'width x height', 'files', 'from')]
    for checked in prepared.checked:
        counts = f'{checked.num_pairs:,}', f'{len(checked.faults):,}'
        size = tqdm.format_sizeof(checked.num_bytes, 'B')
        where = _shorten(str(checked.split.where), prepared.source)
        rows.append((checked.split.name, *counts, _format_sizes(checked.sizes), size, where))
    return to_columns(rows, '<>><><')


def format_notes(prepared: Preparation) -> list[str]:
    """Return notes on properties that are not faults but worth knowing."""
    lines = []
    for checked in prepared.checked:
        name = checked.split.name
        for trait, count in sorted(checked.traits.items()):
            lines.append(f'{name}: {_count(count, "image")} {_TRAITS.get(trait, f"{trait}; read by content")}')
        repeats = find_duplicates(checked, checked, 'degraded')  # clean images may have several degraded ones
        if repeats.num:
            examples = [f'{Path(one).name} = {Path(other).name}' for one, other in repeats.examples]
            more = ' ...' if repeats.num > len(examples) else ''
            count = _count(repeats.num, 'degraded image')
            lines.append(f'{name}: {count} repeated: {", ".join(examples)}{more}')
        if num_unchanged := sum(lq == gt for lq, gt in zip(*checked.digests, strict=True)):
            lines.append(f'{name}: {_count(num_unchanged, "pair")} with equal degraded and clean images')
        if (num_clean := len(set(checked.digests[1]))) < len(checked.good):
            lines.append(f'{name}: {len(checked.good):,} degraded images of {_count(num_clean, "clean image")}')
    return lines


def format_faults(prepared: Preparation) -> list[str]:
    """Describe the faults by kind, with the first few of each."""
    lines = []
    for checked in prepared.checked:
        by_kind = defaultdict(list)
        for fault in checked.faults:
            by_kind[fault.kind].append(f'{fault.name}: {fault.text}')
        for kind, texts in sorted(by_kind.items()):
            lines.append(f'{checked.split.name}: {len(texts):,} x {kind}')
            lines += _first(texts[:_NUM_SHOWN], len(texts), prepared.source)
    return lines


def format_leaks(prepared: Preparation) -> list[str]:
    """Describe the test images that are also training images."""
    lines = []
    for leak in prepared.leaks:
        verb = 'is' if leak.num == 1 else 'are'
        lines.append(f'{leak.second}: {_count(leak.num, f"{leak.kind} image")} {verb} also in {leak.first}')
        lines += _first([f'{tested} = {trained}' for trained, tested in leak.examples], leak.num, prepared.source)
    return lines


def format_options(manifests: Iterable[tuple[str, Path]]) -> list[str]:
    """Return the section of an option file for manifests given by phase and path."""
    sections, others = {}, []
    for phase, path in manifests:
        if phase == 'train' and 'train' in sections:
            others.append(f'# or, in train, manifest: {path}')
            continue
        count = len(sections.keys() - {'train'})
        key = 'train' if phase == 'train' else f'val_{count + 1}' if count else 'val'
        # The name must be valid in names of result files.
        name = f'{printable(path.parent.name)[:80]}_{path.stem}'.replace('\\', '_').lstrip('._ ')
        sections[key] = {'name': name, 'type': 'PairsDataset', 'layout': 'manifest', 'manifest': str(path)}
    text = yaml.safe_dump({'datasets': sections}, sort_keys=False, allow_unicode=True, width=10**6)
    return text.splitlines() + others


def _put(path: str, target: Path, how: str, first: Path) -> None:
    """Copy or link a file unless it exists; if `first` is an earlier copy of it, make a hard link to that."""
    if how == 'link':
        target.unlink(missing_ok=True)
        target.symlink_to(os.path.relpath(os.path.realpath(path), os.path.realpath(target.parent)))
        return
    stat = os.stat(path)
    if target.is_symlink():
        target.unlink()
    elif target.exists() and (target.stat().st_size, target.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns):
        return
    partial = target.with_name('.part')
    partial.unlink(missing_ok=True)
    with suppress(OSError):  # some file systems have no hard links or limit their number
        if first != target:
            os.link(first, partial)
    if not partial.exists():
        shutil.copyfile(path, partial)
        os.utime(partial, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(partial, target)


def _name_copies(checked: CheckedSplit) -> Iterator[tuple[str, str, str]]:
    """Yield the new key of each good pair and the names of its degraded and clean copies.

    Names derive from the keys without folders and are unique even on case-insensitive file systems.
    """
    taken: set[int] = set()
    for pair in checked.good_pairs():
        stem = pair.key.replace('/', '_')
        stem = os.path.splitext(stem)[0] if is_image(stem) else stem
        name, count = stem, 1
        while hash(name.casefold()) in taken:
            count += 1
            name = f'{stem}_{count}'
        taken.add(hash(name.casefold()))
        lq_end, gt_end = (os.path.splitext(path)[1].lower() for path in (pair.lq, pair.gt))
        yield name, f'lq/{name}{lq_end}', f'gt/{name}{gt_end}'


def _below(path: str, root: Path) -> str:
    name = path.removeprefix(f'{root}/')
    return name if name != path else Path(os.path.relpath(os.path.abspath(path), root)).as_posix()


def _remove(path: Path) -> None:
    """Remove a manifest or fault list of an earlier run, but no other file of that name."""
    try:
        if not path.is_file():
            return
        with open(path, 'rb') as file:
            start = file.read(16)
        if path.suffix == '.jsonl' and not start.startswith(b'{"manifest"'):
            raise DataError(f'{path} exists and is not a manifest; move it, or choose another folder')
        path.unlink()
    except OSError as error:
        raise DataError(f'{path}: cannot be removed from an earlier run: {error.strerror or error}') from error


def _format_sizes(sizes: Counter) -> str:
    common = [f'{width}x{height} ({count:,})' for (height, width), count in sizes.most_common(2)]
    if len(sizes) <= 2:
        return ', '.join(common) if len(sizes) == 2 else common[0].partition(' ')[0] if common else '-'
    heights, widths = zip(*sizes, strict=True)
    return f'{min(widths)}x{min(heights)} to {max(widths)}x{max(heights)}, mostly {common[0]}'


def _shorten(text: str, source: Path) -> str:
    """Remove the folder of the dataset, which is printed above, and make undecodable names printable."""
    return printable(text.replace(f'{source}/', ''))


def _first(texts: Sequence[str], num: int, source: Path) -> list[str]:
    more = [f'  and {num - len(texts):,} more'] if num > len(texts) else []
    return [f'  {_shorten(text, source)}' for text in texts] + more


def _count(number: int, noun: str) -> str:
    return f'{number:,} {noun}{"s" if number != 1 else ""}'
