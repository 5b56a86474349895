"""Compute PSNR and SSIM of images against clean images, with all definitions used in papers side by side.

  basicsr measure results/SRN testsets/gt
  basicsr measure results/SRN testsets/gt --input testsets/lq --csv images.csv
  basicsr measure results/SRN testsets/gt --like 31.87      how was this value computed?
  basicsr measure restored.png clean.png

Images are paired by name without extension, including subfolders; templates describe additional parts of a name. The
intervals are 95 % bootstrap confidence intervals of the mean over the images. Files are written only with --csv or
--markdown.

Exit status: 0 all images measured, 1 some images could not be measured, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from ast_plugin.cli.commands import DEVICES, check_least
from ast_plugin.data.image_files import read_image
from ast_plugin.data.matching import Template, difference_of, fold, is_image, shorten_list
from ast_plugin.errors import DataError, OptionError, ShapeError
from ast_plugin.files import write_file
from ast_plugin.names import printable, say, to_csv, to_markdown

if TYPE_CHECKING:
    import numpy as np

    from ast_plugin.metrics.psnr_ssim import Definition

    Values = dict[Definition | str, float]

_NEAREST = 5  # number of definitions shown if no definition matches --like


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr measure`."""
    parser.add_argument('restored', metavar='RESTORED', help='folder of restored images, or one image')
    parser.add_argument('gt', metavar='GT', help='folder of the clean images, or one image')
    parser.add_argument('--input', metavar='LQ', help='folder of degraded images, or one image, to be measured as well')
    for side, what in (('restored', 'restored'), ('gt', 'clean'), ('input', 'degraded')):
        text = f'name pattern of {what} images: {{}}_SRN for 0001_SRN.png (default: {{}})'
        parser.add_argument(f'--{side}-template', default='{}', metavar='NAME', help=text)
    parser.add_argument(
        '--crop-border', type=int, default=0, metavar='N', help='pixels to crop at each border (default: 0)'
    )
    pyiqa_help = 'also compute these metrics of pyiqa'
    parser.add_argument('--pyiqa', nargs='+', action='extend', default=[], metavar='METRIC', help=pyiqa_help)
    parser.add_argument('--device', default='auto', metavar='NAME', help=f'for pyiqa: {DEVICES} (default: auto)')
    parser.add_argument(
        '--like', metavar='VALUE', help='a published PSNR or SSIM: find the definitions that reproduce it'
    )
    parser.add_argument('--worst', type=int, default=3, metavar='N', help='list the N worst images (default: 3)')
    parser.add_argument('--csv', metavar='FILE', help='write the values of every image as CSV')
    parser.add_argument('--markdown', metavar='FILE', help='write the table of means as Markdown')


def run(args: argparse.Namespace) -> int:
    """Measure the images, print the results and write the requested files."""
    _check(args)
    from ast_plugin.metrics.psnr_ssim import KNOWN, all_definitions

    sides = {'restored': args.restored, 'gt': args.gt, **({'input': args.input} if args.input else {})}
    pairs, notes = _pair({side: Path(os.path.expanduser(path)) for side, path in sides.items()}, vars(args))
    definitions = [definition._replace(border=args.crop_border) for definition in KNOWN]
    if args.like:
        definitions = all_definitions('ssim' if float(args.like) <= 1 else 'psnr')
    values, failures = _measure(pairs, definitions, args.pyiqa, args.crop_border, args.device)
    if notes or failures:
        say(*notes, *failures)
    if not values:
        raise DataError(f'none of the {len(pairs)} pairs could be measured')
    if args.like:
        found = _explain(args.like, definitions, [each['restored'] for each in values.values()])
    else:
        found = _report(values, args)
    return 1 if notes or failures else found


def _check(args: argparse.Namespace) -> None:
    check_least(args, crop_border=0, worst=0)
    if args.like is not None and not re.fullmatch(r'[0-9]+(\.[0-9]+)?', args.like):
        raise OptionError(f'--like {args.like}: expected a published value, such as 31.87 or 0.918')
    if args.like and (args.pyiqa or args.input or args.csv or args.markdown or args.crop_border):
        raise OptionError('--like cannot be combined with --input, --pyiqa, --crop-border, --csv or --markdown')


