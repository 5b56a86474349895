"""Read and write image files without losing bit depth, transparency, gray or colour profile.

Pixels come first: PNG and JPEG files are taken apart, so that whatever their metadata are, a decoder sees the pixels
alone, and the metadata go into the written file as they were. Pillow decodes 8 bits. OpenCV decodes 16 bits, which
Pillow cannot hold in colour, and is faster where only the pixels count. PNG of 16 bits with gray and alpha, which
neither of them writes, is written here.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import stat
import struct
import threading
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from ast_plugin.data.image_metadata import (
    EXIF_PREFIX,
    HOLDERS,
    JPEG_SCAN,
    Metadata,
    add_tags,
    is_resolution,
    jpeg_segments,
    png_chunk,
    png_chunks,
    png_metadata,
    split_metadata,
    take_apart,
    take_other_metadata,
)
from ast_plugin.errors import DataError, MemoryShortage, one_line, out_of_memory
from ast_plugin.files import write_file

SUFFIXES = {
    'PNG': ('.png',),
    'JPEG': ('.jpg', '.jpeg', '.jpe', '.jfif'),
    'WEBP': ('.webp',),
    'TIFF': ('.tif', '.tiff'),
    'BMP': ('.bmp', '.dib'),
}
"""File name endings of every format that can be read and written; the first is the usual one."""
FORMAT_OF = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}
"""Format by file name ending, in small letters."""

NOT_READ = 'not a PNG, JPEG, WebP, TIFF or BMP file'
MAX_PIXELS = 200_000_000
"""Images that claim more pixels are refused, unless the reader is told otherwise."""

# OpenCV 4.10 and later can decode to RGB, which saves a pass over the image.
_DECODES_TO_RGB = hasattr(cv2, 'IMREAD_COLOR_RGB')
_IMREAD_RGB = cv2.IMREAD_COLOR_RGB if _DECODES_TO_RGB else cv2.IMREAD_COLOR

_PNG_START = b'\x89PNG\r\n\x1a\n'
_PNG_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # by number of channels
_JPEG_END = b'\xff\xd9'
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_JPEG_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, in Huffman codes
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANAR, _EXTRA_SAMPLES = 258, 262, 284, 338  # tags of TIFF
# First row and column of each pass of an interlaced PNG, and the steps down and across.
_ADAM7 = (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)


@dataclass(frozen=True)
class ImageFile:
    """The upright pixels of an image file, and its metadata.

    Attributes:
        color: gray [H, W] or RGB [H, W, 3], uint8 or uint16.
        alpha: opacity [H, W] in the dtype of `color`, or None. Colours are not multiplied by it.
        format: a key of `SUFFIXES`.
        lossless: whether the file's compression kept every value.
        icc_profile: the colour profile that `color` is in, or None for sRGB.
        exif: EXIF data, which are those of a TIFF file without pixels, upright and without thumbnail, or None.
        xmp: XMP data, or None.
        dpi: resolution (across, down), or None.
        extra: metadata that only files of `format` hold: names, and the bytes as they lie in the file.
        notes: lines on what could not be kept.
    """

    color: np.ndarray
    alpha: np.ndarray | None = None
    format: str = 'PNG'
    lossless: bool = True
    icc_profile: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    extra: tuple[tuple[str, bytes], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_gray(self) -> bool:
        """Whether the image has one channel of brightness instead of three colours."""
        return self.color.ndim == 2

    def metadata(self, kind: str) -> tuple[dict[str, Any], list[str]]:
        """Return the metadata that a file of format `kind` holds, by attribute, and the names of the others."""
        held, lost = split_metadata({key: getattr(self, key) for key in HOLDERS}, kind)
        if kind == self.format:
            return held | {'extra': self.extra}, lost
        return held | {'extra': ()}, lost + list(dict.fromkeys(name for name, _ in self.extra))


def read_image(path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS) -> ImageFile:
    """Read a PNG, JPEG, WebP, TIFF or BMP file of 1 to 16 bits, gray or colour, with or without transparency.

    EXIF orientation is applied; palettes, CMYK and single bits become RGB or gray of 8 bits.

    Raises:
        DataError: if the file cannot be read whole, is animated, of a kind that is not supported, or larger than
            `max_pixels`, before its pixels are decoded.
        MemoryShortage: if it does not fit in memory.
    """
    return decode_image(read_bytes(path), path, max_pixels=max_pixels)


def decode_image(data: bytes, path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS) -> ImageFile:
    """Decode the content of an image file as `read_image` does; `path` is for messages. Safe in threads."""
    kind = sniff_format(data)
    if kind is None:
        raise DataError(f'{path}: {NOT_READ if data else "the file is empty"}')
    size = 0, 0
    try:
        plain, metadata = take_apart(data, kind)
        try:
            with _PILLOW_WITHOUT_LIMITS, Image.open(io.BytesIO(plain), formats=[kind]) as image:
                check_size(path, *image.size, max_pixels)
                size = image.size
                return _decode(path, plain, kind, image, metadata)
        except DataError:
            raise
        except Exception as error:  # decoders index, unpack, convert and assert what a damaged file claims
            num_pixels = _count_plain_pixels(data) if kind == 'JPEG' and not out_of_memory(error) else None
            pixels = _decode_plainly(plain, cv2.IMREAD_UNCHANGED) if num_pixels and num_pixels <= max_pixels else None
            if pixels is None or pixels.shape[2:] not in ((), (3,)):
                raise
            metadata.notes.append(f'read by OpenCV, as Pillow does not take it ({one_line(error)})')
            return _make_image(pixels if pixels.ndim == 2 else pixels[..., ::-1], None, kind, False, metadata)
    except Exception as error:
        if out_of_memory(error) or not _has_memory(16 * math.prod(size)):
            raise MemoryShortage(f'{path}: {size[0]}x{size[1]} does not fit in memory') from error
        if isinstance(error, DataError):
            raise
        if isinstance(error, UnidentifiedImageError):
            raise DataError(
                f'{path}: damaged, or a kind of {kind} that is not supported; save it anew in 8 or 16 bits, gray or RGB'
            ) from error
        reason = one_line(error) if str(error) else 'its parts do not fit together'  # as assertions say nothing
        raise DataError(f'{path}: the {kind} file is damaged: {reason}') from error


def read_rgb(path: str | os.PathLike) -> np.ndarray:
    """Read an image as RGB, upright, gray expanded and transparency dropped.

    Returns:
        [H, W, 3], uint8, or uint16 for a file of 16 bits.
    Raises:
        DataError: as `read_image`.
    """
    return decode_rgb(read_bytes(path), path)


def decode_rgb(data: bytes | memoryview, path: str | os.PathLike) -> np.ndarray:
    """Decode the content of an image file as `read_rgb` does; `path` is for messages.

    PNG and JPEG go straight through OpenCV, for the rate that training needs.
    """
    num_pixels = _count_plain_pixels(data)
    if num_pixels is not None and num_pixels <= MAX_PIXELS:
        pixels = _decode_plainly(data, _IMREAD_RGB | cv2.IMREAD_ANYDEPTH)
        if pixels is not None:
            return pixels if _DECODES_TO_RGB else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    # The thorough reader takes the other files, and tells what is wrong with damaged ones.
    color = decode_image(bytes(data), path, max_pixels=MAX_PIXELS).color
    return np.repeat(color[..., None], 3, axis=2) if color.ndim == 2 else color


def open_image(path: str | os.PathLike) -> io.FileIO:
    """Open a regular file; raise OSError of any other at once: pipes wait for their writer, and devices never end."""

    def open_at_once(path: str, flags: int) -> int:
        return os.open(path, flags | getattr(os, 'O_NONBLOCK', 0))

    file = open(path, 'rb', buffering=0, opener=open_at_once)  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, 'a pipe or device, expected a file', os.fspath(path))


def read_bytes(path: str | os.PathLike) -> bytes:
    """Read a file whole, or raise DataError with its name."""
    try:
        with open_image(path) as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise DataError(f'{path}: cannot be read: {getattr(error, "strerror", None) or error}') from error


def write_image(path: str | os.PathLike, image: ImageFile, *, quality: int = 95) -> None:
    """Write an image as `encode_image` does; the file appears whole or not at all, in a folder that exists.

    Raises:
        DataError: if the format cannot hold the image.
        FileError: if the file cannot be written.
    """
    write_file(path, encode_image(path, image, quality=quality))


def encode_image(path: str | os.PathLike, image: ImageFile, *, quality: int = 95) -> bytes:
    """Encode an image in the format that the file's name ends with.

    PNG and TIFF hold every image. WebP is written without loss where the image came without loss. Metadata that the
    format does not hold, which `ImageFile.metadata` names, are left out.

    Args:
        path: the file.
        image: the pixels and their metadata.
        quality: of JPEG and lossy WebP, in [1, 100].
    Raises:
        DataError: if the format cannot hold the image.
    """
    kind = format_of_name(path)
    try:
        return _encode(image, kind, quality)
    except (OSError, ValueError, struct.error, cv2.error) as error:
        raise DataError(f'{path}: this image cannot be written as {kind}: {error}') from error


def format_of_name(path: str | os.PathLike) -> str:
    """Return the format that a file's name ends with, a key of `SUFFIXES`; raise DataError if it is none."""
    try:
        return FORMAT_OF[Path(path).suffix.lower()]
    except KeyError:
        raise DataError(f'{path}: expected a name that ends in one of {", ".join(FORMAT_OF)}') from None


