"""Turn a dataset as it was unpacked into manifests to train from, and tell what was found in it."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ast_plugin.data.manifest import Entry, write_manifest
from ast_plugin.data.matching import Fault, Pair, is_image, list_images, printable
from ast_plugin.data.prepare.checks import Duplicates, Journal, SplitFindings, find_leaks, find_repeats
from ast_plugin.data.prepare.splits import Split
from ast_plugin.errors import DataError
from ast_plugin.files import lock_folder, partials_of, replace_text

FAULTS = 'faults.txt'
_OURS = '.prepared'  # marks folders that may be changed by the next run
_NUM_SHOWN = 5  # faults of a kind
_TRAITS = {
    'gray': 'in gray; read as RGB',
    'palette': 'with a palette; read as RGB',
    'transparency': 'with transparency; it is dropped',
    '16 bits': 'of 16 bits',
    'CMYK': 'in CMYK; converted to RGB',
}


@dataclass(frozen=True)
class Checks:
    """What checking a dataset came to.

    Attributes:
        splits: the splits.
        findings: on each of them.
        leaks: images to be tested with that are trained on.
    """

    splits: Sequence[Split]
    findings: Sequence[SplitFindings]
    leaks: Sequence[Duplicates]

    def faults(self, number: int) -> list[Fault]:
        """Return what is wrong with split `number`: with files that have no partner, then with pairs."""
        return [*self.splits[number].faults, *self.findings[number].faults]

    @property
    def num_faults(self) -> int:
        """How many faults there are in all."""
        return sum(len(self.faults(number)) for number in range(len(self.splits)))


class Preparation:
    """A dataset being prepared into a folder.

    Nothing in the folder looks finished before it is: manifests are written last, whole or not at all, and those of an
    earlier run are taken away first. What was checked is kept in hidden journals until then.

    Args:
        splits: what to prepare.
        target: the folder, made where it is not there.
        source: where the dataset is, which is never written to.
    Raises:
        DataError: if the target cannot be written, or lies in the dataset.
    """

    def __init__(self, splits: Sequence[Split], source: Path, target: Path) -> None:
        self.splits, self.source, self.target = splits, source, target
        inside = [target.resolve(), *target.resolve().parents]
        if source.resolve() in inside:
            raise DataError(f'{target} lies in the dataset {source}, which is left as it is; name a folder elsewhere')
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f'{target}: this folder cannot be made: {error.strerror or error}') from error

    def alone(self) -> AbstractContextManager[None]:
        """Keep other runs from preparing into the folder meanwhile; see `lock_folder`."""
        return lock_folder(self.target, 'another run is preparing there')

    def check(self, workers: int, on_pair: Callable[[], None] = int) -> Checks:
        """Read all images; what is known from a run that was killed or refused is believed.

        Args:
            workers: processes to read with.
            on_pair: called after each pair.
        Raises:
            DataError: if the folder cannot be written to.
        """
        found = [self._journal(split).check(split.pairs, workers, on_pair) for split in self.splits]
        return Checks(self.splits, found, find_leaks(self.splits, found))

    def list_faults(self, checks: Checks) -> Path:
        """Write all faults to a file, a line each, and return its path."""
        path = self.target / FAULTS
        with replace_text(path) as file:
            for number, split in enumerate(self.splits):
                for fault in checks.faults(number):
                    file.write(f'{split.name}\t{fault.kind}\t{printable(fault.name)}\t{printable(fault.text)}\n')
            for leak in checks.leaks:
                for trained, tested in leak.examples:
                    file.write(f'{leak.second}\tin {leak.first}, too\t{printable(tested)}\t{printable(trained)}\n')
        return path

    def write(self, checks: Checks, layout: str, place: str | None, on_pair: Callable[[], None] = int) -> list[Path]:
        """Write the manifests, and copies or links of the good pairs where wanted.

        Args:
            checks: from `check`.
            layout: what the manifests call the layout.
            place: `copy` or `link` to make folders of equal names in the target; None to leave images where they are.
            on_pair: called after each pair that was copied or linked.
        Returns:
            The manifests; a split without any good pair gets none.
        Raises:
            DataError: if the disk is full or a file cannot be written; manifests that are there then are whole.
        """
        paths = [self.target / f'{split.name}.jsonl' for split in self.splits]
        for path in [*paths, self.target / FAULTS]:
            for old in (path, *partials_of(path)):
                _remove(old)
        written = []
        for number, (split, found) in enumerate(zip(checks.splits, checks.findings, strict=True)):
            if found.good:
                root = self._place(split, found, place, on_pair) if place else _common_root(split.pairs)
                entries = self._journal(split).entries(split.pairs, lambda name, root=root: _below(name, root))
                entries = _renamed(entries, split, found) if place else entries
                others = [] if place else _others(split, found, root)
                phase, pairs = split.phase, len(found.good)
                write_manifest(
                    paths[number], entries, layout=layout, phase=phase, root=root, pairs=pairs, others=others
                )
                written.append(paths[number])
        for split in self.splits:
            self._journal(split).remove()
        return written

    def _journal(self, split: Split) -> Journal:
        return Journal(self.target / f'.{split.name}.checked')

    def _place(self, split: Split, found: SplitFindings, how: str, on_pair: Callable[[], None]) -> Path:
        """Copy or link the good pairs to `SPLIT/lq` and `SPLIT/gt`, under equal names where endings allow."""
        folder, unfinished = self.target / split.name, self.target / f'.{split.name}.part'
        try:
            if folder.exists():
                _take_over(folder, unfinished)
            for side in ('lq', 'gt'):
                (unfinished / side).mkdir(parents=True, exist_ok=True)
            (unfinished / _OURS).touch()
            wanted: set[int] = set()
            copies: dict[int, Path] = {}
            for pair, names in zip(_good(split, found), _placed_names(split, found), strict=True):
                for path, name in zip((pair.lq, pair.gt), names, strict=True):
                    # RESIDE has up to 35 degraded images to a clean one, which is kept once.
                    first = copies.setdefault(hash(path), unfinished / name)
                    _put(path, unfinished / name, how, first)
                    wanted.add(hash(name))
                on_pair()
            for side in ('lq', 'gt'):  # what an earlier run left and this one does without
                for entry in os.scandir(unfinished / side):
                    if hash(f'{side}/{entry.name}') not in wanted:
                        os.unlink(entry.path)
            os.replace(unfinished, folder)
        except OSError as error:
            raise DataError(
                f'cannot {how} to {error.filename2 or error.filename or unfinished}: {error.strerror or error}. '
                f'Make room or choose another folder, and run the command again: it goes on where it stopped'
            ) from error
        return folder.resolve()


def _take_over(folder: Path, unfinished: Path) -> None:
    """Go on with what an earlier run made; never with anything else, as what is left over is removed in the end."""
    if not (folder / _OURS).is_file():
        raise DataError(f'{folder} is there already, and not from an earlier run; move it, or name another folder')
    if unfinished.exists():
        shutil.rmtree(unfinished)
    os.replace(folder, unfinished)


def _good(split: Split, found: SplitFindings) -> Iterator[Pair]:
    return (split.pairs[number] for number in found.good)


def _put(path: str, target: Path, how: str, first: Path) -> None:
    """Copy or link a file, unless it is there already; of a file that has a copy `first`, give that another name."""
    if how == 'link':
        if target.is_symlink() or target.exists():
            target.unlink()
        target.symlink_to(os.path.relpath(os.path.realpath(path), os.path.realpath(target.parent)))
        return
    stat = os.stat(path)
    if target.is_symlink():
        target.unlink()
    elif target.exists() and (target.stat().st_size, target.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns):
        return
    partial = target.with_name('.part')
    partial.unlink(missing_ok=True)
    if first == target or not _linked(first, partial):
        shutil.copyfile(path, partial)
        os.utime(partial, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(partial, target)


def _linked(first: Path, target: Path) -> bool:
    try:
        os.link(first, target)
    except OSError:  # not all file systems can, and some files have too many names
        return False
    return True


def _placed_names(split: Split, found: SplitFindings) -> Iterator[tuple[str, str]]:
    """Name the copies: the pair's key without folders, distinct also where capitals are not told from small letters."""
    taken: set[int] = set()
    for pair in _good(split, found):
        stem = pair.key.replace('/', '_')
        stem = os.path.splitext(stem)[0] if is_image(stem) else stem
        name, count = stem, 1
        while hash(name.casefold()) in taken:
            count += 1
            name = f'{stem}_{count}'
        taken.add(hash(name.casefold()))
        yield tuple(
            f'{side}/{name}{os.path.splitext(path)[1].lower()}' for side, path in (('lq', pair.lq), ('gt', pair.gt))
        )


