"""Restore picture files with trained weights.

Takes PNG, JPEG, WebP, TIFF and BMP. Each result keeps name, format, depth, transparency, colour profile and EXIF data
of its input, and stands upright. JPEG and lossy WebP are written with --quality, the rest without loss. Inputs are
never replaced; results of an earlier run are.

    basicsr infer -i photos -o restored --weights experiments/AST_derain/stage_2/models/net_g_best.safetensors

Exit status: 0 all restored, 1 some could not be, 2 wrong usage or input.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ast_plugin.errors import DataError, OptionError, ShapeError

if TYPE_CHECKING:
    import numpy as np

    from ast_plugin.data.image_files import ImageFile
    from ast_plugin.evaluation.restorer import Restorer


@dataclass(frozen=True)
class Job:
    """One file to restore, and where the result goes."""

    source: Path
    target: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `basicsr infer` takes."""
    parser.add_argument('-i', '--input', nargs='+', required=True, metavar='PATH', help='pictures, or folders of them')
    parser.add_argument('-o', '--output', required=True, metavar='DIR', help='folder for the restored pictures')
    parser.add_argument('--weights', required=True, metavar='FILE', help='trained weights, .safetensors or .pth')
    parser.add_argument(
        '-opt', metavar='FILE', help='option file whose network_g the weights are of; by default the weights file tells'
    )
    parser.add_argument('--param-key', metavar='KEY', help='where a .pth file holds the weights, such as params_ema')
    parser.add_argument(
        '--tile',
        type=_tile,
        default='auto',
        metavar='N',
        help='restore in tiles of N x N pixels; by default (auto) only what does not fit in memory is',
    )
    parser.add_argument(
        '--overlap', type=int, metavar='N', help='pixels that tiles share (default: a quarter of a tile)'
    )
    parser.add_argument(
        '--batch', type=int, default=1, metavar='N', help='tiles that go through the network together (default: 1)'
    )
    parser.add_argument(
        '--self-ensemble',
        action='store_true',
        help='give the mean of the results for the eight flips and rotations: a little better, eight times as long',
    )
    parser.add_argument('--device', metavar='NAME', help='cpu, cuda, cuda:1 ... (default: a GPU where there is one)')
    parser.add_argument(
        '--suffix', default='', metavar='TEXT', help='put TEXT behind the names: photo.jpg becomes photoTEXT.jpg'
    )
    parser.add_argument(
        '--format',
        choices=('keep', 'png', 'tiff'),
        default='keep',
        help='file format of the results (default: that of the input)',
    )
    parser.add_argument('--quality', type=int, default=95, metavar='N', help='of JPEG and WebP, 1 to 100 (default: 95)')
    parser.add_argument('--recursive', action='store_true', help='take folders inside folders too, and keep their tree')
    parser.add_argument(
        '--max-megapixels', type=float, default=200, metavar='N', help='refuse pictures that claim more (default: 200)'
    )


def run(args: argparse.Namespace) -> int:
    """Restore what the arguments name.

    Returns:
        0 if every file was restored, 1 if some could not be.
    Raises:
        PluginError: if the arguments, the weights or the output folder cannot be used, before anything is computed;
            later only if a result cannot be written.
    """
    _check(args)
    output = Path(args.output).expanduser()
    jobs = plan(find_pictures(args.input, output, args.recursive), output, args.suffix, args.format)
    restorer = _load(args)
    _prepare_folders(jobs, output)
    return _restore_all(jobs, restorer, args, output)


def find_pictures(inputs: Iterable[str | os.PathLike], output: Path, recursive: bool) -> list[tuple[Path, Path]]:
    """The files to restore, each once, folders in order of names.

    Args:
        inputs: files, and folders of which all pictures are taken but hidden ones.
        output: folder that is left out where it lies inside an input.
        recursive: whether to go into folders inside folders.
    Returns:
        Each file with the folder that it lay in, relative to the input.
    Raises:
        DataError: if an input is missing, no picture, or a folder without any.
    """
    from ast_plugin.data.image_files import sniff_format

    found: dict[tuple[int, int], tuple[Path, Path]] = {}
    for given in inputs:
        path = Path(given).expanduser()
        try:
            if path.is_dir():
                pictures = list(_walk(path, output, recursive))
                if not pictures:
                    deeper = not recursive and any(entry.is_dir() for entry in path.iterdir())
                    raise DataError(
                        f'{path}: no pictures in this folder (expected {", ".join(_endings())})'
                        + ('; --recursive takes the folders inside too' if deeper else '')
                    )
            elif path.suffix.lower() in _endings() or sniff_format(_first_bytes(path)):
                pictures = [(path, Path())]
            else:
                raise DataError(f'{path}: not a PNG, JPEG, WebP, TIFF or BMP file')
            for picture, folder in pictures:
                stat = picture.stat()
                found.setdefault((stat.st_dev, stat.st_ino), (picture, folder))
        except OSError as error:
            raise DataError(f'{error.filename or path}: cannot be read: {error.strerror}') from error
    return list(found.values())


