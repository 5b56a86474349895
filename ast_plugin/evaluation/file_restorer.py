"""Restoration of image files: find inputs, plan output paths, and restore the files one after another::

    jobs = plan_jobs(find_images(['photos'], output).images, output)
    for result in restore_files(jobs, Restorer.from_weights('derain.pth')):
        print(result.job.target, result.failure, result.notes)

A failure is stored in the result of its file; the remaining files are still restored.
"""

import glob
import itertools
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from ast_plugin.data.image_files import (
    FORMAT_OF,
    MAX_PIXELS,
    NOT_READ,
    SUFFIXES,
    count_reasons,
    encode_image,
    open_image,
    read_image,
    sniff_format,
    why_no_image,
)
from ast_plugin.data.matching import fold
from ast_plugin.errors import DataError, OptionError, class_of_failure, one_line
from ast_plugin.evaluation.classifier import Specialists
from ast_plugin.evaluation.restorer import Restorer
from ast_plugin.files import write_file
from ast_plugin.names import file_name
from ast_plugin.ops import frozen_weights

MAX_SATURATED, MAX_TINT, MAX_BRIGHTNESS = 0.1, 12.0, 50.0  # fraction, levels of 255, levels; see `Change.warnings`
MIN_CONFIDENCE = 0.6  # of a predicted degradation, without a warning

_RESULTS = '.basicsr_results'  # marker file of an output folder that is inside an input folder
_NOT_WRITTEN = {'.gif', '.heic', '.heif', '.avif', '.exr', '.jp2', '.jxl', '.dng'}  # unlikely extensions of folders


class Job(NamedTuple):
    """Image file to restore and path of the result."""

    source: Path
    target: Path


class Change(NamedTuple):
    """Difference between a result and its image, in levels of 255."""

    mean: float  # mean absolute difference over pixels and channels
    share: float  # fraction of pixels that change by more than 2 levels in any channel
    color: tuple[float, ...]  # difference of the mean of each channel
    saturated: float  # fraction of values that become black or white by a change of at least a quarter of the range

    @classmethod
    def between(cls, image: np.ndarray, result: np.ndarray) -> 'Change | None':
        """Compute the difference, or return None if the sizes differ."""
        if image.shape != result.shape:
            return None
        full = np.iinfo(image.dtype).max
        difference = (result.astype(np.float32) - image) * np.float32(255 / full)
        absolute = np.abs(difference)
        largest = absolute if image.ndim == 2 else absolute.max(2)
        color = np.atleast_1d(difference.mean((0, 1), dtype=np.float64))
        # Dark regions under rain streaks may legitimately become black, but by smaller changes.
        saturated = ((result == 0) | (result == full)) & (absolute >= 64)
        return cls(float(absolute.mean()), float((largest > 2).mean()), tuple(color), float(saturated.mean()))

    def warnings(self) -> Iterator[str]:
        """Yield reasons not to trust a result with this difference."""
        if self.saturated > MAX_SATURATED:
            yield f'{self.saturated:.0%} of the values became black or white: the network output is out of range'
        brightness = sum(self.color) / len(self.color)
        tint = max(abs(shift - brightness) for shift in self.color)
        if tint > MAX_TINT or abs(brightness) > MAX_BRIGHTNESS:
            shown = ', '.join(f'{shift:+.0f}' for shift in self.color)
            yield f'the mean colour changed by {shown} levels of 255'


@dataclass
class FileResult:
    """Outcome of restoring a file."""

    job: Job
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)  # messages for the user
    failure: str = ''  # why there is no result; empty on success
    kind: str = ''  # class of the failure: unreadable, memory, network or unwritable
    task: str = ''  # predicted degradation, if the image was classified
    is_unchanged: bool = False  # whether the image was written without restoration
    confidence: float | None = None  # probability of `task`
    change: Change | None = None  # None if there is no result or its size differs
    warnings: list[str] = field(default_factory=list)  # reasons not to trust the result