def _renamed(entries: Iterable[Entry], split: Split, found: SplitFindings) -> Iterator[Entry]:
    for entry, (lq, gt) in zip(entries, _placed_names(split, found), strict=True):
        yield Entry(os.path.splitext(lq)[0].removeprefix('lq/'), lq, gt, entry.size, entry.bytes, entry.digests)


def _common_root(pairs: Iterable[Pair]) -> Path:
    """The deepest folder that all images lie below."""
    folders = {os.path.dirname(path) for pair in pairs for path in (pair.lq, pair.gt)}
    return Path(os.path.commonpath([os.path.abspath(folder) for folder in folders])) if folders else Path()


def _others(split: Split, found: SplitFindings, root: Path) -> list[str]:
    """List the images that lie among those of the pairs and belong to none."""
    paths = (path for pair in _good(split, found) for path in (pair.lq, pair.gt))
    known = np.sort(np.fromiter(map(hash, paths), np.int64, 2 * len(found.good)))
    folders = sorted({os.path.dirname(path) for pair in _good(split, found) for path in (pair.lq, pair.gt)})
    return [
        _below(path, root)
        for folder in folders
        for path in (f'{folder}/{name}' for name in list_images(folder, split.phase))
        if known[min(np.searchsorted(known, hash(path)), len(known) - 1)] != hash(path)
    ]


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


