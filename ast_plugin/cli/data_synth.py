"""Synthesise pairs of degraded and clean images from clean photos.

Degraded images are written to DIR/lq, clean images to DIR/gt with the same names, and masks, if the degradation has
any, to DIR/mask. DIR/synthesis.json records the run. Equal photos, task, parameters and seed produce identical files.

    basicsr data synth --task rain -i photo.png -o out --count 8 --seed 1
    basicsr data synth --task haze -i photos -o out --size 256 --set psnr=12,16 --set airlight=0.8
    basicsr data synth --task haze -i room.png --depth room.npy -o out --set visibility=20
    basicsr data synth --sheet all.jpg
    basicsr data synth --list

In an option file, use `layout: folders` with `dataroot_lq: out/lq` and `dataroot_gt: out/gt`. The pairs can be prepared
and packed like any dataset: `basicsr data prepare folders out prepared`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ast_plugin.cli.commands import check_least
from ast_plugin.data.contact_sheet import draw_degradations
from ast_plugin.data.image_files import ImageFile, encode_image, format_of_name
from ast_plugin.degradations import DEGRADATIONS
from ast_plugin.errors import DataError, OptionError
from ast_plugin.files import write_file
from ast_plugin.names import say

_DEPTH_ENDINGS = ('.npy', '.npz', '.png', '.tif', '.tiff')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr data synth`."""
    parser.add_argument('--task', choices=tuple(DEGRADATIONS), help='the degradation')
    parser.add_argument(
        '-i', '--input', nargs='+', action='extend', metavar='PATH', help='photos, folders of photos, or glob patterns'
    )
    parser.add_argument('-o', '--output', metavar='DIR', help='folder for the pairs; must not exist')
    parser.add_argument('--count', type=int, default=1, metavar='N', help='pairs per photo (default: 1)')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='random seed (default: 0)')
    parser.add_argument(
        '--size', type=int, metavar='N', help='side of square patches in pixels (default: whole photos)'
    )
    parser.add_argument(
        '--set',
        action='append',
        default=[],
        metavar='KEY=VALUE',
        help='set a parameter of the task to one number or a range LOW,HIGH; may be repeated',
    )
    parser.add_argument(
        '--depth',
        metavar='PATH',
        help='haze: depth map (.npy, .npz, gray image), or a folder with one map per photo, by name',
    )
    parser.add_argument('--recursive', action='store_true', help='include subfolders')
    parser.add_argument('--overwrite', action='store_true', help='replace the output of an earlier run in DIR')
    parser.add_argument(
        '--sheet', metavar='FILE', help='draw a contact sheet of the degradations on -i or packaged photos instead'
    )
    parser.add_argument('--list', action='store_true', help='print the degradations and their parameters')


def run(args: argparse.Namespace) -> int:
    """Synthesise the pairs, or draw the contact sheet, or print the parameters."""
    from ast_plugin.data.synthesis import Recipe, check_output, read_parameters, write_pairs

    if args.list:
        return _print_parameters(args.task)
    if args.sheet:
        return _draw_sheet(args)
    _check(args)
    recipe = Recipe(args.task, read_parameters(args.task, _read_settings(args.set)), args.seed, args.count, args.size)
    output = Path(os.path.expanduser(args.output))
    photos, lines = _find_photos(args.input, output, args.recursive)
    depths = _find_depths(args, photos)
    check_output(output, photos.values(), args.overwrite)
    with tqdm(total=len(photos) * args.count, unit='pair', dynamic_ncols=True, disable=None, leave=False) as bar:
        levels, failures = write_pairs(photos, depths, recipe, output, bar.update)
    plural = 's' if len(levels) != 1 else ''
    low, high = min(levels), max(levels)
    lines = [*(f'basicsr: error: {failure}' for failure in failures), *lines]
    if lines:
        say(*lines, file=sys.stderr)
    left = f', {len(failures)} of {len(photos)} photos failed' if failures else ''
    say(f'created {len(levels)} pair{plural} ({args.task}, PSNR {low:.1f} to {high:.1f} dB){left}: {output}')
    return 1 if failures or any(line.startswith('basicsr: error') for line in lines) else 0


