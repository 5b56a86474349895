"""Results of a validation: a row an image, the metrics of the restored picture beside those of the input."""

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import cv2
import numpy as np

INPUT = 'input'  # column prefix of the unrestored picture's values

_STRIP_SIDE = 512  # longest side of a picture in a strip, in pixels
_STRIP_GAP = 8


@dataclass(frozen=True)
class PictureResult:
    """What the process that restored a picture tells the others.

    Attributes:
        number: of the picture in the dataset.
        name: of its file, without the suffix.
        restored: its metrics.
        degraded: those of the unrestored input; empty where its size is not the result's.
        strip: input, result and clean picture side by side, RGB, [H, W, 3], uint8; for some pictures only.
    """

    number: int
    name: str
    restored: dict[str, float] = field(default_factory=dict)
    degraded: dict[str, float] = field(default_factory=dict)
    strip: np.ndarray | None = None


@dataclass
class ValidationResults:
    """Metrics by image.

    Attributes:
        dataset: the dataset's name.
        restored: a dictionary of metrics for each image's name.
        degraded: the same for the unrestored input; empty where its size is not the result's.
        strips: pictures to look at, of some of the images.
    """

    dataset: str
    restored: dict[str, dict[str, float]] = field(default_factory=dict)
    degraded: dict[str, dict[str, float]] = field(default_factory=dict)
    strips: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def collect(cls, dataset: str, pictures: Iterable[PictureResult]) -> 'ValidationResults':
        """Put the pictures of all processes into the dataset's order; namesakes get numbers in that order."""
        results = cls(dataset)
        for picture in sorted(pictures, key=lambda picture: picture.number):
            name = distinct(picture.name, results.restored)
            results.restored[name] = picture.restored
            if picture.degraded:
                results.degraded[name] = picture.degraded
            if picture.strip is not None:
                results.strips[name] = picture.strip
        return results

    def mean(self) -> dict[str, float]:
        """Mean over the images, by metric."""
        return _mean(self.restored)

    def mean_input(self) -> dict[str, float]:
        """Mean over the unrestored inputs, by metric; empty where they were not measured."""
        return _mean(self.degraded)

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
            row = [name]
            for metric in metrics:
                row += [_cell(before, metric)] if self.degraded else []
                row.append(_cell(after, metric))
            rows.append(row)
        return rows

    def to_markdown(self) -> str:
        """The table in Markdown, columns aligned for the eye."""
        rows = self.rows()
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [[rows[0][0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(rows[0][1:], widths[1:], strict=True))]]
        lines.append(['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])])
        for row in rows[1:]:
            lines.append([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        return '\n'.join(f'| {" | ".join(line)} |' for line in lines)

    def to_csv(self) -> str:
        """The table as comma-separated values."""
        text = io.StringIO()
        csv.writer(text, lineterminator='\n').writerows(self.rows())
        return text.getvalue()


def distinct(name: str, taken: Mapping[str, Any]) -> str:
    """`name`, or with a number behind it where pictures of several folders are called the same."""
    if name not in taken:
        return name
    return next(f'{name}_{number}' for number in range(2, len(taken) + 3) if f'{name}_{number}' not in taken)


def side_by_side(pictures: Iterable[np.ndarray]) -> np.ndarray:
    """One strip of several pictures of the same scene, all in the last one's size or smaller.

    Args:
        pictures: BGR or grey, [H, W, 3] or [H, W], uint8; as BasicSR's tensor2img gives them.
    Returns:
        RGB, [h, w, 3], uint8; no picture in it is longer than 512 pixels.
    """
    pictures = list(pictures)
    height, width = pictures[-1].shape[:2]
    factor = min(1.0, _STRIP_SIDE / max(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    gap = np.full((size[1], _STRIP_GAP, 3), 255, np.uint8)
    parts = []
    for picture in pictures:
        smaller = picture.shape[0] < size[1]
        scaled = cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST if smaller else cv2.INTER_AREA)
        parts += [gap, cv2.cvtColor(scaled, cv2.COLOR_GRAY2RGB if scaled.ndim == 2 else cv2.COLOR_BGR2RGB)]
    return np.concatenate(parts[1:], axis=1)


def _cell(values: Mapping[str, float], metric: str) -> str:
    return f'{values[metric]:.4f}' if metric in values else ''


def _mean(by_image: dict[str, dict[str, float]]) -> dict[str, float]:
    measured = [values for values in by_image.values() if values]
    return {metric: fmean(values[metric] for values in measured) for metric in next(iter(measured), {})}
