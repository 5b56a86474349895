"""Results of a validation: metrics of every image before and after restoration, tables and provenance."""

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image

import ast_plugin
from ast_plugin.checkpoints import weights_file
from ast_plugin.data.contact_sheet import Cell, draw_contact_sheet, save_sheet
from ast_plugin.devices import describe_device
from ast_plugin.errors import only_warn
from ast_plugin.evaluation.protocols import Metrics, Protocol
from ast_plugin.files import file_digest, write_file
from ast_plugin.names import escape_markdown, printable, to_csv, to_markdown

INPUT = 'input'  # column prefix of the metrics of the degraded input


@dataclass(frozen=True)
class ImageResult:
    """Result of one image, gathered from all processes."""

    number: int  # index in the dataset
    name: str  # file name without suffix
    restored: dict[str, float] = field(default_factory=dict)
    degraded: dict[str, float] = field(default_factory=dict)  # empty if the size of the input differs from the result
    thumbnails: tuple[np.ndarray, ...] = ()  # input, result and clean image, RGB [h, w, 3], uint8, of equal size
    failure: str = ''  # `CLASS: REASON` if metrics are missing or NaN


@dataclass(frozen=True)
class Ranking:
    """Order of images by a metric."""

    metric: str
    is_lower_better: bool = False
    count: int = 0  # number of the worst and of the best images to show

    def key(self, values: Mapping[str, float]) -> tuple[bool, float]:
        """Return a sort key that increases with the quality of an image; NaN is the worst."""
        value = values.get(self.metric, math.nan)
        return (False, 0.0) if math.isnan(value) else (True, -value if self.is_lower_better else value)