class FoundImages(NamedTuple):
    """Images found in the inputs of a batch."""

    images: list[tuple[Path, Path]]  # each file with its folder relative to the input
    failures: list[str]  # errors of inputs and of folders inside them
    left_out: Counter[str]  # number of files and folders left out, by reason

    def lines(self) -> list[str]:
        """Return the messages for the user."""
        lines = [f'basicsr: error: {failure}' for failure in self.failures]
        return lines + ([f'note: left out: {count_reasons(self.left_out)}'] if self.left_out else [])


def find_images(inputs: Iterable[str | os.PathLike], output: Path, recursive: bool = False) -> FoundImages:
    """Find the files to restore, without duplicates, folders sorted by name.

    Args:
        inputs: files, patterns such as `photos/*.jpg` (not every shell expands them), and folders of which all images
            except hidden ones are used.
        output: output folder; skipped if it is inside an input, like output folders of earlier runs.
        recursive: whether to include subfolders.
    Returns:
        The files. Input files that cannot be read are included, so that restoration reports them.
    Raises:
        DataError: if there is nothing to restore.
    """
    found = FoundImages([], [], Counter())
    known: dict[tuple[int, int] | Path, Path] = {}
    for path in itertools.chain.from_iterable(_expand(given, output, recursive, found) for given in inputs):
        images = list(_walk(path, output, recursive, found)) if path.is_dir() else [(path, Path())]
        if path.is_dir() and not images:
            reasons = f'; found {count_reasons(found.left_out)}' if found.left_out else ''
            deeper = '; use --recursive to include subfolders' if found.left_out['subfolders'] else ''
            failure = f'{path}: no images in this folder (expected {", ".join(FORMAT_OF)}{reasons}){deeper}'
            found.failures.append(failure)
        for image, folder in images:
            identity = _identity(image) or image
            found.images.extend([(image, folder)] if identity not in known else [])
            found.left_out.update(['links to the same file'] if known.setdefault(identity, image) != image else [])
    reasons = [_why_unreadable(image) for image, _ in found.images]
    if None not in reasons:
        raise DataError(next(iter([*reasons, *found.failures])))
    return found


def _expand(given: str | os.PathLike, output: Path, recursive: bool, found: FoundImages) -> list[Path]:
    """Return the paths that match a pattern, sorted, without earlier results; or the path itself if it is none."""
    path = os.path.expanduser(given)
    root = _root_of_pattern(path)
    if root is None:
        return [Path(path)]
    matches, kept, earlier = sorted(map(Path, glob.glob(path, recursive=recursive))), [], set()
    for match in matches:
        folders = [folder for folder in (match, *match.parents) if len(folder.parts) > len(root.parts)]
        results = [folder for folder in folders if _is_result_folder(folder, output)]
        earlier.update(results)
        kept.extend([] if results else [match])
    found.left_out.update(['folders with earlier results'] * len(earlier))
    if not kept:
        found.failures.append(f'{given}: {"only earlier results match" if matches else "no file matches"} this pattern')
    return kept


def _root_of_pattern(path: str) -> Path | None:
    """Return the folder before the first wildcard, or None if the path exists or is no pattern."""
    if os.path.lexists(path) or not glob.has_magic(path):
        return None
    return Path(os.path.dirname(re.split(r'[*?[]', path)[0]))


def _is_result_folder(folder: Path, output: Path) -> bool:
    return folder.is_dir() and (folder.resolve() == output.resolve() or (folder / _RESULTS).exists())


