"""Metadata of image files: PNG and JPEG are split into pixels and metadata, so that decoders see only the pixels.

Metadata are copied unchanged from file to file. EXIF data (in the format of a TIFF without pixels), colour profile, XMP
and resolution are copied to every format that supports them; PNG chunks and JPEG segments only within their format.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

JPEG_SCAN = 0xDA
# Ancillary chunks passed to Pillow in addition to the critical ones: transparency, frames and resolution.
_PNG_KEPT = (b'tRNS', b'acTL', b'fcTL', b'pHYs')
_PNG_UNSAFE = (b'gAMA', b'cHRM', b'sRGB', b'cICP', b'mDCV', b'cLLI', b'mDCv', b'cLLi')  # colour space, which is kept
_PNG_XMP = b'XML:com.adobe.xmp\0'
EXIF_PREFIX, _XMP_PREFIX = b'Exif\0\0', b'http://ns.adobe.com/xap/1.0/\0'
_XMP_ORIENTATION = re.compile(rb'(tiff:Orientation(?:>|=["\']))[2-8]')
_JPEG_EXTRA = (  # segments copied unchanged: marker, prefix, name
    (0xE1, b'http://ns.adobe.com/xmp/extension/\0', 'extended XMP'),
    (0xED, b'Photoshop 3.0\0', 'IPTC data'),
    (0xFE, b'', 'the comment'),
)
_JPEG_MOST = 65533  # maximum bytes in a segment
_MOST_METADATA = 2**26  # maximum decompressed bytes of a colour profile or XMP
_ORIENTATION_TAG = 0x0112
_XMP_TAG, _ICC_TAG, _EXIF_TAG, _GPS_TAG, _INTEROP_TAG, _LAYERS_TAG = 700, 34675, 34665, 34853, 40965, 37724
# TIFF tags that describe the storage of pixels, or that are handled separately here; all others are kept.
_STRUCTURE = {*range(254, 260), *range(262, 269), 273, 274, *range(277, 285), 288, 289, 290, 291, 292, 293, 296, 317}
_STRUCTURE |= {*range(320, 326), 330, *range(332, 337), *range(338, 348), *range(512, 522), *range(529, 533)}
_STRUCTURE |= {_XMP_TAG, _ICC_TAG, _EXIF_TAG, _GPS_TAG, _LAYERS_TAG}
HOLDERS = {  # name in messages, and supporting formats
    'icc_profile': ('the colour profile', ('PNG', 'JPEG', 'WEBP', 'TIFF')),
    'exif': ('EXIF data', ('PNG', 'JPEG', 'WEBP', 'TIFF')),
    'xmp': ('XMP', ('PNG', 'JPEG', 'WEBP', 'TIFF')),
    'dpi': ('the resolution', ('PNG', 'JPEG', 'TIFF', 'BMP')),
}
_JPEG_ROOM = {'exif': _JPEG_MOST - len(EXIF_PREFIX), 'xmp': _JPEG_MOST - len(_XMP_PREFIX)}


@dataclass
class Metadata:
    """Metadata of a file."""

    values: dict[str, Any] = field(default_factory=dict)  # by attribute of `ImageFile`
    extra: list[tuple[str, bytes]] = field(default_factory=list)  # specific to the format
    orientation: int = 1  # of the pixels, as in EXIF
    lost: list[str] = field(default_factory=list)  # names of metadata that cannot be kept
    notes: list[str] = field(default_factory=list)  # further messages

    def take(self, key: str, value: Any) -> None:
        """Store a value, or record it as damaged if it is None or empty."""
        if value:
            self.values[key] = value
        else:
            self.lost.append(f'{HOLDERS[key][0]}, damaged')

    def finish(self) -> None:
        """Set the orientation in EXIF and XMP to upright, so that viewers do not rotate again; note what is lost."""
        if 'exif' in self.values:
            try:
                exif, orientation = _make_upright(self.values.pop('exif'))
            except (struct.error, LookupError):
                exif, orientation = None, 1
            self.take('exif', exif)
            self.orientation = orientation if orientation != 1 else self.orientation
        if self.orientation != 1 and 'xmp' in self.values:
            self.values['xmp'] = _XMP_ORIENTATION.sub(rb'\g<1>1', self.values['xmp'])
        if self.lost:
            self.notes.append(f'not kept: {", ".join(dict.fromkeys(self.lost))}')


def split_metadata(given: dict[str, Any], kind: str) -> tuple[dict[str, Any], list[str]]:
    """Return the metadata that a format supports, by attribute of `ImageFile`, and the names of all others."""
    held = {key: value for key, value in given.items() if value and kind in HOLDERS[key][1]}
    if kind == 'JPEG':
        held = {key: value for key, value in held.items() if len(value) <= _JPEG_ROOM.get(key, len(value))}
    if kind == 'TIFF' and 'exif' in held and not _copy_tags(held['exif']):
        del held['exif']
    return held, [HOLDERS[key][0] for key, value in given.items() if value and key not in held]


def take_apart(data: bytes, kind: str) -> tuple[bytes, Metadata]:
    """Split a PNG or JPEG into a file of only its pixels and its metadata; other formats are returned unchanged."""
    metadata = Metadata()
    if take := {'PNG': _take_chunks, 'JPEG': _take_segments}.get(kind):
        data = take(data, metadata)
    return data, metadata


def _take_chunks(data: bytes, metadata: Metadata) -> bytes:
    kept, position = [data[:8]], 8
    for name, position, end in png_chunks(data):
        chunk, body = data[position:end], data[position + 8 : end - 4]
        position = end if name != b'IEND' else len(data)
        is_whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], 'big')
        if name in (b'tRNS', b'pHYs'):
            is_whole &= len(body) == (9 if name == b'pHYs' else {0: 2, 2: 6}.get(data[25], len(body)))
        if not name[0] & 32 or (name in _PNG_KEPT and is_whole):
            kept.append(chunk)
        elif not is_whole:
            metadata.lost.append(f'{name.decode("latin-1")}, damaged')
        elif name == b'eXIf':
            metadata.take('exif', body.removeprefix(EXIF_PREFIX))
        elif name == b'iCCP':
            metadata.take('icc_profile', _inflate(body.partition(b'\0')[2][1:]))
        elif name == b'iTXt' and body.startswith(_PNG_XMP) and len(body) > 20:
            text = body[20:].split(b'\0', 2)[-1]
            metadata.take('xmp', _inflate(text) if body[18] else text)
        elif name in _PNG_UNSAFE or name[3] & 32:
            metadata.extra.append((name.decode('latin-1'), chunk))
        elif name != b'iDOT':  # row offsets
            metadata.lost.append(name.decode('latin-1'))  # marked as unsafe to copy if pixels change
    if data[position + 4 : position + 8] == b'IDAT':
        raise EOFError('it is truncated')
    if position < len(data):  # possibly truncated after the pixels
        kept.append(png_chunk(b'IEND', b''))
    return b''.join(kept)


def _take_segments(data: bytes, metadata: Metadata) -> bytes:
    kept, position, exif = [data[:2]], 2, b''
    profile: dict[int, bytes] = {}
    for marker, position, end in jpeg_segments(data):
        if marker == JPEG_SCAN:
            break
        segment, body, position = data[position:end], data[position + 4 : end], end
        titles = (title for known, start, title in _JPEG_EXTRA if marker == known and body.startswith(start))
        if title := next(titles, None):
            metadata.extra.append((title, segment))
        elif marker in (0xE0, 0xEE) or not 0xE1 <= marker <= 0xEF:
            kept.append(segment)  # JFIF and Adobe segments describe the pixels
        elif marker == 0xE1 and body.startswith(b'Exif\0'):
            exif += body[len(EXIF_PREFIX) :]
        elif marker == 0xE1 and body.startswith(_XMP_PREFIX):
            metadata.take('xmp', body[len(_XMP_PREFIX) :])
        elif marker == 0xE2 and body.startswith(b'ICC_PROFILE\0'):
            profile[body[12] if len(body) > 12 else 0] = body[14:]
        elif marker == 0xE2 and body.startswith(b'MPF\0'):
            metadata.notes.append('the file holds several images, only the first is used')
        else:
            name = body[:16].partition(b'\0')[0].decode('ascii', 'ignore')
            metadata.lost.append(f'APP{marker - 0xE0} {name}'.strip())
    if exif:
        metadata.take('exif', exif)
    if profile:
        metadata.take('icc_profile', b''.join(profile[number] for number in sorted(profile)))
    return b''.join([*kept, data[position:]])


def png_chunks(data: bytes | memoryview) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and end of each complete chunk of a PNG."""
    position = 8
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], 'big')
        if end > len(data):
            return
        yield bytes(data[position + 4 : position + 8]), position, end
        position = end


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of each segment in a JPEG header, up to and including its first scan."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # padding
            position += 1
            continue
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], 'big')
        yield marker, position, end
        if marker == JPEG_SCAN:
            return
        position = end


