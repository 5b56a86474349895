"""One page that holds a whole comparison, pictures and all, and needs nothing but a browser."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, features

from ast_plugin.compare import formats, plots
from ast_plugin.compare.results import Results, Row
from ast_plugin.options.compare_file import INPUT

CLEAN = 'clean'  # the source of the pictures that results are measured against
_TEMPLATE = Path(__file__).with_name('report_template.html')
_QUALITY = 92
_SVG_COLOURS = {plots.INK: 'currentColor', plots.FAINT: 'var(--faint)', plots.GRID: 'var(--grid)'}


@dataclass(frozen=True)
class ImageFile:
    """A scene as every source has it.

    Attributes:
        name: of the picture, as in the results.
        files: of each source: `input`, networks, `clean`.
    """

    name: str
    files: Mapping[str, Path]


def write_page(
    results: Results, pictures: Sequence[ImageFile], drawings: Sequence[plots.Plot], method: Sequence[tuple[str, str]]
) -> str:
    """The page as HTML.

    Args:
        results: of the comparison.
        pictures: to be looked at.
        drawings: of `plots.draw_all`.
        method: what readers must know of how the figures came about: terms and what is said of them.
    """
    parts = {
        'TITLE': _escape(results.name),
        'SUMMARY': _summary(results),
        'TABLE': _table(results),
        'VIEWER': _VIEWER if pictures else '',
        'PLOTS': ''.join(map(_figure, drawings)) or '<p>No network was measured.</p>',
        'IMAGES': _image_table(results),
        'METHOD': '<dl>' + ''.join(f'<dt>{_escape(k)}</dt><dd>{_escape(v)}</dd>' for k, v in method) + '</dl>',
        'DATA': _data(results, pictures),
    }
    template = _TEMPLATE.read_text(encoding='utf-8')
    return re.sub(r'%%([A-Z]+)%%', lambda match: parts[match.group(1)], template)


_VIEWER = """<section id="viewer" aria-labelledby="h-viewer">
<h2 id="h-viewer">Look for yourself</h2>
<div class="controls">
<label>Image <select id="picture"></select></label>
<label>Left <select id="left"></select></label>
<label>Right <select id="right"></select></label>
<button id="swap" type="button" aria-label="Swap left and right">⇄</button>
<button id="zoom-out" type="button" aria-label="Smaller">−</button>
<button id="zoom-in" type="button" aria-label="Larger">+</button>
<button id="zoom-real" type="button" aria-label="One pixel of the picture a pixel of the screen">1:1</button>
<button id="zoom-fit" type="button" aria-label="The whole picture">whole</button>
<output id="zoom" class="faint" aria-live="off"></output>
</div>
<div id="stage" tabindex="0" role="group" aria-label="Two restorations of one picture, divided by a bar">
<div class="layer"><img id="image-right" alt=""></div>
<div class="layer" id="layer-left"><img id="image-left" alt=""></div>
<span class="tag" id="tag-left"></span><span class="tag" id="tag-right"></span>
<div id="bar" aria-hidden="true"></div>
</div>
<input id="split" type="range" min="0" max="100" step="0.5" value="50" aria-label="Where the bar stands">
<p class="faint">Drag the bar, or use <kbd>←</kbd> <kbd>→</kbd> on the picture or the slider. <kbd>+</kbd> <kbd>−</kbd>,
two fingers, or the wheel with <kbd>Ctrl</kbd> change the size, <kbd>0</kbd> shows the whole, <kbd>1</kbd> every pixel;
drag or use the arrows to move about. <kbd>Space</kbd> swaps the sides.</p>
<noscript><p>The pictures need JavaScript; all figures are in the tables.</p></noscript>
</section>"""


def _summary(results: Results) -> str:
    networks = [row for row in results.rows if row.name != INPUT]
    failed = [row for row in networks if row.failed]
    lines = []
    metric = next(iter(results.metrics), None)
    best = results.best(metric) if metric else None
    if best is not None:
        pictures = f'{len(results.images)} picture' + ('s' if len(results.images) != 1 else '')
        found = formats.interval(metric, results.estimate(best, metric))
        count = len(networks) - len(failed)
        text = f'{count} networks on {pictures}. Best {metric}: <b>{_escape(best.name)}</b>, {found}.'
        lines.append(f'<p>{text}{_significance(results, metric, best)}</p>')
    lines += [
        f'<p class="failed" role="alert"><b>{_escape(row.name)}</b> failed, {_escape(row.failed)}</p>' for row in failed
    ]
    return ''.join(lines)


def _significance(results: Results, metric: str, best: Row) -> str:
    """Which networks the pictures do not tell from the best one."""
    alike = []
    for row in results.rows:
        found = results.difference(row, metric, best) if row.name != INPUT else None
        if found is not None and found.low is not None and found.low <= 0 <= found.high:
            alike.append(_escape(row.name))
    return f' On these pictures not to be told from it: {", ".join(alike)}.' if alike else ''


def _table(results: Results) -> str:
    header, rows = formats.table_cells(results)
    keys = _sort_keys(results)
    best = _best_cells(keys, results)
    head = ''.join(f'<th scope="col"><button type="button">{_escape(cell)}</button></th>' for cell in header)
    body = []
    for number, (row, cells) in enumerate(zip(results.rows, rows, strict=True)):
        name = f'<th scope="row">{_escape(cells[0])}<small> {_escape(row.kind)}</small></th>'
        values = ''
        for column, (cell, key) in enumerate(zip(cells[1:], keys[number], strict=True)):
            mark = ' class="best"' if (number, column) in best else ''
            values += f'<td data-value="{_number(key)}"{mark}>{_with_interval(cell)}</td>'
        body.append(f'<tr{" class=input" if row.name == INPUT else ""}>{name}{values}</tr>')
    share = f'{100 * results.confidence:g} %'
    caption = f'Means over the pictures, with {share} intervals by bootstrap. Headings sort; bold is best.'
    return f'<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def _sort_keys(results: Results) -> list[list[float | None]]:
    """Of each row the numbers behind the cells of `formats.table_cells`, but for the name's."""
    keys = []
    for row in results.rows:
        line: list[float | None] = [row.parameters]
        for size in results.sizes:
            speed = row.speeds.get(size)
            line += [speed.macs, speed.milliseconds, speed.peak_bytes] if speed else [None] * 3
        found = [results.estimate(row, metric) for metric in results.metrics]
        if results.reference() is not None:
            found += [results.difference(row, metric) for metric in results.metrics[:1]]
        keys.append(line + [item.mean if item else None for item in found])
    return keys