def plan(pictures: Sequence[tuple[Path, Path]], output: Path, suffix: str, file_format: str) -> list[Job]:
    """Name a result for every picture: distinct names, none of them a picture to be read.

    Args:
        pictures: as from `find_pictures`.
        output: folder of the results.
        suffix: goes behind the name.
        file_format: 'keep', 'png' or 'tiff'.
    Raises:
        DataError: if a result would replace an input.
    """
    names = [
        (source, output / folder, source.stem + suffix, _ending(source, file_format)) for source, folder in pictures
    ]
    wanted = Counter(_key(folder / (stem + ending)) for _, folder, stem, ending in names)
    jobs, occupied = [], set(wanted)
    for source, folder, stem, ending in names:
        target = folder / (stem + ending)
        if wanted[_key(target)] > 1:
            target = _distinct(folder, f'{stem}_{source.suffix[1:].lower()}', ending, occupied)
        occupied.add(_key(target))
        jobs.append(Job(source, target))
    _protect_inputs(jobs)
    return jobs


def _tile(text: str) -> int | str:
    if text == 'auto':
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'expected the side of a tile in pixels, or auto, got {text}') from None


def _check(args: argparse.Namespace) -> None:
    tile = args.tile if args.tile != 'auto' else None
    if tile is not None and tile < 1:
        raise OptionError(f'--tile is {tile}: expected the side of a tile in pixels, 1 or more, or auto')
    if args.overlap is not None and args.overlap < 0:
        raise OptionError(f'--overlap is {args.overlap}: expected a number of pixels, 0 or more')
    if tile is not None and args.overlap is not None and args.overlap >= tile:
        raise OptionError(f'--overlap is {args.overlap} and --tile is {tile}: the overlap must be smaller')
    if args.batch < 1:
        raise OptionError(f'--batch is {args.batch}: expected a number of tiles, 1 or more')
    if not 1 <= args.quality <= 100:
        raise OptionError(f'--quality is {args.quality}: expected 1 to 100')
    if not args.max_megapixels > 0:
        raise OptionError(f'--max-megapixels is {args.max_megapixels}: expected more than 0')
    if any(mark in args.suffix for mark in ('/', '\\', '\0')):
        raise OptionError(f'--suffix is {args.suffix!r}: expected a part of a file name, not a path')


def _walk(folder: Path, output: Path, recursive: bool) -> Iterator[tuple[Path, Path]]:
    def fail(error: OSError) -> None:
        raise error

    hold_back = output.resolve()
    for current, folders, names in os.walk(folder, onerror=fail):
        here = Path(current)
        folders[:] = sorted(
            name for name in folders if recursive and not name.startswith('.') and (here / name).resolve() != hold_back
        )
        for name in sorted(names):
            if not name.startswith('.') and Path(name).suffix.lower() in _endings():
                yield here / name, here.relative_to(folder)


def _endings() -> list[str]:
    from ast_plugin.data.image_files import SUFFIXES

    return [ending for endings in SUFFIXES.values() for ending in endings]


def _first_bytes(path: Path) -> bytes:
    with open(path, 'rb') as file:
        return file.read(16)


def _ending(source: Path, file_format: str) -> str:
    """The result's file name ending: the input's own, unless that is not of the format that will be written."""
    from ast_plugin.data.image_files import SUFFIXES, sniff_format

    kind = sniff_format(_first_bytes(source)) if file_format == 'keep' else file_format.upper()
    if kind is None or source.suffix.lower() in SUFFIXES[kind]:
        return source.suffix
    return SUFFIXES[kind][0]


def _key(path: Path) -> str:
    """Equal for names that some file system takes for the same."""
    return unicodedata.normalize('NFC', str(path)).casefold()


def _distinct(folder: Path, stem: str, ending: str, occupied: set[str]) -> Path:
    """The first of `stem`, `stem_2`, `stem_3` … that is free."""
    stems = itertools.chain([stem], (f'{stem}_{count}' for count in itertools.count(2)))
    return next(path for path in (folder / (name + ending) for name in stems) if _key(path) not in occupied)


def _protect_inputs(jobs: Sequence[Job]) -> None:
    """Refuse results in the place of any input, also through links and other spellings of a name."""
    sources = {(stat.st_dev, stat.st_ino): job.source for job in jobs for stat in [job.source.stat()]}
    for job in jobs:
        try:
            stat = job.target.stat()
        except OSError:
            continue  # not there yet; what stands in the way is told when the folder is prepared
        if (stat.st_dev, stat.st_ino) in sources:
            raise DataError(
                f'{job.target} is an input ({sources[stat.st_dev, stat.st_ino]}) and would be replaced; '
                'choose another folder (-o) or a --suffix'
            )
        if job.target.is_dir():
            raise DataError(f'{job.target} is a folder, a restored picture should get this name; choose another -o')