def plan_jobs(
    images: Sequence[tuple[Path, Path]], output: str | os.PathLike, suffix: str = '', file_format: str = 'keep'
) -> list[Job]:
    """Assign every image of `find_images` a unique output path that is not an input.

    Args:
        images: files with their folders relative to the input.
        output: output folder; or the path of a single result if it has the extension of an image, does not end with a
            slash and is not an existing folder.
        suffix: appended to the file name.
        file_format: 'keep', 'png' or 'tiff'.
    Raises:
        DataError: if a result would replace an input, or `output` is a file name but there are several images.
    """
    is_folder, output = os.fspath(output).endswith(('/', os.sep)), Path(output)
    kind = '' if is_folder or output.is_dir() else output.suffix.lower()
    if kind in _NOT_WRITTEN:
        raise DataError(
            f'{output}: expected a folder, or a file name with one of the extensions {", ".join(FORMAT_OF)}'
        )
    if kind in FORMAT_OF:
        if len(images) > 1 or suffix or file_format != 'keep':
            what = f'there are {len(images)} images' if len(images) > 1 else '--suffix or --format is set'
            raise DataError(f'{output} is the path of a single result, but {what}: expected a folder')
        _protect_inputs(jobs := [Job(images[0][0], output)])
        return jobs
    jobs = [
        Job(source, output / folder / file_name(f'{source.stem}{suffix}', _ending(source, file_format)))
        for source, folder in images
    ]
    wanted = Counter(fold(str(job.target)) for job in jobs)
    occupied = set(wanted)
    for number, (source, target) in enumerate(jobs):
        if wanted[fold(str(target))] > 1:
            stem = f'{target.stem}_{source.suffix[1:].lower()}'
            stems = itertools.chain([stem], (f'{stem}_{count}' for count in itertools.count(2)))
            paths = (target.with_name(file_name(name, target.suffix)) for name in stems)
            target = next(path for path in paths if fold(str(path)) not in occupied)
            occupied.add(fold(str(target)))
            jobs[number] = Job(source, target)
    _protect_inputs(jobs)
    return jobs


def prepare_folders(jobs: Sequence[Job]) -> None:
    """Create the output folders and check that they are writable, before any image is restored."""
    for folder in dict.fromkeys(job.target.parent for job in jobs):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise DataError(f'{folder}: cannot write images to this folder: {error.strerror or error}') from error


def mark_results(output: Path, inputs: Iterable[str | os.PathLike]) -> None:
    """Mark an output folder inside an input or below the root of a pattern; later runs of `find_images` skip it."""
    paths = map(os.path.expanduser, inputs)
    parents = {(_root_of_pattern(path) or Path(path)).resolve() for path in paths}
    if output.is_dir() and not parents.isdisjoint(output.resolve().parents):
        (output / _RESULTS).touch()


def restore_files(
    jobs: Iterable[Job],
    restorer: Restorer | Specialists,
    *,
    quality: int = 95,
    max_pixels: int = MAX_PIXELS,
    on_start: Callable[[Job], None] | None = None,
    on_tile: Callable[[int, int], None] | None = None,
    uncertainty: bool = False,
) -> Iterator[FileResult]:
    """Restore files one after another, continuing after failures.

    Args:
        jobs: jobs of `plan_jobs`; the output folders exist.
        restorer: restorer for all images, or `Specialists` to select one for each image.
        quality: quality of JPEG and lossy WebP, 1 to 100.
        max_pixels: larger images are rejected.
        on_start: called with each job before it starts.
        on_tile: called with (tiles done, total number of tiles) of the current image.
        uncertainty: also write a map of `Restorer.spread` for each restored image, see `uncertainty_path`.
    Yields:
        The result of each job, after its files are written.
    Raises:
        FileError: if a result cannot be written (a full disk affects all following images, too).
        OptionError: if an option, such as a backend, is not available for any image.
    """
    with frozen_weights():
        for job in jobs:
            if on_start is not None:
                on_start(job)
            start, result = time.perf_counter(), FileResult(job)
            for path, content in _restore_file(result, restorer, quality, max_pixels, on_tile, uncertainty).items():
                write_file(path, content)
            result.seconds = time.perf_counter() - start
            yield result


