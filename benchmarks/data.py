"""Throughput of reading training pairs, compared with decoding alone and with BasicSR's dataset.

  python tools/benchmark.py data
  python tools/benchmark.py data --json benchmarks/data_cpu.json

Photos included in installed packages are cropped to squares, degraded by rain, stored as files and packed into LMDBs.
All readers read the same pairs and crop patches, in one process with one thread (including OpenCV and PyTorch),
measured in CPU time. Readers alternate in rounds, so that other load on the machine affects them equally; ratios are
medians over rounds. `OpenCV alone` reads and decodes both files only. A second table measures PyTorch's DataLoader with
worker processes, including batching, in wall-clock time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils.lmdb_util import make_lmdb_from_imgs
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from ast_plugin.data.image_files import ImageFile, read_rgb, write_image
from ast_plugin.data.layouts import Source, list_pairs
from ast_plugin.data.lmdb.writer import make_plan, write_lmdbs
from ast_plugin.data.pairs_dataset import PairsDataset
from ast_plugin.data.synthesis import packaged_photos
from ast_plugin.data.transforms import random_crop, to_float
from ast_plugin.degradations import DEGRADATIONS
from ast_plugin.errors import OptionError
from benchmarks import records
from benchmarks.records import MEGABYTE, Line, say

OPENCV, BASICSR = 'OpenCV alone, PNG files', 'BasicSR, its PNG LMDB'
_BATCH = 8
_WORKER_ROUNDS = 5

Read = Callable[[int], Any]


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Attributes:
        pairs: number of different pairs.
        size: side of the images in pixels.
        patch: side of the patches in pixels.
        rounds: number of times each reader reads all pairs.
        workers: numbers of DataLoader worker processes to measure; 0 omits the DataLoader.
    """

    pairs: int
    size: int
    patch: int
    rounds: int
    workers: Sequence[int]


@dataclass(frozen=True)
class Reader:
    """Method to read pairs by index, with its size on disk and its dataset, if any."""

    read: Read
    num_bytes: int
    dataset: Dataset | None = None


def write_pairs(folder: Path, num_pairs: int, size: int) -> None:
    """Crop packaged photos to squares and write rainy images to lq/ and clean ones to gt/, as PNG.

    Args:
        folder: output folder; created if needed.
        num_pairs: number of pairs.
        size: side of the squares in pixels.
    """
    photos = [image for photo in packaged_photos() if min((image := read_rgb(photo.path)).shape[:2]) >= size]
    if not photos:
        raise OptionError(f'--size {size}: larger than all packaged photos; expected 512 or less')
    rain = DEGRADATIONS['rain']
    for kind in ('lq', 'gt'):
        (folder / kind).mkdir(parents=True)
    for number in range(num_pairs):
        generator = np.random.default_rng(number)
        (clean,) = random_crop([photos[number % len(photos)]], size, generator)
        rainy, _ = rain.apply(to_float(clean), generator, rain.parameters())
        write_image(folder / f'gt/{number:05d}.png', ImageFile(np.ascontiguousarray(clean)))
        write_image(folder / f'lq/{number:05d}.png', ImageFile(np.rint(rainy * 255).astype(np.uint8)))


def make_readers(folder: Path, settings: Settings) -> dict[str, Reader]:
    """Pack the pairs of `folder` in every format and open each; return readers by their names in the table."""
    names = sorted(path.name for path in (folder / 'lq').iterdir())
    files = [(str(folder / 'lq' / name), str(folder / 'gt' / name)) for name in names]
    contents = [tuple(np.fromfile(path, np.uint8) for path in pair) for pair in files]
    theirs = folder / 'basicsr'
    theirs.mkdir()
    for kind in ('lq', 'gt'):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            keys = [Path(name).stem for name in names]
            make_lmdb_from_imgs(str(folder / kind), str(theirs / f'{kind}.lmdb'), names, keys)
    listed = list_pairs('folders', Source(dataroot_lq=str(folder / 'lq'), dataroot_gt=str(folder / 'gt')))
    # lmdb cannot open a file twice in one process, so BasicSR reads a copy.
    for name, encoding in (('png', 'png'), ('png_copy', 'png'), ('raw', 'raw')):
        write_lmdbs(make_plan(listed, encoding), folder / name)

    def dataset(kind: type[Dataset], place: Path, **options: Any) -> Reader:
        ending = '.lmdb' if place != folder else ''
        opt = {
            'name': 'benchmark',
            'phase': 'train',
            'scale': 1,
            'dataroot_lq': str(place / f'lq{ending}'),
            'dataroot_gt': str(place / f'gt{ending}'),
            'io_backend': {'type': 'lmdb' if ending else 'disk'},
            'gt_size': settings.patch,
            'use_hflip': True,
            'use_rot': True,
            **options,
        }
        made = kind(opt)
        return Reader(made.__getitem__, _size(place, ending), made)

    def read_files(number: int) -> None:
        for path in files[number]:
            cv2.imread(path)

    def decode(number: int) -> None:
        for content in contents[number]:
            cv2.imdecode(content, cv2.IMREAD_COLOR)

    on_disk = _size(folder, '')
    return {
        OPENCV: Reader(read_files, on_disk),
        'OpenCV alone, PNG in memory': Reader(decode, on_disk),
        'BasicSR, PNG files': dataset(PairedImageDataset, folder),
        BASICSR: dataset(PairedImageDataset, theirs),
        'BasicSR, our PNG LMDB': dataset(PairedImageDataset, folder / 'png_copy'),
        'ours, PNG files': dataset(PairsDataset, folder, keep_uint8=True),
        'ours, PNG LMDB': dataset(PairsDataset, folder / 'png', keep_uint8=True),
        'ours, raw LMDB': dataset(PairsDataset, folder / 'raw', keep_uint8=True),
        'ours, raw LMDB, floats': dataset(PairsDataset, folder / 'raw'),
    }


