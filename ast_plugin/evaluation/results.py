"""Results of a validation: a row an image, the metrics of the restored picture beside those of the input."""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import cv2
import numpy as np

from ast_plugin.data.matching import printable
from ast_plugin.evaluation.provenance import Provenance
from ast_plugin.files import write_file

INPUT = 'input'  # column prefix of the unrestored picture's values

_THUMBNAIL_SIDE = 512  # longest side in pixels
_STRIP_GAP = 8

_collected: ContextVar[list['ValidationResults'] | None] = ContextVar('collected', default=None)


@dataclass(frozen=True)
class PictureResult:
    """What the process that restored a picture tells the others.

    Attributes:
        number: of the picture in the dataset.
        name: of its file, without the suffix.
        restored: its metrics.
        degraded: those of the unrestored input; empty where its size is not the result's.
        thumbnails: input, result and clean picture, RGB, [h, w, 3], uint8, of one size; of some pictures only.
    """

    number: int
    name: str
    restored: dict[str, float] = field(default_factory=dict)
    degraded: dict[str, float] = field(default_factory=dict)
    thumbnails: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class Ranking:
    """What makes a picture better than another.

    Attributes:
        metric: its name.
        is_lower_better: which way.
        count: as many of the worst and of the best are shown.
    """

    metric: str
    is_lower_better: bool = False
    count: int = 0

    def key(self, values: Mapping[str, float]) -> tuple[bool, float]:
        """What is the greater, the better a picture is; a value that is not a number is the worst."""
        value = values.get(self.metric, math.nan)
        return (False, 0.0) if math.isnan(value) else (True, -value if self.is_lower_better else value)