def _load(args: argparse.Namespace) -> Restorer:
    from ast_plugin import options
    from ast_plugin.evaluation.restorer import Restorer
    from ast_plugin.plugins import load_plugins

    load_plugins()
    network = None
    if args.opt is not None:
        file = options.find(args.opt)
        network = options.load(file).get('network_g')
        if not isinstance(network, dict) or 'type' not in network:
            raise OptionError(f'{file}: expected network_g with a type and its arguments')
    restorer = Restorer.from_weights(
        Path(args.weights).expanduser(),
        network=network,
        param_key=args.param_key,
        device=args.device,
        tile=args.tile,
        overlap=args.overlap,
        batch=args.batch,
        self_ensemble=args.self_ensemble,
    )
    for note in restorer.notes:
        print(f'note: {args.weights}: {note}; -opt FILE names the network in full', file=sys.stderr)
    return restorer


def _prepare_folders(jobs: Sequence[Job], output: Path) -> None:
    """Make the folders of the results, and see that files can be made there, before hours are spent on restoring."""
    import tempfile

    for folder in dict.fromkeys([output, *(job.target.parent for job in jobs)]):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise DataError(f'{folder}: no pictures can be written there: {error.strerror or error}') from error


def _restore_all(jobs: Sequence[Job], restorer: Restorer, args: argparse.Namespace, output: Path) -> int:
    from ast_plugin.files import write_file
    from ast_plugin.ops import frozen_weights

    start, failed = time.perf_counter(), 0
    with _Report(len(jobs)) as report, frozen_weights():
        for job in jobs:
            report.begin(job)
            try:
                data = _restore_file(job, restorer, args, report)
            except (DataError, ShapeError) as error:
                failed += 1
                report.fail(job, error)
                continue
            # A disk that takes no more ends the run: what follows would be restored in vain.
            write_file(job.target, data)
            report.end(job)
    seconds = time.perf_counter() - start
    of_all = f' of {len(jobs)}' if failed else ''
    plural = 's' if len(jobs) != 1 else ''
    print(f'restored {len(jobs) - failed}{of_all} picture{plural} in {seconds:.1f} s: {output}')
    return 1 if failed else 0


def _restore_file(job: Job, restorer: Restorer, args: argparse.Namespace, report: _Report) -> bytes:
    from dataclasses import replace

    from ast_plugin.data.image_files import encode_image, read_image

    picture = read_image(job.source, max_pixels=int(args.max_megapixels * 1e6))
    for note in picture.notes:
        report.note(job, note)
    try:
        color = restorer.restore(picture.color, on_tile=report.on_tile, on_note=lambda note: report.note(job, note))
    except (DataError, ShapeError) as error:
        raise DataError(f'{job.source}: {error}') from error
    restored = replace(picture, color=color, alpha=_enlarged(picture, color))
    return encode_image(job.target, restored, quality=args.quality)


def _enlarged(picture: ImageFile, color: np.ndarray) -> np.ndarray | None:
    """The transparency in the size that the network gave the colours."""
    if picture.alpha is None or picture.alpha.shape == color.shape[:2]:
        return picture.alpha
    import cv2

    return cv2.resize(picture.alpha, color.shape[1::-1], interpolation=cv2.INTER_LINEAR)


class _Report:
    """A bar in a terminal, one line a picture elsewhere; faults and notes go to the error stream as lines."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self.total, self.count, self.started = total, 0, 0.0
        self.bar = tqdm(
            total=total, unit='picture', dynamic_ncols=True, file=sys.stderr, disable=not sys.stderr.isatty()
        )

    def __enter__(self) -> _Report:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def begin(self, job: Job) -> None:
        self.count += 1
        self.started = time.perf_counter()
        self.bar.set_postfix_str(job.source.name)

    def on_tile(self, done: int, total: int) -> None:
        if total > 1:
            name, _, _ = (self.bar.postfix or '').partition(', tile ')
            self.bar.set_postfix_str(f'{name}, tile {done}/{total}')

    def end(self, job: Job) -> None:
        if self.bar.disable:
            seconds = time.perf_counter() - self.started
            print(f'[{self.count}/{self.total}] {job.target} ({seconds:.1f} s)', flush=True)
        self.bar.update()

    def fail(self, job: Job, error: Exception) -> None:
        self._line(f'basicsr: error: {error}')
        self.bar.update()

    def note(self, job: Job, note: str) -> None:
        self._line(f'note: {job.source}: {note}')

    def _line(self, text: str) -> None:
        # tqdm lifts the line above the bar
        self.bar.write(text, file=sys.stderr)