def _pair(sides: Mapping[str, Path], templates: Mapping[str, str]) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """Pair the images of all sides by name.

    Returns:
        The path of each side by name; a line for each side with images that have no partner.
    """
    for side, path in sides.items():
        if not path.exists():
            raise DataError(f'{path}: no such file or folder ({side})')
    if len({path.is_dir() for path in sides.values()}) == 2:
        kinds = ', '.join(f'{path} is {"a folder" if path.is_dir() else "a file"}' for path in sides.values())
        raise DataError(f'expected folders or single images, not both: {kinds}')
    if sides['restored'].is_file():
        return {sides['restored'].stem: dict(sides)}, []
    found = {side: _images(path, templates[f'{side}_template']) for side, path in sides.items()}
    pairs = {
        name: {side: images[name] for side, images in found.items()}
        for name in found['restored']
        if all(name in images for images in found.values())
    }
    if not pairs:
        examples = '; '.join(f'{side}: {shorten_list(map(printable, images))}' for side, images in found.items())
        hint = _hint(found['restored'], found) or ': use --restored-template to specify how images are named'
        raise DataError(f'no image name occurs in all folders ({examples}){hint}')
    alone = {side: [name for name in images if name not in pairs] for side, images in found.items()}
    return pairs, [
        f'not measured: {len(names)} of {side} without a partner: {shorten_list(names)}{_hint(names, found)}'
        for side, names in alone.items()
        if names
    ]


def _hint(names: Iterable[str], found: Mapping[str, Iterable[str]]) -> str:
    """Return a hint on the first name that looks like another name but differs, or an empty string."""
    others = {fold(name): name for images in found.values() for name in images}
    others |= {fold(name): name for images in found.values() for name in images if name not in names}
    alike = next((name for name in names if others[fold(name)] != name), None)
    if alike is None:
        return ''
    other = others[fold(alike)]
    return f'; {printable(alike)} and {printable(other)} differ only in {difference_of(alike, other)}, rename one'


def _images(folder: Path, template: str) -> dict[str, Path]:
    """Return the sorted images of a folder and its subfolders, by relative folder and key of the name."""
    found: dict[str, Path] = {}
    pattern = Template(template)
    for where, folders, files in os.walk(folder):
        folders.sort()
        for key, names in pattern.keys(sorted(filter(is_image, files))).items():
            name = Path(where, key).relative_to(folder).as_posix()
            if len(names) > 1:
                raise DataError(f'{where}: several images match the name {printable(key)}: {shorten_list(names)}')
            found[name] = Path(where, names[0])
    if not found:
        named = '' if template == '{}' else f' named {template}'
        raise DataError(f'{folder}: expected images{named}, found none in this folder or its subfolders')
    return found


def _measure(
    pairs: Mapping[str, Mapping[str, Path]],
    definitions: Sequence[Definition],
    metrics: Sequence[str],
    border: int,
    device: str,
) -> tuple[dict[str, dict[str, Values]], list[str]]:
    """Return the values of each definition and pyiqa metric by name and side, and a line for each failed pair."""
    from ast_plugin.metrics.psnr_ssim import KNOWN, fractions, measure, to_toolbox
    from ast_plugin.metrics.registered_metrics import pyiqa

    values, failures = {}, []
    for name, paths in tqdm(pairs.items(), unit='image', disable=None, leave=False):
        try:
            gt, by_side = _read(paths['gt']), {}
            for side in paths.keys() - {'gt'}:
                image = _read(paths[side])
                if image.shape != gt.shape:
                    shapes = ' and '.join('x'.join(map(str, each.shape)) for each in (image, gt))
                    raise DataError(f'{paths[side]} and {paths["gt"]} differ: {shapes} (height, width, channels)')
                measured = measure(image, gt, definitions)
                nothing = [definition for definition in definitions[: len(KNOWN)] if math.isnan(measured[definition])]
                if nothing:
                    raise DataError(f'{paths[side]} is too small for {nothing[0].name} with a border of {border}')
                pair = [to_toolbox(each if each.dtype == 'uint8' else fractions(each)) for each in (image, gt)]
                for metric in metrics:
                    measured[metric] = pyiqa(*pair, metric, crop_border=border, device=device)
                by_side[side] = measured
            values[name] = by_side
        except (DataError, ShapeError) as error:
            failures.append(f'not measured: {error}')
    return values, failures


