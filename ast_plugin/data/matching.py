"""Finding the partners among image files: by the key that a name template finds in them, never by position."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ast_plugin.data.image_files import SUFFIXES
from ast_plugin.errors import DataError, OptionError

IMAGE_SUFFIXES = frozenset(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)

SHOWN = 3
"""How many of many faulty files a message names."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Paths of a degraded image and its clean partner, and the key that they share."""

    key: str
    lq: str
    gt: str


def is_image(name: str) -> bool:
    """Tell by its ending whether a file that is not hidden is an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not os.path.basename(name).startswith('.')


def some(items: Iterable[str]) -> str:
    """List the first few of `items`, and say how many more there are."""
    items = list(items)
    rest = f' and {len(items) - SHOWN} more' if len(items) > SHOWN else ''
    return ', '.join(items[:SHOWN]) + rest


def list_images(folder: str | Path, phase: str) -> list[str]:
    """Return the sorted names of the images that lie directly in `folder`.

    Raises:
        DataError: if there is no such folder, it cannot be read, or no image is in it.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if is_image(entry.name))
    except OSError as error:
        reason = {FileNotFoundError: 'there is no such folder', NotADirectoryError: 'it is not a folder'}
        raise DataError(
            f'datasets.{phase}: {reason.get(type(error), error.strerror)}: {folder}. '
            f'Put the images there, or correct its dataroot in the option file'
        ) from None
    if not names:
        raise DataError(
            f'datasets.{phase}: no image in folder {folder} (folders in it are not searched; '
            f'images end in {", ".join(sorted(IMAGE_SUFFIXES))}). Put the images there, or correct its dataroot'
        )
    return names


class Template:
    """A pattern of file names with one `{}`, which stands for the key.

    `{}_rain` is any image whose name without its ending ends in `_rain`; `{}_rain.png` is only those that are PNG.
    """

    def __init__(self, text: str) -> None:
        if text.count('{}') != 1 or '/' in text:
            raise OptionError(f'a name template has one {{}} and no folder, such as {{}}_rain.png; got {text!r}')
        self.text = text
        self.has_suffix = is_image(text.replace('{}', 'x'))
        before, after = map(re.escape, text.split('{}'))
        self._pattern = re.compile(f'{before}(.+){after}', re.IGNORECASE if self.has_suffix else 0)

    def key(self, name: str) -> str | None:
        """Return what `{}` stands for in a file name; None if the name is of another kind."""
        match = self._pattern.fullmatch(name if self.has_suffix else os.path.splitext(name)[0])
        return match and match[1]

    def fill(self, key: str) -> str:
        """Return the name that belongs to `key`; `.*` where the ending is free."""
        return self.text.replace('{}', key) + ('' if self.has_suffix else '.*')

    def keys(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Group those of `names` that fit by their keys."""
        found = defaultdict(list)
        for name in names:
            key = self.key(name)
            if key is not None:
                found[key].append(name)
        return dict(found)


def match_folders(
    phase: str, lq_dir: str | Path, gt_dir: str | Path, lq_template: str = '{}', gt_template: str = '{}'
) -> list[Pair]:
    """Pair the images of two folders, which may be one, by their keys.

    Files that do not fit their template are left out. Endings may differ; where one key has several files in a
    folder, both folders must have the same names, which then are the keys.

    Raises:
        DataError: if a folder is missing, has no image that fits, an image has no partner, or has several.
        OptionError: if a template is none.
    """
    lq, gt = Template(lq_template), Template(gt_template)
    lq_files, gt_files = (_keyed(phase, folder, template) for folder, template in ((lq_dir, lq), (gt_dir, gt)))
    _check_partners(phase, lq_files.keys() - gt_files.keys(), (lq_dir, lq, lq_files), (gt_dir, gt))
    _check_partners(phase, gt_files.keys() - lq_files.keys(), (gt_dir, gt, gt_files), (lq_dir, lq))
    pairs, ambiguous = [], []
    for key in sorted(lq_files):
        lq_names, gt_names = lq_files[key], gt_files[key]
        if len(lq_names) == len(gt_names) == 1:
            pairs.append(Pair(key, os.path.join(lq_dir, lq_names[0]), os.path.join(gt_dir, gt_names[0])))
        elif lq_names == gt_names:
            pairs += [Pair(name, os.path.join(lq_dir, name), os.path.join(gt_dir, name)) for name in lq_names]
        else:
            ambiguous.append(f'{" or ".join(lq_names)} with {" or ".join(gt_names)}')
    if ambiguous:
        raise DataError(
            f'datasets.{phase}: it is not clear which image of {lq_dir} belongs to which of {gt_dir}: '
            f'{some(ambiguous)}. Remove what is too much, or name the endings in lq_template and gt_template'
        )
    own_partners = [pair.lq for pair in pairs if pair.lq == pair.gt]
    if own_partners:
        raise DataError(
            f'datasets.{phase}: degraded and clean image are one file: {some(own_partners)}. '
            f'In one folder, lq_template and gt_template must tell them apart'
        )
    return pairs


def _keyed(phase: str, folder: str | Path, template: Template) -> dict[str, list[str]]:
    names = list_images(folder, phase)
    files = template.keys(names)
    if not files:
        raise DataError(
            f'datasets.{phase}: none of the {len(names)} images in folder {folder} is named {template.fill("{}")} '
            f'(there are {some(names)}). Correct the template or the folder'
        )
    return files


def _check_partners(
    phase: str,
    lonely: set[str],
    own: tuple[str | Path, Template, dict[str, list[str]]],
    other: tuple[str | Path, Template],
) -> None:
    if not lonely:
        return
    folder, _, files = own
    other_folder, other_template = other
    names = [name for key in sorted(lonely) for name in files[key]]
    raise DataError(
        f'datasets.{phase}: {len(lonely)} of {len(files)} images in {folder} have no partner in {other_folder}: '
        f'{some(names)} (the first would be {other_template.fill(min(lonely))}). '
        f'Add the partners, remove these, or correct lq_template and gt_template'
    )
