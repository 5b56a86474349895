"""Outputs of a comparison: tables, plots with labelled points, and a self-contained HTML report."""

from __future__ import annotations

import base64
import io
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox
from PIL import Image, features

from ast_plugin.compare.measure import describe_machine, image_path, installed_versions
from ast_plugin.compare.results import (
    Column,
    Results,
    Row,
    format_duration,
    format_interval,
    format_metric,
    format_tick,
)
from ast_plugin.compare.run import Plan
from ast_plugin.errors import only_warn
from ast_plugin.evaluation.protocols import read_protocol
from ast_plugin.files import write_file
from ast_plugin.models.run_log import COLOURS, FAINT, GRID, INK, STYLE, draw_legend, quieten, read_columns, smoothed
from ast_plugin.names import escape_markdown, printable, write_name
from ast_plugin.options.sections import CLEAN, INPUT

_TEMPLATE = Path(__file__).with_name('report_template.html')
_QUALITY = 92  # WebP quality of the images in the report
_MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', 'h')  # distinguishable without colour
_INCHES = (5.6, 4.2)
_SMOOTHED_SHARE = 0.05  # window of the running mean of a loss, as a fraction of the run
_MOST_POINTS = 2000
_COSTS = {'parameters': 'parameters', 'macs': 'macs', 'milliseconds': 'latency', 'peak_bytes': 'memory'}  # file names
# Candidate offsets of a label from its point, in typographic points.
_PLACES = ((8, 0), (-8, 0), (8, 8), (8, -8), (-8, 8), (-8, -8), (0, 9), (0, -9), (10, 20), (10, -20))
_SVG_COLOURS = {INK: 'currentColor', FAINT: 'var(--faint)', GRID: 'var(--grid)'}

Columns = Mapping[str, tuple[np.ndarray, np.ndarray]]  # columns of a metrics.csv: name -> (iterations, values)
Scenes = Mapping[str, Mapping[str, Path]]  # image name -> source (`input`, a network, `clean`) -> file


class Plot(NamedTuple):
    """Rendered plot in two formats."""

    name: str  # file name without suffix
    title: str
    png: bytes  # 200 dpi
    svg: str  # for the report, with the colours `INK`, `FAINT` and `GRID`


def draw_all(results: Results, curves: Mapping[str, Columns], validated: str | None) -> list[Plot]:
    """Draw every plot for which data is available.

    Args:
        results: results of the comparison.
        curves: columns of `metrics.csv` of each trained network.
        validated: validation column to plot, `dataset/metric`, or None.
    """
    wanted: list[tuple[str, str, Callable[[Axes], None]]] = []
    metric = next(iter(results.metrics), None)
    costs: dict[str, Column] = {}
    for column in results.columns():  # costs are plotted for the first size only
        costs.setdefault(column.key, column)
    for key in _COSTS if metric else ():
        numbers = costs[key].numbers if key in costs else ()
        points = [(row, cost) for row, cost in zip(results.rows, numbers, strict=False) if row.values and cost]
        if points:
            draw = partial(_draw_scatter, results=results, metric=metric, points=points, label=costs[key].title)
            wanted.append((f'{metric}_against_{_COSTS[key]}', f'{metric} vs. {costs[key].title}', draw))
    losses = {name: loss for name, columns in curves.items() if (loss := _loss(columns)) is not None}
    if losses:
        title = 'training loss (running mean)'
        wanted.append(('training_loss', title, partial(_draw_losses, results=results, title=title, lines=losses)))
    scores = {
        name: columns[validated]
        for name, columns in curves.items()
        if validated in columns and columns[validated][0].size > 1
    }
    if scores:
        dataset, _, metric = validated.rpartition('/')
        title = f'{metric} on {dataset} during training'
        wanted.append(('training_validation', title, partial(_draw_lines, results=results, title=title, lines=scores)))
    plots = []
    for name, title, draw in wanted:
        with only_warn(f'plot not drawn: {title}'):
            plots.append(_draw(re.sub(r'[^\w-]', '_', name), title, draw))
    return plots


def _draw(name: str, title: str, draw: Callable[[Axes], None]) -> Plot:
    with rc_context({**STYLE, 'svg.hashsalt': name}):  # makes the SVG reproducible
        figure = Figure(figsize=_INCHES, layout='constrained')
        axis = figure.subplots()
        quieten(axis)
        draw(axis)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format='png', dpi=200)
        figure.savefig(svg, format='svg', metadata={'Date': None, 'Title': printable(title)}, transparent=True)
    return Plot(name, title, png.getvalue(), svg.getvalue().decode())


