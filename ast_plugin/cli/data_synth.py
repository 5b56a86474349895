"""Make pairs of degraded and clean images from clean photos.

Degraded images go to DIR/lq, clean ones to DIR/gt under the same names, and where the degradation has a mask, that to
DIR/mask; DIR/synthesis.json says what was made. The same photos, task, parameters and seed give the same files.

    basicsr data synth --task rain -i photo.png -o out --count 8 --seed 1
    basicsr data synth --task haze -i photos -o out --size 256 --set psnr=12,16 --set airlight=0.8
    basicsr data synth --task haze -i room.png --depth room.npy -o out --set visibility=20
    basicsr data synth --sheet all.jpg
    basicsr data synth --list

They are read as any pair of folders, `layout: folders` with `dataroot_lq: out/lq` and `dataroot_gt: out/gt`, or
prepared and packed as any dataset: `basicsr data prepare folders out prepared`.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ast_plugin import __version__
from ast_plugin.errors import DataError, OptionError, did_you_mean

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ast_plugin.data.synthesis import Recipe, SynthesizedPair

FOLDERS, RECORD = ('lq', 'gt', 'mask'), 'synthesis.json'
_DEPTH_ENDINGS = ('.npy', '.npz', '.png', '.tif', '.tiff')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr data synth`."""
    from ast_plugin.degradations.degradations import DEGRADATIONS

    parser.add_argument('--task', choices=tuple(DEGRADATIONS), help='the degradation')
    parser.add_argument('-i', '--input', nargs='+', metavar='PATH', help='photos, folders of them, or patterns')
    parser.add_argument('-o', '--output', metavar='DIR', help='folder for the pairs, which is not there yet')
    parser.add_argument('--count', type=int, default=1, metavar='N', help='pairs of each photo (default: 1)')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='another seed gives others (default: 0)')
    parser.add_argument('--size', type=int, metavar='N', help='square patches of N pixels (default: whole photos)')
    parser.add_argument(
        '--set',
        action='append',
        default=[],
        metavar='KEY=VALUE',
        help='a parameter of the task: a range as LOW,HIGH or one number; may be given often',
    )
    parser.add_argument(
        '--depth', metavar='PATH', help='haze: distances (.npy, .npz, gray image), or a folder of them by name'
    )
    parser.add_argument('--recursive', action='store_true', help='take folders inside folders too')
    parser.add_argument('--overwrite', action='store_true', help='replace what an earlier run wrote to DIR')
    parser.add_argument(
        '--sheet', metavar='FILE', help='draw an image of every degradation instead, of -i or packaged photos'
    )
    parser.add_argument('--list', action='store_true', help='print every degradation with its parameters')


def run(args: argparse.Namespace) -> int:
    """Make the pairs, or draw the sheet, or print the list."""
    if args.list:
        return _print_parameters(args.task)
    if args.sheet:
        return _draw_sheet(args)
    _check(args)
    from ast_plugin.data.synthesis import Recipe

    parameters = _parameters(args.task, _settings(args.set))
    recipe = Recipe(args.task, parameters, args.seed, args.count, args.size)
    output = Path(args.output).expanduser()
    photos = _photos(args.input, output, args.recursive)
    depths = _depths(args, photos)
    _check_output(output, photos, args.overwrite)
    levels = _write_all(photos, depths, recipe, output)
    low, high = min(levels), max(levels)
    plural = 's' if len(levels) != 1 else ''
    print(f'made {len(levels)} pair{plural} ({args.task}, PSNR {low:.1f} to {high:.1f} dB): {output}')
    return 0


def _check(args: argparse.Namespace) -> None:
    missing = [name for name, value in (('--task', args.task), ('-i', args.input), ('-o', args.output)) if not value]
    if missing:
        raise OptionError(f'{" and ".join(missing)} must be given; see `basicsr data synth --help` for examples')
    for name in ('count', 'size'):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise OptionError(f'--{name} is {value}: expected 1 or more')
    if args.seed < 0:
        raise OptionError(f'--seed is {args.seed}: expected 0 or more')


def _settings(assignments: Sequence[str]) -> dict[str, object]:
    """Values of `--set`: JSON, or items with commas between them, or plain text."""
    settings = {}
    for assignment in assignments:
        key, equals, text = assignment.partition('=')
        if not equals or not key.strip():
            raise OptionError(f'--set {assignment}: expected KEY=VALUE, such as psnr=22,24')
        settings[key.strip()] = _value(text.strip())
    return settings