def format_table(checks: Checks, source: Path) -> list[str]:
    """Return a table with a line for each split, without what is wrong with them."""
    rows = [('split', 'pairs', 'faulty', 'width x height', 'files', 'from')]
    for number, (split, found) in enumerate(zip(checks.splits, checks.findings, strict=True)):
        faults = len(checks.faults(number))
        rows.append(
            (
                split.name,
                f'{found.num_pairs:,}',
                f'{faults:,}',
                _sizes(found.sizes),
                _bytes(found.num_bytes),
                _shorten(str(split.where), source),
            )
        )
    return _aligned(rows, right=(1, 2, 4))


def format_notes(checks: Checks) -> list[str]:
    """Return lines on what is no fault, but good to know."""
    lines = []
    for split, found in zip(checks.splits, checks.findings, strict=True):
        for trait, count in sorted(found.traits.items()):
            what = _TRAITS.get(trait, f'{trait}; read by content')
            lines.append(f'{split.name}: {_count(count, "image")} {what}')
        repeats = find_repeats(split, found)
        if repeats:
            count = _count(repeats.num, 'degraded image')
            lines.append(f'{split.name}: {count} more than once: {_pairs(repeats)}')
        unchanged = found.num_unchanged
        if unchanged:
            lines.append(f'{split.name}: in {_count(unchanged, "pair")} the degraded image is the clean one')
        clean = found.num_clean
        if clean < len(found.good):
            lines.append(f'{split.name}: {len(found.good):,} degraded images of {_count(clean, "clean one")}')
    return lines


