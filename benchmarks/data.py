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
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
from benchmarks.records import MEGABYTE, Line
from benchmarks.timing import take_turns

OPENCV, BASICSR = 'OpenCV alone, PNG files', 'BasicSR, its PNG LMDB'
_BATCH = 8
_WORKER_ROUNDS = 5

Read = Callable[[int], Any]


class Reader(NamedTuple):
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


def make_readers(folder: Path, patch: int) -> dict[str, Reader]:
    """Pack the pairs of `folder` in every format and open each for patches; return readers by their names."""
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
            'gt_size': patch,
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


def measure(readers: Mapping[str, Reader], pairs: int, rounds: int) -> list[Line]:
    """Read all pairs with each reader in one thread, measured in CPU time.

    Returns:
        One row per reader: `reader`, `pairs_per_second` (median), `of_opencv` and `of_basicsr` (median ratios over
        rounds), `bytes`, and `seconds` of every round.
    """

    def read_all(reader: Reader) -> None:
        for number in range(pairs):
            reader.read(number)

    with _single_threaded():
        taken = take_turns({name: partial(read_all, reader) for name, reader in readers.items()}, rounds + 1)
    lines = _make_lines(taken, 'cpu_seconds', pairs)
    for line in lines:
        line |= {'of_opencv': _ratio(lines[0], line), 'bytes': readers[line['reader']].num_bytes}
    return lines


def measure_loader(readers: Mapping[str, Reader], pairs: int, workers: int) -> list[Line]:
    """Read all pairs through PyTorch's DataLoader with worker processes, in wall-clock time; rows as in `measure`."""
    repeats = max(1, -(-32 * _BATCH // pairs))
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
    return _make_lines(take_turns(calls, _WORKER_ROUNDS + 1), 'seconds', repeats * pairs)


def _make_lines(taken: Mapping[str, Line], clock: str, pairs: int) -> list[Line]:
    """Return the rows of readers from the times of `take_turns`; the first call opens files and fills caches."""
    lines = {name: {'reader': name, 'seconds': times[clock][1:]} for name, times in taken.items()}
    for line in lines.values():
        line['pairs_per_second'] = pairs / statistics.median(line['seconds'])
        line['of_basicsr'] = _ratio(lines[BASICSR], line)
    return list(lines.values())


def _ratio(reference: Line, line: Line) -> float:
    return statistics.median(one / other for one, other in zip(reference['seconds'], line['seconds'], strict=True))


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
    records.add_count(parser, '--pairs', 48, 'number of pairs')
    records.add_count(parser, '--size', 256, 'side of the images in pixels')
    records.add_count(parser, '--patch', 128, 'side of the patches in pixels')
    records.add_count(parser, '--rounds', 15, 'passes over all pairs')
    parser.add_argument(
        '--workers', type=int, nargs='+', default=[2], help='DataLoader worker processes (default: 2); 0 omits them'
    )
    records.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, and write the record."""
    if min(args.workers) < 0:
        raise OptionError('--workers must be 0 or more')
    if args.patch > args.size:
        raise OptionError(f'--patch {args.patch} must not exceed --size {args.size}')
    with tempfile.TemporaryDirectory() as name:
        write_pairs(Path(name), args.pairs, args.size)
        readers = make_readers(Path(name), args.patch)
        results = {
            'loader': {count: measure_loader(readers, args.pairs, count) for count in args.workers if count},
            'one_process': measure(readers, args.pairs, args.rounds),
        }
    print(f'One process, one thread, patches of {args.patch}² from {args.size}²:\n')
    print(table(results['one_process'], args.pairs))
    for workers, lines in results['loader'].items():
        print(f'\nDataLoader, {workers} workers, batch size {_BATCH}:\n')
        print(table(lines, args.pairs))
    settings = {name: getattr(args, name) for name in ('pairs', 'size', 'patch', 'rounds', 'workers')}
    records.write(args.json, 'data', settings, results)
    return 0
