"""Reading an LMDB whole, to be sure of every image in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from ast_plugin.data.image_files import decode_rgb
from ast_plugin.data.lmdb.format import DIGESTS, KINDS, SOURCE, Entry, digest_of, is_raw, read_digests, view_raw
from ast_plugin.data.lmdb.reader import LmdbImages
from ast_plugin.data.matching import some
from ast_plugin.errors import DataError

_CHUNK = 256  # images whose results wait for their turn


def check_lmdb(folder: str | Path, num_workers: int = 1) -> list[str]:
    """Read every image of an LMDB and compare it with its digest or, where there are none, decode it.

    Args:
        folder: `*.lmdb`, ours or BasicSR's.
        num_workers: threads that read.
    Returns:
        What is wrong, a line a fault; nothing if all is well.
    """
    try:
        images = LmdbImages(folder)
        digests = read_digests(folder)
        entries = list({entry.key: entry for entry in images.entries()}.values())
        faults = _key_faults(images, entries, digests)
    except DataError as error:
        return [str(error)]

    def fault(entry: Entry) -> str | None:
        try:
            return images.read(entry.key, lambda value: _fault(images, entry, digests, value))
        except DataError as error:
            return str(error)

    with (
        ThreadPoolExecutor(max(1, num_workers)) as pool,
        tqdm(total=len(entries), desc=f'verify {images.folder.name}', unit='image', leave=False, disable=None) as bar,
    ):
        for chunk in _chunks(entries):
            for found in pool.map(fault, chunk):
                bar.update()
                if found:
                    faults.append(found)
    return faults


def check_together(folder: str | Path) -> list[str]:
    """Find out whether the two LMDBs in a folder are those that were made together, neither lost nor in other places.

    Args:
        folder: as `basicsr data lmdb` writes it; one without its source.json is none, and has no fault.
    Returns:
        What is wrong, a line a fault; whether an LMDB is whole is for `check_lmdb` to say.
    """
    folder = Path(folder)
    if not (folder / SOURCE).is_file():
        return []
    faults = [f'{folder}: {kind}.lmdb is missing' for kind in KINDS if not (folder / f'{kind}.lmdb').is_dir()]
    try:
        written = json.loads((folder / SOURCE).read_bytes())['digests']
        found = {kind: digest_of((folder / f'{kind}.lmdb' / DIGESTS).read_bytes()) for kind in KINDS if not faults}
        wrong = [kind for kind in found if written[kind] != found[kind]]
    except FileNotFoundError:
        return [*faults, f'{folder}: lacks digests.txt of an LMDB; copy it again']
    except (OSError, ValueError, LookupError, TypeError):
        return [*faults, f'{folder / SOURCE}: does not say what was written; write both anew with --overwrite']
    if [written[kind] for kind in reversed(KINDS)] == [*found.values()] and wrong:
        faults.append(f"{folder}: lq.lmdb and gt.lmdb are in each other's place")
    else:
        faults += [f'{folder / kind}.lmdb: is not the one that was written here' for kind in wrong]
    return faults


def _key_faults(images: LmdbImages, entries: list[Entry], digests: dict[str, str] | None) -> list[str]:
    """Whether the LMDB has images that its text files do not name, or they disagree."""
    faults = []
    count = images.count()
    if count > len(entries):
        faults.append(f'{images.folder}: holds {count} images, of which meta_info.txt names {len(entries)}')
    if digests is not None and digests.keys() != {entry.key for entry in entries}:
        odd = sorted(digests.keys() ^ {entry.key for entry in entries})
        faults.append(f'{images.folder}: meta_info.txt and digests.txt name different keys: {some(odd)}')
    return faults


def _fault(images: LmdbImages, entry: Entry, digests: dict[str, str] | None, value: memoryview) -> str | None:
    path = images.path(entry.key)
    if digests is not None and entry.key in digests:
        return None if digest_of(value) == digests[entry.key] else f'{path}: differs from what was written: damaged'
    try:
        shape = (view_raw(value) if is_raw(value) else decode_rgb(value, path)).shape
    except ValueError as error:  # DataError is one
        return str(error) if path in str(error) else f'{path}: damaged: {error}'
    height, width = entry.shape[:2]
    if shape[:2] != (height, width):
        return f'{path}: has {shape[1]}x{shape[0]} pixels, meta_info.txt says {width}x{height}'
    return None


def _chunks(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    iterator = iter(entries)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk
