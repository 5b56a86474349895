"""Telling clean photographs from the other pictures of a folder or a package, and gathering each once."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import cv2
import numpy as np

from ast_plugin.data.image_files import SUFFIXES, Picture, decode_image
from ast_plugin.data.image_headers import sniff_format
from ast_plugin.data.prepare.qt_resources import MAGIC, resource_files
from ast_plugin.data.whole_files import write_bytes
from ast_plugin.errors import DataError

MIN_SIDE = 256
"""Pixels of the shorter side below which a picture is no use for patches."""

_HASH_SIDE = 16
_ALIKE = 10  # of the 240 bits of a fingerprint, those in which two scalings of one photograph may differ
_MOST_FLAT = 0.5  # share of pixels equal to their neighbour in all colours above which a picture is taken for a drawing
_LEAST_COLORS = 4000  # different colours that a photograph has at least, counted in steps of 4 levels a channel
_MOST_WHITE = 0.08  # share of pixels without any tone above which a picture is cut out or burnt out
_LEAST_CHROMA = 4.0  # mean distance in levels between the strongest and the weakest channel


@dataclass
class Gathered:
    """What came of gathering: names of the files written, and how many were left out, by reason."""

    names: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def folder_pictures(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield every picture below a folder, whatever its ending, and those inside Qt's resources, as (path, bytes).

    Raises:
        DataError: if the folder or a file in it cannot be read.
    """

    def fail(error: OSError) -> None:
        raise DataError(f'{error.filename}: cannot be read: {error.strerror}')

    for current, folders, names in os.walk(folder, onerror=fail):
        folders.sort()
        for name in sorted(names):
            path = Path(current) / name
            # Links of a package may point anywhere on this machine.
            if path.is_symlink() or not path.is_file():
                continue
            try:
                with open(path, 'rb') as file:
                    start = file.read(16)
                    if sniff_format(start):
                        yield str(path.relative_to(folder)), start + file.read()
                        continue
            except OSError as error:
                raise DataError(f'{path}: cannot be read: {error.strerror}') from error
            if start[:4] == MAGIC:
                yield from _resource_pictures(path, folder)


