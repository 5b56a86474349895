"""Synthesize degraded/clean image pairs from clean photos, for datasets and for `basicsr data synth`.

Each pair depends only on the photo, its name, the seed and the number of the pair. Adding photos, or pairs per photo,
does not change the other pairs.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ValidationError

from ast_plugin import __version__
from ast_plugin.data import transforms
from ast_plugin.data.image_files import ImageFile, read_image, read_rgb, write_image
from ast_plugin.data.matching import list_images
from ast_plugin.degradations import DEGRADATIONS, Degradation
from ast_plugin.degradations.haze import fill_depth
from ast_plugin.errors import DataError, MemoryShortage, OptionError, PluginError, did_you_mean, one_line, tell_place
from ast_plugin.faults import faults_of
from ast_plugin.files import lock_folder, replace_folder, write_file
from ast_plugin.names import file_name, seed_of

# Colour photos of scenes: split, package and file. Each scene belongs to one split. The other images of these packages
# are gray, drawn, or taken by microscope, telescope or retinal camera, which do not help restoration of photos.
_PACKAGED = {
    'astronaut': ('train', 'skimage', 'data/astronaut.png'),
    'coffee': ('train', 'skimage', 'data/coffee.png'),
    'rocket': ('train', 'skimage', 'data/rocket.jpg'),
    'motorcycle_left': ('train', 'skimage', 'data/motorcycle_left.png'),
    'motorcycle_right': ('train', 'skimage', 'data/motorcycle_right.png'),
    'flower': ('train', 'sklearn', 'datasets/images/flower.jpg'),
    'chelsea': ('val', 'skimage', 'data/chelsea.png'),
    'china': ('val', 'sklearn', 'datasets/images/china.jpg'),
}
_VAL_SHARE = 5  # one in N photos of a folder is kept for validation
_FOLDERS, _RECORD = ('lq', 'gt', 'mask'), 'synthesis.json'


class Photo(NamedTuple):
    """A photo: its name in options and results, and its file."""

    name: str
    path: Path


@dataclass(frozen=True)
class Recipe:
    """Settings for making pairs."""

    task: str  # name in `DEGRADATIONS`
    parameters: BaseModel  # ranges of its parameters
    seed: int = 0
    count: int = 1  # pairs per photo
    size: int | None = None  # side of square patches in pixels, or None for whole photos


def packaged_photos(split: str = 'all', names: list[str] | None = None) -> list[Photo]:
    """List the photos shipped with scikit-image and scikit-learn, without importing or downloading anything.

    They are those of a split (`train`, `val` or `all`), which is fixed for each photo, or those with the given names.
    Raise DataError if a package or one of its files is missing, or a name is unknown.
    """
    if names is None:
        names = [name for name, row in _PACKAGED.items() if split in ('all', row[0])]
    photos = []
    for name in names:
        _, package, file = _choose(name, _PACKAGED, 'the packaged photos')
        spec = importlib.util.find_spec(package)
        path = Path(spec.origin).parent / file if spec and spec.origin else None
        if path is None or not path.is_file():
            missing = package if path is None else f'{path.name} of {package}'
            raise DataError(
                f'the packaged photos need {missing}, which is not installed: pip install "ast_plugin[photos]", '
                f'or use a folder of photos with `source: folder` and `dataroot_gt`'
            )
        photos.append(Photo(name, path))
    return photos


def folder_photos(folder: str | Path, phase: str, split: str = 'all', names: list[str] | None = None) -> list[Photo]:
    """List the photos of a folder.

    Args:
        folder: folder of photos; subfolders are not searched.
        phase: phase of the dataset, for messages.
        split: `train`, `val` or `all`. One photo in five, selected by its name alone, belongs to `val`.
        names: names of photos, with or without extension, to list instead of a split.
    Raises:
        DataError: if the folder is missing, has no photo in the split, or lacks a requested name.
    """
    photos = [Photo(Path(name).stem, Path(folder) / name) for name in list_images(folder, phase)]
    if names is not None:
        by_name = {photo.name: photo for photo in photos} | {photo.path.name: photo for photo in photos}
        return [_choose(name, by_name, str(folder)) for name in names]
    if split == 'all':
        return photos
    wanted = [photo for photo in photos if (seed_of(photo.name) % _VAL_SHARE == 0) == (split == 'val')]
    if not wanted:
        raise DataError(
            f'datasets.{phase}: none of the {len(photos)} photos in {folder} is in the split {split!r}, which is '
            f'determined by their names. Select photos with `photos: [...]`, or use another folder with `split: all`'
        )
    return wanted


def read_parameters(task: str, settings: Mapping[str, object]) -> BaseModel:
    """Return the parameters of a degradation, with `settings` applied; a single value v is the range [v, v].

    Raise OptionError with one line for each unknown or invalid parameter.
    """
    model = DEGRADATIONS[task].parameters
    properties = model.model_json_schema()['properties']
    known = ', '.join(name for name in properties if name != 'type')
    if 'type' in settings:
        raise OptionError(f'{task}: type: no such parameter (available: {known})')
    values = dict(settings)
    for name in values.keys() & properties.keys():
        is_range = any(kind.get('maxItems') == 2 for kind in (properties[name], *properties[name].get('anyOf', ())))
        if is_range and isinstance(values[name], (int, float, str)) and not isinstance(values[name], bool):
            values[name] = [values[name], values[name]]
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = []
        for fault in faults_of(error, model, values):
            message = fault.message
            if fault.unknown_key and len(fault.where) == 1:
                message = f'{message.replace("unknown key", "no such parameter")} (available: {known})'
            lines.append(f'{task}: {fault.where[0]}: {message}' if fault.where else f'{task}: {message}')
        raise OptionError('\n'.join(dict.fromkeys(lines))) from None


def _make_pairs(name: str, path: Path, depth_path: Path | None, recipe: Recipe) -> Iterator[dict[str, np.ndarray]]:
    """Yield the pairs of one photo, RGB [H, W, 3] in its dtype, uint8 or uint16; the mask is [H, W] uint8."""
    image = read_rgb(path)
    height, width = image.shape[:2]
    if recipe.size is not None and recipe.size > min(height, width):
        raise DataError(
            f'{path}: has {width}x{height} pixels, fewer than a patch of {recipe.size}; remove it or reduce the size'
        )
    options = {} if depth_path is None else {'depth': read_depth(depth_path, (height, width))}
    row = DEGRADATIONS[recipe.task]
    for number in range(1, recipe.count + 1):
        generator = np.random.default_rng([recipe.seed, seed_of(name), number])
        if recipe.size is None:
            clean = transforms.to_float(image)
            degraded, mask = row.apply(clean, generator, recipe.parameters, **options)
        else:
            settings = row, recipe.parameters, Augmentation()
            degraded, clean, mask = degraded_patch(image, recipe.size, generator, *settings, **options)
        pair = {'lq': _to_integers(degraded, image.dtype), 'gt': _to_integers(clean, image.dtype)}
        yield pair if mask is None else {**pair, 'mask': _to_integers(mask, np.dtype(np.uint8))}


class Augmentation(NamedTuple):
    """Random changes of patches, under the keys of SyntheticPairsDataset."""

    use_hflip: bool = False  # see `transforms.random_flip`
    use_rot: bool = False
    clean_share: float = 0.0  # fraction of patches, in [0, 1], that are not degraded
    gamma: tuple[float, float] = (1.0, 1.0)  # range of an exponent, sampled log-uniformly; above 1 darkens
    rgb_permute: float = 0.0  # fraction of patches, in [0, 1], whose channels are put in random order
    camera_share: float = 0.0  # fraction of patches, in [0, 1], changed by `transforms.add_camera_noise`
    noise_range: tuple[float, float] = (0.0, 0.0)
    jpeg_range: tuple[int, int] = (100, 100)


def degraded_patch(
    image: np.ndarray,
    size: int,
    generator: np.random.Generator,
    degradation: Degradation,
    parameters: Any,
    augmentation: Augmentation,
    depth: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Crop a patch with the margin required by the degradation, flip it, degrade it, and remove the margin.

    Args:
        image: RGB, [H, W, 3], 8 or 16 bits, or float in [0, 1]. Images smaller than the patch are padded by reflection.
        size: side of the square patch in pixels.
        generator: source of position, flip, gamma, order of channels, whether to degrade, the degradation, and the
            noise, drawn in this order.
        degradation: entry of `DEGRADATIONS`.
        parameters: parameters of that degradation.
        augmentation: further random changes.
        depth: depth map, [H, W], for degradations that take one; cropped and flipped like the image.
    Returns:
        The degraded and the clean patch, [size, size, 3] float32 in [0, 1], and the mask, [size, size], or None.
    """
    margin = degradation.margin
    top, left = transforms.random_offset(image.shape, size, generator)
    place = (top - margin, left - margin, size + 2 * margin, size + 2 * margin)
    parts = [transforms.window(array, *place) for array in (image, depth) if array is not None]
    clean, *depths = transforms.random_flip(parts, augmentation.use_hflip, augmentation.use_rot, generator)
    clean = transforms.to_float(clean)
    if augmentation.gamma != (1.0, 1.0):
        clean = clean ** np.float32(np.exp(generator.uniform(*np.log(augmentation.gamma))))
    if augmentation.rgb_permute and generator.random() < augmentation.rgb_permute:
        clean = np.ascontiguousarray(clean[..., generator.permutation(3)])
    if augmentation.clean_share and generator.random() < augmentation.clean_share:
        degraded, mask = clean, np.zeros(clean.shape[:2], np.float32)
    else:
        degraded, mask = degradation.apply(clean, generator, parameters, *depths)
    inner = (slice(margin, margin + size),) * 2
    degraded, clean = degraded[inner], clean[inner]
    if augmentation.camera_share and generator.random() < augmentation.camera_share:
        ranges = augmentation.noise_range, augmentation.jpeg_range
        degraded, clean = transforms.add_camera_noise([degraded, clean], generator, *ranges)
    return degraded, clean, None if mask is None else mask[inner]


