"""Find the splits of a dataset as it was unpacked, turn them into manifests to train from, and describe them."""

from __future__ import annotations

import itertools
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import yaml
from tqdm import tqdm

from ast_plugin.data.checks import CheckedSplit, Duplicates, Journal, Split, find_duplicates, find_leaks
from ast_plugin.data.image_files import count_reasons, why_no_image
from ast_plugin.data.layouts import (
    LAYOUTS,
    SPAD_LISTS,
    Found,
    Layout,
    Place,
    Source,
    match_place,
    plain_layout,
    preparable,
    read_list,
)
from ast_plugin.data.manifest import Entry, write_manifest
from ast_plugin.data.matching import LEFT_OUT, Pair, PairTable, is_image, list_others, shorten_list
from ast_plugin.errors import DataError, OptionError, did_you_mean
from ast_plugin.files import lock_folder, partials_of, replace_text
from ast_plugin.names import printable, to_columns

FAULTS = 'faults.txt'
_MAX_DEPTH = 6
_MAX_FOLDERS = 5000
_ARCHIVES = ('.zip', '.tar', '.gz', '.tgz', '.xz', '.bz2', '.rar', '.7z')
_OURS = '.prepared'  # marks folders that may be changed by the next run
_NUM_SHOWN = 5  # faults of a kind
_TRAITS = {
    'gray': 'in gray; read as RGB',
    'palette': 'with a palette; read as RGB',
    'transparency': 'with transparency; it is dropped',
    '16 bits': 'of 16 bits',
    'CMYK': 'in CMYK; converted to RGB',
}


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
    if isinstance(layout, str):
        names = preparable()
        if layout not in names:
            raise OptionError(f'no layout {layout}{did_you_mean(layout, names)} (there are {", ".join(names)})')
        layout = plain_layout() if layout == 'folders' else LAYOUTS[layout]
    for name in wanted:
        if name not in layout.splits:
            near, known = did_you_mean(name, layout.splits), ', '.join(layout.splits)
            raise OptionError(f'{layout.title} has no split {name}{near} (it has {known})')
    if source.is_file():
        what = 'an archive: unpack it, and name the folder' if _is_archive(source.name) else 'a file: name the folder'
        raise DataError(f'{source} is {what} with the dataset')
    if not source.is_dir():
        raise DataError(f'{source}: there is no such folder; expected the folder of the dataset as it was unpacked')
    search = _Search(layout, source, bool(wanted))
    splits: dict[tuple[str, Path], Split] = {}
    for name in wanted or layout.splits:
        split = search.find(name)
        if split is None and wanted:
            raise _nothing_found(layout, source, f'the split {name} of {layout.title}')
        # The root itself may go for several splits; the first has it, unless numbers divide it.
        if split:
            splits.setdefault((name if layout.numbers else '', split.where), split)
    if not splits:
        raise _nothing_found(layout, source, layout.title)
    return list(splits.values())


def find_unused(source: Path, splits: Sequence[Split]) -> list[str]:
    """Return lines on the files of a dataset's folder that no split has, by folder and by reason."""
    known, others, lines = set(), Counter(), []
    for split in splits:
        known.update(hash(os.path.normpath(path)) for pair in split.pairs for path in (pair.lq, pair.gt))
        known.update(hash(os.path.normpath(fault.name)) for fault in split.faults)
        known.add(hash(os.path.normpath(split.where)))
    for _, folder in _walk_folders(source):
        paths = [entry.path for entry in os.scandir(folder) if not entry.is_dir() or entry.name.startswith('.')]
        reasons = Counter(why_no_image(path) for path in paths if hash(os.path.normpath(path)) not in known)
        if count := reasons.pop(None, 0):
            where = printable(os.path.relpath(folder, source))
            lines.append(f'left out: {where}: {count:,} image{"s" * (count > 1)} of no pair')
        others += reasons
    more = [f'left out: images of no pair in {len(lines) - 10} more folders'] if len(lines) > 10 else []
    return lines[:10] + more + ([f'left out: {count_reasons(others)}'] if others else [])


