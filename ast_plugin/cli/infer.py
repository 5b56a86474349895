"""Restore image files with trained weights.

Reads PNG, JPEG, WebP, TIFF and BMP. Results keep name, format, bit depth, transparency, colour profile, EXIF data and
other metadata of their inputs (a note reports anything lost) and are rotated upright. JPEG and lossy WebP are written
with --quality, other formats losslessly. Inputs are never overwritten; results of earlier runs are. Images that cannot
be restored are reported with the reason, files that are not images are counted, and all others are still restored.

    basicsr infer -i photo.jpg -o restored                # detects rain, raindrops or haze
    basicsr infer -i photo.jpg -o restored --task rain
    basicsr infer -i photo.jpg -o restored.png            # one image, written to a file of this name and format
    basicsr infer -i photos    -o restored --weights experiments/AST_derain/stage_2/models/net_g_best.safetensors

Exit status: 0 all images restored, 1 some images failed, 2 wrong usage or input.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ast_plugin.cli import commands
from ast_plugin.errors import OptionError
from ast_plugin.files import write_file
from ast_plugin.names import printable, say, to_csv


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr infer`."""
    add = parser.add_argument
    what = 'images, folders of images, or glob patterns'
    add('-i', '--input', nargs='+', action='extend', required=True, metavar='PATH', help=what)
    add('-o', '--output', required=True, metavar='PATH', help='output folder; or output file for a single image')
    commands.add_weights_arguments(parser, 'detect the task of each image')
    add(
        '--tile',
        type=_tile,
        default='auto',
        metavar='N',
        help='tile size in pixels; auto (default) tiles only images that do not fit in memory',
    )
    add('--overlap', type=int, metavar='N', help='overlap of adjacent tiles in pixels (default: a quarter of a tile)')
    add('--batch', type=int, default=1, metavar='N', help='tiles per batch (default: 1)')
    add(
        '--self-ensemble',
        action='store_true',
        help='average the results of the eight flips and rotations, eight times slower; worse for rain, which falls',
    )
    add(
        '--processing-resolution',
        type=int,
        metavar='N',
        help='downscale larger images to this shorter side for the network, and apply its change to the full image; 0 '
        'for full resolution (default: as stated by the weights file)',
    )
    add('--device', default='auto', metavar='NAME', help=f'{commands.DEVICES} (default: auto)')
    add('--suffix', default='', metavar='TEXT', help='append TEXT to the file names: photo.jpg becomes photoTEXT.jpg')
    add(
        '--format',
        choices=('keep', 'png', 'tiff'),
        default='keep',
        help='file format of the results (default: keep the format of the input)',
    )
    add('--quality', type=int, default=95, metavar='N', help='JPEG and lossy WebP quality, 1 to 100 (default: 95)')
    add('--report', metavar='FILE', help='write task, amount of change, warnings, time and status of each image as CSV')
    add(
        '--uncertainty',
        action='store_true',
        help='also write a map of the standard deviation over the eight flips and rotations of each image',
    )
    add('--recursive', action='store_true', help='include subfolders, and keep the folder structure')
    add('--max-megapixels', type=float, default=200, metavar='N', help='reject larger images (default: 200)')


