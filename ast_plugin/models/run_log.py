"""Progress and logs of a training run: the progress bar, `metrics.csv` and `curve.png`."""

import atexit
import csv
import io
import itertools
import logging
import math
import os
import sys
import time
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from ast_plugin.errors import only_warn
from ast_plugin.files import write_file
from ast_plugin.names import LITERAL, write_name

Columns = Mapping[str, tuple[np.ndarray, np.ndarray]]

FIXED = ('iter', 'epoch', 'lr')  # columns before the losses
_DECAY = 0.9  # decay of the moving averages of times, per iteration
_MAX_BUFFERED_ROWS = 1000
_SECONDS_BETWEEN_CURVES = 60.0
_MAX_DRAWING_SHARE = 0.01  # maximum share of time spent on drawing

INK, FAINT, GRID = '#1b1b1b', '#6b6b6b', '#dddddd'
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#56b4e9', '#e69f00', '#7f4f9f', '#806a4f')
"""Palette that is distinguishable with colour-vision deficiency."""
STYLE = {**LITERAL, 'font.size': 10, 'axes.edgecolor': FAINT, 'text.color': INK, 'axes.labelcolor': INK}
"""Settings of matplotlib for the curves of runs."""
_MAX_POINTS = 20_000


class TrainingProgress:
    """Progress bar of a run if stderr is a terminal; log lines are printed above it.

    It shows losses, speed, remaining time, share of time spent waiting for data, memory and the best validation value.

    Args:
        total_iter, start_iter: total number of iterations, and number already done.
        logger: BasicSR's logger, whose stream handlers are redirected to print above the bar.
        device: device whose memory is shown; for a CPU, the memory of the process.
        is_shown: False for all processes except the first.
    """

    def __init__(
        self,
        total_iter: int,
        start_iter: int,
        logger: logging.Logger,
        device: torch.device | None = None,
        is_shown: bool = True,
    ) -> None:
        self.best = ''
        self.device = device or torch.device('cpu')
        self.waited = self.worked = 0.0  # seconds per iteration, moving averages
        self._stamp: float | None = None
        self.bar = tqdm(
            total=total_iter,
            initial=start_iter,
            unit='it',
            dynamic_ncols=True,
            smoothing=0.1,
            disable=not (is_shown and sys.stderr.isatty()),
            file=sys.stderr,
        )
        for handler in logger.handlers if not self.bar.disable else ():
            if type(handler) is logging.StreamHandler:
                handler.setStream(DummyTqdmFile(sys.stderr))

    @property
    def data_share(self) -> float:
        """Share of time spent waiting for data, in [0, 1]."""
        return self.waited / (self.waited + self.worked) if self.waited + self.worked else 0.0

    def begin(self) -> None:
        """Record that the data of an iteration have arrived."""
        self.waited += (1 - _DECAY) * self._time_over_average(self.waited)

    def pause(self) -> None:
        """Exclude the time since the last call, e.g. of a validation or a checkpoint, from the measured times."""
        self._stamp = time.perf_counter()

    def advance(self, losses: Mapping[str, float]) -> None:
        """Count one iteration and show its losses; close the bar after the last one."""
        self.worked += (1 - _DECAY) * self._time_over_average(self.worked)
        if self.bar.disable:
            return
        shown = [f'{name} {value:.4f}' for name, value in losses.items()]
        shown += [f'data {self.data_share:.0%}', memory(self.device), self.best]
        self.bar.set_postfix_str(', '.join(filter(None, shown)), refresh=False)
        self.bar.update()
        if self.bar.n >= self.bar.total:
            self.bar.close()

    def _time_over_average(self, usual: float) -> float:
        """Return by how much the time since the last call exceeds its moving average."""
        before, self._stamp = self._stamp, time.perf_counter()
        return 0.0 if before is None else self._stamp - before - usual


def close_bars() -> None:
    """Close all progress bars, also those of a failed run, so that further output starts on a new line."""
    for bar in list(getattr(tqdm, '_instances', ())):
        bar.close()