class _Search:
    """Where the splits of a dataset lie in a folder; `is_wanted` if each is asked for by name."""

    def __init__(self, layout: Layout, source: Path, is_wanted: bool) -> None:
        self.layout, self.source, self.is_wanted = layout, source, is_wanted
        self.folders = list(_walk_folders(source))  # with their depths

    def find(self, name: str) -> Split | None:
        """Return a split, or None if it is not there."""
        return self._find_list(name) or self._find_scenes(name) or self._find_place(name)

    def _find_list(self, name: str) -> Split | None:
        """The split in a list file of SPAD's, as near to the top as there is one."""
        if 'list_file' not in self.layout.may_have or name not in SPAD_LISTS:
            return None
        lists = [(depth, folder / SPAD_LISTS[name]) for depth, folder in self.folders]
        lists = [(depth, path) for depth, path in lists if path.is_file()]
        if not lists:
            return None
        path = self._choose_only(name, [path for depth, path in lists if depth == lists[0][0]])
        phase = self.layout.phase(name)
        return Split(name, phase, *read_list(path, path.parent, phase), path)

    def _find_scenes(self, name: str) -> Split | None:
        """The split in several pairs of folders, a scene each, in its folder or, of training, outside of others.

        Keys of pairs begin with their scene.
        """
        if not self.layout.has_scenes:
            return None
        own = {alias for alias in self.layout.names(name) if alias != '.'}
        others = self._names_of_others(name)
        inside, outside = [], []
        for _, root in self.folders:
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
        """The split in a pair of folders, as near to the top as there is one."""
        names = self.layout.names(name)
        names += ('.',) if self.is_wanted and '.' not in names else ()
        candidates = [(depth, root, names) for depth, root in self.folders]
        source = self.source.absolute()
        if source.name in names:
            candidates.insert(0, (-1, source.parent, (source.name,)))
        others = self._names_of_others(name)
        hits: dict[Path, tuple[Path, Place, str]] = {}
        level = None
        for depth, root, known in candidates:
            if hits and depth > level:
                break
            for alias in known:
                if alias == '.' and (hits or not others.isdisjoint(root.parts[len(self.source.parts) :])):
                    continue  # in the folder of another split
                # Folders that do not say the split are of the one whose folder they lie in, see `_find_scenes`.
                places = (p for p in self.layout.places if p.has_split or alias == '.' or not self.layout.has_scenes)
                place = next((place for place in places if place.rank(root, alias) == 2), None)
                if place:
                    level = depth
                    hits[Path(os.path.normpath(place.folders(root, alias)[0]))] = root, place, alias
        if not hits:
            return None
        folder = self._choose_only(name, list(hits))
        pairs, faults = self._match(name, *hits[folder])
        return Split(name, self.layout.phase(name), PairTable(pairs), faults, folder)

    def _match(self, name: str, root: Path, place: Place, alias: str) -> Found:
        source = Source(self.layout.phase(name), str(root), split=name)
        pairs, faults = match_place(self.layout, source, place, alias)
        return pairs, [fault for fault in faults if fault.kind != LEFT_OUT]  # `find_unused` knows more

    def _names_of_others(self, name: str) -> set[str]:
        """Names that the folders of other splits may have."""
        return {alias for other in self.layout.splits if other != name for alias in self.layout.names(other)}

    def _choose_only(self, name: str, places: list[Path]) -> Path:
        if len(places) > 1:
            names = shorten_list(map(str, places))
            raise DataError(
                f'the split {name} of {self.layout.title} may be in {names}. Name the folder of one of them'
            )
        return places[0]


def _walk_folders(folder: Path) -> Iterator[tuple[int, Path]]:
    """Walk the folders in `folder`, itself first, each once, level by level: yields depth and folder.

    Links to folders are followed, loops of links are not.

    Raises:
        DataError: if a folder cannot be read, or there are so many that this is no dataset.
    """
    level, seen = [folder], set()
    for depth in range(_MAX_DEPTH + 1):
        below = []
        for current in level:
            place = os.path.realpath(current)
            if place in seen:
                continue
            seen.add(place)
            if len(seen) > _MAX_FOLDERS:
                raise DataError(f'{folder} has more than {_MAX_FOLDERS} folders in it; name the folder of one dataset')
            yield depth, current
            try:
                names = sorted(name for name in os.listdir(current) if name[0] != '.')
            except OSError as error:
                raise DataError(
                    f'{current}: this folder cannot be read: {error.strerror}. Make it readable, or move it out of '
                    f'the dataset'
                ) from error
            below += [current / name for name in names if os.path.isdir(current / name)]
        level = below


def _nothing_found(layout: Layout, source: Path, what: str) -> DataError:
    """Return the error that nothing was found, with a list of the files that are there."""
    names = sorted(os.listdir(source))
    archives = [name for name in names if _is_archive(name)]
    remedy = f'Unpack {shorten_list(archives)} first' if archives else 'Name its folder, or another layout'
    present = f'{shorten_list(names, 8) or "nothing"}{_describe_unmatched(layout, source)}'
    return DataError(f'{what} is not in {source}: expected {layout.description}; there is {present}. {remedy}')