def _best_cells(keys: Sequence[Sequence[float | None]], results: Results) -> set[tuple[int, int]]:
    """Row and column of the best figures among the networks: the least of costs, the best of metrics."""
    num_costs = 1 + 3 * len(results.sizes)
    best = set()
    for column in range(num_costs + len(results.metrics)):
        lower = column < num_costs or results.metrics[column - num_costs] in results.lower_is_better
        values = [
            (line[column], number)
            for number, (line, row) in enumerate(zip(keys, results.rows, strict=True))
            if line[column] is not None and row.name != INPUT
        ]
        if len(values) > 1:
            extreme = (min if lower else max)(value for value, _ in values)
            best |= {(number, column) for value, number in values if value == extreme}
    return best


def _image_table(results: Results) -> str:
    rows = [row for row in results.rows if row.values]
    if not rows:
        return ''
    head = '<th scope="col"><button type="button">picture</button></th>' + ''.join(
        f'<th scope="col"><button type="button">{_escape(row.name)}</button></th>' for row in rows
    )
    body = []
    for image in results.images:
        cells = ''
        for row in rows:
            values = row.values.get(image, {})
            texts = [formats.metric_value(metric, value) for metric, value in values.items()]
            cells += f'<td data-value="{_number(next(iter(values.values()), None))}">{" / ".join(texts)}</td>'
        body.append(f'<tr><th scope="row">{_escape(image)}</th>{cells}</tr>')
    caption = ' / '.join(map(_escape, results.metrics))
    return f'<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def _figure(drawing: plots.Plot) -> str:
    svg = drawing.svg[drawing.svg.index('<svg') :]
    for colour, replacement in _SVG_COLOURS.items():
        svg = svg.replace(colour, replacement)
    # Several drawings in one page: names in them are of their own.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf'\g<1>{drawing.name}-', svg)
    svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
    svg = svg.replace(
        '<svg ', f'<svg role="img" aria-label="{_escape(drawing.title)}; the figures are in the table" ', 1
    )
    return f'<figure>{svg}</figure>'


def _data(results: Results, pictures: Sequence[ImageFile]) -> str:
    """What the page's script reads: pictures once each, as data URLs."""
    names = dict.fromkeys(source for picture in pictures for source in picture.files)
    best = results.best(results.metrics[0]) if results.metrics else None
    images: list[str] = []
    entries = []
    for picture in pictures:
        numbers = {}
        for source, file in picture.files.items():
            numbers[source] = len(images)
            images.append(_data_url(file))
        with Image.open(next(iter(picture.files.values()))) as image:
            width, height = image.size
        values = {
            row.name: {
                metric: formats.metric_value(metric, value) for metric, value in row.values[picture.name].items()
            }
            for row in results.rows
            if picture.name in row.values
        }
        entries.append({'name': picture.name, 'width': width, 'height': height, 'images': numbers, 'values': values})
    content = {
        'pictures': entries,
        'sources': [[name, {INPUT: 'unrestored'}.get(name, name)] for name in names],
        'left': INPUT if INPUT in names else next(iter(names), ''),
        'right': best.name if best is not None and best.name in names else next(reversed(names), ''),
        'images': images,
    }
    # Nothing in a name may end the script or begin another.
    return json.dumps(content).replace('<', '\\u003c').replace('>', '\\u003e').replace('&', '\\u0026')


def _data_url(file: Path) -> str:
    with Image.open(file) as image:
        stream, kind = io.BytesIO(), 'webp' if features.check('webp') else 'png'
        image.convert('RGB').save(stream, format=kind.upper(), quality=_QUALITY)
    return f'data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}'


def _with_interval(cell: str) -> str:
    value, bracket, rest = cell.partition(' [')
    return f'{_escape(value)}<small>[{_escape(rest)}</small>' if bracket else _escape(cell)


def _number(value: float | None) -> str:
    return '' if value is None or not math.isfinite(value) else repr(value)


def _escape(text: Any) -> str:
    return html.escape(str(text))
