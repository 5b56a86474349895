"""Read and write image files, preserving bit depth, transparency, gray and colour profile.

PNG and JPEG files are split, so that decoders see only the pixels, whatever the metadata contain, and the metadata are
copied unchanged to the written file. Pillow decodes 8 bits. OpenCV decodes 16 bits, which Pillow does not support in
colour, and is faster where only pixels are needed. 16-bit PNG files with gray and alpha, which neither can write, are
encoded here.
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
"""File extensions of every supported format; the first is the usual one."""
FORMAT_OF = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}
"""Format by lower-case file extension."""

NOT_READ = 'not a PNG, JPEG, WebP, TIFF or BMP file'
MAX_PIXELS = 200_000_000
"""Default limit of the number of pixels of an image; larger images are rejected."""

# OpenCV 4.10 and later can decode to RGB, which saves a pass over the image.
_DECODES_TO_RGB = hasattr(cv2, 'IMREAD_COLOR_RGB')
_IMREAD_RGB = cv2.IMREAD_COLOR_RGB if _DECODES_TO_RGB else cv2.IMREAD_COLOR

_PNG_START = b'\x89PNG\r\n\x1a\n'
_PNG_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # by number of channels
_JPEG_END = b'\xff\xd9'
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_JPEG_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, with Huffman coding
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANAR, _EXTRA_SAMPLES = 258, 262, 284, 338  # TIFF tags
# First row, first column, row step and column step of each pass of an interlaced PNG.
_ADAM7 = (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)


@dataclass(frozen=True)
class ImageFile:
    """Pixels of an image file in upright orientation, and its metadata."""

    color: np.ndarray  # gray [H, W] or RGB [H, W, 3], uint8 or uint16
    alpha: np.ndarray | None = None  # opacity [H, W] in the dtype of `color`; colours are not premultiplied
    format: str = 'PNG'  # a key of `SUFFIXES`
    lossless: bool = True  # whether the compression of the file is lossless
    icc_profile: bytes | None = None  # colour profile of `color`, or None for sRGB
    exif: bytes | None = None  # in the format of a TIFF file without pixels, upright and without thumbnail
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None  # resolution (horizontal, vertical)
    extra: tuple[tuple[str, bytes], ...] = ()  # metadata specific to `format`, as names and the bytes in the file
    notes: tuple[str, ...] = ()  # messages on data that was not preserved

    @property
    def is_gray(self) -> bool:
        """Whether the image has a single gray channel."""
        return self.color.ndim == 2

    def metadata(self, kind: str) -> tuple[dict[str, Any], list[str]]:
        """Return the metadata that format `kind` supports, by attribute, and the names of all others."""
        held, lost = split_metadata({key: getattr(self, key) for key in HOLDERS}, kind)
        held['extra'] = self.extra if kind == self.format else ()
        return held, lost if held['extra'] else lost + list(dict.fromkeys(name for name, _ in self.extra))


def read_image(path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS) -> ImageFile:
    """Read a PNG, JPEG, WebP, TIFF or BMP file of 1 to 16 bits, gray or colour, with or without transparency.

    EXIF orientation is applied. Palettes, CMYK and 1-bit images are converted to 8-bit RGB or gray.

    Raises:
        DataError: if the file cannot be read completely, is animated or unsupported, or has more than `max_pixels`,
            which is checked before decoding.
        MemoryShortage: if it does not fit in memory.
    """
    return decode_image(read_bytes(path), path, max_pixels=max_pixels)


def decode_image(data: bytes, path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS) -> ImageFile:
    """Decode the content of an image file like `read_image`; `path` is for messages. Thread-safe."""
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
        except Exception as error:  # on damaged files, decoders raise errors of any kind
            num_pixels = _count_plain_pixels(data) if kind == 'JPEG' and not out_of_memory(error) else None
            pixels = _decode_plainly(plain, cv2.IMREAD_UNCHANGED) if num_pixels and num_pixels <= max_pixels else None
            if pixels is None or pixels.shape[2:] not in ((), (3,)):
                raise
            metadata.notes.append(f'read by OpenCV, as Pillow does not support it ({one_line(error)})')
            return _make_image(pixels if pixels.ndim == 2 else pixels[..., ::-1], None, kind, False, metadata)
    except Exception as error:
        if out_of_memory(error) or not _has_memory(16 * math.prod(size)):
            raise MemoryShortage(f'{path}: {size[0]}x{size[1]} does not fit in memory') from error
        if isinstance(error, DataError):
            raise
        if isinstance(error, UnidentifiedImageError):
            raise DataError(
                f'{path}: damaged, or an unsupported kind of {kind}; save it again with 8 or 16 bits, gray or RGB'
            ) from error
        reason = one_line(error) if str(error) else 'its parts are inconsistent'  # assertions have no message
        raise DataError(f'{path}: the {kind} file is damaged: {reason}') from error


def read_rgb(path: str | os.PathLike) -> np.ndarray:
    """Read an image as upright RGB [H, W, 3], uint8 or uint16, without transparency; raise errors like `read_image`."""
    return decode_rgb(read_bytes(path), path)


def decode_rgb(data: bytes | memoryview, path: str | os.PathLike) -> np.ndarray:
    """Decode the content of an image file like `read_rgb`; `path` is for messages."""
    # OpenCV decodes PNG and JPEG directly, for the throughput required by training.
    num_pixels = _count_plain_pixels(data)
    if num_pixels is not None and num_pixels <= MAX_PIXELS:
        pixels = _decode_plainly(data, _IMREAD_RGB | cv2.IMREAD_ANYDEPTH)
        if pixels is not None:
            return pixels if _DECODES_TO_RGB else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    # The general reader handles all other files, and reports what is wrong with damaged ones.
    color = decode_image(bytes(data), path, max_pixels=MAX_PIXELS).color
    return np.repeat(color[..., None], 3, axis=2) if color.ndim == 2 else color


def open_image(path: str | os.PathLike) -> io.FileIO:
    """Open a regular file; raise OSError for pipes and devices, which would block or never end."""

    def open_at_once(path: str, flags: int) -> int:
        return os.open(path, flags | getattr(os, 'O_NONBLOCK', 0))

    file = open(path, 'rb', buffering=0, opener=open_at_once)  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, 'a pipe or device, expected a file', os.fspath(path))


def read_bytes(path: str | os.PathLike) -> bytes:
    """Read a complete file; raise DataError with its name if that fails."""
    try:
        with open_image(path) as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise DataError(f'{path}: cannot be read: {getattr(error, "strerror", None) or error}') from error


def write_image(path: str | os.PathLike, image: ImageFile) -> None:
    """Write an image atomically to an existing folder, encoded by `encode_image`; raise FileError if that fails."""
    write_file(path, encode_image(path, image))


def downscale(image: np.ndarray, shorter_side: int) -> np.ndarray:
    """Downscale an image by averaging to a shorter side in pixels; a smaller image is returned as it is."""
    scale = shorter_side / min(image.shape[:2])
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else image


def encode_image(path: str | os.PathLike, image: ImageFile, *, quality: int = 95) -> bytes:
    """Encode an image in the format of the file extension.

    PNG and TIFF support every image. WebP is lossless if the source was. Metadata that the format does not support are
    dropped, see `ImageFile.metadata`.

    Args:
        path: the file.
        image: pixels and metadata.
        quality: quality of JPEG and lossy WebP, in [1, 100].
    Raises:
        DataError: if the format does not support the image.
    """
    kind = format_of_name(path)
    try:
        return _encode(image, kind, quality)
    except (OSError, ValueError, struct.error, cv2.error) as error:
        raise DataError(f'{path}: this image cannot be written as {kind}: {error}') from error


def format_of_name(path: str | os.PathLike) -> str:
    """Return the format of a file extension, a key of `SUFFIXES`; raise DataError if it is unsupported."""
    try:
        return FORMAT_OF[Path(path).suffix.lower()]
    except KeyError:
        raise DataError(f'{path}: expected a name that ends in one of {", ".join(FORMAT_OF)}') from None


def sniff_format(data: bytes) -> str | None:
    """Return the format of a file, a key of `SUFFIXES`, from its first 16 bytes, or None if it is unsupported."""
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
    """Return why a file in a folder is ignored, in words common to files of its kind, or None if it is an image."""
    name = os.path.basename(path)
    ending = os.path.splitext(name)[1].lower()
    if name.startswith('.'):
        return 'hidden'
    if ending in FORMAT_OF:
        return None
    kind = None
    with contextlib.suppress(OSError), open_image(path) as file:
        kind = sniff_format(file.read(16))
    return f'{kind} {f"named {ending}" if ending else "without extension"}' if kind else ending or 'without extension'


def count_reasons(reasons: Counter[str]) -> str:
    """Format counts of `why_no_image` as one line: `2 .heic, 1 PNG without extension`."""
    return ', '.join(f'{count:,} {reason}' for reason, count in reasons.most_common())


def check_size(path: str | os.PathLike, width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise DataError if an image has more than `max_pixels`."""
    if width * height > max_pixels:
        raise DataError(
            f'{path}: {width}x{height} is {width * height / 1e6:.0f} million pixels, more than the '
            f'{max_pixels / 1e6:.0f} million allowed; scale it down, or, if you trust the file, raise '
            '--max-megapixels where the command has it'
        )