def _restore_file(
    result: FileResult,
    restorer: Restorer | Specialists,
    quality: int,
    max_pixels: int,
    on_tile: Callable[[int, int], None] | None,
    uncertainty: bool,
) -> dict[Path, bytes]:
    """Restore the image of a job; return the content of each file to write, or nothing if it failed."""
    job, notes, stage, written = result.job, result.notes, 'unreadable', {}
    try:
        image = read_image(job.source, max_pixels=max_pixels)
        stage, kind = 'unwritable', FORMAT_OF[job.target.suffix.lower()]
        if kind != image.format:  # one pixel shows, before the network runs, whether the format supports the image
            alpha = None if image.alpha is None else image.alpha[:1, :1]
            encode_image(job.target, replace(image, color=image.color[:1, :1], alpha=alpha))
        stage = 'network'
        if isinstance(restorer, Specialists):
            result.task, result.confidence, restorer = restorer.choose(image.color)
            if result.confidence < MIN_CONFIDENCE:
                result.warnings.append(f'classified as {result.task} with a confidence of only {result.confidence:.0%}')
        color = image.color
        result.is_unchanged = restorer is None
        if result.task == 'clean':
            notes.append(f'no degradation detected (confidence {result.confidence:.0%}), left unchanged')
        elif restorer is None:
            text = f'classified as {result.task} (confidence {result.confidence:.0%})'
            result.warnings.append(f'{text}, left unchanged: this installation does not include weights for it')
        else:
            color = restorer.restore(color, on_tile=on_tile, on_note=notes.append)
            if uncertainty:
                written[uncertainty_path(job)] = draw_spread(restorer.spread(image.color))
        result.change = Change.between(image.color, color)
        result.warnings += result.change.warnings() if result.change else ()
        stage = 'unwritable'
        if restorer is None and kind == image.format:
            return {job.target: job.source.read_bytes()}
        _, lost = image.metadata(kind)
        notes += [*image.notes, *([f'{kind} does not support {", ".join(lost)}'] if lost else [])]
        alpha = image.alpha
        if alpha is not None and alpha.shape != color.shape[:2]:
            alpha = cv2.resize(alpha, color.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        image = replace(image, color=color, alpha=alpha)
        return {job.target: encode_image(job.target, image, quality=quality), **written}
    except Exception as error:
        kind = class_of_failure(error, stage)
        reason = f'does not fit in memory ({one_line(error)})' if isinstance(error, MemoryError) else one_line(error)
        if str(job.source) not in reason and kind != 'unwritable':
            reason = f'{job.source}: {reason}'
        result.kind, result.failure, result.change, result.warnings = kind, reason, None, []
        result.is_unchanged = False
        return {}


def protect_images(paths: Iterable[Path], what: str, jobs: Sequence[Job]) -> None:
    """Raise OptionError if `paths`, to which `what` will be written, are not distinct or are images of the jobs."""

    def key(path: Path) -> tuple[int, int] | str:
        return _identity(path) or fold(str(path.absolute()))

    taken = dict.fromkeys((key(path) for job in jobs for path in job), 'is an image of this run')
    for path in paths:
        if (why := taken.get(key(path))) is not None:
            raise OptionError(f'{path} {why}, and {what} would replace it')
        taken[key(path)] = 'belongs to another image of that name (use --format png to rename it)'


def uncertainty_path(job: Job) -> Path:
    """Return the path of the uncertainty map of a result."""
    return job.target.with_name(file_name(job.target.stem, '_uncertainty.png'))


def draw_spread(spread: np.ndarray) -> bytes:
    """Draw a map [H, W] of standard deviations in [0, 1] as PNG, with a colour bar in levels of 255."""
    levels = 255 * spread
    most = max(1.0, float(np.percentile(levels, 99.5)))
    shown = np.uint8(255 * np.clip(levels / most, 0, 1))
    bar = np.tile(np.linspace(0, 255, max(260, shown.shape[1])).astype(np.uint8), (12, 1))
    shown = np.pad(shown, ((0, 8), (0, bar.shape[1] - shown.shape[1])))
    drawn = cv2.applyColorMap(np.vstack([shown, bar, np.zeros((24, bar.shape[1]), np.uint8)]), cv2.COLORMAP_MAGMA)
    text = f'0 to {most:.1f} of 255: std of 8 transforms'
    cv2.putText(drawn, text, (4, len(drawn) - 7), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (255, 255, 255), 1, cv2.LINE_AA)
    return cv2.imencode('.png', drawn)[1].tobytes()


def report_rows(results: Iterable[FileResult]) -> list[list[Any]]:
    """Return the rows of the report: a header, then one row per file; differences are in levels of 255."""
    headings = 'file task confidence mean_absolute_change changed_share mean_color_shift warnings seconds status'
    rows: list[list[Any]] = [headings.split()]
    for result in results:
        change = result.change
        shift = ' '.join(f'{value:+.2f}' for value in change.color) if change else None
        figures = [round(change.mean, 3), round(change.share, 4), shift] if change else [None] * 3
        confidence = None if result.confidence is None else round(result.confidence, 3)
        status = result.kind or ('unchanged' if result.is_unchanged else 'restored')
        warnings = '; '.join(result.warnings + [result.failure] * bool(result.failure))
        rows.append([result.job.source, result.task, confidence, *figures, warnings, round(result.seconds, 2), status])
    return rows


def _walk(folder: Path, output: Path, recursive: bool, found: FoundImages) -> Iterator[tuple[Path, Path]]:
    results = output.resolve()

    def fail(error: OSError) -> None:
        found.failures.append(f'{error.filename or folder}: cannot be read: {error.strerror}')

    for current, folders, names in os.walk(folder, onerror=fail):
        here = Path(current)
        folders[:] = sorted(name for name in folders if (here / name).resolve() != results)
        earlier = {name for name in folders if (here / name / _RESULTS).exists()}
        found.left_out.update(['folders with earlier results'] * len(earlier))
        folders[:] = [name for name in folders if name not in earlier]
        skipped = [name for name in folders if not recursive or name.startswith('.')]
        found.left_out.update('hidden' if name.startswith('.') else 'subfolders' for name in skipped)
        folders[:] = [name for name in folders if name not in skipped]
        for name in sorted(names):
            reason = why_no_image(here / name)
            if reason is None:
                yield here / name, here.relative_to(folder)
            else:
                found.left_out[reason] += 1


def _why_unreadable(path: Path) -> str | None:
    """Return why an input file is not an image, or None if it looks like one."""
    try:
        return None if _format_of(path) or path.suffix.lower() in FORMAT_OF else f'{path}: {NOT_READ}'
    except OSError as error:
        return f'{path}: cannot be read: {error.strerror}'


def _format_of(path: Path) -> str | None:
    with open_image(path) as file:
        return sniff_format(file.read(16))


def _identity(path: Path) -> tuple[int, int] | None:
    """Return a key that is equal for all links and spellings of one file, or None if it does not exist."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _ending(source: Path, file_format: str) -> str:
    """Return the file extension of a result: that of the input if it matches the output format."""
    try:
        kind = _format_of(source) if file_format == 'keep' else file_format.upper()
    except OSError:
        kind = None  # reported when the file is read
    if kind is None or source.suffix.lower() in SUFFIXES[kind]:
        return source.suffix
    return SUFFIXES[kind][0]


def _protect_inputs(jobs: Sequence[Job]) -> None:
    """Raise DataError if a result would replace an input, including through links, or a folder."""
    sources = {_identity(job.source): job.source for job in jobs}
    for target in (job.target for job in jobs):
        identity = _identity(target)  # None if the target does not exist
        if identity is not None and identity in sources:
            raise DataError(
                f'{target} is an input ({sources[identity]}) and would be replaced; '
                'choose another folder (-o) or a --suffix'
            )
        if target.is_dir():
            raise DataError(f'{target}: expected a file name for the restored image, this is a folder; change -o')
