"""Results of a comparison: one row per network, bootstrap confidence intervals, and tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import bootstrap

from ast_plugin.names import to_csv, to_markdown
from ast_plugin.options.sections import INPUT

MISSING = '–'
_SEED = 0
_BLOCK = 2**22  # resampled values held in memory at once
_PREFIXES = ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k'))
_DIGITS = {'psnr': 2, 'ssim': 4}

Size = tuple[int, int]  # (height, width) in pixels


class Estimate(NamedTuple):
    """Mean over the images with the bounds of its confidence interval, None for fewer than two images."""

    mean: float
    low: float | None = None
    high: float | None = None


def estimate(values: Sequence[float], confidence: float = 0.95, resamples: int = 10_000) -> Estimate:
    """Return the mean over images with a percentile bootstrap confidence interval.

    The resamples depend only on the number of values, so all networks measured on the same images, and their
    differences, share the same resamples.

    Args:
        values: one value per image. If any is not finite (the PSNR of a perfect result), there is no interval.
        confidence: confidence level in (0, 1).
        resamples: number of bootstrap resamples.
    """
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2 or not np.isfinite(array).all():
        return Estimate(mean)
    interval = bootstrap(
        (array,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, _BLOCK // len(array)),
        confidence_level=confidence,
        method='percentile',
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high))


@dataclass
class Row:
    """Results of one network; incomplete if it failed."""

    name: str  # of the network; `input` for the degraded images
    kind: str = ''  # registered type
    failed: str = ''  # `STAGE: REASON` of a failure
    parameters: int | None = None
    speeds: dict[Size, Mapping[str, Any]] = field(default_factory=dict)  # records of `measure.measure_speed`
    values: dict[str, dict[str, float]] = field(default_factory=dict)  # image -> metric -> value
    training: dict[str, Any] = field(default_factory=dict)  # `iterations`, `seconds`, `versions`; empty if not trained
    notes: list[str] = field(default_factory=list)  # shown in the report


@dataclass(frozen=True)
class Column:
    """Column of the formatted table."""

    key: str  # `parameters`, `macs`, `milliseconds`, `peak_bytes` or the name of a metric
    title: str
    numbers: list[float | None]  # one per row
    texts: list[str]  # formatted numbers
    best: float | None = None  # best value of the networks; None for fewer than two values or a column without a best


@dataclass
class Results:
    """All results of a comparison."""

    name: str  # of the comparison
    rows: list[Row]  # the input, then the networks in the order of the option file
    lower_is_better: frozenset[str] = frozenset()  # metrics for which lower is better
    baseline: str | None = None  # network that differences refer to; None for the best
    confidence: float = 0.95  # confidence level of the intervals
    resamples: int = 10_000  # number of bootstrap resamples

    @property
    def networks(self) -> list[Row]:
        """Rows of the networks."""
        return [row for row in self.rows if row.name != INPUT]

    @property
    def measured(self) -> list[Row]:
        """Rows with metric values."""
        return [row for row in self.rows if row.values]

    @property
    def images(self) -> list[str]:
        """Names of the images."""
        return list(self.measured[0].values) if self.measured else []

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics, in the order of the option file."""
        return list(self.measured[0].values[self.images[0]]) if self.measured else []

    @property
    def sizes(self) -> list[Size]:
        """Sizes at which costs were measured."""
        return list(dict.fromkeys(size for row in self.rows for size in row.speeds))

    @property
    def uncounted(self) -> list[str]:
        """Operators not included in the MACs."""
        names = {name for row in self.rows for speed in row.speeds.values() for name in speed['uncounted']}
        return sorted({name.removeprefix('aten::').rstrip('_') for name in names})

    def perfect(self, metric: str) -> list[str]:
        """Return the images for which any row has a non-finite value, such as the PSNR of a perfect result."""
        rows = [row.values for row in self.measured]
        return [name for name in self.images if not all(math.isfinite(values[name][metric]) for values in rows)]

    def incomparable(self) -> list[str]:
        """Return the metrics for which every image is NaN in at least one row, so that no common mean exists."""
        rows = [row.values for row in self.measured]
        return [
            metric
            for metric in self.metrics
            if all(any(math.isnan(values[name][metric]) for values in rows) for name in self.images)
        ]

    def of_metric(self, row: Row, metric: str) -> list[float]:
        """Return the values of a metric for the images that are finite in all rows, or for all images if none is."""
        perfect = set(self.perfect(metric))
        finite = [values[metric] for name, values in row.values.items() if name not in perfect]
        return finite or [values[metric] for values in row.values.values()]

    def estimate(self, row: Row, metric: str) -> Estimate | None:
        """Return the mean of a metric with its interval, or None if it was not measured."""
        return estimate(self.of_metric(row, metric), self.confidence, self.resamples) if row.values else None

    def best(self, metric: str) -> Row | None:
        """Return the network with the best mean, or None if no network was measured."""
        sign = -1 if metric in self.lower_is_better else 1
        networks = [row for row in self.measured if row.name != INPUT]
        return max(networks, key=lambda row: sign * statistics.fmean(self.of_metric(row, metric)), default=None)

    def reference(self) -> Row | None:
        """Return the row that differences refer to: the baseline if it was measured, else the best network."""
        named = [row for row in self.measured if row.name == self.baseline]
        return named[0] if named else self.best(self.metrics[0]) if self.metrics else None

    def difference(self, row: Row, metric: str, reference: Row | None = None) -> Estimate | None:
        """Return the mean difference to a reference row, paired by image.

        Pairing removes the variance between images, which is common to both rows.

        Args:
            row: row to compare.
            metric: name of the metric.
            reference: row to subtract; `reference()` if None.
        Returns:
            The estimate, or None if the row is the reference or has no values.
        """
        reference = reference or self.reference()
        if reference is None or row is reference or not row.values:
            return None
        with np.errstate(invalid='ignore'):  # ∞ − ∞
            differences = np.subtract(self.of_metric(row, metric), self.of_metric(reference, metric))
            return estimate(differences, self.confidence, self.resamples)

    def columns(self) -> list[Column]:
        """Return the columns of the formatted table, without the names of the rows."""
        columns = [self._cost('parameters', 'parameters', [row.parameters for row in self.rows], format_count)]
        for size in self.sizes:
            place = f'at {size[0]}²' if size[0] == size[1] else f'at {size[0]}×{size[1]}'
            for key, title, unit, text in (
                ('macs', 'MACs', 1, format_count),
                ('milliseconds', 'ms', 1, format_milliseconds),
                ('peak_bytes', 'MB', 2**20, '{:,.0f}'.format),
            ):
                numbers = [row.speeds.get(size, {}).get(key) for row in self.rows]
                numbers = [number and number / unit for number in numbers]
                columns.append(self._cost(key, f'{title} {place}', numbers, text))
        for metric in self.metrics:
            estimates = [self.estimate(row, metric) for row in self.rows]
            texts = [format_interval(metric, found) for found in estimates]
            means = [found and found.mean for found in estimates]
            columns.append(Column(metric, metric, means, texts, self._best(means, metric in self.lower_is_better)))
        reference = self.reference()
        if reference is not None:
            metric = self.metrics[0]
            differences = [self.difference(row, metric) for row in self.rows]
            texts = [format_interval(metric, found, sign=True) for found in differences]
            means = [found and found.mean for found in differences]
            columns.append(Column(metric, f'Δ {metric} vs. {reference.name}', means, texts))
        return columns

    def to_markdown(self) -> str:
        """Return the formatted table as Markdown."""
        columns = self.columns()
        cells = [[row.name, *(column.texts[number] for column in columns)] for number, row in enumerate(self.rows)]
        return to_markdown([['network', *(column.title for column in columns)], *cells])

    def to_csv(self) -> str:
        """Return all results at full precision, one line per network."""
        rows = [self._csv_cells(row) for row in self.rows]
        return to_csv([list(rows[0]), *(list(cells.values()) for cells in rows)])

    def images_to_csv(self) -> str:
        """Return the metrics of every network and image, one line per image."""
        rows = [(row.name, name, *values.values()) for row in self.rows for name, values in row.values.items()]
        return to_csv([('network', 'image', *self.metrics), *rows])

    def _csv_cells(self, row: Row) -> dict[str, Any]:
        cells: dict[str, Any] = {'network': row.name, 'type': row.kind, 'parameters': row.parameters}
        for size in self.sizes:
            speed = row.speeds.get(size, {})
            for title, key in (('macs', 'macs'), ('ms', 'milliseconds'), ('peak_bytes', 'peak_bytes')):
                cells[f'{title} {size[0]}x{size[1]}'] = speed.get(key)
        nothing = Estimate(None)
        differences = {metric: self.difference(row, metric) or nothing for metric in self.metrics}
        for metric, difference in differences.items():
            cells[metric], cells[f'{metric} low'], cells[f'{metric} high'] = self.estimate(row, metric) or nothing
            cells[f'{metric} difference'] = difference.mean
        for metric, difference in differences.items():
            _, cells[f'{metric} difference low'], cells[f'{metric} difference high'] = difference
        training = {'iterations': row.training.get('iterations'), 'training seconds': row.training.get('seconds')}
        return {**cells, **training, 'failed': row.failed or None}

    def _cost(self, key: str, title: str, numbers: list[float | None], text: Callable[[float], str]) -> Column:
        texts = [MISSING if number is None else text(number) for number in numbers]
        return Column(key, title, numbers, texts, self._best(numbers, is_lower_better=True))

    def _best(self, numbers: Sequence[float | None], is_lower_better: bool) -> float | None:
        own = [n for n, row in zip(numbers, self.rows, strict=True) if n is not None and row.name != INPUT]
        return (min if is_lower_better else max)(own) if len(own) > 1 else None