def find_jpeg_frame(data: bytes) -> tuple[int, int, int, int, int | None] | None:
    """Return marker, height, width and channels of a JPEG's frame, and the start of its scan or None."""
    frame = None
    for marker, start, _ in jpeg_segments(data):
        if marker == JPEG_SCAN:
            return frame and (*frame, start)
        if marker in _JPEG_FRAMES and frame is None and start + 10 <= len(data):
            frame = (marker, *struct.unpack_from('>HHB', data, start + 5))
    return frame and (*frame, None)


def _count_plain_pixels(data: bytes | memoryview) -> int | None:
    """Return height * width of a complete PNG that is not animated, or of a gray or RGB JPEG; None for all other files.

    OpenCV reads these files fast and correctly. Of truncated files it may return the first rows without an error.
    """
    kind = sniff_format(bytes(data[:16]))
    if kind == 'PNG':
        names = {name for name, _, _ in png_chunks(data)}
        is_whole = data[12:16] == b'IHDR' and b'IEND' in names and b'acTL' not in names
        return math.prod(struct.unpack_from('>II', data, 16)) if is_whole else None
    data = bytes(data)
    if kind == 'JPEG' and (frame := find_jpeg_frame(data)):
        marker, height, width, channels, scan = frame
        # Search for the end marker after the header, as thumbnails in the header have end markers too.
        is_whole = scan is not None and data.rfind(_JPEG_END, scan) >= 0
        if is_whole and marker in _JPEG_PLAIN_FRAMES and channels in (1, 3):
            return height * width
    return None


