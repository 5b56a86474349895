"""Writes what a comparison has found: tables, plots and the report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ast_plugin.compare import formats, plots, report
from ast_plugin.compare.machine import describe_machine, installed_versions
from ast_plugin.compare.measure import picture_path
from ast_plugin.compare.training import training_curves
from ast_plugin.evaluation.protocols import read_protocol
from ast_plugin.files import write_file
from ast_plugin.options.compare_file import INPUT

if TYPE_CHECKING:
    from ast_plugin.compare.comparison import Plan
    from ast_plugin.compare.results import Results


def write_outputs(plan: Plan, results: Results) -> dict[str, Path]:
    """Write table.md, table.csv, images.csv, plots/ and report.html into the comparison's folder.

    Returns:
        The files, by what they are: `table`, `csv`, `images`, `report`, and each plot by its name.
    Raises:
        FileError: if one cannot be written.
    """
    drawings = plots.draw_all(results, _curves(plan), _validated(plan, results))
    page = report.write_page(results, _pictures(plan, results), drawings, method(plan, results))
    files = {
        'table': ('table.md', results.to_markdown() + '\n' + _remarks(results)),
        'csv': ('table.csv', results.to_csv()),
        'images': ('images.csv', results.images_to_csv()),
        'report': ('report.html', page),
    }
    contents = {key: (plan.folder / name, text.encode()) for key, (name, text) in files.items()}
    for drawing in drawings:
        contents[drawing.name] = (plan.folder / 'plots' / f'{drawing.name}.png', drawing.png)
        contents[f'{drawing.name} svg'] = (plan.folder / 'plots' / f'{drawing.name}.svg', drawing.svg.encode())
    for path, content in contents.values():
        path.parent.mkdir(exist_ok=True)
        write_file(path, content)
    return {key: path for key, (path, _) in contents.items()}


def method(plan: Plan, results: Results) -> list[tuple[str, str]]:
    """How the figures came about, as terms and sentences."""
    machine, versions = describe_machine(), installed_versions()
    lines = [
        ('Data', f'{plan.dataset["name"]} ({plan.dataset["type"]}), {len(results.images)} pictures'),
        ('Protocol', read_protocol(plan.protocol).describe()),
        ('Training', _budget(plan, results)),
    ]
    lines += [
        (
            f'Training of {row.name}',
            f'{row.training["iterations"]:,} iterations in {formats.duration(row.training["seconds"])}, with its start '
            f'and validations; torch {row.training["versions"].get("torch")}',
        )
        for row in results.rows
        if row.training.get('iterations')
    ]
    lines += [
        ('Weights', _weights(plan)),
        (
            'Intervals',
            f'{100 * results.confidence:g} %, percentiles of the means of {results.resamples:,} bootstrap samples of '
            'the pictures, seed fixed, the same draws for all networks. Differences are paired, picture by picture. '
            'They tell nothing of what another training seed or other scenes would give.',
        ),
        *_perfect(results),
        ('Multiply-adds', _uncounted(results)),
        (
            'Speed and memory',
            f'float32, one picture, a fresh process for each network and size; median of {plan.settings["runs"]} runs '
            'after two. Memory is what the first pass takes on top of the network and its input.',
        ),
    ]
    loads = [speed.load for row in results.rows for speed in row.speeds.values() if speed.load is not None]
    cores = machine['cores'] or 1
    if loads and max(loads) > cores:
        lines.append(('Busy machine', f'load up to {max(loads):.1f} on {cores} cores while speed was measured'))
    lines += [(f'On {row.name}', '; '.join(row.notes)) for row in results.rows if row.notes]
    gpu = f', {machine["gpu"]}' if machine['gpu'] else ''
    threads = plan.settings['threads'] or machine['threads']
    lines += [
        ('Machine', f'{machine["processor"]}, {cores} cores, {threads} threads{gpu}, {machine["system"]}'),
        ('Versions', ', '.join(f'{name} {version}' for name, version in versions.items())),
        (
            'Pictures in this page',
            'the middle 768 pixels at most, WebP of quality 92; figures are of the whole results',
        ),
    ]
    return lines


def _budget(plan: Plan, results: Results) -> str:
    trained = [network for network in plan.networks if network.train is not None]
    if not trained:
        return 'none here, weights were given'
    opts = [network.train for network in trained]
    equal = 'the same for all: one set of pairs in one order, one seed'
    minutes = plan.settings['minutes']
    lengths = {row.training['iterations'] for row in results.rows if row.training.get('iterations')}
    if minutes:
        budget = f'as many iterations for each as fit into {minutes:g} minutes'
    elif len(lengths) == 1:
        budget = f'{next(iter(lengths)):,} iterations for each'
    else:
        budget = 'iterations as listed'
    first = opts[0]['datasets']['train']
    shape = f'batches of {first.get("batch_size_per_gpu")}' + (
        f', patches of {first["gt_size"]} pixels' if first.get('gt_size') else ''
    )
    differing = sorted(
        {key for opt in opts for key, value in opt['train'].items() if value != opts[0]['train'].get(key)}
    )
    differs = (
        f'; networks differ in train.{", train.".join(differing)}' if differing else '; same optimiser and schedule'
    )
    return f'{equal} ({opts[0].get("manual_seed")}); {budget}, {shape}{differs}'


def _weights(plan: Plan) -> str:
    given = [network.name for network in plan.networks if network.train is None]
    which = (
        'the last ones of each training: no test picture has picked them'
        if plan.settings['weights'] == 'latest'
        else 'the best of each training by its validations'
    )
    return which + (f'; given ones for {", ".join(given)}' if given else '')


def _uncounted(results: Results) -> str:
    left_out: dict[str, None] = {}
    for row in results.rows:
        for speed in row.speeds.values():
            left_out |= dict.fromkeys(name.removeprefix('aten::').rstrip('_') for name in speed.uncounted)
    text = 'of convolutions, linear layers, matrix products and normalisations, by mmengine; padding included'
    return text + (f'. Left out: {", ".join(sorted(left_out))}' if left_out else '')


def _perfect(results: Results) -> list[tuple[str, str]]:
    numbers = {metric: len(results.perfect(metric)) for metric in results.metrics}
    return [
        (f'Left out of {metric}', f'{count} pictures that some row restores without any fault, of all rows alike')
        for metric, count in numbers.items()
        if count
    ]


def _remarks(results: Results) -> str:
    """Below the table of a text file: what failed."""
    lines = [f'- {row.name} failed, {row.failed}' for row in results.rows if row.failed]
    return '\n' + '\n'.join(lines) + '\n' if lines else ''


def _curves(plan: Plan) -> dict[str, dict]:
    tables = {
        network.name: training_curves(plan.folder / 'experiments' / network.name / 'metrics.csv')
        for network in plan.networks
        if network.train is not None
    }
    return {name: columns for name, columns in tables.items() if columns}


def _validated(plan: Plan, results: Results) -> str | None:
    """The column that a training's log has of the first metric, on its first set of validation."""
    for network in plan.networks:
        if network.train is not None:
            names = [data['name'] for key, data in network.train['datasets'].items() if key.startswith('val')]
            if names and results.metrics:
                return f'{" ".join(names[0].split())}/{results.metrics[0]}'
    return None


def _pictures(plan: Plan, results: Results) -> list[report.ImageFile]:
    folder = plan.folder / 'pictures'
    measured = [row for row in results.rows if row.values]
    pictures = []
    for name in results.images[: plan.settings['pictures']]:
        files = {row.name: picture_path(folder / row.name, name) for row in measured}
        files[report.CLEAN] = picture_path(folder / INPUT, name, is_clean=True)
        pictures.append(report.ImageFile(name, {source: file for source, file in files.items() if file.is_file()}))
    return pictures