def _size(place: Path, ending: str) -> int:
    return sum(
        file.stat().st_size
        for kind in ('lq', 'gt')
        for file in (place / f'{kind}{ending}').iterdir()
        if file.suffix in ('.png', '.mdb')
    )


def measure(readers: Mapping[str, Reader], settings: Settings) -> list[Line]:
    """Read all pairs with each reader in one thread, measured in CPU time.

    Returns:
        One row per reader: `reader`, `pairs_per_second` (median), `of_opencv` and `of_basicsr` (median ratios over
        rounds), `bytes`, and `seconds` of every round.
    """

    def read_all(reader: Reader) -> None:
        for number in range(settings.pairs):
            reader.read(number)

    calls = {name: partial(read_all, reader) for name, reader in readers.items()}
    with _single_threaded():
        seconds = _take_rounds(calls, settings.rounds, time.process_time)
    return [
        {
            **_line(name, seconds, settings.pairs),
            'of_opencv': _ratio(seconds[OPENCV], seconds[name]),
            'bytes': readers[name].num_bytes,
        }
        for name in readers
    ]


def measure_loader(readers: Mapping[str, Reader], settings: Settings, workers: int) -> list[Line]:
    """Read all pairs through PyTorch's DataLoader with worker processes, in wall-clock time; rows as in `measure`."""
    repeats = max(1, -(-32 * _BATCH // settings.pairs))
    loaders = {
        name: DataLoader(
            ConcatDataset([reader.dataset] * repeats),
            batch_size=_BATCH,
            num_workers=workers,
            persistent_workers=True,
            collate_fn=getattr(reader.dataset, 'collate', None),
        )
        for name, reader in readers.items()
        if reader.dataset is not None
    }
    calls = {name: partial(deque, loader, maxlen=0) for name, loader in loaders.items()}
    seconds = _take_rounds(calls, _WORKER_ROUNDS, time.perf_counter)
    return [_line(name, seconds, repeats * settings.pairs) for name in loaders]


def _take_rounds(
    calls: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return the seconds of each round by name; calls alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        say(f'round {turn} of {rounds}')
        for name, call in calls.items():
            start = clock()
            call()
            if turn:  # the first round opens files and fills caches
                seconds[name].append(clock() - start)
    return seconds


def _line(name: str, seconds: Mapping[str, list[float]], num_pairs: int) -> Line:
    return {
        'reader': name,
        'pairs_per_second': num_pairs / statistics.median(seconds[name]),
        'of_basicsr': _ratio(seconds[BASICSR], seconds[name]),
        'seconds': [round(value, 5) for value in seconds[name]],
    }


def _ratio(reference: list[float], taken: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(reference, taken, strict=True))


@contextlib.contextmanager
def _single_threaded() -> Iterator[None]:
    before = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before[0])
        torch.set_num_threads(before[1])


def table(lines: Sequence[Line], pairs: int) -> str:
    """Format a Markdown table, with rates relative to OpenCV alone, if measured, and to BasicSR with its LMDB."""
    columns: dict[str, Callable[[Line], str]] = {
        'reader': lambda line: line['reader'],
        'pairs/s': lambda line: f'{line["pairs_per_second"]:.0f}',
        'of OpenCV alone': lambda line: f'{line["of_opencv"]:.2f}',
        'of BasicSR': lambda line: f'{line["of_basicsr"]:.2f}',
        'MB / 1000 pairs': lambda line: f'{line["bytes"] / MEGABYTE / pairs * 1000:.0f}',
    }
    if 'of_opencv' not in lines[0]:
        del columns['of OpenCV alone'], columns['MB / 1000 pairs']
    return records.markdown(list(columns), [[text(line) for text in columns.values()] for line in lines])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `benchmark.py data`."""
    parser.add_argument('--pairs', type=int, default=48, help='number of pairs (default: %(default)s)')
    parser.add_argument('--size', type=int, default=256, help='side of the images in pixels (default: %(default)s)')
    parser.add_argument('--patch', type=int, default=128, help='side of the patches in pixels (default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=15, help='passes over all pairs (default: %(default)s)')
    parser.add_argument(
        '--workers', type=int, nargs='+', default=[2], help='DataLoader worker processes (default: 2); 0 omits them'
    )
    records.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, and write the record."""
    settings = Settings(args.pairs, args.size, args.patch, args.rounds, args.workers)
    if min(settings.pairs, settings.size, settings.patch, settings.rounds) < 1 or min(settings.workers) < 0:
        raise OptionError('--pairs, --size, --patch and --rounds must be 1 or more, --workers 0 or more')
    if settings.patch > settings.size:
        raise OptionError(f'--patch {settings.patch} must not exceed --size {settings.size}')
    with tempfile.TemporaryDirectory() as name:
        write_pairs(Path(name), settings.pairs, settings.size)
        readers = make_readers(Path(name), settings)
        results = {
            'loader': {count: measure_loader(readers, settings, count) for count in settings.workers if count},
            'one_process': measure(readers, settings),
        }
    print(f'One process, one thread, patches of {settings.patch}² from {settings.size}²:\n')
    print(table(results['one_process'], settings.pairs))
    for workers, lines in results['loader'].items():
        print(f'\nDataLoader, {workers} workers, batch size {_BATCH}:\n')
        print(table(lines, settings.pairs))
    records.write(args.json, 'data', asdict(settings), results)
    return 0
