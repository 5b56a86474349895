"""What the bytes of a picture file say of it before anything decodes them."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

_PNG_END = b'IEND\xaeB`\x82'
_JPEG_END = b'\xff\xd9'
_JPEG_SCAN = 0xDA
_JPEG_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, as Huffman codes


def sniff_format(data: bytes) -> str | None:
    """Format of a file by its first bytes (16 are enough), a key of `image_files.SUFFIXES`, or None for any other."""
    if data.startswith(b'\x89PNG\r\n\x1a\n'):
        return 'PNG'
    if data.startswith(b'\xff\xd8\xff'):
        return 'JPEG'
    if data[:4] == b'RIFF' and data[8:12] == b'WEBP':
        return 'WEBP'
    if data[:4] in (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+'):
        return 'TIFF'
    return 'BMP' if data.startswith(b'BM') else None


def count_plain_pixels(data: bytes | memoryview) -> int | None:
    """Height times width of a PNG, or a gray or three-channel JPEG, that reaches its end; None for all other files.

    OpenCV reads these right and fast. Of files that were cut it may return the first rows without a word.
    """
    kind = sniff_format(bytes(data[:16]))
    if kind == 'PNG':
        return _count_png_pixels(data)
    return _count_jpeg_pixels(bytes(data)) if kind == 'JPEG' else None


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the marker and the place of each segment of a JPEG, up to the first scan, which is the last one."""
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # filling
            position += 1
            continue
        yield marker, position
        if marker == _JPEG_SCAN:
            return
        position += 2 + int.from_bytes(data[position + 2 : position + 4], 'big')


def jpeg_frame(data: bytes, position: int) -> tuple[int, int, int]:
    """Height, width and number of channels that the frame segment at a place states."""
    return struct.unpack_from('>HHB', data, position + 5)


def is_lossless_webp(data: bytes) -> bool:
    """Whether the picture in a WebP file was compressed without loss."""
    position = 12
    while position + 8 <= len(data):
        if data[position : position + 4] in (b'VP8L', b'VP8 '):
            return data[position : position + 4] == b'VP8L'
        size = int.from_bytes(data[position + 4 : position + 8], 'little')
        position += 8 + size + size % 2
    return False


def _count_png_pixels(data: bytes | memoryview) -> int | None:
    if len(data) < 24 or not (bytes(data[-len(_PNG_END) :]) == _PNG_END or _PNG_END in bytes(data)):
        return None
    return math.prod(struct.unpack_from('>II', data, 16))


def _count_jpeg_pixels(data: bytes) -> int | None:
    pixels = None
    for marker, position in jpeg_segments(data):
        if marker in _JPEG_PLAIN_FRAMES:
            height, width, channels = jpeg_frame(data, position)
            if channels not in (1, 3):
                return None
            pixels = max(pixels or 0, height * width)
        # The end is looked for behind the header, since thumbnails in it have ends of their own.
        if marker == _JPEG_SCAN and data.rfind(_JPEG_END, position) >= 0:
            return pixels
    return None