def _inflate(data: bytes) -> bytes | None:
    """Decompress metadata; return None if they are damaged or too large."""
    try:
        inflater = zlib.decompressobj()
        plain = inflater.decompress(data, _MOST_METADATA)
        return plain if inflater.eof else None
    except zlib.error:
        return None


def _make_upright(exif: bytes) -> tuple[bytes, int]:
    """Return EXIF data with orientation 1 and without thumbnail link, otherwise unchanged, and the old orientation."""
    order = {b'II': '<', b'MM': '>'}[exif[:2]]
    block, orientation = bytearray(exif), 1
    (start,) = struct.unpack_from(f'{order}L', block, 4)
    (count,) = struct.unpack_from(f'{order}H', block, start)
    end = start + 2 + 12 * count
    for entry in range(start + 2, end, 12):
        tag, kind = struct.unpack_from(f'{order}HH', block, entry)
        code = {3: 'H', 4: 'L'}.get(kind)
        if tag == _ORIENTATION_TAG and code:
            (orientation,) = struct.unpack_from(order + code, block, entry + 8)
            struct.pack_into(order + code, block, entry + 8, 1)
    if end + 4 <= len(block):
        struct.pack_into('4x', block, end)
    return bytes(block), orientation


def _copy_tags(file: bytes, directory: ImageFileDirectory_v2 | None = None) -> ImageFileDirectory_v2 | None:
    """Copy the non-pixel tags of a TIFF file or EXIF data to a directory; return None if they are damaged."""
    directory = ImageFileDirectory_v2() if directory is None else directory
    try:
        tags, exif = _read_directory(file), Image.Exif()
        if {_EXIF_TAG, _GPS_TAG} & set(tags):
            exif.load(file)
        for tag in set(tags) - _STRUCTURE:
            directory.tagtype[tag] = tags.tagtype[tag]
            value = tags[tag]  # write text as bytes, as Pillow would lose accents
            directory[tag] = value.encode('latin-1', 'replace') if isinstance(value, str) else value
        for tag in {_EXIF_TAG, _GPS_TAG} & set(tags):
            directory[tag] = {key: value for key, value in exif.get_ifd(tag).items() if key != _INTEROP_TAG}
        directory.tobytes()
    except Exception:  # on damaged data, the parser raises errors of any kind
        return None
    return directory


