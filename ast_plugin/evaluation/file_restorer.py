"""Restoring image files: which files are meant, where each result goes, and one after the other with one policy::

    jobs = plan_jobs(find_images(['photos'], output).images, output)
    for result in restore_files(jobs, Restorer.from_weights('derain.pth')):
        print(result.job.target, result.failure, result.notes)

A file that fails says why and of which kind its failure is; the others are restored all the same.
"""

import itertools
import os
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

MAX_SATURATED, MAX_TINT, MAX_BRIGHTNESS = 0.1, 12.0, 50.0  # a share, levels of 255; see `Change.warnings`
MIN_CONFIDENCE = 0.6  # of what an image is taken for

_RESULTS = '.basicsr_results'  # lies in a folder of results that is inside an input
_NOT_WRITTEN = {'.gif', '.heic', '.heif', '.avif', '.exr', '.jp2', '.jxl', '.dng'}  # nobody names a folder so


class Job(NamedTuple):
    """A file to restore, and where the result goes."""

    source: Path
    target: Path


class Change(NamedTuple):
    """How far a result is from its image, in levels of 255."""

    mean: float  # absolute, over pixels and channels
    share: float  # of the pixels that change by more than 2 levels in a channel, in [0, 1]
    color: tuple[float, ...]  # of the mean of each channel
    saturated: float  # share of the values that become black or white by a quarter of the range or more, in [0, 1]

    @classmethod
    def between(cls, image: np.ndarray, result: np.ndarray) -> 'Change | None':
        """Measure it; None where the sizes differ."""
        if image.shape != result.shape:
            return None
        full = np.iinfo(image.dtype).max
        difference = (result.astype(np.float32) - image) * np.float32(255 / full)
        absolute = np.abs(difference)
        largest = absolute if image.ndim == 2 else absolute.max(2)
        color = np.atleast_1d(difference.mean((0, 1), dtype=np.float64))
        # A dark ground below a veil of rain becomes black, too, but not by so much.
        saturated = ((result == 0) | (result == full)) & (absolute >= 64)
        return cls(float(absolute.mean()), float((largest > 2).mean()), tuple(color), float(saturated.mean()))

    def warnings(self) -> Iterator[str]:
        """Tell why a result that differs so should not be trusted."""
        if self.saturated > MAX_SATURATED:
            yield f'{self.saturated:.0%} of the values became black or white: the network gives values out of range'
        brightness = sum(self.color) / len(self.color)
        tint = max(abs(shift - brightness) for shift in self.color)
        if tint > MAX_TINT or abs(brightness) > MAX_BRIGHTNESS:
            shown = ', '.join(f'{shift:+.0f}' for shift in self.color)
            yield f'the mean colour changed by {shown} levels of 255'


@dataclass
class FileResult:
    """What became of a file."""

    job: Job
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)  # lines on what was noticed on the way
    failure: str = ''  # why there is no result; empty if there is one
    kind: str = ''  # of the failure: unreadable, memory, network or unwritable
    task: str = ''  # what the image was taken for, where that was asked
    is_unchanged: bool = False  # left as it was
    confidence: float | None = None  # in [0, 1], of that
    change: Change | None = None  # None where there is no result, or one of another size
    warnings: list[str] = field(default_factory=list)  # why the result should not be trusted


class Found(NamedTuple):
    """What lies at the inputs of a batch."""

    images: list[tuple[Path, Path]]  # each file with the folder that it lay in, relative to the input
    failures: list[str]  # why inputs, or folders in them, cannot be used
    left_out: Counter[str]  # how many files and folders were seen and not taken, by reason

    def lines(self) -> list[str]:
        """Return what the user must know of it, in lines."""
        lines = [f'basicsr: error: {failure}' for failure in self.failures]
        return lines + ([f'note: left out: {count_reasons(self.left_out)}'] if self.left_out else [])


def find_images(inputs: Iterable[str | os.PathLike], output: Path, recursive: bool = False) -> Found:
    """Find the files to restore, each once, folders in order of names.

    Args:
        inputs: files, and folders of which all images are taken but hidden ones.
        output: folder that is left out where it lies inside an input, as those of earlier results are.
        recursive: whether to go into folders inside folders.
    Returns:
        The files; those named that cannot be read among them, as the others are restored all the same.
    Raises:
        DataError: if there is nothing to restore.
    """
    found = Found([], [], Counter())
    known: set[tuple[int, int] | Path] = set()
    for path in (Path(given).expanduser() for given in inputs):
        images = list(_walk(path, output, recursive, found)) if path.is_dir() else [(path, Path())]
        if path.is_dir() and not images:
            reasons = f'; there are {count_reasons(found.left_out)}' if found.left_out else ''
            deeper = '; --recursive takes the folders inside too' if found.left_out['folders inside'] else ''
            failure = f'{path}: no images in this folder (expected {", ".join(FORMAT_OF)}{reasons}){deeper}'
            found.failures.append(failure)
        for image, folder in images:
            identity = _identity(image) or image
            found.left_out.update(['other names of the same file'] if identity in known and image != path else [])
            found.images.extend([(image, folder)] if identity not in known else [])
            known.add(identity)
    reasons = [_why_unreadable(image) for image, _ in found.images]
    if None not in reasons:
        raise DataError(next(iter([*reasons, *found.failures])))
    return found


