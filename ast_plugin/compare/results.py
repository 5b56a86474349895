"""What a comparison has found: a row a network, and the tables made of them."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ast_plugin.compare.bootstrap import Estimate, estimate, paired_difference
from ast_plugin.compare.formats import table_cells
from ast_plugin.options.compare_file import INPUT

Size = tuple[int, int]


@dataclass(frozen=True)
class Speed:
    """What a network costs at one size.

    Attributes:
        macs: multiply-adds of a pass.
        milliseconds: median of the timed runs; with the fastest and the slowest.
        peak_bytes: on top of the weights; None where the system does not tell.
        uncounted: operators that `macs` leaves out.
        load: of the machine before.
    """

    macs: int
    milliseconds: float
    fastest: float
    slowest: float
    peak_bytes: int | None
    uncounted: Mapping[str, int]
    load: float | None

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Speed:
        """Out of a record of `measure.measure_speed`."""
        times = [1000 * value for value in record['seconds']]
        return cls(
            record['macs'],
            statistics.median(times),
            min(times),
            max(times),
            record['peak_bytes'],
            record['uncounted'],
            record['load'],
        )


@dataclass
class Row:
    """What was found about a network, as far as it got.

    Attributes:
        name: of the network; `input` for the unrestored pictures.
        kind: its registered type.
        failed: where and why it failed; empty if it did not.
        parameters: how many; None if it was not measured.
        speeds: by (height, width).
        values: of each picture, by metric.
        training: `iterations`, `seconds` of training, `versions`; empty for what was not trained here.
        notes: lines for the reader.
    """

    name: str
    kind: str = ''
    failed: str = ''
    parameters: int | None = None
    speeds: dict[Size, Speed] = field(default_factory=dict)
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Results:
    """All rows, the unrestored input first, and how they are to be read.

    Attributes:
        name: of the comparison.
        rows: the input's, then a network's each in the order of the file.
        lower_is_better: metrics of which small values are good.
        baseline: name of the network that others are told against; None for the best.
        confidence, resamples: of intervals.
    """

    name: str
    rows: list[Row]
    lower_is_better: frozenset[str] = frozenset()
    baseline: str | None = None
    confidence: float = 0.95
    resamples: int = 10_000

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics, in the order of the file."""
        measured = next((row.values for row in self.rows if row.values), {})
        return list(next(iter(measured.values()), {}))

    @property
    def images(self) -> list[str]:
        """Names of the pictures."""
        return list(next((row.values for row in self.rows if row.values), {}))

    def perfect(self, metric: str) -> list[str]:
        """Pictures of which some row's value is not finite, as the PSNR of what equals its reference."""
        rows = [row.values for row in self.rows if row.values]
        return [name for name in self.images if not all(math.isfinite(values[name][metric]) for values in rows)]

    def of_metric(self, row: Row, metric: str) -> list[float]:
        """The values of a row's metric, picture by picture: those that are finite for all, so that all are alike.

        Where that is none, those of all pictures.
        """
        perfect = set(self.perfect(metric))
        found = [values[metric] for name, values in row.values.items() if name not in perfect]
        return found or [values[metric] for values in row.values.values()]

    @property
    def sizes(self) -> list[Size]:
        """Sizes at which costs were measured."""
        return list(dict.fromkeys(size for row in self.rows for size in row.speeds))

    def estimate(self, row: Row, metric: str) -> Estimate | None:
        """The mean of a row's metric, None if it was not measured."""
        return estimate(self.of_metric(row, metric), self.confidence, self.resamples) if row.values else None

    def best(self, metric: str) -> Row | None:
        """The network of the best mean; None if none was measured."""
        sign = -1 if metric in self.lower_is_better else 1
        measured = [row for row in self.rows if row.values and row.name != INPUT]
        return max(measured, key=lambda row: sign * statistics.fmean(self.of_metric(row, metric)), default=None)

    def reference(self) -> Row | None:
        """The row that differences are told against: the named one, where it was measured, else the best."""
        named = [row for row in self.rows if row.name == self.baseline and row.values]
        return named[0] if named else self.best(self.metrics[0]) if self.metrics else None

    def difference(self, row: Row, metric: str, reference: Row | None = None) -> Estimate | None:
        """The paired difference of a row from another; None for that itself, and where nothing was measured.

        Args:
            reference: the other row; that of `reference()` if not given.
        """
        reference = reference or self.reference()
        if reference is None or row is reference or not row.values:
            return None
        values, others = self.of_metric(row, metric), self.of_metric(reference, metric)
        return paired_difference(values, others, self.confidence, self.resamples)

    def to_csv(self) -> str:
        """Numbers in full, a row a network."""
        header = ['network', 'type', 'parameters']
        header += [f'{what} {h}x{w}' for h, w in self.sizes for what in ('macs', 'ms', 'peak_bytes')]
        header += [f'{metric}{end}' for metric in self.metrics for end in ('', ' low', ' high', ' difference')]
        header += [f'{metric} difference {end}' for metric in self.metrics for end in ('low', 'high')]
        header += ['iterations', 'training seconds', 'failed']
        lines = [header, *(self._csv_row(row) for row in self.rows)]
        return _csv(lines)

    def images_to_csv(self) -> str:
        """Every value of every picture, one a line."""
        lines: list[Sequence[Any]] = [('network', 'image', *self.metrics)]
        lines += [(row.name, name, *values.values()) for row in self.rows for name, values in row.values.items()]
        return _csv(lines)

    def to_markdown(self) -> str:
        """The table for reading, columns aligned."""
        header, rows = table_cells(self)
        widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
        lines = [_aligned(header, widths), ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]]
        lines += [_aligned(row, widths) for row in rows]
        return '\n'.join(f'| {" | ".join(line)} |' for line in lines)

    def _csv_row(self, row: Row) -> list[Any]:
        cells: list[Any] = [row.name, row.kind, row.parameters]
        for size in self.sizes:
            speed = row.speeds.get(size)
            cells += [speed.macs, round(speed.milliseconds, 3), speed.peak_bytes] if speed else [None] * 3
        differences = [self.difference(row, metric) for metric in self.metrics]
        for metric, difference in zip(self.metrics, differences, strict=True):
            found = self.estimate(row, metric)
            cells += [found.mean, found.low, found.high] if found else [None] * 3
            cells.append(difference.mean if difference else None)
        for difference in differences:
            cells += [difference.low, difference.high] if difference else [None] * 2
        return [*cells, row.training.get('iterations'), row.training.get('seconds'), row.failed or None]


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(
        ['' if cell is None or (isinstance(cell, float) and math.isnan(cell)) else cell for cell in line]
        for line in lines
    )
    return text.getvalue()


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *rest = row
    return [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