def read_depth(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Read a depth map in any unit from .npy, .npz with one array, or a gray image of 8 or 16 bits where 0 is unknown.

    Returns:
        [H, W] float32, filled by `fill_depth`, since a patch may be all sky or unknown.
    Raises:
        DataError: if it cannot be read, does not have the shape `shape`, or is not a depth map.
    """
    if path.suffix.lower() in ('.npy', '.npz'):
        depth = _read_array(path)
        if depth.ndim != 2 or depth.dtype.kind not in 'fiu':
            raise DataError(f'{path}: expected an array of numbers [H, W]; got {depth.dtype} {list(depth.shape)}')
    else:
        color = read_image(path).color
        if color.ndim != 2:
            raise DataError(f'{path}: expected a depth map as a gray image, .npy or .npz; got an image with colours')
        depth = np.where(color == 0, np.float32('nan'), color.astype(np.float32))
    with tell_place(str(path)):
        return fill_depth(depth, shape)


def _read_array(path: Path) -> np.ndarray:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        if len(loaded.files) == 1:
            return loaded[loaded.files[0]]
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise DataError(f'{path}: cannot be read as an array: {error}') from error
    raise DataError(f'{path}: expected one array, got {len(loaded.files)}: {", ".join(loaded.files[:3])}')


def check_output(output: Path, photos: Iterable[Path], overwrite: bool) -> None:
    """Raise DataError unless `output` is missing or empty, or holds only an earlier run that may be overwritten."""
    if not os.path.lexists(output):
        return
    if not output.is_dir() or output.is_symlink():
        raise DataError(f'{output}: exists and is not a folder; choose another output with -o')
    entries = set(os.listdir(output))
    if not entries:
        return
    if not overwrite:
        raise DataError(f'{output}: is not empty; choose another folder, or replace an earlier run with --overwrite')
    foreign = sorted(entries - {*_FOLDERS, _RECORD})
    if foreign or _RECORD not in entries:
        what = f'has {foreign[0]}' if foreign else f'has no {_RECORD}'
        raise DataError(
            f'{output}: {what}, so it was not written by this command; remove it manually, or choose another folder'
        )
    inside = next((path for path in photos if path.resolve().is_relative_to(output.resolve())), None)
    if inside is not None:
        raise DataError(f'{inside}: is in {output}, which --overwrite would remove; choose another folder')


def write_pairs(
    photos: Mapping[str, Path],
    depths: Mapping[str, Path | None],
    recipe: Recipe,
    output: Path,
    on_pair: Callable[[], None] = int,
) -> tuple[list[float], list[str]]:
    """Write the pairs of all photos to a folder atomically; an existing folder is replaced.

    Args:
        photos: files by name. The pairs of a photo are named `name_1`, `name_2`, …; name and seed determine them.
        depths: depth map of each photo, or None.
        recipe: settings for making pairs.
        output: the folder, validated by `check_output`.
        on_pair: called after each pair.
    Returns:
        The PSNR of each pair in dB, and a message for each photo that failed; the pairs of all others are written.
    Raises:
        DataError: if no photo can be read, or images cannot be written.
    """
    partial = output.absolute().parent / file_name(f'.{output.name}', '.synth.part')
    record = {
        **vars(recipe),
        'parameters': recipe.parameters.model_dump(mode='json', exclude={'type'}),
        'photographs': {name: path.name for name, path in photos.items()},
        'depths': {name: path.name for name, path in depths.items() if path is not None},
        'ast_plugin': __version__,
    }
    levels, failures, digits = [], [], len(str(recipe.count))
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with lock_folder(partial, 'another run is making pairs there'):
            try:
                for left_over in partial.iterdir():  # from an interrupted run
                    shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
                for name, path in photos.items():
                    try:
                        for number, pair in enumerate(_make_pairs(name, path, depths[name], recipe), 1):
                            for kind, pixels in pair.items():
                                (partial / kind).mkdir(exist_ok=True)
                                file = partial / kind / file_name(f'{name}_{number:0{digits}}', '.png')
                                write_image(file, ImageFile(pixels))
                            levels.append(_psnr(pair['lq'], pair['gt']))
                            on_pair()
                    except (DataError, MemoryShortage, MemoryError) as error:
                        failures.append(str(error) if isinstance(error, PluginError) else f'{path}: {one_line(error)}')
                        del record['photographs'][name]
                if not levels:
                    raise DataError(failures[0])
                write_file(partial / _RECORD, (json.dumps(record, indent=2) + '\n').encode())
                replace_folder(partial, output, partial.with_suffix('.old'))
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DataError(f'cannot write {output}: {error.strerror or error}') from error
    return levels, failures


def _choose(name: str, known: Mapping[str, Any], where: str) -> Any:
    if name not in known:
        raise DataError(f'no photo {name!r} in {where}{did_you_mean(name, known)}')
    return known[name]


def _psnr(lq: np.ndarray, gt: np.ndarray) -> float:
    error = np.mean((lq.astype(np.float64) - gt) ** 2) / np.iinfo(gt.dtype).max ** 2
    return math.inf if error == 0 else float(-10 * np.log10(error))


def _to_integers(image: np.ndarray, dtype: np.dtype) -> np.ndarray:
    # float64, because float32 misses some 16-bit values.
    return np.rint(image.astype(np.float64) * np.iinfo(dtype).max).astype(dtype)
