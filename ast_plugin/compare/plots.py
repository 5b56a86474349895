"""Draws a comparison: quality against what it costs, and how the networks learned. Every mark carries its name."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from ast_plugin.compare.results import Column, Results, Row, format_metric, format_tick
from ast_plugin.errors import only_warn
from ast_plugin.models.run_log import draw_legend
from ast_plugin.names import LITERAL, printable, write_name
from ast_plugin.options.sections import INPUT

INK, FAINT, GRID = '#1b1b1b', '#6b6b6b', '#dddddd'
# Told apart by every eye, and the markers by every printer.
_COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#56b4e9', '#e69f00', '#7f4f9f', '#806a4f')
_MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', 'h')
_INCHES = (5.6, 4.2)
_SMOOTHED_SHARE = 0.05  # of a run that a point of its loss looks back
_MOST_POINTS = 2000
_COSTS = {'parameters': 'parameters', 'macs': 'macs', 'milliseconds': 'latency', 'peak_bytes': 'memory'}  # in files
# Where the name of a mark may stand, in points from the mark.
_PLACES = ((8, 0), (-8, 0), (8, 8), (8, -8), (-8, 8), (-8, -8), (0, 9), (0, -9), (10, 20), (10, -20))

Columns = Mapping[str, tuple[np.ndarray, np.ndarray]]  # of a metrics.csv: iterations and values by name


@dataclass(frozen=True)
class Plot:
    """A drawing, for files and for the report.

    Attributes:
        name: of its file, without ending.
        title: what it shows.
        png: for documents, 200 dots an inch.
        svg: for pages; colours of ink and grid as in `INK`, `FAINT`, `GRID`.
    """

    name: str
    title: str
    png: bytes
    svg: str


def draw_all(results: Results, curves: Mapping[str, Columns], validated: str | None) -> list[Plot]:
    """Every plot that there are numbers for.

    Args:
        results: of the comparison.
        curves: of each trained network the columns of its `metrics.csv`.
        validated: the column of validation to draw, `dataset/metric`; None for none.
    """
    wanted: list[tuple[str, str, Callable[[Figure, Axes], None]]] = []
    metric = next(iter(results.metrics), None)
    costs: dict[str, Column] = {}
    for column in results.columns():  # of the first size, where there are several
        costs.setdefault(column.key, column)
    for key, name in _COSTS.items() if metric else ():
        numbers = costs[key].numbers if key in costs else [None] * len(results.rows)
        points = [(row, cost) for row, cost in zip(results.rows, numbers, strict=True) if row.values and cost]
        if points:
            draw = _scatter_drawing(results, metric, points, costs[key].title)
            wanted.append((f'{metric}_against_{name}', f'{metric} against {costs[key].title}', draw))
    losses = {name: loss for name, columns in curves.items() if (loss := _loss(columns)) is not None}
    if losses:
        title = 'loss in training, a running mean'
        wanted.append(('training_loss', title, _line_drawing(results, title, losses, clips=True)))
    scores = {
        name: columns[validated]
        for name, columns in curves.items()
        if validated in columns and columns[validated][0].size > 1
    }
    if scores:
        dataset, _, metric = validated.rpartition('/')
        title = f'{metric} of {dataset}, validated in training'
        wanted.append(('training_validation', title, _line_drawing(results, title, scores)))
    plots = []
    for name, title, draw in wanted:
        with only_warn(f'not drawn: {title}'):
            plots.append(_draw(re.sub(r'[^\w-]', '_', name), title, draw))
    return plots


def _draw(name: str, title: str, draw: Callable[[Figure, Axes], None]) -> Plot:
    style = {
        **LITERAL,
        'font.size': 10,
        'axes.edgecolor': FAINT,
        'text.color': INK,
        'axes.labelcolor': INK,
        'svg.hashsalt': name,  # equal drawings are equal files
    }
    with rc_context(style):
        figure = Figure(figsize=_INCHES, layout='constrained')
        axis = figure.subplots()
        axis.grid(color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[['top', 'right']].set_visible(False)
        axis.tick_params(colors=FAINT, which='both')
        draw(figure, axis)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format='png', dpi=200)
        figure.savefig(svg, format='svg', metadata={'Date': None, 'Title': printable(title)}, transparent=True)
    return Plot(name, title, png.getvalue(), svg.getvalue().decode())


def _styles(results: Results) -> dict[str, tuple[str, str]]:
    """Colour and marker of each network."""
    names = [row.name for row in results.networks]
    return {name: (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(names)}


def _scatter_drawing(
    results: Results, metric: str, points: Sequence[tuple[Row, float]], label: str
) -> Callable[[Figure, Axes], None]:
    def draw(figure: Figure, axis: Axes) -> None:
        styles = _styles(results)
        marks = []
        for row, cost in points:
            colour, marker = styles[row.name]
            found = results.estimate(row, metric)
            if found.low is not None:
                axis.plot([cost, cost], [found.low, found.high], color=colour, alpha=0.35, linewidth=3, zorder=2)
            axis.plot(cost, found.mean, marker, color=colour, markersize=8, markeredgecolor='white', zorder=3)
            marks.append((row.name, cost, found.mean, colour))
        axis.set_xscale('log')
        costs = [cost for _, cost in points]
        # A span of its own where all cost alike, room for names otherwise.
        axis.set_xlim(min(costs) / 1.7, max(costs) * 1.7)
        is_narrow = max(costs) < 12 * min(costs)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_narrow else (1,)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
        axis.xaxis.set_minor_formatter(NullFormatter())
        write_name(axis.set_xlabel(''), label)
        write_name(axis.set_ylabel(''), metric)
        axis.margins(y=0.12)
        note = _draw_input(axis, results, metric)
        title = axis.set_title('', loc='left', fontweight='bold')
        write_name(title, f'{metric} of {len(results.images)} images')
        figure.draw_without_rendering()  # only now is known where things are
        _name_marks(axis, marks, note)

    return draw


def _draw_input(axis: Axes, results: Results, metric: str) -> Annotation | None:
    """A line at the unrestored images' mean, and its name."""
    row = next((row for row in results.rows if row.name == INPUT and row.values), None)
    found = results.estimate(row, metric) if row is not None else None
    if found is None or not math.isfinite(found.mean):
        return None
    axis.axhline(found.mean, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    return axis.annotate(
        f'unrestored {format_metric(metric, found.mean)}',
        (1, found.mean),
        xycoords=('axes fraction', 'data'),
        xytext=(-3, 3),
        textcoords='offset points',
        ha='right',
        color=FAINT,
        fontsize=9,
    )


def _name_marks(axis: Axes, marks: Sequence[tuple[str, float, float, str]], note: Annotation | None) -> None:
    """Put each name where it covers least: other names, marks, the frame; the note first, left or right."""
    frame = axis.get_window_extent()
    corners = [axis.transData.transform((cost, value)) - 6 for _, cost, value, _ in marks]
    taken = [Bbox.from_bounds(x, y, 12, 12) for x, y in corners]

    def put(text: Annotation, choices: Sequence[Mapping[str, Any]]) -> None:
        def covered(choice: Mapping[str, Any]) -> float:
            text.set(**choice)
            box = text.get_window_extent()
            outside = box.width * box.height - _overlap(box, frame)
            return sum(_overlap(box, other) for other in taken) + 3 * outside

        text.set(**min(choices, key=covered))
        taken.append(text.get_window_extent())

    if note is not None:
        put(
            note,
            [
                {'position': (-3, 3), 'ha': 'right'},
                {'position': (3 - axis.bbox.width * 72 / axis.figure.dpi, 3), 'ha': 'left'},
            ],
        )
    for name, cost, value, colour in marks:
        font = {'color': colour, 'fontweight': 'bold', 'fontsize': 9.5}
        text = axis.annotate('', (cost, value), xytext=(0, 0), textcoords='offset points', **font)
        write_name(text, name)
        put(text, [{'position': (dx, dy), **_alignment(dx, dy)} for dx, dy in _PLACES])


def _alignment(dx: float, dy: float) -> dict[str, str]:
    """Let a text grow away from its mark."""
    horizontal = 'left' if dx > 0 else 'right' if dx < 0 else 'center'
    return {'ha': horizontal, 'va': 'bottom' if dy > 0 else 'top' if dy < 0 else 'center'}


def _overlap(first: Bbox, second: Bbox) -> float:
    common = Bbox.intersection(first, second)
    return 0.0 if common is None else common.width * common.height


def _line_drawing(results: Results, title: str, lines: Columns, clips: bool = False) -> Callable[[Figure, Axes], None]:
    def draw(figure: Figure, axis: Axes) -> None:
        styles = _styles(results)
        # The legend lists names as their lines end, from top to bottom.
        ordered = dict(sorted(lines.items(), key=lambda line: -np.nan_to_num(line[1][1][-1])))
        drawn: list[Any] = []
        for name, (iterations, values) in ordered.items():
            colour, marker = styles.get(name, (FAINT, 'o'))
            marker = marker if len(values) <= 40 else None
            drawn += axis.plot(iterations, values, color=colour, linewidth=1.6, marker=marker, markersize=4)
        axis.set_xlabel('iteration')
        write_name(axis.set_title('', loc='left', fontweight='bold'), title)
        axis.xaxis.set_major_formatter(lambda value, _: format_tick(value))
        if clips:
            _clip_to_learning(axis, lines)
        draw_legend(axis, drawn, list(ordered), labelcolor='linecolor', handlelength=1.2, prop={'weight': 'bold'})

    return draw


def _loss(columns: Columns) -> tuple[np.ndarray, np.ndarray] | None:
    """The sum of the losses of each iteration, smoothed; None if the log has none."""
    names = [name for name in columns if name.startswith('l_') and columns[name][0].size]
    if not names:
        return None
    iterations = columns[names[0]][0]
    total = sum(columns[name][1] for name in names if len(columns[name][1]) == len(iterations))
    window = max(1, round(len(total) * _SMOOTHED_SHARE))
    sums = np.concatenate([[0.0], np.cumsum(np.nan_to_num(total))])
    ends = np.arange(1, len(total) + 1)
    starts = np.maximum(0, ends - window)
    smooth = (sums[ends] - sums[starts]) / (ends - starts)
    step = math.ceil(len(total) / _MOST_POINTS)
    return iterations[window // 2 :: step], smooth[window // 2 :: step]


def _clip_to_learning(axis: Axes, lines: Columns) -> None:
    """Cut off the first few iterations' losses, which would press all the rest to the floor."""
    values = np.concatenate([values[len(values) // 20 :] for _, values in lines.values()])
    low, high = np.nanmin(values), np.nanpercentile(values, 99)
    if np.isfinite([low, high]).all() and high > low:
        axis.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
