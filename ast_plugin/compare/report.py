"""Writes what a comparison has found: tables, plots, and one page that needs nothing but a browser."""

from __future__ import annotations

import base64
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image, features

from ast_plugin.compare import plots
from ast_plugin.compare.machine import describe_machine, installed_versions
from ast_plugin.compare.measure import image_path
from ast_plugin.compare.plan import Plan
from ast_plugin.compare.results import Results, format_duration, format_interval, format_metric
from ast_plugin.errors import only_warn
from ast_plugin.evaluation.protocols import read_protocol
from ast_plugin.files import write_file
from ast_plugin.models.run_log import read_columns
from ast_plugin.names import escape_markdown
from ast_plugin.options.sections import INPUT

CLEAN = 'clean'  # the source of the images that results are measured against
_TEMPLATE = Path(__file__).with_name('report_template.html')
_QUALITY = 92  # of the images in the page
Scenes = Mapping[str, Mapping[str, Path]]  # by name the files of every source: `input`, networks, `clean`
_SVG_COLOURS = {plots.INK: 'currentColor', plots.FAINT: 'var(--faint)', plots.GRID: 'var(--grid)'}


def write_outputs(plan: Plan, results: Results) -> Path:
    """Write table.md, table.csv, images.csv, plots/ and report.html into the comparison's folder.

    Returns:
        The report, or where it fails the table.
    Raises:
        FileError: if a file cannot be written.
    """
    failures = [escape_markdown(f'{row.name} failed, {row.failed}') for row in results.rows if row.failed]
    contents = {
        'table.md': f'{results.to_markdown()}\n{"".join(f"{chr(10)}- {line}" for line in failures)}'.rstrip() + '\n',
        'table.csv': results.to_csv(),
        'images.csv': results.images_to_csv(),
    }
    for name, text in contents.items():
        write_file(plan.folder / name, text.encode(), make_folder=True)
    drawings: list[plots.Plot] = []
    with only_warn('not drawn'):
        drawings = plots.draw_all(results, _read_curves(plan), _validated_column(plan, results))
    for drawing in drawings:
        write_file(plan.folder / 'plots' / f'{drawing.name}.svg', drawing.svg.encode(), make_folder=True)
        write_file(plan.folder / 'plots' / f'{drawing.name}.png', drawing.png)
    with only_warn('report.html is not written'):
        page = render_page(results, _scenes(plan, results), drawings, describe_method(plan, results))
        write_file(plan.folder / 'report.html', page.encode())
        return plan.folder / 'report.html'
    return plan.folder / 'table.md'


def render_page(
    results: Results, scenes: Scenes, drawings: Sequence[plots.Plot], method: Sequence[tuple[str, str]]
) -> str:
    """The page as HTML.

    Args:
        results: of the comparison.
        scenes: images to be looked at.
        drawings: of `plots.draw_all`.
        method: what readers must know of how the figures came about: terms and what is said of them.
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
        alike=_not_told_from(results, metric, best) if best else [],
        scenes=scenes,
        drawings=[(drawing.title, _inline_svg(drawing)) for drawing in drawings],
        method=method,
        data=_viewer_data(results, scenes, best.name if best else None),
    )


def _not_told_from(results: Results, metric: str, best: Any) -> list[str]:
    """Networks whose difference from the best one the images leave open."""
    differences = {row.name: results.difference(row, metric, best) for row in results.networks}
    return [
        name
        for name, found in differences.items()
        if found is not None and found.low is not None and found.low <= 0 <= found.high
    ]


def _inline_svg(drawing: plots.Plot) -> str:
    svg = drawing.svg[drawing.svg.index('<svg') :]
    for colour, replacement in _SVG_COLOURS.items():
        svg = svg.replace(colour, replacement)
    # Several drawings share one page: the names in each get its own name in front.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf'\g<1>{drawing.name}-', svg)
    return re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)


def _viewer_data(results: Results, scenes: Scenes, best: str | None) -> dict[str, Any]:
    """What the page's script reads, images as data URLs among it."""
    sources = list(dict.fromkeys(source for files in scenes.values() for source in files))
    pictures = []
    for name, files in scenes.items():
        images: dict[str, str] = {}
        with only_warn(f'{name} is not shown'):
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
        'sources': [[name, 'unrestored' if name == INPUT else name] for name in sources],
        'left': INPUT if INPUT in sources else next(iter(sources), ''),
        'right': best if best in sources else next(reversed(sources), ''),
    }


