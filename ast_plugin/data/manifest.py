"""Read and write manifests: text files, written by `basicsr data prepare`, that list the pairs of one phase.

The format is JSON Lines. The first line describes the dataset:

  {"manifest": 1, "layout": "spad", "phase": "train", "root": "../SPAD", "pairs": 638492, "others": [], "made_by": ".."}

`root` is the folder that names are relative to, itself relative to the manifest. `others` are images in the folders of
the pairs that belong to no pair. Each further line is a pair:

  {"key": "a", "lq": "rain/a.png", "gt": "clean/a.png", "size": [256, 256], "bytes": [9041, 8220], "digests": [.., ..]}

`size` is (height, width). The first item of `bytes` and `digests` belongs to the degraded image. Digests are computed
from the decoded pixels (`checks.digest_pixels`), so lossless re-encoding of a file does not change them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ast_plugin import __version__
from ast_plugin.data.matching import Pair, PairTable
from ast_plugin.errors import DataError
from ast_plugin.files import replace_text

FORMAT = 1
"""Version of the format, the value of `manifest` in the first line."""


class Entry(NamedTuple):
    """A pair, and properties of its images."""

    key: str  # unique in the manifest
    lq: str  # file of the degraded image, relative to the root, with `/` between folders
    gt: str  # file of the clean image
    size: tuple[int, int]  # (height, width) of both images
    bytes: tuple[int, int]  # sizes of the two files
    digests: tuple[str, str]  # of the pixels of the two images, hexadecimal


@dataclass(frozen=True)
class Manifest:
    """The first line of a manifest."""

    path: Path
    layout: str  # layout that the dataset is distributed in
    phase: str  # train or test
    root: Path  # the folder that names are relative to
    num_pairs: int  # number of pair lines
    others: tuple[str, ...] = ()  # images in the folders of the pairs that belong to no pair

    def entries(self) -> Iterator[Entry]:
        """Yield the pairs lazily; raise DataError if a line is invalid or their number differs from the first line."""
        with _reading(self.path) as lines:
            next(lines)
            number = 1
            for number, line in enumerate(lines, 2):
                yield _parse_entry(self.path, number, line)
        if number - 1 != self.num_pairs:
            raise DataError(
                f'{self.path}: expected {self.num_pairs} pairs as stated in the first line, got {number - 1}: the file '
                f'was truncated or edited. Prepare the dataset again'
            )

    def pairs(self) -> PairTable:
        """Read all pairs like `entries`, with paths relative to the working directory."""
        root = f'{self.root}/'
        return PairTable((Pair(entry.key, root + entry.lq, root + entry.gt) for entry in self.entries()), root)


def read_manifest(path: str | os.PathLike) -> Manifest:
    """Open a manifest; its pairs are read on access.

    Raises:
        DataError: if the file is not a manifest, has an unsupported format, or its root does not exist.
    """
    path = Path(path)
    with _reading(path) as lines:
        header = _parse_object(path, 1, next(lines, ''))
    if header.get('manifest') != FORMAT:
        what = f'a manifest of format {header["manifest"]!r}' if 'manifest' in header else 'not a manifest'
        raise DataError(
            f'{path}: {what}; expected one of format {FORMAT}, as written by `basicsr data prepare`. '
            f'Prepare the dataset again'
        )
    kinds = {'layout': str, 'phase': str, 'root': str, 'pairs': int}
    wrong = [key for key, kind in kinds.items() if type(header.get(key)) is not kind]
    if wrong:
        raise DataError(f'{path}: line 1 lacks {", ".join(wrong)}. Prepare the dataset again')
    root = Path(os.path.normpath(path.resolve().parent / header['root']))
    if not os.path.isdir(root):
        raise DataError(
            f'{path}: its images were in {root}, which is not a folder. Restore it, '
            f'or set "root" in the first line to the folder of the images'
        )
    others = header.get('others', [])
    if not isinstance(others, list) or not all(map(_is_inside, others)):
        raise DataError(f'{path}: line 1: "others" is not a list of names below root. Prepare the dataset again')
    return Manifest(path, header['layout'], header['phase'], root, header['pairs'], tuple(others))


def write_manifest(manifest: Manifest, entries: Iterable[Entry]) -> None:
    """Write a manifest with these pairs, consumed lazily, atomically into an existing folder.

    Raises:
        FileError: if the file cannot be written, for example because the disk is full.
    """
    root = manifest.root.absolute()
    with suppress(ValueError):  # a different drive on Windows
        root = Path(os.path.relpath(root, manifest.path.parent.resolve()))
    header = {
        'manifest': FORMAT,
        'layout': manifest.layout,
        'phase': manifest.phase,
        'root': root.as_posix(),
        'pairs': manifest.num_pairs,
        'others': list(manifest.others),
        'made_by': f'ast_plugin {__version__}',
    }
    with replace_text(manifest.path) as file:
        file.write(json.dumps(header) + '\n')
        for entry in entries:
            file.write(json.dumps(entry._asdict()) + '\n')


@contextmanager
def _reading(path: Path) -> Iterator[Iterator[str]]:
    try:
        with open(path, encoding='utf-8') as file:
            yield iter(file)
    except OSError as error:
        raise DataError(f'{path}: this manifest cannot be read: {error.strerror or error}') from error
    except UnicodeDecodeError as error:
        raise DataError(f'{path}: not a manifest, which is UTF-8 text') from error


def _parse_object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise DataError(
            f'{path}: line {number} is not a line of a manifest: {line.strip()[:60]!r}. Prepare the dataset again'
        )
    return value


def _parse_entry(path: Path, number: int, line: str) -> Entry:
    value = _parse_object(path, number, line)
    try:
        names = [value[name] for name in ('key', 'lq', 'gt')]
        numbers, digests = [*value['size'], *value['bytes']], value['digests']
        is_right = _can_be_name(names[0]) and all(map(_is_inside, names[1:]))
        is_right = is_right and [*map(type, numbers)] == [int] * 4 and [*map(type, digests)] == [str] * 2
        if is_right and len(value['size']) == 2:
            return Entry(*names, tuple(numbers[:2]), tuple(numbers[2:]), tuple(digests))
    except (KeyError, TypeError):
        pass
    raise DataError(
        f'{path}: line {number} is not a pair: expected key, lq, gt (names below root), size, bytes and digests; '
        f'got {line.strip()[:60]!r}. Prepare the dataset again'
    )


def _can_be_name(name: object) -> bool:
    """Return whether a file can have this name, including bytes that are not valid text."""
    try:
        return isinstance(name, str) and bool(name) and b'\0' not in os.fsencode(name)
    except UnicodeEncodeError:  # an unpaired surrogate, which JSON can express
        return False


def _is_inside(name: object) -> bool:
    """Return whether a name stays below the root, so that an untrusted manifest cannot open other files."""
    return _can_be_name(name) and not PurePosixPath(name).is_absolute() and '..' not in name.split('/')