class _PillowWithoutLimits:
    """Context that disables Pillow's pixel limit and warnings, which are process-wide, while any thread is inside.

    `check_size` replaces the limit; damaged metadata are dropped without a warning. The lock is not held inside, since
    a process forked meanwhile would wait for it forever.
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
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None


def _has_memory(num_bytes: int) -> bool:
    """Return whether `num_bytes` can be allocated: decoders report exhausted memory like damage."""
    try:
        np.empty(num_bytes, np.uint8)
    except MemoryError:
        return False
    return True


def _make_image(
    color: np.ndarray, alpha: np.ndarray | None, kind: str, lossless: bool, metadata: Metadata
) -> ImageFile:
    """Create an ImageFile from decoded pixels, applying the orientation."""
    metadata.finish()
    # TIFF decoders apply the orientation themselves.
    orientation = metadata.orientation if kind != 'TIFF' and metadata.orientation in range(2, 9) else 1
    turn = (orientation - 1) % 4
    rows, columns = -1 if turn >= 2 else 1, -1 if turn in (1, 2) else 1
    parts = (part if part is None or orientation < 5 else part.swapaxes(0, 1) for part in (color, alpha))
    color, alpha = (None if part is None else np.ascontiguousarray(part[::rows, ::columns]) for part in parts)
    more = {'extra': tuple(metadata.extra), 'notes': tuple(metadata.notes)}
    return ImageFile(color, alpha, kind, lossless, **metadata.values, **more)


def _decode(path: str | os.PathLike, data: bytes, kind: str, image: Image.Image, metadata: Metadata) -> ImageFile:
    """Decode the file left by `take_apart`, and add the metadata."""
    frames = getattr(image, 'n_frames', 1)
    if frames > 1:
        raise DataError(
            f'{path}: holds {frames} frames or pages; animations are not supported, save the frames as separate images'
        )
    bits = 8
    if kind == 'TIFF':
        bits = max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
        _check_strips(path, image)
        if 0 in image.tag_v2.get(_EXTRA_SAMPLES, ()):
            metadata.notes.append('a channel of unspecified meaning, which is not transparency, is dropped')
    if kind == 'PNG':
        bits = data[24]
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
            if not (image.palette and image.palette.palette):  # if it is empty, Pillow leaves the image black
                raise ValueError('it has no palette')
            metadata.notes.append('written in RGB instead of a palette')
        if image.mode == 'CMYK':
            metadata.notes.append('converted from CMYK to RGB')
            image = _convert_cmyk(image, metadata.values.pop('icc_profile', None))
        color, alpha = _split_alpha(path, image)
    lossless = kind != 'JPEG' and (kind != 'WEBP' or _is_lossless_webp(data))
    return _make_image(color, alpha, kind, lossless, metadata)


def _split_alpha(path: str | os.PathLike, image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """Return gray or RGB, and opacity or None, of an image of at most 8 bits."""
    gray = image.mode in ('1', 'L', 'LA')
    if image.mode not in ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'RGBa', 'RGBX', 'YCbCr'):
        raise DataError(
            f'{path}: pixels of mode {image.mode} are not supported; save it with 8 or 16 bits, gray or RGB'
        )
    if image.has_transparency_data:
        pixels = np.asarray(image.convert('RGBA'))
        return pixels[..., 0] if gray else pixels[..., :3], pixels[..., 3]
    return np.asarray(image.convert('L' if gray else 'RGB')), None


def _check_strips(path: str | os.PathLike, image: Image.Image) -> None:
    """Raise DataError if strips or tiles are missing; Pillow would leave their pixels black."""
    count = sum((right - left) * (bottom - top) for left, top, right, bottom in (tile.extents for tile in image.tile))
    planes = len(image.getbands()) if len(image.tile) > 1 and image.tag_v2.get(_PLANAR, 1) == 2 else 1
    width, height = image.size
    if count < width * height * planes:
        raise DataError(f'{path}: damaged: strips or tiles are missing; got {count} of {width}x{height} pixels')


def _check_rows(path: str | os.PathLike, data: bytes) -> None:
    """Raise DataError if rows of a PNG are missing; if its compressed data end regularly, Pillow leaves them black."""
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
    """Return gray or RGB, and opacity or None, of 16 bits; Pillow validates the file, OpenCV preserves the depth."""
    if kind == 'TIFF' and (image.tag_v2.get(_PLANAR, 1) != 1 or image.mode not in ('I;16', 'I;16B', 'RGB', 'RGBA')):
        raise DataError(f'{path}: this layout of a 16-bit TIFF is not supported; save it as interleaved gray or RGB')
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        raise DataError(f'{path}: this kind of 16-bit {kind} is not supported; save it again in gray or RGB')
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
    if kind == 'TIFF' and alpha is not None and image.tag_v2.get(_EXTRA_SAMPLES) == (1,):  # premultiplied alpha
        opacity = np.maximum(alpha, 1)[..., None].astype(np.uint32)
        color = np.minimum((color.astype(np.uint32) * 65535 + opacity // 2) // opacity, 65535).astype(np.uint16)
    return color, alpha


def _convert_cmyk(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert CMYK to sRGB, using its embedded profile if valid."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile('sRGB'), outputMode='RGB')
        except (ImageCms.PyCMSError, OSError):
            pass  # damaged profile: use the plain conversion
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
        raise ValueError(f'{kind} supports 8 bits only, the image has 16; use PNG or TIFF')
    if kind == 'JPEG' and image.alpha is not None:
        raise ValueError('JPEG does not support transparency, which the image has; use PNG, WebP or TIFF')
    if kind == 'TIFF':
        return _encode_tiff(channels, metadata)
    if kind in ('WEBP', 'BMP') and channels.shape[2] == 2:
        channels = channels[..., [0, 0, 0, 1]]
    if kind == 'BMP' and channels.shape[2] == 4:
        # Pillow does not mark the fourth channel of BMP as alpha.
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
    # PNG filter 1 (Sub): difference to the byte of the pixel on the left.
    filtered = np.empty((height, 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = 1
    filtered[:, 1:] = rows
    filtered[:, 1 + count * 2 :] -= rows[:, : -count * 2]
    header = struct.pack('>IIBBBBB', width, height, 16, _PNG_COLOR_TYPES[count], 0, 0, 0)
    chunks = {b'IHDR': header, b'IDAT': zlib.compress(filtered, 6), b'IEND': b''}
    return _PNG_START + b''.join(map(png_chunk, chunks, chunks.values()))


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