def _data_url(file: Path) -> str:
    kind = 'webp' if features.check('webp') else 'png'
    with Image.open(file) as image, io.BytesIO() as stream:
        image.convert('RGB').save(stream, format=kind.upper(), quality=_QUALITY)
        return f'data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}'


def _read_curves(plan: Plan) -> dict[str, plots.Columns]:
    curves = {}
    for network in plan.networks:
        if network.train is not None:
            try:
                curves[network.name] = read_columns(plan.folder / 'experiments' / network.name / 'metrics.csv')
            except (OSError, ValueError):  # a training that failed early left none
                continue
    return curves


def _validated_column(plan: Plan, results: Results) -> str | None:
    """The column that a training's log has of the first metric, on its first set of validation."""
    for network in plan.networks:
        if network.train is not None:
            names = [data['name'] for key, data in network.train['datasets'].items() if key.startswith('val')]
            if names and results.metrics:
                return f'{" ".join(names[0].split())}/{results.metrics[0]}'
    return None


def _scenes(plan: Plan, results: Results) -> Scenes:
    """The first images that were kept, as those that failed were not: the files of each by their network."""
    folder = plan.folder / 'pictures'

    def kept(name: str) -> dict[str, Path]:
        files = {row.name: image_path(folder / row.name, name) for row in results.rows if row.values}
        files[CLEAN] = image_path(folder / INPUT, name, is_clean=True)
        return {source: file for source, file in files.items() if file.is_file()}

    scenes = ((name, kept(name)) for name in results.images)
    return dict(itertools.islice((scene for scene in scenes if scene[1]), plan.settings['pictures']))


def describe_method(plan: Plan, results: Results) -> list[tuple[str, str]]:
    """How the figures came about, as terms and sentences; the page itself says what holds of every comparison."""
    machine, settings = describe_machine(), plan.settings
    cores = machine['cores'] or 1
    given = [network.name for network in plan.networks if network.train is None]
    weights = {
        'latest': 'the last ones of each training: no test image has picked them',
        'best': 'the best of each training by its validations',
    }[settings['weights']]
    loads = [speed['load'] or 0.0 for row in results.rows for speed in row.speeds.values()]
    gpu = f', {machine["gpu"]}' if machine['gpu'] else ''
    threads = settings['threads'] or machine['threads']
    lines = [
        ('Data', f'{plan.dataset["name"]} ({plan.dataset["type"]}), {len(results.images)} images'),
        ('Protocol', read_protocol(plan.protocol).describe()),
        ('Training', _describe_training(plan, results)),
        ('Weights', weights + (f'; given ones for {", ".join(given)}' if given else '')),
        ('Timed runs', f'{settings["runs"]} for each network and size, after two'),
        ('Machine', f'{machine["processor"]}, {cores} cores, {threads} threads{gpu}, {machine["system"]}'),
        ('Versions', ', '.join(f'{name} {version}' for name, version in installed_versions().items())),
    ]
    if max(loads, default=0.0) > cores:
        lines.append(('Busy machine', f'load up to {max(loads):.1f} on {cores} cores while speed was measured'))
    return lines


def _describe_training(plan: Plan, results: Results) -> str:
    opts = [network.train for network in plan.networks if network.train is not None]
    if not opts:
        return 'none here, weights were given'
    first = opts[0]
    lengths = {row.training['iterations'] for row in results.rows if row.training.get('iterations')}
    if plan.settings['minutes']:
        budget = f'as many iterations for each as fit into {plan.settings["minutes"]:g} minutes'
    elif len(lengths) == 1:
        budget = f'{next(iter(lengths)):,} iterations for each'
    else:
        budget = 'iterations as listed'
    data = first['datasets']['train']
    shape = f'batches of {data.get("batch_size_per_gpu")}'
    shape += f', patches of {data["gt_size"]} pixels' if data.get('gt_size') else ''
    keys = sorted({key for opt in opts for key, value in opt['train'].items() if value != first['train'].get(key)})
    differing = f'networks differ in train.{", train.".join(keys)}' if keys else 'same optimiser and schedule'
    seed = first.get('manual_seed')
    return f'the same for all: one set of pairs in one order, one seed ({seed}); {budget}, {shape}; {differing}'
