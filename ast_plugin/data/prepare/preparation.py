"""Turn a dataset as it was unpacked into manifests to train from, and describe the dataset."""

from __future__ import annotations

import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ast_plugin.data.manifest import Entry, write_manifest
from ast_plugin.data.matching import is_image, list_images
from ast_plugin.data.prepare.checks import CheckedSplit, Duplicates, Journal, find_duplicates, find_leaks
from ast_plugin.data.prepare.splits import Split
from ast_plugin.errors import DataError
from ast_plugin.files import lock_folder, partials_of, replace_text
from ast_plugin.names import printable, to_columns

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
class CheckedDataset:
    """A dataset whose images were read."""

    splits: Sequence[CheckedSplit]
    leaks: Sequence[Duplicates]  # images to be tested with that are trained on

    @property
    def num_faults(self) -> int:
        """The number of faults of all splits."""
        return sum(len(checked.faults) for checked in self.splits)


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
        self.splits, self.target = splits, target
        if target.resolve().is_relative_to(source.resolve()):
            raise DataError(f'{target} lies in the dataset {source}, which is left as it is; name a folder elsewhere')
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f'{target}: this folder cannot be made: {error.strerror or error}') from error

    def lock(self) -> AbstractContextManager:
        """Keep other runs from preparing into the folder meanwhile; see `lock_folder`."""
        return lock_folder(self.target, 'another run is preparing there')

    def check(self, workers: int, on_pair: Callable[[], None] = int) -> CheckedDataset:
        """Read all images but those that a run checked that was killed or refused."""
        splits = [self._journal(split).check(split, workers, on_pair) for split in self.splits]
        return CheckedDataset(splits, find_leaks(splits))

    def list_faults(self, dataset: CheckedDataset) -> Path:
        """Write all faults to a file, a line each, and return its path."""
        path = self.target / FAULTS
        rows = [(one.split.name, fault.kind, fault.name, fault.text) for one in dataset.splits for fault in one.faults]
        rows += [
            (leak.second, f'in {leak.first}, too', tested, trained)
            for leak in dataset.leaks
            for trained, tested in leak.examples
        ]
        with replace_text(path) as file:
            file.writelines('\t'.join(map(printable, row)) + '\n' for row in rows)
        return path

    def write(
        self, dataset: CheckedDataset, layout: str, place: str | None, on_pair: Callable[[], None] = int
    ) -> list[Path]:
        """Write the manifests, and copies or links of the good pairs where wanted.

        Args:
            dataset: from `check`.
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
        good = [checked for checked in dataset.splits if checked.good]
        for checked in good:
            split, others = checked.split, []
            if place:
                root = self._place(checked, place, on_pair)
                names = _name_copies(checked)
            else:
                folders = {os.path.dirname(path) for pair in split.pairs for path in (pair.lq, pair.gt)}
                root = Path(os.path.commonpath([os.path.abspath(folder) for folder in folders]))
                names = ((pair.key, _below(pair.lq, root), _below(pair.gt, root)) for pair in checked.good_pairs())
                others = _list_others(checked, root)
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


def format_table(dataset: CheckedDataset, source: Path) -> list[str]:
    """Return a table with a line for each split."""
    rows = [('split', 'pairs', 'faulty', 'width x height', 'files', 'from')]
    for checked in dataset.splits:
        counts = f'{checked.num_pairs:,}', f'{len(checked.faults):,}'
        size = tqdm.format_sizeof(checked.num_bytes, 'B')
        where = _shorten(str(checked.split.where), source)
        rows.append((checked.split.name, *counts, _format_sizes(checked.sizes), size, where))
    return to_columns(rows, '<>><><')


def format_notes(dataset: CheckedDataset) -> list[str]:
    """Return lines on what is no fault, but good to know."""
    lines = []
    for checked in dataset.splits:
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


def format_faults(dataset: CheckedDataset, source: Path) -> list[str]:
    """Return lines on the faults, by kind, with the first few of each."""
    lines = []
    for checked in dataset.splits:
        by_kind = defaultdict(list)
        for fault in checked.faults:
            by_kind[fault.kind].append(f'{_shorten(fault.name, source)}: {_shorten(fault.text, source)}')
        for kind, texts in sorted(by_kind.items()):
            lines += [f'{checked.split.name}: {len(texts):,} x {kind}', *_first(texts[:_NUM_SHOWN], len(texts))]
    return lines


def format_leaks(dataset: CheckedDataset, source: Path) -> list[str]:
    """Return lines on images to be tested with that are trained on."""
    lines = []
    for leak in dataset.leaks:
        verb = 'is' if leak.num == 1 else 'are'
        lines.append(f'{leak.second}: {_count(leak.num, f"{leak.kind} image")} {verb} in {leak.first}, too')
        examples = [f'{_shorten(tested, source)} = {_shorten(trained, source)}' for trained, tested in leak.examples]
        lines += _first(examples, leak.num)
    return lines


def format_options(manifests: Iterable[tuple[str, Path]]) -> list[str]:
    """Return the part of an option file that uses manifests, given by phase and path."""
    lines, used = ['datasets:'], Counter()
    for phase, path in manifests:
        used[phase] += 1
        if phase == 'train' and used[phase] > 1:
            lines.append(f'    # or manifest: {_quote(str(path))}')
            continue
        key = 'train' if phase == 'train' else 'val'
        key += f'_{used[phase]}' if used[phase] > 1 else ''
        # A name that files of results can have.
        folder = printable(path.parent.name).replace('\\', '_').lstrip('. ')[:80]
        lines += [
            f'  {key}:',
            f'    name: {_quote(f"{folder}_{path.stem}".lstrip("_"))}',
            '    type: PairsDataset',
            '    layout: manifest',
            f'    manifest: {_quote(str(path))}',
        ]
    return lines


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


def _list_others(checked: CheckedSplit, root: Path) -> list[str]:
    """List the images that lie among those of the pairs and belong to none."""
    known, folders = set(), set()
    for pair in checked.good_pairs():
        for path in (pair.lq, pair.gt):
            known.add(hash(path))
            folders.add(os.path.dirname(path))
    paths = (f'{folder}/{name}' for folder in sorted(folders) for name in list_images(folder, checked.split.phase))
    return [_below(path, root) for path in paths if hash(path) not in known]


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


def _first(texts: Sequence[str], num: int) -> list[str]:
    return [f'  {text}' for text in texts] + ([f'  and {num - len(texts):,} more'] if num > len(texts) else [])


def _count(number: int, noun: str) -> str:
    return f'{number:,} {noun}{"s" if number != 1 else ""}'


def _quote(text: str) -> str:
    plain = text.replace('/', '').replace('.', '').replace('_', '').replace('-', '')
    return text if plain.isalnum() and plain.isascii() else "'" + text.replace("'", "''") + "'"
