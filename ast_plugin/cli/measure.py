"""Measure images of any network against clean ones, in the definitions that papers use, side by side.

  basicsr measure results/SRN testsets/gt
  basicsr measure results/SRN testsets/gt --input testsets/lq --csv images.csv
  basicsr measure results/SRN testsets/gt --like 31.87      how was this figure computed?
  basicsr measure restored.png clean.png

Images are paired by name, whatever their endings, in sub-folders too; a template says what else stands in a name.
Intervals are those of the mean over the images, at 95 %, by bootstrap. Nothing is written without --csv or --markdown.
Exit status: 0 all measured, 1 some could not be, 2 wrong usage.
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

from ast_plugin.cli.commands import DEVICES
from ast_plugin.data.image_files import read_image
from ast_plugin.data.matching import Template, difference_of, fold, is_image, shorten_list
from ast_plugin.errors import DataError, OptionError, ShapeError
from ast_plugin.files import write_file
from ast_plugin.names import printable, say, to_csv, to_markdown

if TYPE_CHECKING:
    import numpy as np

    from ast_plugin.metrics.psnr_ssim import Definition

    Values = dict[Definition | str, float]

_NEAREST = 5  # definitions that are shown where none gives a figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr measure`."""
    parser.add_argument('restored', metavar='RESTORED', help='folder of restored images, or one image')
    parser.add_argument('gt', metavar='GT', help='folder of the clean images, or one image')
    parser.add_argument('--input', metavar='LQ', help='the degraded images, to be measured as well')
    for side, what in (('restored', 'restored'), ('gt', 'clean'), ('input', 'degraded')):
        text = f'how {what} images are named: {{}}_SRN for 0001_SRN.png'
        parser.add_argument(f'--{side}-template', default='{}', metavar='NAME', help=text)
    parser.add_argument('--crop-border', type=int, default=0, metavar='N', help='pixels to leave out at each side')
    pyiqa_help = 'measure by these metrics of pyiqa too'
    parser.add_argument('--pyiqa', nargs='+', action='extend', default=[], metavar='METRIC', help=pyiqa_help)
    parser.add_argument('--device', default='auto', metavar='NAME', help=f'for pyiqa: {DEVICES} (default: auto)')
    parser.add_argument('--like', metavar='FIGURE', help='a published PSNR or SSIM: name the definitions that give it')
    parser.add_argument(
        '--worst', type=int, default=3, metavar='N', help='name as many of the worst images (default: 3)'
    )
    parser.add_argument('--csv', metavar='FILE', help='write the values of every image')
    parser.add_argument('--markdown', metavar='FILE', help='write the table of means')


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write what is asked for."""
    _check(args)
    from ast_plugin.metrics.psnr_ssim import KNOWN, all_definitions

    sides = {'restored': args.restored, 'gt': args.gt, **({'input': args.input} if args.input else {})}
    pairs, notes = _pair({side: Path(path).expanduser() for side, path in sides.items()}, vars(args))
    definitions = [definition._replace(border=args.crop_border) for definition in KNOWN]
    if args.like:
        definitions = all_definitions('ssim' if float(args.like) <= 1 else 'psnr')
    values, failures = _measure(pairs, definitions, args.pyiqa, args.crop_border, args.device)
    if notes or failures:
        say(*notes, *failures)
    if not values:
        raise DataError(f'none of {len(pairs)} pairs could be measured')
    if args.like:
        found = _explain(args.like, definitions, [each['restored'] for each in values.values()])
    else:
        found = _report(values, args)
    return 1 if notes or failures else found


def _check(args: argparse.Namespace) -> None:
    if args.crop_border < 0 or args.worst < 0:
        raise OptionError('--crop-border and --worst: expected a number of 0 or more')
    if args.like is not None and not re.fullmatch(r'[0-9]+(\.[0-9]+)?', args.like):
        raise OptionError(f'--like {args.like}: expected a figure as it was published, such as 31.87 or 0.918')
    if args.like and (args.pyiqa or args.input or args.csv or args.markdown or args.crop_border):
        raise OptionError('--like looks for a definition of its own: leave the other options of figures out')


def _pair(sides: Mapping[str, Path], templates: Mapping[str, str]) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """Pair the images of all sides by name; and a line on those of each side that have no partner.

    Returns:
        By name the path of each side; and the lines.
    """
    for side, path in sides.items():
        if not path.exists():
            raise DataError(f'{path}: there is no such file or folder ({side})')
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
        hint = _hint(found['restored'], found) or ': say with --restored-template how images are named'
        raise DataError(f'no name is in all folders ({examples}){hint}')
    alone = {side: [name for name in images if name not in pairs] for side, images in found.items()}
    return pairs, [
        f'not measured: {len(names)} of {side} without a partner: {shorten_list(names)}{_hint(names, found)}'
        for side, names in alone.items()
        if names
    ]


def _hint(names: Iterable[str], found: Mapping[str, Iterable[str]]) -> str:
    """Say what the first name that looks like another differs in; nothing if there is none."""
    others = {fold(name): name for images in found.values() for name in images}
    others |= {fold(name): name for images in found.values() for name in images if name not in names}
    alike = next((name for name in names if others[fold(name)] != name), None)
    if alike is None:
        return ''
    other = others[fold(alike)]
    return f'; {printable(alike)} and {printable(other)} differ only in {difference_of(alike, other)}, rename one'


def _images(folder: Path, template: str) -> dict[str, Path]:
    """Images of a folder and those inside of it by their folder and the key of their name, in order."""
    found: dict[str, Path] = {}
    pattern = Template(template)
    for where, folders, files in os.walk(folder):
        folders.sort()
        for key, names in pattern.keys(sorted(filter(is_image, files))).items():
            name = Path(where, key).relative_to(folder).as_posix()
            if len(names) > 1:
                raise DataError(f'{where}: several images are called {printable(key)}: {shorten_list(names)}')
            found[name] = Path(where, names[0])
    if not found:
        named = '' if template == '{}' else f' named {template}'
        raise DataError(f'{folder}: expected images{named}, found none here or in the folders inside')
    return found


def _measure(
    pairs: Mapping[str, Mapping[str, Path]],
    definitions: Sequence[Definition],
    metrics: Sequence[str],
    border: int,
    device: str,
) -> tuple[dict[str, dict[str, Values]], list[str]]:
    """By name and side the values of each definition and metric of pyiqa; and a line on each pair that failed."""
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
        raise DataError(f'{path} has transparency, which no metric measures: save it without')
    return image.color


def _explain(figure: str, definitions: Sequence[Definition], values: Sequence[Values]) -> int:
    """Print the definitions whose mean is the figure within its digits, or those that come nearest."""
    from ast_plugin.metrics.psnr_ssim import KNOWN, gives, mean_over_images

    means = {
        definition: mean_over_images([each[definition] for each in values], definition.is_pooled)
        for definition in definitions
    }
    digits = len(figure.partition('.')[2]) + 2
    matches = {definition: how for definition, mean in means.items() if (how := gives(figure, mean))}
    shown = sorted(matches, key=lambda one: (one not in KNOWN, matches[one] == 'cut off'))
    present = [one for one in definitions if not math.isnan(means[one])]  # borders may leave nothing of an image
    shown = shown or sorted(present, key=lambda one: abs(means[one] - float(figure)))[:_NEAREST]
    say(f'{figure} of {len(values)} images:' if matches else f'no definition gives {figure}; the nearest:')
    for definition in shown:
        source = f' ({KNOWN[definition]})' if definition in KNOWN else ''
        how = ', cut off' if matches.get(definition) == 'cut off' else ''
        say(f'  {means[definition]:.{digits}f}  {definition}{source}{how}')
    return 0 if matches else 1


def _report(values: Mapping[str, Mapping[str, Values]], args: argparse.Namespace) -> int:
    """Print the table of means and the worst images, and write the files asked for."""
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
        write_file(Path(args.csv).expanduser(), to_csv(lines).encode(), make_folder=True)
    if args.markdown:
        write_file(Path(args.markdown).expanduser(), f'{table}\n'.encode(), make_folder=True)
    return 0


def _title(column: Definition | str) -> str:
    return column if isinstance(column, str) else column.name