@dataclass
class ValidationResults:
    """Metrics of every image of a dataset.

    Attributes:
        dataset: name of the dataset.
        restored: metrics by image name.
        degraded: metrics of the degraded input by image name; empty if its size differs from the result.
        thumbnails: input, result and clean image of a subset of the images.
        failures: reasons for missing or NaN metrics by image name.
        ranking: order of the images.
        provenance: origin of the results, see `describe_provenance`; written into the files.
    """

    dataset: str
    restored: dict[str, dict[str, float]] = field(default_factory=dict)
    degraded: dict[str, dict[str, float]] = field(default_factory=dict)
    thumbnails: dict[str, tuple[np.ndarray, ...]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    ranking: Ranking | None = None
    provenance: dict[str, str] = field(default_factory=dict)

    @classmethod
    def collect(
        cls, dataset: str, images: Iterable[ImageResult], ranking: Ranking | None = None
    ) -> 'ValidationResults':
        """Combine the images of all processes in dataset order; duplicate names are numbered in that order."""
        by_name: dict[str, ImageResult] = {}
        for image in sorted(images, key=lambda image: image.number):
            by_name[distinct(image.name, by_name)] = image

        def present(what: str) -> dict[str, Any]:
            return {name: value for name, image in by_name.items() if (value := getattr(image, what))}

        restored = {name: image.restored for name, image in by_name.items()}
        return cls(dataset, restored, present('degraded'), present('thumbnails'), present('failure'), ranking)

    def mean(self) -> dict[str, float]:
        """Return the mean of each metric, excluding NaN and inf (the PSNR of a result equal to its reference)."""
        return _mean(self.restored)

    def mean_input(self) -> dict[str, float]:
        """Return the mean of each metric over the degraded inputs; empty if they were not measured."""
        return _mean(self.degraded)

    def ranks(self) -> dict[str, int]:
        """Return the rank of each measured image, 1 for the best; empty without a ranking."""
        if self.ranking is None:
            return {}
        measured = [name for name, values in self.restored.items() if values]
        measured.sort(key=lambda name: self.ranking.key(self.restored[name]), reverse=True)
        return {name: place for place, name in enumerate(measured, 1)}

    def examples(self) -> list[str]:
        """Return the names of the worst and the best images with thumbnails, worst first."""
        ranks = self.ranks()
        names = sorted((name for name in self.thumbnails if name in ranks), key=lambda name: -ranks[name])
        count = self.ranking.count if self.ranking else 0
        return names if len(names) <= 2 * count else names[:count] + names[-count:]

    def draw_examples(self) -> Image.Image | None:
        """Draw a contact sheet of input, result and clean image of each example with metrics; None without examples."""
        ranks = self.ranks()
        rows = []
        for name in self.examples():
            lq, result, gt = self.thumbnails[name]
            before = f'{name}: {_scores(self.degraded.get(name, {}))}'.removesuffix(': ')
            rank = f'rank {ranks[name]} of {len(ranks)} by {self.ranking.metric}'
            rows.append([Cell(lq, before), Cell(result, _scores(self.restored[name])), Cell(gt, rank)])
        return draw_contact_sheet(('input', 'restored', 'ground truth'), rows) if rows else None

    def rows(self) -> list[list[str]]:
        """Return the table: header, one row per image, and the mean; each metric before and after restoration."""
        kinds = [INPUT, ''] if self.degraded else ['']
        columns = [(f'{kind} {metric}'.strip(), kind, metric) for metric in self.mean() for kind in kinds]
        lines = [(name, self.degraded.get(name, {}), values) for name, values in self.restored.items()]
        lines.append(('mean', self.mean_input(), self.mean()))
        rows = [['image', *(heading for heading, _, _ in columns)]]
        for name, before, after in lines:
            cells = ((before if kind else after).get(metric) for _, kind, metric in columns)
            rows.append([name, *('' if cell is None else f'{cell:.4f}' for cell in cells)])
        return rows

    def notes(self) -> list[str]:
        """Return notes on values excluded from the means, failures, and provenance."""
        lines = []
        for kind, by_image in (('', self.restored), (f'{INPUT} ', self.degraded)):
            for metric in _mean(by_image):
                column = [values.get(metric, math.nan) for values in by_image.values()]
                counts = Counter(str(value) for value in column if not math.isfinite(value))
                for value, count in counts.items() if counts.total() < len(column) else ():
                    lines.append(f'{kind}{metric}: {count} of {len(column)} are {value} and excluded from the mean')
        lines += [f'failed: {name}: {failure}' for name, failure in self.failures.items()]
        return lines + [f'{name}: {value}' for name, value in self.provenance.items()]

    def to_markdown(self) -> str:
        """Return the table and its notes in Markdown."""
        notes = '\n'.join(f'- {escape_markdown(note)}' for note in self.notes())
        return f'{to_markdown(self.rows())}\n\n{notes}' if notes else to_markdown(self.rows())

    def to_csv(self) -> str:
        """Return the table as CSV, with the provenance in additional columns of every row."""
        header, *rows = self.rows()
        rows = [[*header, *self.provenance], *([*row, *self.provenance.values()] for row in rows)]
        return to_csv([list(map(printable, row)) for row in rows])

    def write(self, folder: Path) -> Path | None:
        """Write `DATASET.csv`, `DATASET.md` and, if there are examples, a contact sheet; return its path or None."""
        write_file(folder / f'{self.dataset}.csv', self.to_csv().encode())
        write_file(folder / f'{self.dataset}.md', f'{self.to_markdown()}\n'.encode())
        with only_warn(f'{self.dataset}: contact sheet not drawn'):
            if (sheet := self.draw_examples()) is not None:
                path = folder / f'{self.dataset}_worst_and_best.png'
                save_sheet(sheet, path)
                return path
        return None


def describe_provenance(
    protocol: Protocol, metrics: Metrics, weights: str | os.PathLike | None, device: torch.device
) -> dict[str, str]:
    """Return protocol, metrics, weights with their SHA-256, and versions, which comparable results require."""
    try:
        basicsr = version('basicsr')
    except PackageNotFoundError:  # run from a source checkout
        basicsr = 'unknown'
    return {
        'protocol': protocol.describe(),
        'metrics': '; '.join(f'{name}: {_describe_metric(options)}' for name, options in metrics.items()),
        'weights': str(weights or ''),
        'sha256': file_digest(weights_file(weights)) if weights else '',
        'versions': f'ast_plugin {ast_plugin.__version__}, basicsr {basicsr}, torch {torch.__version__}, '
        f'device {describe_device(device)}',
    }


def distinct(name: str, taken: Mapping[str, Any]) -> str:
    """Return `name`, with a number appended if it is taken, as by an image of another folder."""
    if name not in taken:
        return name
    return next(f'{name}_{number}' for number in range(2, len(taken) + 3) if f'{name}_{number}' not in taken)


def _mean(by_image: dict[str, dict[str, float]]) -> dict[str, float]:
    measured = [values for values in by_image.values() if values]
    means = {}
    for metric in next(iter(measured), {}):
        column = [values[metric] for values in measured]
        means[metric] = fmean([value for value in column if math.isfinite(value)] or column)
    return means


def _scores(values: Mapping[str, float]) -> str:
    return ', '.join(f'{metric} {value:.{2 if abs(value) >= 2 else 4}f}' for metric, value in values.items())


def _describe_metric(options: Mapping[str, Any]) -> str:
    arguments = [f'{key} {value}' for key, value in options.items() if key not in ('type', 'better')]
    return ', '.join([options['type'], *arguments])