def format_faults(checks: Checks, source: Path) -> list[str]:
    """Return lines on the faults, by kind, with the first few of each."""
    lines = []
    for number, split in enumerate(checks.splits):
        by_kind: dict[str, list[Fault]] = {}
        for fault in checks.faults(number):
            by_kind.setdefault(fault.kind, []).append(fault)
        for kind, members in sorted(by_kind.items()):
            lines.append(f'{split.name}: {len(members):,} x {kind}')
            lines += [
                f'  {_shorten(fault.name, source)}: {_shorten(fault.text, source)}' for fault in members[:_NUM_SHOWN]
            ]
            lines += _rest(len(members), _NUM_SHOWN)
    return lines


def format_leaks(checks: Checks, source: Path) -> list[str]:
    """Return lines on images to be tested with that are trained on."""
    lines = []
    for leak in checks.leaks:
        what = _count(leak.num, f'{leak.kind} image')
        lines.append(f'{leak.second}: {what} {"is" if leak.num == 1 else "are"} in {leak.first}, too')
        lines += [f'  {_shorten(tested, source)} = {_shorten(trained, source)}' for trained, tested in leak.examples]
        lines += _rest(leak.num, len(leak.examples))
    return lines


def format_options(manifests: Iterable[tuple[str, Path]]) -> list[str]:
    """Return the part of an option file that uses manifests.

    Args:
        manifests: phase and path of each.
    """
    lines, used = ['datasets:'], Counter()
    for phase, path in manifests:
        used[phase] += 1
        if phase == 'train' and used[phase] > 1:
            lines.append(f'    # or manifest: {_quoted(str(path))}')
            continue
        key = 'train' if phase == 'train' else 'val'
        key += f'_{used[phase]}' if used[phase] > 1 else ''
        lines += [
            f'  {key}:',
            f'    name: {_quoted(_dataset_name(path))}',
            '    type: PairsDataset',
            '    layout: manifest',
            f'    manifest: {_quoted(str(path))}',
        ]
    return lines


def _dataset_name(manifest: Path) -> str:
    """A name that files of results can have: the folder's, as far as that may be, and the split's."""
    folder = printable(manifest.parent.name).replace('\\', '_').lstrip('. ')[:80]
    return f'{folder}_{manifest.stem}'.lstrip('_')


def _quoted(text: str) -> str:
    plain = text.replace('/', '').replace('.', '').replace('_', '').replace('-', '')
    return text if plain.isalnum() and plain.isascii() else "'" + text.replace("'", "''") + "'"


def _sizes(sizes: Counter) -> str:
    if not sizes:
        return '-'
    (height, width), count = sizes.most_common(1)[0]
    if len(sizes) == 1:
        return f'{width}x{height}'
    heights, widths = [size[0] for size in sizes], [size[1] for size in sizes]
    if len(sizes) == 2:
        return ', '.join(f'{w}x{h} ({n:,})' for (h, w), n in sizes.most_common())
    return f'{min(widths)}x{min(heights)} to {max(widths)}x{max(heights)}, mostly {width}x{height} ({count:,})'


def _bytes(number: int) -> str:
    size = float(number)
    for unit in ('B', 'kB', 'MB', 'GB'):
        if size < 1000:
            return f'{size:.0f} {unit}' if unit == 'B' or size >= 10 else f'{size:.1f} {unit}'
        size /= 1000
    return f'{size:.1f} TB'


def _aligned(rows: Sequence[Sequence[str]], right: tuple[int, ...]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        '  '.join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _shorten(text: str, source: Path) -> str:
    """Leave out the folder of the dataset, which is printed above; show names that are no text all the same."""
    text = text.replace(f'{source}/', '')
    return text.encode('utf-8', 'backslashreplace').decode().replace('\n', '\\n')


def _pairs(repeats: Duplicates) -> str:
    return ', '.join(f'{Path(one).name} = {Path(other).name}' for one, other in repeats.examples) + (
        ' ...' if repeats.num > len(repeats.examples) else ''
    )


def _count(number: int, noun: str) -> str:
    return f'{number:,} {noun}{"s" if number != 1 else ""}'


def _rest(number: int, shown: int) -> list[str]:
    return [f'  and {number - shown:,} more'] if number > shown else []