def is_resolution(value: Any) -> bool:
    """Return whether `value` is two numbers in the range of every format; damaged tags may have any type and value."""
    try:
        return len(value) == 2 and all(1 <= float(dots) <= 65535 for dots in value)
    except (TypeError, ValueError, ArithmeticError):
        return False


def take_other_metadata(data: bytes, image: Image.Image, kind: str, metadata: Metadata) -> None:
    """Take the metadata of a WebP, TIFF or BMP opened by Pillow."""
    for key in ('icc_profile', 'xmp'):
        if image.info.get(key) and isinstance(image.info[key], bytes):
            metadata.take(key, image.info[key])
    if kind == 'TIFF':
        image.info.pop('xmp', None)  # otherwise Pillow applies an orientation found there
        metadata.orientation = image.tag_v2.get(_ORIENTATION_TAG, 1)
        tags = _copy_tags(data)
        if tags:
            metadata.take('exif', b'II*\0\x08\0\0\0' + tags.tobytes(8))
        metadata.lost += ['layers'] if _LAYERS_TAG in image.tag_v2 else []
        metadata.lost += ['its tags, damaged'] if tags is None else []
    elif image.info.get('exif'):
        metadata.take('exif', image.info['exif'].removeprefix(EXIF_PREFIX))


def png_metadata(metadata: dict[str, Any]) -> bytes:
    """Return the chunks to insert after the first chunk of a PNG."""
    chunks = b''.join(chunk for _, chunk in metadata['extra'])
    if 'icc_profile' in metadata:
        chunks += png_chunk(b'iCCP', b'ICC profile\0\0' + zlib.compress(metadata['icc_profile']))
    if 'exif' in metadata:
        chunks += png_chunk(b'eXIf', metadata['exif'])
    if 'xmp' in metadata:
        chunks += png_chunk(b'iTXt', _PNG_XMP + bytes(4) + metadata['xmp'])
    if 'dpi' in metadata:
        chunks += png_chunk(b'pHYs', struct.pack('>IIB', *(round(float(dots) / 0.0254) for dots in metadata['dpi']), 1))
    return chunks


def png_chunk(name: bytes, body: bytes) -> bytes:
    """Return a PNG chunk."""
    return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))


def add_tags(data: bytes, metadata: dict[str, Any]) -> bytes:
    """Add EXIF data and XMP to a little-endian TIFF file."""
    directory = _read_directory(data)
    if 'exif' in metadata:
        _copy_tags(metadata['exif'], directory)
    if 'xmp' in metadata:
        directory.tagtype[_XMP_TAG] = 1
        directory[_XMP_TAG] = metadata['xmp']
    # Pillow shifts the pixel offsets to the end of the tags; appending the complete file there makes them valid.
    return data[:4] + struct.pack('<L', 8) + directory.tobytes(8) + data


def _read_directory(data: bytes) -> ImageFileDirectory_v2:
    """Read the first directory of a TIFF file or EXIF data."""
    directory = ImageFileDirectory_v2(data[: 16 if data[2] == 43 else 8])  # a BigTIFF's offsets have 8 bytes
    stream = io.BytesIO(data)
    stream.seek(directory.next)
    directory.load(stream)
    dict(directory)  # values are read lazily, and only values already read are written
    return directory