def _styles(results: Results) -> dict[str, tuple[str, str]]:
    """Return the colour and marker of each network."""
    names = [row.name for row in results.networks]
    return dict(zip(names, itertools.cycle(zip(COLOURS, _MARKERS, strict=True)), strict=False))


def _draw_scatter(axis: Axes, results: Results, metric: str, points: Sequence[tuple[Row, float]], label: str) -> None:
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
    # Leaves room for labels, and a non-empty range if all costs are equal.
    axis.set_xlim(min(costs) / 1.7, max(costs) * 1.7)
    is_narrow = max(costs) < 12 * min(costs)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_narrow else (1,)))
    axis.xaxis.set_major_formatter(lambda value, _: format_tick(value))
    axis.xaxis.set_minor_formatter(NullFormatter())
    write_name(axis.set_xlabel(''), label)
    write_name(axis.set_ylabel(''), metric)
    axis.margins(y=0.12)
    title = axis.set_title('', loc='left', fontweight='bold')
    write_name(title, f'{metric}, mean over {len(results.images)} images')
    _name_marks(axis, marks, _draw_input(axis, results, metric))


def _draw_input(axis: Axes, results: Results, metric: str) -> Annotation | None:
    """Draw a labelled horizontal line at the mean of the degraded input."""
    row = next((row for row in results.rows if row.name == INPUT and row.values), None)
    found = results.estimate(row, metric) if row is not None else None
    if found is None or not math.isfinite(found.mean):
        return None
    axis.axhline(found.mean, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    return axis.annotate(
        f'input {format_metric(metric, found.mean)}',
        (1, found.mean),
        xycoords=('axes fraction', 'data'),
        xytext=(-3, 3),
        textcoords='offset points',
        ha='right',
        color=FAINT,
        fontsize=9,
    )


def _name_marks(axis: Axes, marks: Sequence[tuple[str, float, float, str]], note: Annotation | None) -> None:
    """Place each label with the least overlap with other labels, points and the frame; the note is placed first."""
    axis.figure.draw_without_rendering()  # computes the layout
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
        left = 3 - axis.bbox.width * 72 / axis.figure.dpi
        put(note, [{'position': (-3, 3), 'ha': 'right'}, {'position': (left, 3), 'ha': 'left'}])
    for name, cost, value, colour in marks:
        font = {'color': colour, 'fontweight': 'bold', 'fontsize': 9.5}
        text = axis.annotate('', (cost, value), xytext=(0, 0), textcoords='offset points', **font)
        write_name(text, name)
        # Align each label so that it extends away from its point.
        sides, heights = {-1: 'right', 0: 'center', 1: 'left'}, {-1: 'top', 0: 'center', 1: 'bottom'}
        signs = [(np.sign(dx), np.sign(dy)) for dx, dy in _PLACES]
        places = zip(_PLACES, signs, strict=True)
        put(text, [{'position': place, 'ha': sides[x], 'va': heights[y]} for place, (x, y) in places])


def _overlap(first: Bbox, second: Bbox) -> float:
    common = Bbox.intersection(first, second)
    return 0.0 if common is None else common.width * common.height


def _draw_lines(axis: Axes, results: Results, title: str, lines: Columns) -> None:
    styles = _styles(results)
    # The legend is sorted by the final values, as the lines end from top to bottom.
    ordered = dict(sorted(lines.items(), key=lambda line: -np.nan_to_num(line[1][1][-1])))
    drawn: list[Any] = []
    for name, (iterations, values) in ordered.items():
        colour, marker = styles.get(name, (FAINT, 'o'))
        marker = marker if len(values) <= 40 else None
        drawn += axis.plot(iterations, values, color=colour, linewidth=1.6, marker=marker, markersize=4)
    axis.set_xlabel('iteration')
    write_name(axis.set_title('', loc='left', fontweight='bold'), title)
    axis.xaxis.set_major_formatter(lambda value, _: format_tick(value))
    draw_legend(axis, drawn, list(ordered), labelcolor='linecolor', handlelength=1.2, prop={'weight': 'bold'})


def _draw_losses(axis: Axes, results: Results, title: str, lines: Columns) -> None:
    """Draw loss curves with y limits that ignore the first 5 % of iterations, whose losses are much larger."""
    values = np.concatenate([values[len(values) // 20 :] for _, values in lines.values()])
    low, high = np.nanmin(values), np.nanpercentile(values, 99)
    if np.isfinite([low, high]).all() and high > low:
        axis.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
    _draw_lines(axis, results, title, lines)


def _loss(columns: Columns) -> tuple[np.ndarray, np.ndarray] | None:
    """Return iterations and the smoothed sum of all losses, or None if no loss was logged."""
    names = [name for name in columns if name.startswith('l_') and columns[name][0].size]
    if not names:
        return None
    iterations = columns[names[0]][0]
    total = smoothed(
        sum(columns[name][1] for name in names if len(columns[name][1]) == len(iterations)), _SMOOTHED_SHARE
    )
    points = slice(round(len(total) * _SMOOTHED_SHARE) // 2, None, math.ceil(len(total) / _MOST_POINTS))
    return iterations[points], total[points]


def write_outputs(plan: Plan, results: Results) -> Path:
    """Write table.md, table.csv, images.csv, plots/ and report.html into the folder of the comparison.

    Returns:
        Path of the report, or of table.md if the report could not be written.
    Raises:
        FileError: if a file cannot be written.
    """
    failures = [escape_markdown(f'{row.name} failed while {row.failed}') for row in results.rows if row.failed]
    contents = {
        'table.md': f'{results.to_markdown()}\n{"".join(f"{chr(10)}- {line}" for line in failures)}'.rstrip() + '\n',
        'table.csv': results.to_csv(),
        'images.csv': results.images_to_csv(),
    }
    for name, text in contents.items():
        write_file(plan.folder / name, text.encode(), make_folder=True)
    drawings: list[Plot] = []
    with only_warn('plots not drawn'):
        drawings = draw_all(results, _read_curves(plan), _validated_column(plan, results))
    for drawing in drawings:
        write_file(plan.folder / 'plots' / f'{drawing.name}.svg', drawing.svg.encode(), make_folder=True)
        write_file(plan.folder / 'plots' / f'{drawing.name}.png', drawing.png)
    with only_warn('report.html not written'):
        page = render_page(results, _scenes(plan, results), drawings, describe_method(plan, results))
        write_file(plan.folder / 'report.html', page.encode())
        return plan.folder / 'report.html'
    return plan.folder / 'table.md'


def render_page(results: Results, scenes: Scenes, drawings: Sequence[Plot], method: Sequence[tuple[str, str]]) -> str:
    """Render the report as one HTML page.

    Args:
        results: results of the comparison.
        scenes: images for the image viewer.
        drawings: plots, see `draw_all`.
        method: experimental setup as (term, description) pairs, see `describe_method`.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters['duration'] = format_duration
    environment.filters['metric'] = lambda values: ' / '.join(format_metric(*item) for item in values.items())
    environment.filters['number'] = lambda value: '' if value is None or not math.isfinite(value) else repr(value)
    metric = next(iter(results.metrics), None)
    best = results.best(metric) if metric else None
    return environment.from_string(_TEMPLATE.read_text(encoding='utf-8')).render(
        results=results,
        input_name=INPUT,
        best=best,
        best_interval=best and format_interval(metric, results.estimate(best, metric)),
        alike=_not_significant(results, metric, best) if best else [],
        scenes=scenes,
        drawings=[(drawing.title, _inline_svg(drawing)) for drawing in drawings],
        method=method,
        data=_viewer_data(results, scenes, best.name if best else None),
    )


def _not_significant(results: Results, metric: str, best: Any) -> list[str]:
    """Return the networks whose confidence interval of the difference to the best network includes zero."""
    differences = {row.name: results.difference(row, metric, best) for row in results.networks}
    return [
        name
        for name, found in differences.items()
        if found is not None and found.low is not None and found.low <= 0 <= found.high
    ]


def _inline_svg(drawing: Plot) -> str:
    svg = drawing.svg[drawing.svg.index('<svg') :]
    for colour, replacement in _SVG_COLOURS.items():
        svg = svg.replace(colour, replacement)
    # Prefix ids with the plot's name: they must be unique in the page.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf'\g<1>{drawing.name}-', svg)
    return re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)


def _viewer_data(results: Results, scenes: Scenes, best: str | None) -> dict[str, Any]:
    """Return the data of the image viewer's script, with images as data URLs."""
    sources = list(dict.fromkeys(source for files in scenes.values() for source in files))
    pictures = []
    for name, files in scenes.items():
        images: dict[str, str] = {}
        with only_warn(f'{name} is not shown in the report'):
            with Image.open(next(iter(files.values()))) as image:
                width, height = image.size
            images = {source: _data_url(file) for source, file in files.items()}
        if not images:
            continue
        values = {
            row.name: [format_metric(*item) for item in row.values[name].items()]
            for row in results.rows
            if name in row.values
        }
        pictures.append({'name': name, 'width': width, 'height': height, 'images': images, 'values': values})
    return {
        'pictures': pictures,
        'sources': [[name, name] for name in sources],
        'left': INPUT if INPUT in sources else next(iter(sources), ''),
        'right': best if best in sources else next(reversed(sources), ''),
    }


def _data_url(file: Path) -> str:
    kind = 'webp' if features.check('webp') else 'png'
    with Image.open(file) as image, io.BytesIO() as stream:
        image.convert('RGB').save(stream, format=kind.upper(), quality=_QUALITY)
        return f'data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}'


def _read_curves(plan: Plan) -> dict[str, Columns]:
    curves = {}
    for network in plan.networks:
        if network.train is not None:
            try:
                curves[network.name] = read_columns(plan.folder / 'experiments' / network.name / 'metrics.csv')
            except (OSError, ValueError):  # a training that failed early has no metrics.csv
                continue
    return curves


def _validated_column(plan: Plan, results: Results) -> str | None:
    """Return the log column of the first metric on the first validation set, or None if nothing was trained."""
    for network in plan.networks:
        if network.train is not None:
            names = [data['name'] for key, data in network.train['datasets'].items() if key.startswith('val')]
            if names and results.metrics:
                return f'{" ".join(names[0].split())}/{results.metrics[0]}'
    return None


def _scenes(plan: Plan, results: Results) -> Scenes:
    """Return the files of the first images for the viewer, skipping images without any file."""
    folder = plan.folder / 'pictures'

    def kept(name: str) -> dict[str, Path]:
        files = {row.name: image_path(folder / row.name, name) for row in results.rows if row.values}
        files[CLEAN] = image_path(folder / INPUT, name, is_clean=True)
        return {source: file for source, file in files.items() if file.is_file()}

    scenes = ((name, kept(name)) for name in results.images)
    return dict(itertools.islice((scene for scene in scenes if scene[1]), plan.settings.pictures))


def describe_method(plan: Plan, results: Results) -> list[tuple[str, str]]:
    """Return the experimental setup as (term, description) pairs; the template adds what holds for all comparisons."""
    machine, settings = describe_machine(), plan.settings
    cores = machine['cores'] or 1
    given = [network.name for network in plan.networks if network.train is None]
    weights = {
        'latest': 'last checkpoint of each training; not selected on test images',
        'best': 'best checkpoint of each training, selected by validation',
    }[settings.weights]
    loads = [speed['load'] or 0.0 for row in results.rows for speed in row.speeds.values()]
    gpu = f', {machine["gpu"]}' if machine['gpu'] else ''
    threads = settings.threads or machine['threads']
    lines = [
        ('Data', f'{plan.dataset["name"]} ({plan.dataset["type"]}), {len(results.images)} images'),
        ('Protocol', read_protocol(plan.protocol).describe()),
        ('Training', _describe_training(plan, results)),
        ('Weights', weights + (f'; pretrained weights for {", ".join(given)}' if given else '')),
        ('Timed runs', f'{settings.runs} per network and size, after 2 warm-up runs'),
        ('Machine', f'{machine["processor"]}, {cores} cores, {threads} threads{gpu}, {machine["system"]}'),
        ('Versions', ', '.join(f'{name} {version}' for name, version in installed_versions().items())),
    ]
    if max(loads, default=0.0) > cores:
        lines.append(('Machine load', f'up to {max(loads):.1f} on {cores} cores during timing; latency is unreliable'))
    return lines


def _describe_training(plan: Plan, results: Results) -> str:
    opts = [network.train for network in plan.networks if network.train is not None]
    if not opts:
        return 'none; all networks use pretrained weights'
    first = opts[0]
    lengths = {row.training['iterations'] for row in results.rows if row.training.get('iterations')}
    if plan.settings.minutes:
        budget = f'{plan.settings.minutes:g} minutes per network, converted to iterations by its measured speed'
    elif len(lengths) == 1:
        budget = f'{next(iter(lengths)):,} iterations per network'
    else:
        budget = 'iterations as listed below'
    data = first['datasets']['train']
    shape = f'batch size {data.get("batch_size_per_gpu")}'
    shape += f', patch size {data["gt_size"]}×{data["gt_size"]}' if data.get('gt_size') else ''
    keys = sorted({key for opt in opts for key, value in opt['train'].items() if value != first['train'].get(key)})
    differing = f'networks differ in train.{", train.".join(keys)}' if keys else 'same optimiser and schedule'
    seed = first.get('manual_seed')
    return f'identical for all networks: training pairs, their order, seed {seed}; {budget}; {shape}; {differing}'
