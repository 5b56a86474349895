"""Strength and run time of each synthetic degradation on the packaged photos.

  python tools/benchmark.py synthesis
  python tools/benchmark.py synthesis --json benchmarks/synthesis_cpu.json

Photos are resized and cropped to 480 x 720 and degraded with default parameters, for each of several seeds. PSNR is
computed between the degraded and the clean image. Time is CPU time on one thread, including OpenCV, as the median over
all photos and seeds; degradations alternate.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import cv2
import numpy as np

from ast_plugin.data.image_files import read_rgb
from ast_plugin.data.synthesis import packaged_photos
from ast_plugin.data.transforms import to_float
from ast_plugin.degradations import DEGRADATIONS
from ast_plugin.metrics import psnr_rgb
from benchmarks import records
from benchmarks.records import Line, say

HEIGHT, WIDTH = 480, 720


def scaled_photos() -> list[np.ndarray]:
    """Return the packaged photos, resized and centre-cropped to [480, 720, 3], float32 in [0, 1]."""
    photos = []
    for photo in packaged_photos():
        image = to_float(read_rgb(photo.path))
        scale = max(HEIGHT / image.shape[0], WIDTH / image.shape[1])
        interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=interpolation)
        top, left = (image.shape[0] - HEIGHT) // 2, (image.shape[1] - WIDTH) // 2
        photos.append(np.ascontiguousarray(image[top : top + HEIGHT, left : left + WIDTH]).clip(0, 1))
    return photos


def measure(photos: Sequence[np.ndarray], seeds: int) -> list[Line]:
    """Apply every degradation to every photo with every seed.

    Returns:
        One row per degradation: its name, `psnr` (minimum, 5 %, median, 95 %, maximum, in dB) and median
        `milliseconds`.
    """
    levels: dict[str, list[float]] = {name: [] for name in DEGRADATIONS}
    seconds: dict[str, list[float]] = {name: [] for name in DEGRADATIONS}
    for number, clean in enumerate(photos):
        say(f'photo {number + 1} of {len(photos)}')
        for seed in range(seeds):
            for name, row in DEGRADATIONS.items():
                generator = np.random.default_rng(seed)
                begun = time.process_time()
                degraded, _ = row.apply(clean, generator, row.parameters())
                seconds[name].append(time.process_time() - begun)
                levels[name].append(psnr_rgb(degraded.clip(0, 1), clean))
    return [
        {
            'degradation': name,
            'psnr': [round(float(level), 2) for level in np.percentile(levels[name], [0, 5, 50, 95, 100])],
            'milliseconds': round(1000 * statistics.median(seconds[name]), 1),
        }
        for name in DEGRADATIONS
    ]


def table(lines: Sequence[Line]) -> str:
    """Format the rows as a Markdown table."""
    rows = [
        [line['degradation'], ', '.join(f'{level:.1f}' for level in line['psnr']), f'{line["milliseconds"]:.0f}']
        for line in lines
    ]
    return records.markdown(['degradation', 'PSNR in dB: min, 5 %, median, 95 %, max', 'ms'], rows, num_texts=2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `benchmark.py synthesis`."""
    records.add_count(parser, '--seeds', 16, 'seeds per photo')
    records.add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write the record."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        lines = measure(scaled_photos(), args.seeds)
    finally:
        cv2.setNumThreads(threads)
    print(f'\n{table(lines)}')
    records.write(args.json, 'synthesis', {'seeds': args.seeds, 'size': [HEIGHT, WIDTH]}, lines)
    return 0