def _resource_pictures(path: Path, folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the pictures inside Qt's resources; for what is damaged no bytes, so that the rest is gathered."""
    place = path.relative_to(folder)
    try:
        for name, data in resource_files(path):
            if sniff_format(data[:16]):
                yield str(place / name), data
    except DataError:
        yield str(place), b''


def gather(pictures: Iterator[tuple[str, bytes]], destination: Path, min_side: int = MIN_SIDE) -> Gathered:
    """Write the photographs among `pictures` to a folder, as they are, each once.

    Names are those of the files, with the folder's before them where two are the same. Photographs that are in the
    folder already count as there, so that a second run adds only what is new.

    Args:
        pictures: (path, bytes) of picture files.
        destination: folder to write to; made if it is not there.
        min_side: pixels of the shorter side.
    Raises:
        DataError: if a file cannot be written.
    """
    try:
        destination.mkdir(parents=True, exist_ok=True)
        present = {entry.name for entry in destination.iterdir()}
    except OSError as error:
        raise DataError(f'{destination}: cannot be written: {error.strerror}') from error
    seen = _Seen()
    for name in sorted(present):
        path = destination / name
        if path.suffix.lower() in _ENDINGS and path.is_file():
            seen.is_new(path.read_bytes(), _read(path.read_bytes()))
    taken = {Path(name).stem.casefold() for name in present}
    result = Gathered()
    for place, data in pictures:
        picture = _read(data)
        reason = 'unreadable' if picture is None else why_not(picture, min_side)
        if reason is None and not seen.is_new(data, picture):
            reason = 'there already'
        if reason:
            result.left_out[reason] += 1
            continue
        name = _free_name(PurePosixPath(Path(place).as_posix()), taken) + SUFFIXES[sniff_format(data[:16])][0]
        write_bytes(destination / name, data)
        result.names.append(name)
    return result


def why_not(picture: Picture, min_side: int = MIN_SIDE) -> str | None:
    """Say why a picture is no clean colour photograph of some size, or None if it is one."""
    if picture.is_gray:
        return 'gray'
    color = picture.color if picture.color.dtype == np.uint8 else (picture.color >> 8).astype(np.uint8)
    if min(color.shape[:2]) < min_side:
        return 'small'
    if picture.alpha is not None and picture.alpha.min() < np.iinfo(picture.alpha.dtype).max:
        return 'transparent'
    if float(np.ptp(color[::2, ::2].astype(np.int16), axis=2).mean()) < _LEAST_CHROMA:
        return 'gray'
    if float((color.min(axis=2) == 255).mean()) > _MOST_WHITE:
        return 'burnt out'
    # What is drawn has areas of one colour and few colours; light and noise leave neither in a photograph.
    flat = float((color[:, 1:] == color[:, :-1]).all(axis=2).mean())
    coarse = (color >> 2).astype(np.uint32)
    colors = len(np.unique(coarse[..., 0] << 12 | coarse[..., 1] << 6 | coarse[..., 2]))
    return 'drawn' if flat > _MOST_FLAT or colors < _LEAST_COLORS else None


class _Seen:
    """Photographs by their bytes and by what they show, scaled down."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()
        self._fingerprints: list[np.ndarray] = []

    def is_new(self, data: bytes, picture: Picture | None) -> bool:
        """Tell whether a photograph was not there before, neither as a file nor in another size or format; note it."""
        digest = hashlib.sha256(data).digest()
        if digest in self._digests:
            return False
        self._digests.add(digest)
        if picture is None or min(picture.color.shape[:2]) < _HASH_SIDE:
            return True
        fingerprint = _fingerprint(picture)
        if self._fingerprints and (np.stack(self._fingerprints) != fingerprint).sum(axis=1).min() <= _ALIKE:
            return False
        self._fingerprints.append(fingerprint)
        return True


def _fingerprint(picture: Picture) -> np.ndarray:
    """Whether each of 16 x 15 parts is brighter than the one to its left; survives scaling and compression."""
    gray = picture.color if picture.is_gray else picture.color.mean(axis=2)
    small = cv2.resize(gray.astype(np.float32), (_HASH_SIDE, _HASH_SIDE), interpolation=cv2.INTER_AREA)
    return (small[:, 1:] > small[:, :-1]).ravel()


_ENDINGS = {suffix for suffixes in SUFFIXES.values() for suffix in suffixes}


def _read(data: bytes) -> Picture | None:
    try:
        return decode_image(data, 'picture')
    except DataError:
        return None


def _free_name(place: PurePosixPath, taken: set[str]) -> str:
    """A name that is not taken yet: the file's, with ever more of its folders before it, then with a number."""
    parts = list(place.parts)
    for first in range(len(parts) - 1, -1, -1):
        name = '_'.join([*parts[first:-1], place.stem]).replace('/', '_').lstrip('.')
        if name and name.casefold() not in taken:
            break
    number, base = 2, name or 'photo'
    while not name or name.casefold() in taken:
        name, number = f'{base}_{number}', number + 1
    taken.add(name.casefold())
    return name


def unpack_debian(package: str, folder: Path) -> Path | None:
    """Unpack a Debian package below `folder`, without installing it and as any user.

    Args:
        package: a .deb file, or a name that apt downloads.
        folder: an empty folder.
    Returns:
        The file that states the licences of what is in the package, if it has one.
    Raises:
        DataError: if apt or dpkg-deb is missing, or one fails; with what it said.
    """
    file = Path(package).expanduser()
    if not file.is_file():
        if package.endswith('.deb') or '/' in package:
            raise DataError(f'{package}: there is no such file')
        _call(['apt-get', 'download', package], folder, f'downloading the Debian package {package}')
        found = sorted(folder.glob('*.deb'))
        if not found:
            raise DataError(f'apt-get download {package}: brought no file')
        file = found[0]
    tree = folder / 'tree'
    _call(['dpkg-deb', '-x', str(file.resolve()), str(tree)], folder, f'unpacking {file.name}')
    copyrights = sorted(tree.glob('usr/share/doc/*/copyright'))
    return next((path for path in copyrights if path.is_file() and not path.is_symlink()), None)


def _call(command: list[str], folder: Path, purpose: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors='replace', check=False)
    except FileNotFoundError:
        raise DataError(
            f'{purpose} needs {command[0]}, which this machine does not have; '
            f'on another, `{" ".join(command)}`, then give its folder with --from'
        ) from None
    if done.returncode:
        said = ' '.join((done.stderr or done.stdout).strip().splitlines()[-2:])
        raise DataError(f'{purpose}: {command[0]} failed: {said or f"status {done.returncode}"}')