def sniff_format(data: bytes) -> str | None:
    """Return the format of a file by its first bytes (16 are enough), a key of `SUFFIXES`, or None for any other."""
    if data.startswith(_PNG_START):
        return 'PNG'
    if data.startswith(b'\xff\xd8\xff'):
        return 'JPEG'
    if data[:4] == b'RIFF' and data[8:12] == b'WEBP':
        return 'WEBP'
    if data[:4] in (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+'):
        return 'TIFF'
    return 'BMP' if data.startswith(b'BM') else None


def why_no_image(path: str | os.PathLike) -> str | None:
    """Return why a file in a folder is not taken, in words that files of a kind share; None if it is."""
    name = os.path.basename(path)
    ending = os.path.splitext(name)[1].lower()
    if name.startswith('.'):
        return 'hidden'
    if ending in FORMAT_OF:
        return None
    kind = None
    with contextlib.suppress(OSError), open_image(path) as file:
        kind = sniff_format(file.read(16))
    return f'{kind} {f"named {ending}" if ending else "without ending"}' if kind else ending or 'without ending'


def count_reasons(reasons: Counter[str]) -> str:
    """Return counts of `why_no_image` in a line: `2 .heic, 1 PNG without ending`."""
    return ', '.join(f'{count:,} {reason}' for reason, count in reasons.most_common())


def check_size(path: str | os.PathLike, width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise DataError if an image claims more pixels than are allowed."""
    if width * height > max_pixels:
        raise DataError(
            f'{path}: {width}x{height} is {width * height / 1e6:.0f} million pixels, more than the '
            f'{max_pixels / 1e6:.0f} million allowed; scale it down, or if you trust the file and the '
            'command has that, raise --max-megapixels'
        )


def find_jpeg_frame(data: bytes) -> tuple[int, int, int, int, int | None] | None:
    """Return marker, height, width and channels of a JPEG's frame, and where its scan begins if it does."""
    frame = None
    for marker, start, _ in jpeg_segments(data):
        if marker == JPEG_SCAN:
            return frame and (*frame, start)
        if marker in _JPEG_FRAMES and frame is None and start + 10 <= len(data):
            frame = (marker, *struct.unpack_from('>HHB', data, start + 5))
    return frame and (*frame, None)


def _count_plain_pixels(data: bytes | memoryview) -> int | None:
    """Return height times width of a PNG, or a gray or RGB JPEG, that reaches its end; None for all other files.

    OpenCV reads these right and fast. Of files that were cut it may return the first rows without a word.
    """
    kind = sniff_format(bytes(data[:16]))
    if kind == 'PNG':
        is_whole = data[12:16] == b'IHDR' and any(name == b'IEND' for name, _, _ in png_chunks(data))
        return math.prod(struct.unpack_from('>II', data, 16)) if is_whole else None
    data = bytes(data)
    if kind == 'JPEG' and (frame := find_jpeg_frame(data)):
        marker, height, width, channels, scan = frame
        # The end is looked for behind the header, since thumbnails in it have ends of their own.
        is_whole = scan is not None and data.rfind(_JPEG_END, scan) >= 0
        if is_whole and marker in _JPEG_PLAIN_FRAMES and channels in (1, 3):
            return height * width
    return None


class _PillowWithoutLimits:
    """Pillow without its limit of pixels and its warnings, while any thread is inside: both hold for a whole process.

    The limit is `check_size` instead; damaged metadata are dropped without a warning. The lock is not held meanwhile:
    a process that is forked from this one would wait for it forever.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    def __enter__(self) -> None:
        with self._lock:
            self._count += 1
            if self._count == 1:
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
                self._warnings = warnings.catch_warnings()
                self._warnings.__enter__()
                warnings.simplefilter('ignore')

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0:
                Image.MAX_IMAGE_PIXELS = self._limit
                self._warnings.__exit__(None, None, None)


_PILLOW_WITHOUT_LIMITS = _PillowWithoutLimits()


def _decode_plainly(data: bytes | memoryview, flags: int) -> np.ndarray | None:
    """The pixels as OpenCV has them; None if it does not read them."""
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None


def _has_memory(num_bytes: int) -> bool:
    """Whether so much memory can be had at once: decoders tell of memory that ran out as they tell of damage."""
    try:
        np.empty(num_bytes, np.uint8)
    except MemoryError:
        return False
    return True


def _make_image(
    color: np.ndarray, alpha: np.ndarray | None, kind: str, lossless: bool, metadata: Metadata
) -> ImageFile:
    """Put decoded pixels upright."""
    metadata.finish()
    # Decoders of TIFF have turned them already.
    orientation = metadata.orientation if kind != 'TIFF' and metadata.orientation in range(2, 9) else 1
    turn = (orientation - 1) % 4
    rows, columns = -1 if turn >= 2 else 1, -1 if turn in (1, 2) else 1
    parts = (part if part is None or orientation < 5 else part.swapaxes(0, 1) for part in (color, alpha))
    color, alpha = (None if part is None else np.ascontiguousarray(part[::rows, ::columns]) for part in parts)
    return ImageFile(color, alpha, kind, lossless, **metadata.values, notes=tuple(metadata.notes))


def _decode(path: str | os.PathLike, data: bytes, kind: str, image: Image.Image, metadata: Metadata) -> ImageFile:
    """Decode what `take_apart` has left of a file, and give it the metadata from there."""
    frames = getattr(image, 'n_frames', 1)
    if frames > 1:
        raise DataError(
            f'{path}: holds {frames} frames or pages; animated files are not supported, save the frames as images'
        )
    bits, has_other_samples = data[24] if kind == 'PNG' else 8, False
    if kind == 'TIFF':
        has_other_samples = 0 in image.tag_v2.get(_EXTRA_SAMPLES, ())
        bits = max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
        _check_strips(path, image)
    if kind == 'PNG':
        _check_rows(path, data)
    if kind not in ('PNG', 'JPEG'):
        take_other_metadata(data, image, kind, metadata)
    if is_resolution(image.info.get('dpi')):
        metadata.take('dpi', image.info['dpi'])
    image.load()
    if bits == 16 and image.mode != 'CMYK':
        color, alpha = _decode_16_bits(path, data, kind, image)
    else:
        if image.mode == '1':
            metadata.notes.append('written with 8 bits instead of 1')
        if image.mode in ('P', 'PA'):
            metadata.notes.append('written in RGB instead of a palette')
        if image.mode == 'CMYK':
            metadata.notes.append('converted from CMYK to RGB')
            image = _convert_cmyk(image, metadata.values.pop('icc_profile', None))
        color, alpha = _split_alpha(path, image)
    if has_other_samples:
        metadata.notes.append('a channel of no said meaning, which is no transparency, is left out')
    lossless = kind != 'JPEG' and (kind != 'WEBP' or _is_lossless_webp(data))
    return _make_image(color, alpha, kind, lossless, metadata)


def _split_alpha(path: str | os.PathLike, image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """Gray or RGB, and opacity if there is any, of at most 8 bits."""
    gray = image.mode in ('1', 'L', 'LA')
    if image.mode not in ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'RGBa', 'RGBX', 'YCbCr'):
        raise DataError(
            f'{path}: pixels of kind {image.mode} are not supported; save it with 8 or 16 bits in gray or RGB'
        )
    if image.has_transparency_data:
        pixels = np.asarray(image.convert('RGBA'))
        return pixels[..., 0] if gray else pixels[..., :3], pixels[..., 3]
    return np.asarray(image.convert('L' if gray else 'RGB')), None


def _check_strips(path: str | os.PathLike, image: Image.Image) -> None:
    """Raise DataError if strips or tiles are missing: Pillow leaves their pixels black, however many there are."""
    count = sum((right - left) * (bottom - top) for left, top, right, bottom in (tile.extents for tile in image.tile))
    planes = len(image.getbands()) if len(image.tile) > 1 and image.tag_v2.get(_PLANAR, 1) == 2 else 1
    width, height = image.size
    if count < width * height * planes:
        raise DataError(f'{path}: damaged: strips or tiles are missing, it holds {count} of {width}x{height} pixels')


def _check_rows(path: str | os.PathLike, data: bytes) -> None:
    """Raise DataError if rows of a PNG are missing: where its compressed data end soundly, Pillow leaves them black."""
    width, height, depth, color_type, _, _, is_interlaced = struct.unpack_from('>IIBBBBB', data, 16)
    bits = depth * {2: 3, 4: 2, 6: 4}.get(color_type, 1)
    sizes = [(-((row - height) // down), -((column - width) // across)) for row, column, down, across in _ADAM7]
    rows = [size for size in (sizes if is_interlaced else [(height, width)]) if all(size)]
    expected = sum(count * (1 + (length * bits + 7) // 8) for count, length in rows)
    count, inflater = 0, zlib.decompressobj()
    for rest in (data[start + 8 : end - 4] for name, start, end in png_chunks(data) if name == b'IDAT'):
        while rest and count < expected:
            count += len(inflater.decompress(rest, 2**20))
            rest = inflater.unconsumed_tail
    if count + len(inflater.flush()) < expected:
        raise DataError(f'{path}: truncated or damaged: its pixels are {count} bytes, expected {expected}')


def _decode_16_bits(
    path: str | os.PathLike, data: bytes, kind: str, image: Image.Image
) -> tuple[np.ndarray, np.ndarray | None]:
    """Gray or RGB, and opacity if there is any, of 16 bits: Pillow has checked the file, OpenCV keeps its depth."""
    if kind == 'TIFF' and (image.tag_v2.get(_PLANAR, 1) != 1 or image.mode not in ('I;16', 'I;16B', 'RGB', 'RGBA')):
        raise DataError(f'{path}: this layout of a 16-bit TIFF is not supported; save it as interleaved gray or RGB')
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        raise DataError(f'{path}: this kind of 16-bit {kind} is not supported; save it anew in gray or RGB')
    if pixels.ndim == 2:
        white_is_zero = kind == 'TIFF' and image.tag_v2.get(_PHOTOMETRIC) == 0
        transparent = image.info.get('transparency')
        alpha = None if transparent is None else np.where(pixels == transparent, 0, 65535).astype(np.uint16)
        return ~pixels if white_is_zero else pixels, alpha
    color, alpha = pixels[..., 2::-1], pixels[..., 3] if pixels.shape[2] == 4 else None
    if kind == 'TIFF' and not {1, 2} & {*image.tag_v2.get(_EXTRA_SAMPLES, ())}:
        alpha = None
    if kind == 'PNG' and data[25] == 4:
        color = color[..., 0]
    if kind == 'TIFF' and alpha is not None and image.tag_v2.get(_EXTRA_SAMPLES) == (1,):  # multiplied by alpha
        opacity = np.maximum(alpha, 1)[..., None].astype(np.uint32)
        color = np.minimum((color.astype(np.uint32) * 65535 + opacity // 2) // opacity, 65535).astype(np.uint16)
    return color, alpha


def _convert_cmyk(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert CMYK to sRGB, through its own profile where it has a usable one."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile('sRGB'), outputMode='RGB')
        except (ImageCms.PyCMSError, OSError):
            pass  # a damaged profile: the plain conversion remains
    return image.convert('RGB')


def _is_lossless_webp(data: bytes) -> bool:
    position = 12
    while position + 8 <= len(data):
        if data[position : position + 4] in (b'VP8L', b'VP8 '):
            return data[position : position + 4] == b'VP8L'
        size = int.from_bytes(data[position + 4 : position + 8], 'little')
        position += 8 + size + size % 2
    return False


def _encode(image: ImageFile, kind: str, quality: int) -> bytes:
    color = image.color[..., None] if image.is_gray else image.color
    channels = color if image.alpha is None else np.dstack([color, image.alpha])
    metadata, _ = image.metadata(kind)
    if channels.dtype == np.uint16 and kind not in ('PNG', 'TIFF'):
        raise ValueError(f'{kind} holds 8 bits, the image has 16; PNG and TIFF hold it')
    if kind == 'JPEG' and image.alpha is not None:
        raise ValueError('JPEG has no transparency, the image has; PNG, WebP and TIFF hold it')
    if kind == 'TIFF':
        return _encode_tiff(channels, metadata)
    if kind in ('WEBP', 'BMP') and channels.shape[2] == 2:
        channels = channels[..., [0, 0, 0, 1]]
    if kind == 'BMP' and channels.shape[2] == 4:
        # Pillow writes such files without saying that the fourth channel is alpha.
        return cv2.imencode('.bmp', cv2.cvtColor(channels, cv2.COLOR_RGBA2BGRA))[1].tobytes()
    pixels = np.ascontiguousarray(channels.squeeze(2) if channels.shape[2] == 1 else channels)
    output = io.BytesIO()
    if kind == 'PNG':
        if pixels.dtype == np.uint16:
            data = _encode_png_16_bits(channels)
        else:
            Image.fromarray(pixels).save(output, 'PNG')
            data = output.getvalue()
        return data[:33] + png_metadata(metadata) + data[33:]
    metadata['extra'] = b''.join(segment for _, segment in metadata['extra'])
    if kind == 'JPEG':
        metadata |= {'quality': quality, 'subsampling': 0 if quality >= 90 else 2}
        metadata |= {'exif': EXIF_PREFIX + metadata['exif']} if 'exif' in metadata else {}
    elif kind == 'WEBP':
        metadata |= {'lossless': True, 'exact': True} if image.lossless else {'quality': quality}
    Image.fromarray(pixels).save(output, kind, **metadata)
    return output.getvalue()


def _encode_png_16_bits(channels: np.ndarray) -> bytes:
    height, width, count = channels.shape
    rows = channels.astype('>u2', order='C').view(np.uint8).reshape(height, width * count * 2)
    # Filter 1 of PNG: each byte less the one of the pixel to the left.
    filtered = np.empty((height, 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = 1
    filtered[:, 1:] = rows
    filtered[:, 1 + count * 2 :] -= rows[:, : -count * 2]
    header = struct.pack('>IIBBBBB', width, height, 16, _PNG_COLOR_TYPES[count], 0, 0, 0)
    return (
        _PNG_START
        + png_chunk(b'IHDR', header)
        + png_chunk(b'IDAT', zlib.compress(filtered, 6))
        + png_chunk(b'IEND', b'')
    )


def _encode_tiff(channels: np.ndarray, metadata: dict[str, Any]) -> bytes:
    import tifffile

    count, dpi = channels.shape[2], metadata.get('dpi')
    output = io.BytesIO()
    tifffile.imwrite(
        output,
        channels.squeeze(2) if count == 1 else channels,
        byteorder='<',
        photometric='minisblack' if count < 3 else 'rgb',
        planarconfig='contig' if count > 1 else None,
        metadata=None,
        software=False,
        extrasamples=['unassalpha'] if count in (2, 4) else None,
        compression='zlib',
        predictor=True,
        iccprofile=metadata.get('icc_profile'),
        resolution=dpi and tuple(map(float, dpi)),
        resolutionunit='INCH' if dpi else None,
    )
    return add_tags(output.getvalue(), metadata)