def _value(text: str) -> object:
    for candidate in (text, f'[{text}]'):
        try:
            return json.loads(candidate)
        except ValueError:
            continue
    return [item.strip() for item in text.split(',')] if ',' in text else text


def _parameters(task: str, settings: Mapping[str, object]) -> BaseModel:
    """The ranges of a degradation with those of `settings`; one value stands for a range of that value alone.

    Raises:
        OptionError: with a line on each that is unknown or wrong.
    """
    from pydantic import ValidationError

    from ast_plugin.degradations.degradations import DEGRADATIONS
    from ast_plugin.faults import faults_of

    model = DEGRADATIONS[task].parameters
    properties = model.model_json_schema()['properties']
    known = [name for name in properties if name != 'type']
    unknown = [name for name in settings if name not in known]
    lines = [
        f'{name}: {task} has no such parameter{did_you_mean(name, known)}; it has {", ".join(known)}'
        for name in unknown
    ]
    values = {
        name: [value, value] if _is_range(properties[name]) and _may_be_bound(value) else value
        for name, value in settings.items()
        if name in known
    }
    try:
        parameters = model.model_validate(values)
    except ValidationError as error:
        faults = faults_of(error, model, values)
        lines += [f'{fault.where[0]}: {fault.message}' if fault.where else fault.message for fault in faults]
    if lines:
        raise OptionError('\n'.join(f'{task}: {line}' for line in dict.fromkeys(lines)))
    return parameters


def _is_range(schema: Mapping[str, Any]) -> bool:
    return any(kind.get('maxItems') == 2 for kind in (schema, *schema.get('anyOf', ())))


def _may_be_bound(value: object) -> bool:
    return isinstance(value, (int, float, str)) and not isinstance(value, bool)


def _photos(inputs: Sequence[str], output: Path, recursive: bool) -> dict[str, Path]:
    """Every photo by the name that its pairs get: the file's, with folder and ending where that is needed."""
    from ast_plugin.evaluation.file_restorer import find_images

    paths = []
    for given in inputs:
        expanded = os.path.expanduser(given)
        matches = [expanded] if os.path.lexists(expanded) else sorted(glob.glob(expanded, recursive=recursive))
        if not matches and glob.has_magic(expanded):
            raise DataError(f'{given}: no file matches this pattern')
        paths += matches or [expanded]
    found = find_images(paths, output, recursive)
    names = ['_'.join((*folder.parts, path.stem)) for path, folder in found]
    twice = {name for name, count in Counter(name.casefold() for name in names).items() if count > 1}
    named: dict[str, Path] = {}
    for (path, _), name in zip(found, names, strict=True):
        name = f'{name}_{path.suffix[1:].lower()}' if name.casefold() in twice else name
        other = next((taken for taken in named if taken.casefold() == name.casefold()), None)
        if other is not None:
            raise DataError(f'{path} and {named[other]} would make pairs of one name; rename one, or give them apart')
        named[name] = path
    return named


def _depths(args: argparse.Namespace, photos: dict[str, Path]) -> dict[str, Path | None]:
    """The map of distances of each photo."""
    from ast_plugin.data.synthesis import takes_depth

    if args.depth is None:
        return dict.fromkeys(photos)
    if not takes_depth(args.task):
        raise OptionError(f'--depth: {args.task} does not depend on distances, leave it out')
    path = Path(args.depth).expanduser()
    if not path.is_dir():
        if len(photos) > 1:
            raise OptionError(
                f'--depth {path}: is one file for {len(photos)} photos; give a folder with one of each name'
            )
        if not path.is_file():
            raise DataError(f'--depth {path}: there is no such file or folder')
        return dict.fromkeys(photos, path)
    depths = {}
    for name, photo in photos.items():
        places = [path / f'{photo.stem}{ending}' for ending in _DEPTH_ENDINGS]
        depths[name] = next((place for place in places if place.is_file()), None)
        if depths[name] is None:
            raise DataError(f'--depth {path}: has no {photo.stem}{"|".join(_DEPTH_ENDINGS)}, for {photo}')
    return depths


def _check_output(output: Path, photos: dict[str, Path], overwrite: bool) -> None:
    """Raise unless `output` is free, or holds what this command wrote and nothing else, and may be replaced."""
    if not os.path.lexists(output):
        return
    if not output.is_dir() or output.is_symlink():
        raise DataError(f'{output}: is there already and is no folder; name another one with -o')
    entries = {entry.name for entry in output.iterdir()}
    if not entries:
        return
    if not overwrite:
        raise DataError(f'{output}: is not empty; name another folder, or replace an earlier run with --overwrite')
    foreign = sorted(entries - {*FOLDERS, RECORD})
    if foreign or RECORD not in entries:
        what = f'has {foreign[0]}' if foreign else f'has no {RECORD}'
        raise DataError(
            f'{output}: {what}, so this command did not write it; remove it yourself, or name another folder'
        )
    inside = next((path for path in photos.values() if path.resolve().is_relative_to(output.resolve())), None)
    if inside is not None:
        raise DataError(f'{inside}: lies in {output}, which --overwrite would remove; name another folder')