def run(args: argparse.Namespace) -> int:
    """Restore the input images and report the outcome of each file."""
    from ast_plugin.evaluation import file_restorer

    _check(args)
    output = os.path.expanduser(args.output)
    found = file_restorer.find_images(args.input, Path(output), args.recursive)
    jobs = file_restorer.plan_jobs(found.images, output, args.suffix, args.format)
    restorer = _load_restorer(args)
    for note in getattr(restorer, 'notes', ()):
        hint = '; specify the full network with -opt FILE' if 'assuming' in note else ''
        say(f'note: {args.weights}: {note}{hint}', file=sys.stderr)
    report = None if args.report is None else Path(os.path.expanduser(args.report))
    maps = map(file_restorer.uncertainty_path, jobs) if args.uncertainty else ()
    file_restorer.protect_images(maps, 'a map of --uncertainty', jobs)
    file_restorer.protect_images([report] if report else [], '--report', jobs)
    file_restorer.prepare_folders(jobs)
    file_restorer.mark_results(Path(output), args.input)
    if report is not None:
        write_file(report, b'', make_folder=True)  # fail now if it cannot be written

    start = time.perf_counter()
    failed = Counter({'unreadable': len(found.failures)} if found.failures else {})
    # A progress bar in a terminal, one line per image elsewhere. Failures and notes go to stderr, above the bar.
    is_bar = sys.stderr.isatty()
    with tqdm(total=len(jobs), unit='image', dynamic_ncols=True, file=sys.stderr, disable=not is_bar) as bar:

        def show_tile(done: int, total: int) -> None:
            if total > 1:
                name, _, _ = (bar.postfix or '').partition(', tile ')
                bar.set_postfix_str(f'{name}, tile {done}/{total}')

        results = file_restorer.restore_files(
            jobs,
            restorer,
            quality=args.quality,
            max_pixels=int(args.max_megapixels * 1e6),
            on_start=lambda job: bar.set_postfix_str(printable(job.source.name)),
            on_tile=show_tile,
            uncertainty=args.uncertainty,
        )
        finished = []
        try:
            for number, result in enumerate(results, 1):
                finished.append(result)
                for warning in result.warnings:
                    bar.write(printable(f'warning: {result.job.source}: {warning}'), file=sys.stderr)
                for note in result.notes:
                    bar.write(printable(f'note: {result.job.source}: {note}'), file=sys.stderr)
                if result.failure:
                    failed[result.kind] += 1
                    bar.write(printable(f'basicsr: error: {result.failure}'), file=sys.stderr)
                elif not is_bar:
                    task = f'{result.task} {result.confidence:.0%}, ' if result.task else ''
                    line = f'[{number}/{len(jobs)}] {result.job.target} ({task}{result.seconds:.1f} s)'
                    say(line)
                bar.update()
        finally:  # an interrupted run also writes its report
            if report is not None:  # names that are not UTF-8 keep their bytes
                text = to_csv(file_restorer.report_rows(finished))
                write_file(report, text.encode(errors='surrogateescape'))
    if lines := found.lines():
        say(*lines, file=sys.stderr)
    unchanged, total = sum(result.is_unchanged for result in finished), len(jobs) + len(found.failures)
    num_others = failed.total() + unchanged
    restored = f'{total - num_others}{f" of {total}" if num_others else ""} image{"s" * (total != 1)}'
    others = [f'unchanged: {unchanged}'] if unchanged else []
    others += [f'failed: {", ".join(f"{count} {kind}" for kind, count in failed.items())}'] if failed else []
    classes = f' ({"; ".join(others)})' if others else ''
    say(f'restored {restored} in {time.perf_counter() - start:.1f} s{classes}: {Path(output)}')
    return 1 if failed else 0


def _load_restorer(args: argparse.Namespace) -> Any:
    """Return the Restorer given by the arguments, or Specialists, which select a restorer for each image."""
    from ast_plugin.evaluation.classifier import Specialists
    from ast_plugin.evaluation.restorer import Restorer
    from ast_plugin.weights import resolve_weights

    names = ('device', 'tile', 'overlap', 'batch', 'self_ensemble', 'processing_resolution')
    options = {name: getattr(args, name) for name in names}
    if args.self_ensemble and args.weights is None and args.task in (None, 'rain'):
        say('warning: --self-ensemble rotates rain, which the bundled weights only know upright', file=sys.stderr)
    if args.task is not None:
        return Restorer.from_task(args.task, **options)
    if args.weights is None:
        return Specialists(**options)
    network = None if args.opt is None else commands.read_network(args.opt)
    return Restorer.from_weights(resolve_weights(args.weights), network=network, param_key=args.param_key, **options)


def _tile(text: str) -> int | str:
    if text == 'auto':
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'expected a tile size in pixels, or auto, got {text}') from None


def _check(args: argparse.Namespace) -> None:
    from ast_plugin.evaluation.tiling import Tiling

    try:
        Tiling(args.tile, args.overlap, batch=args.batch)
    except OptionError as error:
        raise OptionError(f'--{error}') from None
    commands.check_weights_arguments(args)
    commands.check_least(args, processing_resolution=0)
    if not 1 <= args.quality <= 100:
        raise OptionError(f'--quality is {args.quality}: expected 1 to 100')
    if not args.max_megapixels > 0:
        raise OptionError(f'--max-megapixels is {args.max_megapixels}: expected more than 0')
    if any(mark in args.suffix for mark in ('/', '\\', '\0')):
        raise OptionError(f'--suffix is {args.suffix!r}: expected part of a file name, not a path')