def _scaled(value: float) -> tuple[float, str]:
    factor, prefix = next(((factor, prefix) for factor, prefix in _PREFIXES if value >= factor), (1, ''))
    return value / factor, prefix


def format_count(value: float) -> str:
    """Format a count with three significant digits and an SI prefix, such as `6.65 M`."""
    scaled, prefix = _scaled(value)
    return f'{format_milliseconds(scaled)} {prefix}' if prefix else f'{scaled:.0f}'


def format_tick(value: float) -> str:
    """Format an axis tick, such as `200 k` or `0.05`."""
    scaled, prefix = _scaled(value)
    return f'{scaled:g} {prefix}'.rstrip()


def format_milliseconds(value: float) -> str:
    """Format milliseconds with three significant digits, without decimals from 100 up."""
    return f'{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}'


def format_duration(seconds: float) -> str:
    """Format a duration, such as `41 s`, `3.2 min` or `5.1 h`."""
    for size, unit in ((3600, 'h'), (60, 'min')):
        if seconds >= 2 * size:
            return f'{seconds / size:.1f} {unit}'
    return f'{seconds:.0f} s'


def format_metric(metric: str, value: float) -> str:
    """Format a metric: PSNR with two decimals, SSIM with four; others with two from 2 up, else four."""
    return f'{value:.{_digits(metric, value)}f}'


def format_interval(metric: str, found: Estimate | None, sign: bool = False) -> str:
    """Format a mean with its interval, such as `29.49 [28.10, 30.75]`."""
    if found is None:
        return MISSING
    form = f'{"+" if sign else ""}.{_digits(metric, found.mean)}f'
    text = f'{found.mean:{form}}'
    return text if found.low is None else f'{text} [{found.low:{form}}, {found.high:{form}}]'


def _digits(metric: str, value: float) -> int:
    known = next((digits for name, digits in _DIGITS.items() if name in metric.lower()), None)
    return known if known is not None else 2 if abs(value) >= 2 else 4