def _write_all(photos: dict[str, Path], depths: dict[str, Path | None], recipe: Recipe, output: Path) -> list[float]:
    """Write every pair beside its place first, then put the whole folder there, so that no half of it is ever seen.

    What a run that was killed has left beside its place goes.
    """
    from ast_plugin.files import lock_folder

    partial = output.absolute().parent / f'.{output.name[:64]}.synth.part'
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with lock_folder(partial, 'another run is making pairs there'):
            try:
                for left_over in partial.iterdir():
                    shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
                levels = _write_pairs(photos, depths, recipe, partial)
                _write_record(partial, photos, depths, recipe)
                _put_in_place(partial, output)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DataError(f'cannot write {output}: {error.strerror or error}') from error
    return levels


def _write_pairs(photos: dict[str, Path], depths: dict[str, Path | None], recipe: Recipe, folder: Path) -> list[float]:
    """Write every pair, and return what PSNR each has."""
    from tqdm import tqdm

    from ast_plugin.data.synthesis import make_pairs

    for kind in ('lq', 'gt'):
        (folder / kind).mkdir()
    levels = []
    total = len(photos) * recipe.count
    with tqdm(total=total, unit='pair', dynamic_ncols=True, disable=None, leave=False) as bar:
        for name, path in photos.items():
            for pair in make_pairs(name, path, recipe, depths[name]):
                _write_pair(folder, pair)
                levels.append(pair.psnr)
                bar.update()
    return levels


def _write_pair(folder: Path, pair: SynthesizedPair) -> None:
    from ast_plugin.data.image_files import ImageFile, write_image

    if pair.mask is not None:
        (folder / 'mask').mkdir(exist_ok=True)
    for kind in FOLDERS:
        pixels = getattr(pair, kind)
        if pixels is not None:
            write_image(folder / kind / f'{pair.name}.png', ImageFile(pixels))


def _write_record(folder: Path, photos: dict[str, Path], depths: dict[str, Path | None], recipe: Recipe) -> None:
    from ast_plugin.files import write_file

    record = {
        'task': recipe.task,
        'parameters': recipe.parameters.model_dump(mode='json', exclude={'type'}),
        'seed': recipe.seed,
        'count': recipe.count,
        'size': recipe.size,
        'photos': {name: path.name for name, path in photos.items()},
        'depths': {name: path.name for name, path in depths.items() if path is not None},
        'ast_plugin': __version__,
    }
    write_file(folder / RECORD, (json.dumps(record, indent=2, ensure_ascii=False) + '\n').encode())


def _put_in_place(partial: Path, output: Path) -> None:
    old = partial.with_suffix('.old')
    if output.is_dir() and any(output.iterdir()):
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
        try:
            partial.rename(output)
        except OSError:
            old.rename(output)
            raise
    else:
        partial.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _draw_sheet(args: argparse.Namespace) -> int:
    useless = [name for name in ('output', 'depth', 'size') if getattr(args, name) is not None]
    if useless or args.set:
        raise OptionError(f'--sheet does not go with --{(useless or ["set"])[0]}; it takes --task, -i and --seed')
    from ast_plugin.compare.degradation_sheet import draw_degradations, save_sheet
    from ast_plugin.data.synthesis import packaged_photos

    if args.input:
        photos = _photos(args.input, Path(args.sheet).parent / 'nothing', args.recursive)
    else:
        photos = {photo.name: photo.path for photo in packaged_photos()}
    path = Path(args.sheet).expanduser()
    save_sheet(draw_degradations(photos, [args.task] if args.task else None, args.seed), path)
    print(f'drew {path}')
    return 0


def _print_parameters(task: str | None) -> int:
    from ast_plugin.degradations.degradations import DEGRADATIONS

    for name in [task] if task else DEGRADATIONS:
        print(name)
        for key, field in DEGRADATIONS[name].parameters.model_fields.items():
            default = field.get_default()
            if key == 'type' or key == 'layers':
                continue
            shown = ', '.join(map(str, default)) if isinstance(default, tuple) else str(default)
            print(f'  {key} = {shown}: {field.description}')
    return 0