def memory(device: torch.device) -> str:
    """Return the peak memory of tensors on a GPU, or of this process on a CPU; empty if it is not known."""
    if device.type == 'cuda':
        return f'{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB'
    try:
        import resource
    except ImportError:  # Windows
        return ''
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f'{peak * (1 if sys.platform == "darwin" else 1024) / 1e9:.1f} GB'


class RunLog:
    """Writer of `metrics.csv` and `curve.png` in the experiment's folder.

    The table has a row for each iteration (iteration, epoch as counted by BasicSR, learning rate of the first parameter
    group, losses) and for each validation (iteration, epoch, and the means in the columns `dataset/metric`), in full
    precision. Rows are buffered until `flush`. A resumed run removes the rows that it is about to repeat.

    Args:
        folder: the experiment's folder; None, for all processes except the first, writes nothing.
        name: name of the run, the title of the curve.
        iters_per_epoch: iterations per epoch; None leaves the column `epoch` empty.
        best_metric: validation metric to draw, or None; see also `higher_is_better`.
        flush_every: iterations between writes.
    """

    def __init__(
        self,
        folder: str | Path | None,
        name: str = '',
        iters_per_epoch: int | None = None,
        best_metric: str | None = None,
        higher_is_better: bool = True,
        flush_every: int = _MAX_BUFFERED_ROWS,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.table, self.curve = (Path(folder or '', name) for name in ('metrics.csv', 'curve.png'))
        self.name, self.iters_per_epoch = name, iters_per_epoch
        self.best_metric, self.higher_is_better = best_metric, higher_is_better
        self.flush_every = min(flush_every, _MAX_BUFFERED_ROWS)
        self._columns = [*FIXED]
        self._rows: list[dict[str, Any]] = []
        self._is_begun = False
        self._is_drawn = True  # whether the curve shows all rows in the table
        self._due_at = time.monotonic() + _SECONDS_BETWEEN_CURVES

    @classmethod
    def from_options(cls, opt: Mapping[str, Any], rank: int) -> 'RunLog':
        """Build the log of a run from BasicSR's options."""
        is_kept = opt['is_train'] and rank == 0
        metrics = (opt.get('val') or {}).get('metrics') or {}
        best = (opt.get('val') or {}).get('best_metric') or next(iter(metrics), None)
        return cls(
            opt['path'].get('experiments_root') if is_kept else None,
            opt['name'],
            (opt.get('train') or {}).get('iters_per_epoch'),
            best,
            metrics.get(best, {}).get('better') != 'lower',
            (opt.get('logger') or {}).get('print_freq') or _MAX_BUFFERED_ROWS,
        )

    def add_iteration(self, current_iter: int, lr: float, losses: Mapping[str, float]) -> None:
        """Add the losses of an iteration."""
        self._add(current_iter, {'lr': lr, **losses})
        if current_iter % self.flush_every == 0:
            self.flush()

    def add_validation(self, current_iter: int, dataset: str, means: Mapping[str, float]) -> None:
        """Add the means of a validation."""
        name = ' '.join(dataset.split())
        self._add(current_iter, {f'{name}/{metric}': value for metric, value in means.items()})

    def flush(self, durably: bool = False) -> None:
        """Write buffered rows, and sync the table if `durably`; if that fails, log a warning and keep the rows."""
        if not self._rows and not (durably and self._is_begun and self.table.is_file()):
            return
        with only_warn(f'{self.table} cannot be written, its rows are kept in memory'):
            self._begin()
            new = dict.fromkeys(name for row in self._rows for name in row if name not in self._columns)
            if new:
                self._rewrite([row + ',' * len(new) for row in _read_lines(self.table)[1]], [*self._columns, *new])
            self._append(durably)
            self._rows.clear()
            self._is_drawn = False

    def draw(self, at_once: bool = False) -> None:
        """Redraw the curve if there are new rows, at most once per minute unless `at_once`."""
        self.flush()
        is_due = at_once or time.monotonic() > self._due_at
        if self._is_drawn or not is_due:
            return
        start = time.monotonic()
        with only_warn(f'{self.curve} cannot be drawn'):
            columns = read_columns(self.table)
            write_file(self.curve, draw_curve(columns, self.name, self.best_metric, self.higher_is_better))
        self._is_drawn = True
        end = time.monotonic()
        self._due_at = end + max(_SECONDS_BETWEEN_CURVES, (end - start) / _MAX_DRAWING_SHARE)

    def _add(self, current_iter: int, values: Mapping[str, float]) -> None:
        if self.folder is None:
            return
        epoch = (current_iter - 1) // self.iters_per_epoch if self.iters_per_epoch else ''
        exact = {name: repr(float(value)) for name, value in values.items()}
        self._rows.append({'iter': current_iter, 'epoch': epoch, **exact})
        if len(self._rows) == 1 and not self._is_begun:
            atexit.register(self.flush)  # keeps the last losses of a failed run
            with only_warn(f'{self.table} cannot be written, its rows are kept in memory'):
                self._begin()

    def _begin(self) -> None:
        """Open the table; keep the rows of earlier iterations, and that of the same one if a validation comes first."""
        if self._is_begun and self.table.is_file():
            return
        columns, rows = [*FIXED], []
        first = self._rows[0]['iter'], 'lr' not in self._rows[0]
        if self.table.is_file() and first > (1, False):
            try:
                header, rows = _read_lines(self.table)
                columns = next(csv.reader([header]))
                if columns[: len(FIXED)] != [*FIXED]:
                    raise ValueError(f'expected columns starting with {", ".join(FIXED)}')
                fixed = [row.split(',')[: len(FIXED)] for row in rows]
                rows = [
                    row for row, (iteration, _, lr) in zip(rows, fixed, strict=True) if (int(iteration), not lr) < first
                ]
            except (ValueError, StopIteration) as error:
                aside = self.table.with_name(f'{self.table.name}.damaged')
                self.table.replace(aside)
                columns, rows = [*FIXED], []
                logging.getLogger('basicsr').warning(
                    f'{self.table} is damaged, kept as {aside.name} and restarted: {error}'
                )
        self._rewrite(rows, columns)
        self._is_begun = True

    def _append(self, durably: bool) -> None:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator='\n').writerows(self._rows)
        with self.table.open('ab', buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                content = text.getvalue().encode()
                if file.write(content) != len(content):
                    raise OSError('the disk is full')
                if durably:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise

    def _rewrite(self, rows: Sequence[str], columns: list[str]) -> None:
        """Rewrite the table with these rows and columns atomically."""
        header = io.StringIO()
        csv.writer(header, lineterminator='').writerow(columns)
        text = '\n'.join([header.getvalue(), *rows, ''])
        write_file(self.table, text.encode())
        self._columns = columns


def read_columns(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read a `metrics.csv` as, for each column, the iterations that have a value and the values."""
    header, rows = _read_lines(path)
    columns = {name: (array('q'), array('d')) for name in next(csv.reader([header]), [])}
    for row in csv.reader(rows):
        for (iterations, values), value in zip(columns.values(), row, strict=True):
            if value:
                iterations.append(int(row[0]))
                values.append(float(value))
    return {name: (np.array(iterations), np.array(values)) for name, (iterations, values) in columns.items()}


def draw_curve(columns: Columns, title: str, best_metric: str | None = None, higher_is_better: bool = True) -> bytes:
    """Draw losses, learning rate and validation metric of a run.

    Args:
        columns: as returned by `read_columns`.
        title: the run's name.
        best_metric: validation metric drawn for each dataset; see also `higher_is_better`.
    Returns:
        The content of a PNG file.
    Raises:
        ImportError: if matplotlib is not installed.
    """
    from matplotlib import rc_context, ticker
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = {name: column for name, column in columns.items() if column[0].size}
    losses = [name for name in columns if name not in FIXED and '/' not in name]
    validated = [name for name in columns if '/' in name and name.rpartition('/')[2] == best_metric]
    heights = [3, 1, *([2.4] if validated else [])]
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 1.45 * sum(heights)), dpi=110, layout='constrained')
        axes = list(figure.subplots(len(heights), sharex=True, height_ratios=heights))
        _draw_losses(axes[0], columns, losses, ticker)
        if 'lr' in columns:
            axes[1].plot(*_subsample(*columns['lr']), color=FAINT, linewidth=1.4)
        axes[1].set_ylim(bottom=0)
        axes[1].ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
        axes[1].set_ylabel('learning rate')
        if validated:
            _draw_validation(axes[2], columns, validated, best_metric, higher_is_better)
        for axis in axes:
            quieten(axis)
        axes[-1].set_xlabel('iteration')
        axes[-1].xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
        axes[-1].xaxis.set_major_formatter(lambda value, _: f'{value:,.0f}')
        write_name(axes[0].set_title('', loc='left', fontsize=14, fontweight='bold'), title)
        image = io.BytesIO()
        FigureCanvasAgg(figure).print_png(image)
    return image.getvalue()


def _draw_losses(axis, columns: Columns, names: Sequence[str], ticker) -> None:
    lines, labels = [], []
    for name, colour in zip(names, itertools.cycle(COLOURS), strict=False):
        iterations, values = columns[name]
        smooth = smoothed(values)
        axis.plot(*_subsample(iterations, values), color=colour, linewidth=0.6, alpha=0.28)
        labels.append(f'{name}   {smooth[-1]:.4g}')
        lines += axis.plot(*_subsample(iterations, smooth), color=colour, linewidth=1.8)
    axis.set_ylabel('loss')
    draw_legend(axis, lines, labels, loc='upper right')
    numbers = np.concatenate([[], *(columns[name][1][np.isfinite(columns[name][1])] for name in names)])
    # Logarithmic if the largest loss is at least 4 times the smallest; a wide range gets fewer labels.
    if numbers.size and numbers.min() > 0 and numbers.max() >= 4 * numbers.min():
        axis.set_yscale('log')
        steps = (1, 2, 5) if numbers.max() < 300 * numbers.min() else (1,)
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=steps))
        axis.yaxis.set_major_formatter(lambda value, _: f'{value:g}')
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def _draw_validation(axis, columns: Columns, names: Sequence[str], metric: str, higher_is_better: bool) -> None:
    lines, labels = [], []
    for name, colour in zip(names, itertools.cycle(COLOURS), strict=False):
        iterations, values = columns[name]
        marker = 'o' if len(values) <= 60 else None
        axis.plot(iterations, values, color=colour, linewidth=1.6, marker=marker, markersize=4)
        if np.isnan(values).all():
            continue
        best = int(np.nanargmax(values) if higher_is_better else np.nanargmin(values))
        labels.append(f'{name.rpartition("/")[0]}   best {values[best]:.4g} at {iterations[best]:,}')
        star = {'marker': '*', 'markersize': 15, 'markeredgecolor': 'white', 'linestyle': 'none', 'zorder': 3}
        lines += axis.plot(iterations[best], values[best], color=colour, **star)
    axis.margins(y=0.15)
    write_name(axis.set_ylabel(''), metric)
    draw_legend(axis, lines, labels, loc='lower right' if higher_is_better else 'upper right')


def quieten(axis: Any) -> None:
    """Make grid, frame and ticks of matplotlib axes less prominent."""
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[['top', 'right']].set_visible(False)
    axis.tick_params(colors=FAINT, which='both')


def draw_legend(axis: Any, lines: Sequence[Any], labels: Sequence[str], **options: Any) -> None:
    """Add a legend to matplotlib axes with literal labels."""
    if lines:
        # matplotlib omits labels that begin with an underscore, so texts are set afterwards.
        legend = axis.legend(lines, ['-'] * len(lines), frameon=False, **options)
        for text, label in zip(legend.get_texts(), labels, strict=True):
            write_name(text, label)


def _subsample(iterations: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    step = math.ceil(len(values) / _MAX_POINTS)
    return iterations[::step], values[::step]


def smoothed(values: np.ndarray, share: float = 0.02) -> np.ndarray:
    """Return the trailing moving average over a share of the run; non-finite values are ignored."""
    window = max(1, round(len(values) * share))
    is_finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_finite)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    with np.errstate(invalid='ignore', divide='ignore'):
        return (sums[ends] - sums[starts]) / (counts[ends] - counts[starts])


def _read_lines(path: Path) -> tuple[str, list[str]]:
    """Return the header and the complete rows; a killed run may have left an incomplete last row."""
    header, *rows, _unfinished = path.read_text(encoding='utf-8').split('\n')
    return header, rows
