"""Draws a comparison: quality against what it costs, and how the networks learned. Every mark carries its name."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ast_plugin.compare import formats
from ast_plugin.options.compare_file import INPUT

if TYPE_CHECKING:
    from ast_plugin.compare.results import Results, Row

INK, FAINT, GRID = '#1b1b1b', '#6b6b6b', '#dddddd'
# Told apart by every eye, and the markers by every printer.
_COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#56b4e9', '#e69f00', '#7f4f9f', '#806a4f')
_MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', 'h')
_INCHES = (5.6, 4.2)
_SMOOTHED_SHARE = 0.05  # of a run that a point of its loss looks back
_MOST_POINTS = 2000


Lines = Mapping[str, tuple[np.ndarray, np.ndarray]]  # iterations and values, by network


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


def draw_all(results: Results, curves: Mapping[str, Mapping[str, Any]], validated: str | None) -> list[Plot]:
    """Every plot that there are numbers for.

    Args:
        results: of the comparison.
        curves: of each trained network the columns of its `metrics.csv`.
        validated: the column of validation to draw, `dataset/metric`; None for none.
    """
    plots = []
    metric = next(iter(results.metrics), None)
    for name, label, value in _costs(results) if metric else ():
        points = [(row, cost) for row in results.rows if row.values and row.name != INPUT and (cost := value(row))]
        if points:
            title = f'{metric} against {label.partition(" (")[0]}'
            plots.append(_drawn(f'{metric}_against_{name}', title, _draw_scatter(results, metric, points, label)))
    for name, title, lines in _learning(curves, validated):
        plots.append(_drawn(name, title, _draw_lines(results, title, lines)))
    return plots


def _costs(results: Results) -> list[tuple[str, str, Callable[[Row], float | None]]]:
    size = results.sizes[0] if results.sizes else None
    shown = f'{size[1]}×{size[0]}' if size else ''

    def at_size(key: str, factor: float = 1.0) -> Callable[[Row], float | None]:
        return lambda row: (getattr(row.speeds[size], key) or 0) * factor if size in row.speeds else None

    costs: list[tuple[str, str, Callable[[Row], float | None]]] = [
        ('parameters', 'parameters', lambda row: row.parameters)
    ]
    if size:
        costs += [
            ('macs', f'multiply-adds (of {shown} pixels)', at_size('macs')),
            ('latency', f'seconds a picture (of {shown} pixels)', at_size('milliseconds', 1e-3)),
            ('memory', f'peak memory in MB (of {shown} pixels)', at_size('peak_bytes', 2**-20)),
        ]
    return costs


def _drawn(name: str, title: str, draw: Callable[[Any], None]) -> Plot:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {
        'font.size': 10,
        'axes.edgecolor': FAINT,
        'text.color': INK,
        'axes.labelcolor': INK,
        'svg.hashsalt': name,  # the same drawing is the same file
    }
    with rc_context(style):
        figure = Figure(figsize=_INCHES, layout='constrained')
        FigureCanvasAgg(figure)
        draw(figure)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format='png', dpi=200)
        figure.savefig(svg, format='svg', metadata={'Date': None, 'Title': title}, transparent=True)
    return Plot(name, title, png.getvalue(), svg.getvalue().decode())


def _draw_scatter(
    results: Results, metric: str, points: Sequence[tuple[Row, float]], label: str
) -> Callable[[Any], None]:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        _dress(axis)
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
        narrow = max(costs) < 12 * min(costs)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.axis_number(value)))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(label)
        axis.set_ylabel(metric)
        axis.margins(y=0.12)
        note = _draw_input(axis, results, metric)
        axis.set_title(f'{metric} of {len(results.images)} pictures', loc='left', fontweight='bold')
        _name_marks(figure, axis, marks, note)

    return draw


def _draw_input(axis: Any, results: Results, metric: str) -> Any:
    """A line at the unrestored pictures' mean, and its name."""
    row = next((row for row in results.rows if row.name == INPUT and row.values), None)
    found = results.estimate(row, metric) if row is not None else None
    if found is None or not math.isfinite(found.mean):
        return None
    axis.axhline(found.mean, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    return axis.annotate(
        f'unrestored {formats.metric_value(metric, found.mean)}',
        (0.99, found.mean),
        xycoords=('axes fraction', 'data'),
        xytext=(0, 3),
        textcoords='offset points',
        ha='right',
        color=FAINT,
        fontsize=9,
    )


def _name_marks(figure: Any, axis: Any, marks: Sequence[tuple[str, float, float, str]], note: Any) -> None:
    """Put each name where it covers least: other names, marks, the frame; the note first, left or right."""
    figure.canvas.draw()  # only now is known where things are
    renderer = figure.canvas.get_renderer()
    frame = axis.get_window_extent(renderer)
    points = [axis.transData.transform((cost, value)) for _, cost, value, _ in marks]
    taken = [_box(x - 6, y - 6, 12, 12) for x, y in points]
    if note is not None:
        sides = []
        for share, align in ((0.01, 'left'), (0.99, 'right')):
            note.xy = (share, note.xy[1])
            note.set_horizontalalignment(align)
            box = note.get_window_extent(renderer)
            own = _box(box.x0, box.y0, box.width, box.height)
            sides.append((sum(_overlap(own, other) for other in taken), share, align, own))
        _, share, align, own = min(sides)
        note.xy = (share, note.xy[1])
        note.set_horizontalalignment(align)
        taken.append(own)
    for name, cost, value, colour in marks:
        best, least = None, math.inf
        for dx, dy, align, vertical in _PLACES:
            text = axis.annotate(
                name,
                (cost, value),
                xytext=(dx, dy),
                textcoords='offset points',
                ha=align,
                va=vertical,
                color=colour,
                fontweight='bold',
                fontsize=9.5,
            )
            box = text.get_window_extent(renderer)
            own = _box(box.x0, box.y0, box.width, box.height)
            cover = sum(_overlap(own, other) for other in taken) + 3 * _outside(own, frame)
            if cover < least:
                if best is not None:
                    best[0].remove()
                best, least = (text, own), cover
            else:
                text.remove()
        taken.append(best[1])


_PLACES = (
    (8, 0, 'left', 'center'),
    (-8, 0, 'right', 'center'),
    (8, 8, 'left', 'bottom'),
    (8, -8, 'left', 'top'),
    (-8, 8, 'right', 'bottom'),
    (-8, -8, 'right', 'top'),
    (0, 9, 'center', 'bottom'),
    (0, -9, 'center', 'top'),
    (10, 20, 'left', 'bottom'),
    (10, -20, 'left', 'top'),
)


def _learning(curves: Mapping[str, Mapping[str, Any]], validated: str | None) -> list[tuple[str, str, Lines]]:
    """What is drawn of the trainings: name of the file, title, and lines by network."""
    losses = {name: loss for name, columns in curves.items() if (loss := _loss(columns)) is not None}
    scores = {
        name: columns[validated]
        for name, columns in curves.items()
        if validated in columns and columns[validated][0].size > 1
    }
    dataset, _, metric = (validated or '').rpartition('/')
    panels = [
        ('training_loss', 'loss in training, a running mean', losses),
        ('training_validation', f'{metric} of {dataset}, validated in training', scores),
    ]
    return [panel for panel in panels if panel[2]]


def _draw_lines(results: Results, title: str, lines: Lines) -> Callable[[Any], None]:
    def draw(figure: Any) -> None:
        axis = figure.subplots()
        _dress(axis)
        styles = _styles(results)
        ends = []
        for name, (iterations, values) in lines.items():
            colour, marker = styles.get(name, (FAINT, 'o'))
            few = len(values) <= 40
            axis.plot(iterations, values, color=colour, linewidth=1.6, marker=marker if few else None, markersize=4)
            ends.append((name, iterations[-1], values[-1], colour))
        axis.set_xlabel('iteration')
        axis.set_title(title, loc='left', fontweight='bold')
        axis.xaxis.set_major_formatter(lambda value, _: formats.axis_number(value))
        if title.startswith('loss'):
            _clip_to_learning(axis, lines)
        _name_ends(figure, axis, ends)

    return draw


def _loss(columns: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
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


def _clip_to_learning(axis: Any, lines: Lines) -> None:
    """What the first few iterations lose would press all the rest to the floor."""
    values = np.concatenate([values[len(values) // 20 :] for _, values in lines.values()])
    low, high = np.nanmin(values), np.nanpercentile(values, 99)
    if np.isfinite([low, high]).all() and high > low:
        axis.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))


def _name_ends(figure: Any, axis: Any, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Names at the ends of lines, one below the other where these lie close, in the space that is made for them."""
    if not ends:
        return
    left, right = axis.get_xlim()
    axis.set_xticks([tick for tick in axis.get_xticks() if left <= tick <= right])
    longest = max(len(name) for name, *_ in ends)
    axis.set_xlim(left, right + (right - left) * min(0.5, 0.028 * longest + 0.02))
    figure.canvas.draw()
    step = 12.0  # points from name to name
    scale = 72 / figure.dpi
    low, high = axis.get_ylim()

    def height(value: float) -> float:
        return axis.transData.transform((0, min(max(value, low), high)))[1] * scale

    place = -math.inf
    for name, x, y, colour in sorted(ends, key=lambda end: height(end[2])):
        place = max(height(y), place + step)
        axis.annotate(
            name,
            (x, min(max(y, low), high)),
            xytext=(7, place - height(y)),
            textcoords='offset points',
            va='center',
            color=colour,
            fontweight='bold',
            fontsize=9.5,
            annotation_clip=False,
        )


def _styles(results: Results) -> dict[str, tuple[str, str]]:
    names = [row.name for row in results.rows if row.name != INPUT]
    return {name: (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(names)}


def _dress(axis: Any) -> None:
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[['top', 'right']].set_visible(False)
    axis.tick_params(colors=FAINT, which='both')


def _box(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return x, y, x + width, y + height


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: tuple[float, ...], frame: Any) -> float:
    inner = _overlap(box, (frame.x0, frame.y0, frame.x1, frame.y1))
    return (box[2] - box[0]) * (box[3] - box[1]) - inner
