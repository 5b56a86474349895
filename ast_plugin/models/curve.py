"""Draws a run: its losses, its rate, and what validation made of it."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np

from ast_plugin.models.run_log import FIXED

Columns = Mapping[str, tuple[np.ndarray, np.ndarray]]

_INK, _FAINT, _GRID = '#1b1b1b', '#6b6b6b', '#e3e3e3'
_COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#56b4e9', '#e69f00')  # told apart by every eye
_SMOOTHED_SHARE = 0.02  # of the run that a point of the smoothed loss looks back
_MOST_POINTS = 20_000


def draw_curve(columns: Columns, title: str, best_metric: str | None = None, higher_is_better: bool = True) -> bytes:
    """Draw the columns of a `metrics.csv`.

    Args:
        columns: as `run_log.read_columns` gives them.
        title: the run's name.
        best_metric: the metric of validation that is drawn, for each dataset; with `higher_is_better`.
    Returns:
        A PNG.
    Raises:
        ImportError: if matplotlib is not there.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = {name: column for name, column in columns.items() if column[0].size}
    losses = [name for name in columns if name not in FIXED and '/' not in name]
    validated = [name for name in columns if '/' in name and name.rpartition('/')[2] == best_metric]
    heights = [3, 1, *([2.4] if validated else [])]
    with rc_context({'font.size': 10, 'axes.edgecolor': _FAINT, 'text.color': _INK, 'axes.labelcolor': _INK}):
        figure = Figure(figsize=(10, 1.45 * sum(heights)), dpi=110, layout='constrained')
        axes = list(figure.subplots(len(heights), sharex=True, height_ratios=heights))
        _draw_losses(axes[0], columns, losses)
        _draw_rate(axes[1], columns)
        if validated:
            _draw_validation(axes[2], columns, validated, best_metric, higher_is_better)
        for axis in axes:
            axis.grid(color=_GRID, linewidth=0.8)
            axis.set_axisbelow(True)
            axis.spines[['top', 'right']].set_visible(False)
            axis.tick_params(colors=_FAINT)
        axes[-1].set_xlabel('iteration')
        axes[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes[-1].xaxis.set_major_formatter(lambda value, _: f'{value:,.0f}')
        axes[0].set_title(title, loc='left', fontsize=14, fontweight='bold')
        picture = io.BytesIO()
        FigureCanvasAgg(figure).print_png(picture)
    return picture.getvalue()


def _draw_losses(axis, columns: Columns, names: Sequence[str]) -> None:
    for name, colour in zip(names, _cycle(len(names)), strict=True):
        iterations, values = columns[name]
        step = math.ceil(len(values) / _MOST_POINTS)
        smooth = _smoothed(values)
        axis.plot(iterations[::step], values[::step], color=colour, linewidth=0.6, alpha=0.28)
        last = f'{smooth[-1]:.4g}'
        axis.plot(iterations[::step], smooth[::step], color=colour, linewidth=1.8, label=f'{name}   {last}')
    _scale(axis, [columns[name][1][np.isfinite(columns[name][1])] for name in names])
    axis.set_ylabel('loss')
    if names:
        axis.legend(loc='upper right', frameon=False)


def _scale(axis, values: Sequence[np.ndarray]) -> None:
    """Logarithmic where losses span more than a few times their least; with as many labels as that span needs."""
    from matplotlib.ticker import LogLocator, NullFormatter

    numbers = np.concatenate([*values, []])
    if not numbers.size or numbers.min() <= 0 or numbers.max() < 4 * numbers.min():
        return
    axis.set_yscale('log')
    steps = (1, 2, 5) if numbers.max() < 300 * numbers.min() else (1,)
    axis.yaxis.set_major_locator(LogLocator(subs=steps))
    axis.yaxis.set_major_formatter(lambda value, _: f'{value:g}')
    axis.yaxis.set_minor_formatter(NullFormatter())


def _draw_rate(axis, columns: Columns) -> None:
    if 'lr' in columns:
        iterations, values = columns['lr']
        step = math.ceil(len(values) / _MOST_POINTS)
        axis.plot(iterations[::step], values[::step], color=_FAINT, linewidth=1.4)
    axis.set_ylim(bottom=0)
    axis.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
    axis.set_ylabel('rate')


def _draw_validation(axis, columns: Columns, names: Sequence[str], metric: str, higher_is_better: bool) -> None:
    for name, colour in zip(names, _cycle(len(names)), strict=True):
        iterations, values = columns[name]
        marker = 'o' if len(values) <= 60 else None
        axis.plot(iterations, values, color=colour, linewidth=1.6, marker=marker, markersize=4)
        if np.isnan(values).all():
            continue
        best = int(np.nanargmax(values) if higher_is_better else np.nanargmin(values))
        dataset, where = name.rpartition('/')[0], f'{iterations[best]:,}'
        axis.plot(
            *(iterations[best], values[best]),
            color=colour,
            marker='*',
            markersize=15,
            markeredgecolor='white',
            linestyle='none',
            label=f'{dataset}   best {values[best]:.4g} at {where}',
            zorder=3,
        )
    axis.margins(y=0.15)
    axis.set_ylabel(metric)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc='lower right' if higher_is_better else 'upper right', frameon=False)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of each value and those before it, over a share of the run; what is no number is left out."""
    window = max(1, round(len(values) * _SMOOTHED_SHARE))
    is_finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_finite)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    with np.errstate(invalid='ignore', divide='ignore'):
        return (sums[ends] - sums[starts]) / (counts[ends] - counts[starts])


def _cycle(count: int) -> list[str]:
    return [_COLOURS[number % len(_COLOURS)] for number in range(count)]