@dataclass
class ValidationResults:
    """Metrics by image.

    Attributes:
        dataset: the dataset's name.
        restored: a dictionary of metrics for each image's name.
        degraded: the same for the unrestored input; empty where its size is not the result's.
        thumbnails: input, result and clean picture of some of the images.
        ranking: what makes one image better than another.
        provenance: how the results were made; goes into the files.
    """

    dataset: str
    restored: dict[str, dict[str, float]] = field(default_factory=dict)
    degraded: dict[str, dict[str, float]] = field(default_factory=dict)
    thumbnails: dict[str, tuple[np.ndarray, ...]] = field(default_factory=dict)
    ranking: Ranking | None = None
    provenance: Provenance | None = None

    @classmethod
    def collect(
        cls, dataset: str, pictures: Iterable[PictureResult], ranking: Ranking | None = None
    ) -> 'ValidationResults':
        """Put the pictures of all processes into the dataset's order; namesakes get numbers in that order."""
        results = cls(dataset, ranking=ranking)
        for picture in sorted(pictures, key=lambda picture: picture.number):
            name = distinct(picture.name, results.restored)
            results.restored[name] = picture.restored
            if picture.degraded:
                results.degraded[name] = picture.degraded
            if picture.thumbnails:
                results.thumbnails[name] = picture.thumbnails
        return results

    @property
    def strips(self) -> dict[str, np.ndarray]:
        """The thumbnails of each image side by side, RGB, [h, w, 3], uint8."""
        return {name: side_by_side(pictures) for name, pictures in self.thumbnails.items()}

    def mean(self) -> dict[str, float]:
        """Mean over the images, by metric; images that equal their reference (PSNR inf) are left out of it."""
        return _mean(self.restored)

    def mean_input(self) -> dict[str, float]:
        """Mean over the unrestored inputs, by metric; empty where they were not measured."""
        return _mean(self.degraded)

    def ranks(self) -> dict[str, int]:
        """The place of each measured image, 1 for the best; empty without a ranking."""
        if self.ranking is None:
            return {}
        measured = [name for name, values in self.restored.items() if values]
        measured.sort(key=lambda name: self.ranking.key(self.restored[name]), reverse=True)
        return {name: place for place, name in enumerate(measured, 1)}

    def examples(self) -> list[str]:
        """The worst images and the best of which there are thumbnails, from the worst on."""
        ranks = self.ranks()
        names = sorted((name for name in self.thumbnails if name in ranks), key=lambda name: -ranks[name])
        count = self.ranking.count if self.ranking else 0
        return names if len(names) <= 2 * count else names[:count] + names[-count:]

    def rows(self) -> list[list[str]]:
        """Header, a row an image, and the mean; each metric before and after restoration."""
        metrics = list(self.mean())
        header = ['image']
        for metric in metrics:
            header += [f'{INPUT} {metric}', metric] if self.degraded else [metric]
        lines = [(name, self.degraded.get(name, {}), values) for name, values in self.restored.items()]
        lines.append(('mean', self.mean_input(), self.mean()))
        rows = [header]
        for name, before, after in lines:
            row = [printable(name)]
            for metric in metrics:
                row += [_cell(before, metric)] if self.degraded else []
                row.append(_cell(after, metric))
            rows.append(row)
        return rows

    def notes(self) -> list[str]:
        """What a reader of the table must know of its means, and how it was made."""
        lines = []
        for kind, by_image in (('', self.restored), (f'{INPUT} ', self.degraded)):
            for metric in _mean(by_image):
                count = sum(values.get(metric) == math.inf for values in by_image.values())
                if count and count < len(by_image):
                    lines.append(f'{kind}{metric}: {count} of {len(by_image)} are inf and left out of the mean')
        if self.provenance is not None:
            lines += [printable(f'{name}: {value}') for name, value in self.provenance.items()]
        return lines

    def to_markdown(self) -> str:
        """The table in Markdown, columns aligned for the eye, and what is to be known of it."""
        rows = [[cell.replace('|', '\\|') for cell in row] for row in self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [[rows[0][0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(rows[0][1:], widths[1:], strict=True))]]
        lines.append(['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])])
        for row in rows[1:]:
            lines.append([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        table = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
        notes = '\n'.join(f'- {note}' for note in self.notes())
        return f'{table}\n\n{notes}' if notes else table

    def to_csv(self) -> str:
        """The table as comma-separated values; how it was made stands in columns of their own, the same in each row."""
        made = list(self.provenance.items()) if self.provenance is not None else []
        header, *rows = self.rows()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator='\n')
        writer.writerow([*header, *(name for name, _ in made)])
        writer.writerows([*row, *(printable(value) for _, value in made)] for row in rows)
        return text.getvalue()

    def write(self, folder: Path) -> None:
        """Write the table as `DATASET.csv` and `DATASET.md`, each whole or not at all.

        Raises:
            DataError: if that fails.
        """
        write_file(folder / f'{self.dataset}.csv', self.to_csv().encode())
        write_file(folder / f'{self.dataset}.md', f'{self.to_markdown()}\n'.encode())


@contextmanager
def collected() -> Iterator[list[ValidationResults]]:
    """Gives a list to which the results of every test are added that is written inside of this context."""
    found: list[ValidationResults] = []
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)


def announce(results: ValidationResults) -> None:
    """Hand results to whoever collects them."""
    found = _collected.get()
    if found is not None:
        found.append(results)


def distinct(name: str, taken: Mapping[str, Any]) -> str:
    """`name`, or with a number behind it where pictures of several folders are called the same."""
    if name not in taken:
        return name
    return next(f'{name}_{number}' for number in range(2, len(taken) + 3) if f'{name}_{number}' not in taken)


def thumbnails(pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Pictures of the same scene, all in the last one's size or smaller.

    Args:
        pictures: BGR or grey, [H, W, 3] or [H, W], uint8; as BasicSR's tensor2img gives them.
    Returns:
        RGB, [h, w, 3], uint8, none longer than 512 pixels.
    """
    if not pictures:
        return ()
    height, width = pictures[-1].shape[:2]
    factor = min(1.0, _THUMBNAIL_SIDE / max(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    made = []
    for picture in pictures:
        smaller = picture.shape[0] < size[1]
        scaled = cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST if smaller else cv2.INTER_AREA)
        made.append(cv2.cvtColor(scaled, cv2.COLOR_GRAY2RGB if scaled.ndim == 2 else cv2.COLOR_BGR2RGB))
    return tuple(made)


def side_by_side(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """One strip of pictures of one size, RGB, [h, w, 3], uint8."""
    gap = np.full((len(pictures[0]), _STRIP_GAP, 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (gap, picture)][1:], axis=1)


def _cell(values: Mapping[str, float], metric: str) -> str:
    return f'{values[metric]:.4f}' if metric in values else ''


def _mean(by_image: dict[str, dict[str, float]]) -> dict[str, float]:
    measured = [values for values in by_image.values() if values]
    means = {}
    for metric in next(iter(measured), {}):
        column = [values[metric] for values in measured]
        means[metric] = fmean([value for value in column if value != math.inf] or column)
    return means