def _read(path: Path) -> np.ndarray:
    image = read_image(path)
    if image.alpha is not None:
        raise DataError(f'{path} has an alpha channel, which metrics do not support: save it without transparency')
    return image.color


def _explain(figure: str, definitions: Sequence[Definition], values: Sequence[Values]) -> int:
    """Print the definitions whose mean matches the figure at its precision, or the nearest ones."""
    from ast_plugin.metrics.psnr_ssim import KNOWN, gives, mean_over_images

    means = {
        definition: mean_over_images([each[definition] for each in values], definition.is_pooled)
        for definition in definitions
    }
    digits = len(figure.partition('.')[2]) + 2
    matches = {definition: how for definition, mean in means.items() if (how := gives(figure, mean))}
    shown = sorted(matches, key=lambda one: (one not in KNOWN, matches[one] == 'cut off'))
    present = [one for one in definitions if not math.isnan(means[one])]  # NaN: the border covers the whole image
    shown = shown or sorted(present, key=lambda one: abs(means[one] - float(figure)))[:_NEAREST]
    say(f'{figure} over {len(values)} images:' if matches else f'no definition yields {figure}; nearest:')
    for definition in shown:
        source = f' ({KNOWN[definition]})' if definition in KNOWN else ''
        how = ', truncated' if matches.get(definition) == 'cut off' else ''
        say(f'  {means[definition]:.{digits}f}  {definition}{source}{how}')
    return 0 if matches else 1


def _report(values: Mapping[str, Mapping[str, Values]], args: argparse.Namespace) -> int:
    """Print the table of means and the worst images, and write the requested files."""
    from ast_plugin.compare.results import estimate
    from ast_plugin.metrics.psnr_ssim import KNOWN, mean_over_images

    sides = [side for side in ('input', 'restored') if side in next(iter(values.values()))]
    columns = list(next(iter(values.values()))['restored'])
    rows = [['metric', *sides, *['gain'] * (len(sides) - 1), '95 % interval', 'as in']]
    for column in columns:
        by_side = [[each[side][column] for each in values.values()] for side in sides]
        means, interval = [mean_over_images(each) for each in by_side], estimate(by_side[-1])
        digits = 2 if getattr(column, 'metric', '') == 'psnr' else 4
        numbers = [f'{mean:.{digits}f}' for mean in means]
        numbers += [f'{means[-1] - means[0]:+.{digits}f}'] * (len(sides) - 1)
        limits = '–' if interval.low is None else f'{interval.low:.{digits}f} to {interval.high:.{digits}f}'
        source = 'pyiqa' if isinstance(column, str) else KNOWN[column._replace(border=0)]
        rows.append([_title(column), *numbers, limits, source])
    table = to_markdown(rows)
    say(*table.split('\n'), '', f'{len(values)} image{"s" * (len(values) > 1)}')
    first = columns[0]
    ranked = sorted(values, key=lambda name: values[name]['restored'][first])
    for name in ranked[: args.worst] if len(values) > 1 else ():
        say(f'worst: {name}, {_title(first)} {values[name]["restored"][first]:.2f}')
    if args.csv:
        cells = [(side, column) for side in sides for column in columns]
        lines = [['image', *(f'{side} {_title(column)}' for side, column in cells)]]
        lines += [[printable(name), *(each[side][column] for side, column in cells)] for name, each in values.items()]
        write_file(Path(os.path.expanduser(args.csv)), to_csv(lines).encode(), make_folder=True)
    if args.markdown:
        write_file(Path(os.path.expanduser(args.markdown)), f'{table}\n'.encode(), make_folder=True)
    return 0


def _title(column: Definition | str) -> str:
    return column if isinstance(column, str) else column.name
