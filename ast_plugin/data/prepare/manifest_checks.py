"""Comparing pictures with the manifest that was made of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ast_plugin.data.image_files import decode_rgb
from ast_plugin.data.manifest import Entry, Manifest
from ast_plugin.data.matching import Fault, Pair, list_images
from ast_plugin.data.pair_table import PairTable
from ast_plugin.data.parallel import map_in_order
from ast_plugin.data.prepare.picture_checks import check_picture, digest, quiet_threads
from ast_plugin.errors import DataError


class _Half(NamedTuple):
    """A picture of a pair as the manifest has it."""

    name: str
    size: tuple[int, int]
    num_bytes: int
    digest: str


def check_files(
    manifest: Manifest, workers: int, *, quick: bool = False, on_pair: Callable[[], None] = int
) -> list[Fault]:
    """Find the pictures of a manifest that are missing, changed or unreadable, and keys that belong to several pairs.

    A file that was written anew with the same pixels is not changed.

    Args:
        manifest: what there should be.
        workers: processes that read.
        quick: only look whether files are there and have their sizes.
        on_pair: called after each pair.
    Raises:
        DataError: if the manifest is damaged.
    """
    faults: list[Fault] = []
    entries = _with_own_keys(manifest, faults)
    for found in map_in_order(partial(_check_entry, manifest.root, quick), entries, workers, prepare=quiet_threads):
        faults += found
        on_pair()
    return faults


def find_extra(manifests: Iterable[Manifest]) -> list[Fault]:
    """Find pictures that lie among those of the manifests, and were not there when they were made.

    Args:
        manifests: all that were made of the dataset: the pictures of one are no strangers to another.
    """
    known: set[int] = set()
    folders: set[Path] = set()
    for manifest in manifests:
        names = (name for entry in manifest.entries() for name in (entry.lq, entry.gt))
        for name in (*manifest.others, *names):
            path = os.path.join(manifest.root, name)
            known.add(hash(path))
            folders.add(os.path.dirname(path))
    return [
        Fault('extra', path, 'came after the manifest was made')
        for folder in sorted(folders)
        for path in (os.path.join(folder, name) for name in _names(folder))
        if hash(path) not in known
    ]


def check_lmdbs(folder: Path, manifest: Manifest, on_pair: Callable[[], None] = int) -> list[Fault]:
    """Compare the pixels of `lq.lmdb` and `gt.lmdb` in a folder with a manifest.

    Args:
        folder: as `basicsr data lmdb` writes it.
        manifest: what they were made of.
        on_pair: called after each pair.
    Raises:
        DataError: if one of them is missing or cannot be opened.
    """
    from ast_plugin.data.lmdb.format import is_raw, view_raw
    from ast_plugin.data.lmdb.plan import make_plan
    from ast_plugin.data.lmdb.reader import LmdbImages

    def pixels_digest(path: str, value: memoryview) -> str:
        return digest(view_raw(value) if is_raw(value) else decode_rgb(value, path)).hex()

    faults = []
    sides = [(which, LmdbImages(folder / name)) for which, name in enumerate(('lq.lmdb', 'gt.lmdb'))]
    entries = list(manifest.entries())
    order = make_plan(PairTable(Pair(entry.key, entry.lq, entry.gt) for entry in entries)).order
    for entry, key in zip(entries, order, strict=True):
        for which, images in sides:
            path = images.path(key)
            try:
                same = images.read(key, partial(pixels_digest, path)) == entry.digests[which]
            except ValueError as error:  # DataError is one
                faults.append(Fault('missing or damaged', path, str(error)))
                continue
            if not same:
                faults.append(
                    Fault('changed', path, f'not the pixels of {(entry.lq, entry.gt)[which]} in {manifest.path}')
                )
        on_pair()
    for _, images in sides:
        for key in sorted({found.key for found in images.entries()} - set(order)):
            faults.append(Fault('extra', images.path(key), f'not in {manifest.path}'))
    return faults


def _with_own_keys(manifest: Manifest, faults: list[Fault]) -> Iterator[Entry]:
    """The entries, one by one; a key that an earlier pair has, of other pictures, adds to the faults."""
    owners: dict[int, int] = {}
    for number, entry in enumerate(manifest.entries(), 2):
        pictures = hash((entry.lq, entry.gt))
        if owners.setdefault(hash(entry.key), pictures) != pictures:
            faults.append(Fault('key twice', entry.key, f'line {number} gives it to another pair than a line before'))
        yield entry


def _check_entry(root: Path, quick: bool, entry: Entry) -> list[Fault]:
    halves = (
        _Half(name, entry.size, num_bytes, pixels)
        for name, num_bytes, pixels in zip((entry.lq, entry.gt), entry.bytes, entry.digests, strict=True)
    )
    return [fault for half in halves if (fault := _check_half(root, quick, half))]


def _check_half(root: Path, quick: bool, half: _Half) -> Fault | None:
    path = os.path.join(root, half.name)
    try:
        num_bytes = os.stat(path).st_size
    except FileNotFoundError:
        return Fault('missing', path, 'there is no such file')
    except OSError as error:
        return Fault('unreadable', path, error.strerror)
    if quick:
        text = f'{num_bytes:,} bytes, the manifest says {half.num_bytes:,}'
        return None if num_bytes == half.num_bytes else Fault('changed', path, text)
    try:
        found = check_picture(path)
    except DataError as error:
        return Fault('unreadable', path, str(error).removeprefix(f'{path}: '))
    if tuple(found.size) != tuple(half.size):
        size = f'{found.size[1]}x{found.size[0]} pixels, the manifest says {half.size[1]}x{half.size[0]}'
        return Fault('changed', path, size)
    return None if found.digest.hex() == half.digest else Fault('changed', path, 'other pixels than the manifest says')


def _names(folder: str) -> Iterator[str]:
    try:
        yield from list_images(folder, '')
    except DataError:
        return  # its pictures are missing, each of which is told