def _check(args: argparse.Namespace) -> None:
    missing = [name for name, value in (('--task', args.task), ('-i', args.input), ('-o', args.output)) if not value]
    if missing:
        raise OptionError(f'expected {" and ".join(missing)}; see `basicsr data synth --help` for examples')
    check_least(args, count=1, size=1, seed=0)
    if args.depth is not None and not DEGRADATIONS[args.task].takes_depth:
        raise OptionError(f'--depth: not used by {args.task}; remove it')


def _read_settings(assignments: Sequence[str]) -> dict[str, object]:
    """Parse the values of `--set`: JSON, comma-separated items, or plain text."""
    settings = {}
    for assignment in assignments:
        key, equals, text = map(str.strip, assignment.partition('='))
        if not equals or not key:
            raise OptionError(f'--set {assignment}: expected KEY=VALUE, such as psnr=22,24')
        settings[key] = [item.strip() for item in text.split(',')] if ',' in text else text
        for candidate in (f'[{text}]', text):
            with suppress(ValueError):
                settings[key] = json.loads(candidate)
    return settings


def _find_photos(inputs: Sequence[str], output: Path, recursive: bool) -> tuple[dict[str, Path], list[str]]:
    """Return the photos by unique name, including folder and extension where needed, and lines about other files."""
    from ast_plugin.evaluation.file_restorer import find_images

    found = find_images(inputs, output, recursive)
    names = ['_'.join((*folder.parts, path.stem)) for path, folder in found.images]
    counts = Counter(name.casefold() for name in names)
    named: dict[str, Path] = {}
    for (path, _), name in zip(found.images, names, strict=True):
        name = f'{name}_{path.suffix[1:].lower()}' if counts[name.casefold()] > 1 else name
        other = next((taken for taken in named if taken.casefold() == name.casefold()), None)
        if other is not None:
            raise DataError(
                f'{path} and {named[other]} would produce pairs of the same name; rename one or process them separately'
            )
        named[name] = path
    return named, found.lines()


def _find_depths(args: argparse.Namespace, photos: dict[str, Path]) -> dict[str, Path | None]:
    """Return the depth map of each photo."""
    if args.depth is None:
        return dict.fromkeys(photos)
    path = Path(os.path.expanduser(args.depth))
    if not path.is_dir():
        if len(photos) > 1:
            raise OptionError(
                f'--depth {path}: expected a folder with one depth map per photo for {len(photos)} photos, got a file'
            )
        if not path.is_file():
            raise DataError(f'--depth {path}: no such file or folder')
        return dict.fromkeys(photos, path)
    depths = {}
    for name, photo in photos.items():
        places = [path / f'{photo.stem}{ending}' for ending in _DEPTH_ENDINGS]
        depths[name] = next((place for place in places if place.is_file()), None)
        if depths[name] is None:
            raise DataError(f'--depth {path}: expected {photo.stem}{"|".join(_DEPTH_ENDINGS)} for {photo}, found none')
    return depths


def _draw_sheet(args: argparse.Namespace) -> int:
    from ast_plugin.data.synthesis import packaged_photos

    useless = [name for name in ('output', 'depth', 'size') if getattr(args, name) is not None]
    if useless or args.set:
        raise OptionError(
            f'--sheet cannot be combined with --{(useless or ["set"])[0]}; it supports --task, -i and --seed'
        )
    path = Path(os.path.expanduser(args.sheet))
    format_of_name(path)  # report an unsupported format before drawing
    if args.input:
        photos, _ = _find_photos(args.input, path.parent / 'nothing', args.recursive)
    else:
        photos = {photo.name: photo.path for photo in packaged_photos()}
    sheet = draw_degradations(photos, [args.task] if args.task else None, args.seed)
    write_file(path, encode_image(path, ImageFile(np.asarray(sheet)), quality=74), make_folder=True)
    say(f'drew {path}')
    return 0


def _print_parameters(task: str | None) -> int:
    for name in [task] if task else DEGRADATIONS:
        say(name)
        for key, field in DEGRADATIONS[name].parameters.model_fields.items():
            if key not in ('type', 'layers'):
                default = field.get_default()
                shown = ', '.join(map(str, default)) if isinstance(default, tuple) else str(default)
                say(f'  {key} = {shown}: {field.description}')
    return 0