def plan_jobs(
    images: Sequence[tuple[Path, Path]], output: str | os.PathLike, suffix: str = '', file_format: str = 'keep'
) -> list[Job]:
    """Name a result for every image of `find_images`: distinct names, none of them an image to be read.

    Args:
        output: folder of the results; or the name of a single one, where it ends as images do, not in a slash, and is
            no folder.
        suffix: goes behind the name.
        file_format: 'keep', 'png' or 'tiff'.
    Raises:
        DataError: if a result would replace an input, or `output` names an image and there are several.
    """
    is_folder, output = os.fspath(output).endswith(('/', os.sep)), Path(output)
    kind = '' if is_folder or output.is_dir() else output.suffix.lower()
    if kind in _NOT_WRITTEN:
        raise DataError(f'{output}: expected a folder, or a name that ends in one of {", ".join(FORMAT_OF)}')
    if kind in FORMAT_OF:
        if len(images) > 1 or suffix or file_format != 'keep':
            what = f'{len(images)} images' if len(images) > 1 else 'a suffix or a format for it'
            raise DataError(f'{output} is the name of one result, but there are {what}: expected a folder')
        _protect_inputs(jobs := [Job(images[0][0], output)])
        return jobs
    jobs = [
        Job(source, output / folder / f'{source.stem}{suffix}{_ending(source, file_format)}')
        for source, folder in images
    ]
    wanted = Counter(fold(str(job.target)) for job in jobs)
    occupied = set(wanted)
    for number, (source, target) in enumerate(jobs):
        if wanted[fold(str(target))] > 1:
            stem = f'{target.stem}_{source.suffix[1:].lower()}'
            stems = itertools.chain([stem], (f'{stem}_{count}' for count in itertools.count(2)))
            paths = (target.with_name(f'{name}{target.suffix}') for name in stems)
            target = next(path for path in paths if fold(str(path)) not in occupied)
            occupied.add(fold(str(target)))
            jobs[number] = Job(source, target)
    _protect_inputs(jobs)
    return jobs


def prepare_folders(jobs: Sequence[Job]) -> None:
    """Make the folders of the results, and see that files can be made there, before hours are spent on restoring."""
    for folder in dict.fromkeys(job.target.parent for job in jobs):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise DataError(f'{folder}: no images can be written there: {error.strerror or error}') from error