def _describe_unmatched(layout: Layout, source: Path) -> str:
    """Name folders that are as expected, if no image in them has a partner."""
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

    Nothing in the folder looks finished before it is: manifests are written last, whole or not at all, and those of an
    earlier run are taken away first. Findings are kept in hidden journals until then.

    Args:
        splits: of the dataset.
        source: the dataset's folder, which is never written to.
        target: the folder to prepare into, made where it is not there.
    Raises:
        DataError: if the target cannot be written, or lies in the dataset.
    """

    def __init__(self, splits: Sequence[Split], source: Path, target: Path) -> None:
        self.splits, self.source, self.target = splits, source, target
        self.checked: list[CheckedSplit] = []
        self.leaks: list[Duplicates] = []  # images to be tested with that are trained on
        if target.resolve().is_relative_to(source.resolve()):
            raise DataError(f'{target} lies in the dataset {source}, which is left as it is; name a folder elsewhere')
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f'{target}: this folder cannot be made: {error.strerror or error}') from error

    def lock(self) -> AbstractContextManager:
        """Keep other runs from preparing into the folder meanwhile; see `lock_folder`."""
        return lock_folder(self.target, 'another run is preparing there')

    @property
    def num_faults(self) -> int:
        """The number of faults of all splits."""
        return sum(len(checked.faults) for checked in self.checked)

    def check(self, workers: int, on_pair: Callable[[], None] = int) -> None:
        """Read all images but those that a run checked that was killed or refused."""
        self.checked = [self._journal(split).check(split, workers, on_pair) for split in self.splits]
        self.leaks = find_leaks(self.checked)

    def list_faults(self) -> Path:
        """Write all faults to a file, a line each, and return its path."""
        path = self.target / FAULTS
        rows = [(one.split.name, fault.kind, fault.name, fault.text) for one in self.checked for fault in one.faults]
        rows += [
            (leak.second, f'in {leak.first}, too', tested, trained)
            for leak in self.leaks
            for trained, tested in leak.examples
        ]
        with replace_text(path) as file:
            file.writelines('\t'.join(map(printable, row)) + '\n' for row in rows)
        return path

    def write(self, layout: str, place: str | None, on_pair: Callable[[], None] = int) -> list[Path]:
        """Write the manifests of what was checked, and copies or links of the good pairs where wanted.

        Args:
            layout: name of the layout in the manifests.
            place: `copy` or `link` to make folders of equal names in the target; None to leave images where they are.
            on_pair: called after each pair that was copied or linked.
        Returns:
            The manifests; a split without any good pair gets none.
        Raises:
            DataError: if the disk is full or a file cannot be written; manifests that are there then are whole.
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
                for name, (lq, gt) in zip(names, self._journal(split).findings(), strict=True)
            )
            counts = {'pairs': len(checked.good), 'others': others}
            write_manifest(paths[split.name], entries, layout=layout, phase=split.phase, root=root, **counts)
        for split in self.splits:
            self._journal(split).path.unlink()
        return [paths[checked.split.name] for checked in good]

    def _journal(self, split: Split) -> Journal:
        return Journal(self.target / f'.{split.name}.checked')

    def _place(self, checked: CheckedSplit, how: str, on_pair: Callable[[], None]) -> Path:
        """Copy or link the good pairs to `SPLIT/lq` and `SPLIT/gt`, under equal names where endings allow."""
        folder, unfinished = self.target / checked.split.name, self.target / f'.{checked.split.name}.part'
        try:
            if folder.exists():
                # Never with another: files that are not needed are removed.
                if not (folder / _OURS).is_file():
                    raise DataError(
                        f'{folder} is there already, and not from an earlier run; move it, or name another folder'
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
                    # RESIDE has up to 35 degraded images to a clean one, which is kept once.
                    first = copies.setdefault(hash(path), unfinished / name)
                    _put(path, unfinished / name, how, first)
                    wanted.add(hash(name))
                on_pair()
            for side in ('lq', 'gt'):  # files of an earlier run that this one does without
                for name in os.listdir(unfinished / side):
                    if hash(f'{side}/{name}') not in wanted:
                        (unfinished / side / name).unlink()
            os.replace(unfinished, folder)
        except OSError as error:
            raise DataError(
                f'cannot {how} to {error.filename2 or error.filename or unfinished}: {error.strerror or error}. '
                f'Make room or choose another folder, and run the command again: it goes on where it stopped'
            ) from error
        return folder.resolve()


def format_table(prepared: Preparation) -> list[str]:
    """Return a table with a line for each split."""
    rows = [('split', 'pairs', 'faulty', 'width x height', 'files', 'from')]
    for checked in prepared.checked:
        counts = f'{checked.num_pairs:,}', f'{len(checked.faults):,}'
        size = tqdm.format_sizeof(checked.num_bytes, 'B')
        where = _shorten(str(checked.split.where), prepared.source)
        rows.append((checked.split.name, *counts, _format_sizes(checked.sizes), size, where))
    return to_columns(rows, '<>><><')


def format_notes(prepared: Preparation) -> list[str]:
    """Return lines on what is no fault, but good to know."""
    lines = []
    for checked in prepared.checked:
        name = checked.split.name
        for trait, count in sorted(checked.traits.items()):
            lines.append(f'{name}: {_count(count, "image")} {_TRAITS.get(trait, f"{trait}; read by content")}')
        repeats = find_duplicates(checked, checked, 'degraded')  # clean ones may well have many degraded ones
        if repeats.num:
            examples = [f'{Path(one).name} = {Path(other).name}' for one, other in repeats.examples]
            more = ' ...' if repeats.num > len(examples) else ''
            count = _count(repeats.num, 'degraded image')
            lines.append(f'{name}: {count} more than once: {", ".join(examples)}{more}')
        if checked.num_unchanged:
            lines.append(f'{name}: in {_count(checked.num_unchanged, "pair")} the degraded image is the clean one')
        if checked.num_clean < len(checked.good):
            clean = _count(checked.num_clean, 'clean one')
            lines.append(f'{name}: {len(checked.good):,} degraded images of {clean}')
    return lines


def format_faults(prepared: Preparation) -> list[str]:
    """Return lines on the faults, by kind, with the first few of each."""
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
    """Return lines on images to be tested with that are trained on."""
    lines = []
    for leak in prepared.leaks:
        verb = 'is' if leak.num == 1 else 'are'
        lines.append(f'{leak.second}: {_count(leak.num, f"{leak.kind} image")} {verb} in {leak.first}, too')
        lines += _first([f'{tested} = {trained}' for trained, tested in leak.examples], leak.num, prepared.source)
    return lines


def format_options(manifests: Iterable[tuple[str, Path]]) -> list[str]:
    """Return the part of an option file that uses manifests, given by phase and path."""
    sections, others = {}, []
    for phase, path in manifests:
        if phase == 'train' and 'train' in sections:
            others.append(f'# or, in train, manifest: {path}')
            continue
        count = len(sections.keys() - {'train'})
        key = 'train' if phase == 'train' else f'val_{count + 1}' if count else 'val'
        # A name that files of results can have.
        name = f'{printable(path.parent.name)[:80]}_{path.stem}'.replace('\\', '_').lstrip('._ ')
        sections[key] = {'name': name, 'type': 'PairsDataset', 'layout': 'manifest', 'manifest': str(path)}
    text = yaml.safe_dump({'datasets': sections}, sort_keys=False, allow_unicode=True, width=10**6)
    return text.splitlines() + others


def _put(path: str, target: Path, how: str, first: Path) -> None:
    """Copy or link a file, unless it is there already; of a file that has a copy `first`, give that another name."""
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
    with suppress(OSError):  # not all file systems have links, and some files too many names
        if first != target:
            os.link(first, partial)
    if not partial.exists():
        shutil.copyfile(path, partial)
        os.utime(partial, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(partial, target)


def _name_copies(checked: CheckedSplit) -> Iterator[tuple[str, str, str]]:
    """Name pairs and copies by the keys without folders, distinct also where capitals are not told from small letters.

    Yields the new key, and the names of the degraded and the clean image.
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
    """Remove a manifest or list of an earlier run, and no file that only has its name."""
    try:
        if not path.is_file():
            return
        with open(path, 'rb') as file:
            start = file.read(16)
        if path.suffix == '.jsonl' and not start.startswith(b'{"manifest"'):
            raise DataError(f'{path} is there already, and no manifest; move it, or name another folder')
        path.unlink()
    except OSError as error:
        raise DataError(f'{path}: of an earlier run, and cannot be removed: {error.strerror or error}') from error


def _format_sizes(sizes: Counter) -> str:
    common = [f'{width}x{height} ({count:,})' for (height, width), count in sizes.most_common(2)]
    if len(sizes) <= 2:
        return ', '.join(common) if len(sizes) == 2 else common[0].partition(' ')[0] if common else '-'
    heights, widths = zip(*sizes, strict=True)
    return f'{min(widths)}x{min(heights)} to {max(widths)}x{max(heights)}, mostly {common[0]}'


def _shorten(text: str, source: Path) -> str:
    """Leave out the folder of the dataset, which is printed above; show names that are no text all the same."""
    return printable(text.replace(f'{source}/', ''))


def _first(texts: Sequence[str], num: int, source: Path) -> list[str]:
    more = [f'  and {num - len(texts):,} more'] if num > len(texts) else []
    return [f'  {_shorten(text, source)}' for text in texts] + more


def _count(number: int, noun: str) -> str:
    return f'{number:,} {noun}{"s" if number != 1 else ""}'
