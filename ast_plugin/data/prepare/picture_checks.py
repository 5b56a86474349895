"""Reading pictures to the last byte to find what is wrong with them, before a training of days finds it."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ast_plugin.data.image_files import MAX_PIXELS, SUFFIXES, read_image, read_rgb
from ast_plugin.data.image_headers import jpeg_frame, jpeg_segments, sniff_format
from ast_plugin.data.matching import Fault, Pair
from ast_plugin.errors import DataError

DIGEST_BYTES = 16

_PNG_KINDS = {0: ('gray',), 3: ('palette',), 4: ('gray', 'transparency'), 6: ('transparency',)}
_JPEG_KINDS = {1: ('gray',), 4: ('CMYK',)}
# What libjpeg says on the error stream while it fills up with gray what is not there. It also complains of
# superfluous bytes, which cost nothing.
_JPEG_LOSSES = (
    b'remature end',
    b'bad Huffman code',
    b'Corrupt JPEG data: found marker',
    b'Invalid SOS',
    b'bad component',
)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a readable picture is.

    Attributes:
        size: height and width in pixels, upright.
        num_bytes: size of the file.
        digest: of the pixels, `DIGEST_BYTES` long.
        traits: what is not plain RGB of 8 bits, each in a word or two.
    """

    size: tuple[int, int]
    num_bytes: int
    digest: bytes
    traits: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Checked:
    """A pair that was looked at: two findings, or a fault."""

    lq: Finding | None
    gt: Finding | None
    fault: Fault | None = None


def check_pair(pair: Pair) -> Checked:
    """Read both pictures of a pair, and compare their sizes."""
    findings = []
    for path in (pair.lq, pair.gt):
        try:
            findings.append(check_picture(path))
        except DataError as error:
            return Checked(None, None, Fault('unreadable', path, str(error).removeprefix(f'{path}: ')))
    lq, gt = findings
    if lq.size == gt.size:
        return Checked(lq, gt)
    sizes = f'{lq.size[1]}x{lq.size[0]} pixels, its clean partner {pair.gt} {gt.size[1]}x{gt.size[0]}'
    return Checked(None, None, Fault('sizes differ', pair.lq, sizes + _explain_sizes(lq.size, gt.size)))


def check_picture(path: str | os.PathLike) -> Finding:
    """Read a picture as training does, but trust it less.

    Raises:
        DataError: if it cannot be read whole, is animated, or claims more than `MAX_PIXELS`.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f'{path}: cannot be read: {getattr(error, "strerror", None) or error}') from error
    kind = sniff_format(data)
    size, traits = _header(path, data, kind)
    if size and size[0] * size[1] > MAX_PIXELS:
        raise DataError(
            f'{path}: {size[1]}x{size[0]} is {size[0] * size[1] / 1e6:.0f} million pixels, more than the '
            f'{MAX_PIXELS / 1e6:.0f} million allowed'
        )
    if size:
        with _heard(kind == 'JPEG') as losses:
            pixels = read_rgb(path)
        if any(loss in line for line in losses for loss in _JPEG_LOSSES):
            raise DataError(f'{path}: the JPEG file is damaged: {losses[0].decode(errors="replace").strip()}')
    else:
        picture = read_image(path)
        traits, pixels = _traits(picture), picture.color
        pixels = np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels
    if path.suffix.lower() not in SUFFIXES[kind]:
        traits += (f'{kind} named {path.suffix}',)
    return Finding(pixels.shape[:2], len(data), digest(pixels), traits)


def digest(pixels: np.ndarray) -> bytes:
    """Return a digest of RGB pixels [H, W, 3], their size and depth: BLAKE2b, `DIGEST_BYTES` long."""
    state = hashlib.blake2b(f'{pixels.shape} {pixels.dtype.itemsize}\n'.encode(), digest_size=DIGEST_BYTES)
    state.update(np.ascontiguousarray(pixels))
    return state.digest()


def quiet_threads() -> None:
    """Keep OpenCV to one thread: processes are the parallelism."""
    cv2.setNumThreads(1)


def _explain_sizes(lq: tuple[int, int], gt: tuple[int, int]) -> str:
    if lq == gt[::-1]:
        return '; one of them is turned by 90 degrees'
    factors = {gt[0] / lq[0], gt[1] / lq[1]}
    if len(factors) == 1 and (factor := factors.pop()) > 1 and factor.is_integer():
        return f'; the degraded one is {factor:.0f} times smaller, as for super-resolution, which is not done here'
    return ''


def _header(path: Path, data: bytes, kind: str | None) -> tuple[tuple[int, int] | None, tuple[str, ...]]:
    """Height, width and traits of a PNG or JPEG by its first bytes; None where a thorough reader must look."""
    if kind == 'PNG' and len(data) > 33:
        if b'acTL' in data[33:256]:
            raise DataError(f'{path}: an animated PNG; save its frames as single pictures')
        size = int.from_bytes(data[20:24], 'big'), int.from_bytes(data[16:20], 'big')
        traits = _PNG_KINDS.get(data[25], ())
        return size, traits + (('16 bits',) if data[24] == 16 else ())
    if kind == 'JPEG':
        return _jpeg_header(data)
    return None, ()


def _jpeg_header(data: bytes) -> tuple[tuple[int, int] | None, tuple[str, ...]]:
    for marker, position in jpeg_segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width, channels = jpeg_frame(data, position)
            return (height, width), _JPEG_KINDS.get(channels, ())
    return None, ()


def _traits(picture) -> tuple[str, ...]:
    traits = ('gray',) if picture.is_gray else ()
    traits += ('transparency',) if picture.alpha is not None else ()
    return traits + (('16 bits',) if picture.color.dtype == np.uint16 else ())


@contextmanager
def _heard(listen: bool) -> Iterator[list[bytes]]:
    """Collect what C libraries say on the error stream meanwhile, where there is no other way to hear of it."""
    lines: list[bytes] = []
    if not listen:
        yield lines
        return
    with tempfile.TemporaryFile() as heard:
        before = os.dup(2)
        os.dup2(heard.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(before, 2)
            os.close(before)
            heard.seek(0)
            lines += heard.read().splitlines()