def mark_results(output: Path, inputs: Iterable[str | os.PathLike]) -> None:
    """Have `find_images` leave out a folder of results inside an input, when later ones go elsewhere."""
    parents = [Path(given).expanduser().resolve() for given in inputs]
    if output.is_dir() and not {*parents}.isdisjoint(output.resolve().parents):
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
    """Restore files one after the other, whatever becomes of each.

    Args:
        jobs: as from `plan_jobs`; the folders of the results are there.
        restorer: what restores all of them; or what chooses by image, and leaves some as they are.
        quality: of JPEG and lossy WebP, 1 to 100.
        max_pixels: larger images are refused.
        on_start: called with each job before it begins.
        on_tile: called with (tiles done, tiles in all) of the image at hand.
        uncertainty: write a map of `Restorer.spread` beside each restored image, see `uncertainty_path`.
    Yields:
        A result for each job, once it has been written.
    Raises:
        FileError: if a result cannot be written: on a disk that takes no more, what follows would be in vain.
        OptionError: if what was asked for, such as a backend, cannot be had for any image.
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
    """Return what is to be written where for a job, none of it if `result` says why that cannot be."""
    job, notes, stage, written = result.job, result.notes, 'unreadable', {}
    try:
        image = read_image(job.source, max_pixels=max_pixels)
        stage = 'network'
        if isinstance(restorer, Specialists):
            result.task, result.confidence, restorer = restorer.choose(image.color)
            if result.confidence < MIN_CONFIDENCE:
                result.warnings.append(f'taken for {result.task}, but with {result.confidence:.0%} only')
        color = image.color
        result.is_unchanged = restorer is None
        if result.task == 'clean':
            notes.append(f'no degradation found ({result.confidence:.0%} sure): left as it is')
        elif restorer is None:
            text = f'taken for {result.task} ({result.confidence:.0%} sure), which this installation has no weights for'
            result.warnings.append(f'{text}: left as it is')
        else:
            color = restorer.restore(color, on_tile=on_tile, on_note=notes.append)
            if uncertainty:
                written[uncertainty_path(job)] = draw_spread(restorer.spread(image.color))
        result.change = Change.between(image.color, color)
        result.warnings += result.change.warnings() if result.change else ()
        stage, kind = 'unwritable', FORMAT_OF[job.target.suffix.lower()]
        if restorer is None and kind == image.format:
            return {job.target: job.source.read_bytes()}
        _, lost = image.metadata(kind)
        notes += [*image.notes, *([f'{kind} does not hold {", ".join(lost)}'] if lost else [])]
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
        return {}


def refuse_clash(paths: Iterable[Path], what: str, jobs: Sequence[Job]) -> None:
    """Raise OptionError if `what` goes to one of `paths` that is an image which a job reads or writes."""
    images = {_identity(path) or path.absolute() for job in jobs for path in job}
    clash = next((path for path in paths if (_identity(path) or path.absolute()) in images), None)
    if clash is not None:
        raise OptionError(f'{clash} is an image of this run, and {what} would replace it')


def uncertainty_path(job: Job) -> Path:
    """Where the map of uncertainty of a result goes."""
    return job.target.with_name(file_name(job.target.stem, '_uncertainty.png'))


def draw_spread(spread: np.ndarray) -> bytes:
    """Draw a map [H, W] of standard deviations in [0, 1] as a PNG, with the scale below it in levels of 255."""
    levels = 255 * spread
    most = max(1.0, float(np.percentile(levels, 99.5)))
    shown = np.uint8(255 * np.clip(levels / most, 0, 1))
    bar = np.tile(np.linspace(0, 255, max(260, shown.shape[1])).astype(np.uint8), (12, 1))
    shown = np.pad(shown, ((0, 8), (0, bar.shape[1] - shown.shape[1])))
    drawn = cv2.applyColorMap(np.vstack([shown, bar, np.zeros((24, bar.shape[1]), np.uint8)]), cv2.COLORMAP_MAGMA)
    text = f'0 to {most:.1f} of 255: std of eight turns'
    cv2.putText(drawn, text, (4, len(drawn) - 7), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (255, 255, 255), 1, cv2.LINE_AA)
    return cv2.imencode('.png', drawn)[1].tobytes()


def report_rows(results: Iterable[FileResult]) -> list[list[Any]]:
    """A row for each file, behind a row of headings: what was noticed, and how much changed, in levels of 255."""
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


def _walk(folder: Path, output: Path, recursive: bool, found: Found) -> Iterator[tuple[Path, Path]]:
    results = output.resolve()

    def fail(error: OSError) -> None:
        found.failures.append(f'{error.filename or folder}: cannot be read: {error.strerror}')

    for current, folders, names in os.walk(folder, onerror=fail):
        here = Path(current)
        folders[:] = sorted(name for name in folders if (here / name).resolve() != results)
        earlier = {name for name in folders if (here / name / _RESULTS).exists()}
        found.left_out.update(['folders of earlier results'] * len(earlier))
        folders[:] = [name for name in folders if name not in earlier]
        skipped = [name for name in folders if not recursive or name.startswith('.')]
        found.left_out.update('hidden' if name.startswith('.') else 'folders inside' for name in skipped)
        folders[:] = [name for name in folders if name not in skipped]
        for name in sorted(names):
            reason = why_no_image(here / name)
            if reason is None:
                yield here / name, here.relative_to(folder)
            else:
                found.left_out[reason] += 1


def _why_unreadable(path: Path) -> str | None:
    """Why a file that was named is no image; None where it looks like one."""
    try:
        return None if _format_of(path) or path.suffix.lower() in FORMAT_OF else f'{path}: {NOT_READ}'
    except OSError as error:
        return f'{path}: cannot be read: {error.strerror}'


def _format_of(path: Path) -> str | None:
    with open_image(path) as file:
        return sniff_format(file.read(16))


def _identity(path: Path) -> tuple[int, int] | None:
    """Equal for links and other spellings of one file; None for what is not there."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _ending(source: Path, file_format: str) -> str:
    """The result's file name ending: the input's own, unless that is not of the format that will be written."""
    try:
        kind = _format_of(source) if file_format == 'keep' else file_format.upper()
    except OSError:
        kind = None  # reading it will say why
    if kind is None or source.suffix.lower() in SUFFIXES[kind]:
        return source.suffix
    return SUFFIXES[kind][0]


def _protect_inputs(jobs: Sequence[Job]) -> None:
    """Refuse results in the place of any input, also through links and other spellings of a name."""
    sources = {_identity(job.source): job.source for job in jobs}
    for target in (job.target for job in jobs):
        identity = _identity(target)  # None for most: what stands in the way is told when the folder is prepared
        if identity is not None and identity in sources:
            raise DataError(
                f'{target} is an input ({sources[identity]}) and would be replaced; '
                'choose another folder (-o) or a --suffix'
            )
        if target.is_dir():
            raise DataError(f'{target} is a folder, a restored image should get this name; choose another -o')
