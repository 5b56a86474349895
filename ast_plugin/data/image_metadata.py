"""The metadata of image files, beside their pixels: PNG and JPEG are taken apart, so that a decoder sees pixels alone.

Metadata go from file to file as they are: EXIF data, which are those of a TIFF without pixels, the colour profile, XMP
and the resolution into every format that holds them, chunks of PNG and segments of JPEG into files of their own format.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

JPEG_SCAN = 0xDA
_PNG_PIXELS = (b'tRNS', b'acTL', b'fcTL')  # beside those with a capital: transparency, and frames
_PNG_UNSAFE = (b'gAMA', b'cHRM', b'sRGB', b'cICP', b'mDCV', b'cLLI', b'mDCv', b'cLLi')  # of the colours, which stay
_PNG_XMP = b'XML:com.adobe.xmp\0'
EXIF_PREFIX, _XMP_PREFIX = b'Exif\0\0', b'http://ns.adobe.com/xap/1.0/\0'
_JPEG_EXTRA = {  # segments that are kept as they are, by marker and beginning
    (0xE1, b'http://ns.adobe.com/xmp/extension/\0'): 'extended XMP',
    (0xED, b'Photoshop 3.0\0'): 'IPTC data',
    (0xFE, b''): 'the comment',
}
_JPEG_MOST = 65533  # bytes in a segment
_MOST_METADATA = 2**26  # bytes of a colour profile or XMP that are unpacked
_ORIENTATION_TAG = 0x0112
_XMP_TAG, _ICC_TAG, _EXIF_TAG, _GPS_TAG, _INTEROP_TAG, _LAYERS_TAG = 700, 34675, 34665, 34853, 40965, 37724
# Tags of TIFF on how its pixels are stored, or which have a place of their own here; all others are kept.
_STRUCTURE = {*range(254, 260), *range(262, 269), 273, 274, *range(277, 285), 288, 289, 290, 291, 292, 293, 296, 317}
_STRUCTURE |= {*range(320, 326), 330, *range(332, 337), *range(338, 348), *range(512, 522), *range(529, 533)}
_STRUCTURE |= {_XMP_TAG, _ICC_TAG, _EXIF_TAG, _GPS_TAG, _LAYERS_TAG}
HOLDERS = {  # how a message calls them, and the formats that hold them
    'icc_profile': ('the colour profile', ('PNG', 'JPEG', 'WEBP', 'TIFF')),
    'exif': ('EXIF data', ('PNG', 'JPEG', 'WEBP', 'TIFF')),
    'xmp': ('XMP', ('PNG', 'JPEG', 'WEBP', 'TIFF')),
    'dpi': ('the resolution', ('PNG', 'JPEG', 'TIFF', 'BMP')),
}
_JPEG_ROOM = {'exif': _JPEG_MOST - len(EXIF_PREFIX), 'xmp': _JPEG_MOST - len(_XMP_PREFIX)}


def split_metadata(given: dict[str, Any], kind: str) -> tuple[dict[str, Any], list[str]]:
    """Return those of some metadata, by attribute of `ImageFile`, that a format holds, and the names of the others."""
    held = {key: value for key, value in given.items() if value and kind in HOLDERS[key][1]}
    if kind == 'JPEG':
        held = {key: value for key, value in held.items() if len(value) <= _JPEG_ROOM.get(key, len(value))}
    if kind == 'TIFF' and 'exif' in held and not _copy_tags(held['exif']):
        del held['exif']
    return held, [HOLDERS[key][0] for key, value in given.items() if value and key not in held]


def take_apart(data: bytes, kind: str) -> tuple[bytes, dict[str, Any], list[str]]:
    """Separate a PNG or JPEG into a file of the pixels alone, and its metadata by attribute, `orientation` among them.

    Metadata that cannot be kept go into the notes. Other formats are returned as they are.
    """
    if kind not in ('PNG', 'JPEG'):
        return data, {}, []
    found: dict[str, Any] = {'extra': []}
    lost: list[str] = []
    notes: list[str] = []
    kept, position = [data[: 8 if kind == 'PNG' else 2]], 8 if kind == 'PNG' else 2
    if kind == 'PNG':
        for name, position, end in png_chunks(data):
            is_whole = zlib.crc32(data[position + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], 'big')
            if name == b'tRNS':
                is_whole &= end - position - 12 == {0: 2, 2: 6}.get(data[25], end - position - 12)
            if not name[0] & 32 or (name in _PNG_PIXELS and is_whole):
                kept.append(data[position:end])
            elif not is_whole:
                lost.append(f'{name.decode("latin-1")}, which is damaged')
            elif name != b'iDOT':  # offsets of rows
                _take_chunk(name, data[position:end], found, lost)
            position = end if name != b'IEND' else len(data)
        if data[position + 4 : position + 8] == b'IDAT':
            raise EOFError('it is truncated')
        if position < len(data):  # cut behind its pixels, perhaps
            kept.append(png_chunk(b'IEND', b''))
            position = len(data)
    else:
        profile: dict[int, bytes] = {}
        for marker, start, end in jpeg_segments(data):
            position = start
            if marker == JPEG_SCAN:
                break
            body = data[start + 4 : end]
            if marker in (0xE0, 0xEE) or not (0xE1 <= marker <= 0xEF or marker == 0xFE):
                kept.append(data[start:end])  # JFIF and Adobe tell of the pixels
            elif marker == 0xE2 and body.startswith(b'MPF\0'):
                notes.append('the file holds several images, only the first is used')
            elif marker == 0xE2 and body.startswith(b'ICC_PROFILE\0'):
                profile[body[12] if len(body) > 12 else 0] = body[14:]
            else:
                _take_segment(marker, data[start:end], found, lost)
            position = end
        found |= {'icc_profile': b''.join(profile[number] for number in sorted(profile))} if profile else {}
    kept.append(data[position:])
    if 'exif' in found:
        try:
            found['exif'], found['orientation'] = _make_upright(found['exif'])
        except (struct.error, LookupError):
            del found['exif']
            lost.append('EXIF data, which are damaged')
    found['extra'] = tuple(found['extra'])
    return b''.join(kept), found, notes + _lines_on_lost(lost)


def _lines_on_lost(names: Sequence[str]) -> list[str]:
    return [f'not kept: {", ".join(dict.fromkeys(names))}'] if names else []


def png_chunks(data: bytes | memoryview) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and end of each whole chunk of a PNG."""
    position = 8
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], 'big')
        if end > len(data):
            return
        yield bytes(data[position + 4 : position + 8]), position, end
        position = end


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of each segment of a JPEG's header, that of its first scan as the last one."""
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


def _take_chunk(name: bytes, chunk: bytes, found: dict[str, Any], lost: list[str]) -> None:
    """Sort the metadata in a chunk of a PNG into those found and the names of those lost."""
    body = chunk[8:-4]
    if name == b'eXIf':
        found['exif'] = body.removeprefix(EXIF_PREFIX)
    elif name == b'iCCP':
        profile = _inflate(body.partition(b'\0')[2][1:])
        found |= {'icc_profile': profile} if profile else {}
        lost += [] if profile else ['the colour profile, which is damaged']
    elif name == b'iTXt' and body.startswith(_PNG_XMP) and len(body) > 20:
        text = body[20:].split(b'\0', 2)[-1]
        xmp = _inflate(text) if body[18] else text
        found |= {'xmp': xmp} if xmp else {}
        lost += [] if xmp else ['XMP, which is damaged']
    elif name == b'pHYs' and len(body) == 9 and body[8] == 1:
        dpi = tuple(dots * 0.0254 for dots in struct.unpack('>II', body[:8]))
        found |= {'dpi': dpi} if is_resolution(dpi) else {}
    elif name in _PNG_UNSAFE or name[3] & 32:
        found['extra'].append((name.decode('latin-1'), chunk))
    else:
        lost.append(name.decode('latin-1'))  # by its name unsafe to copy where pixels change


def _take_segment(marker: int, segment: bytes, found: dict[str, Any], lost: list[str]) -> None:
    """Sort the metadata in a segment of a JPEG into those found and the names of those lost."""
    body = segment[4:]
    if marker == 0xE1 and body.startswith(b'Exif\0'):
        found['exif'] = found.get('exif', b'') + body[len(EXIF_PREFIX) :]
    elif marker == 0xE1 and body.startswith(_XMP_PREFIX):
        found['xmp'] = body[len(_XMP_PREFIX) :]
    else:
        names = (name for (known, start), name in _JPEG_EXTRA.items() if marker == known and body.startswith(start))
        name = next(names, None)
        if name:
            found['extra'].append((name, segment))
        else:
            lost.append(f'APP{marker - 0xE0} {body[:16].partition(bytes(1))[0].decode("ascii", "ignore")}'.strip())


def _inflate(data: bytes) -> bytes | None:
    """Decompress metadata; None if they are damaged or too many."""
    try:
        inflater = zlib.decompressobj()
        plain = inflater.decompress(data, _MOST_METADATA)
        return plain if inflater.eof else None
    except zlib.error:
        return None


def _make_upright(exif: bytes) -> tuple[bytes, int]:
    """EXIF data with orientation 1 and no link to a thumbnail, everything else in its place; and the orientation."""
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
    """Copy the tags of a TIFF file or of EXIF data, but those on pixels, to a directory; None if they are damaged."""
    directory = ImageFileDirectory_v2() if directory is None else directory
    try:
        tags, exif = _read_directory(file), Image.Exif()
        if {_EXIF_TAG, _GPS_TAG} & set(tags):
            exif.load(file)
        for tag in set(tags) - _STRUCTURE:
            directory.tagtype[tag] = tags.tagtype[tag]
            value = tags[tag]  # text in its bytes: written as text it would lose its accents
            directory[tag] = value.encode('latin-1', 'replace') if isinstance(value, str) else value
        for tag in {_EXIF_TAG, _GPS_TAG} & set(tags):
            directory[tag] = {key: value for key, value in exif.get_ifd(tag).items() if key != _INTEROP_TAG}
        directory.tobytes()
    except Exception:  # as of decoders
        return None
    return directory


def is_resolution(value: Any) -> bool:
    """Whether two numbers in the range that every format holds: tags may have any kind and value."""
    try:
        return len(value) == 2 and all(1 <= float(dots) <= 65535 for dots in value)
    except (TypeError, ValueError, ArithmeticError):
        return False


def take_other_metadata(data: bytes, image: Image.Image, kind: str) -> tuple[dict[str, Any], list[str]]:
    """The metadata of a WebP, TIFF or BMP by attribute, `orientation` among them, and notes on those not kept."""
    found: dict[str, Any] = {
        key: image.info[key] for key in ('icc_profile', 'xmp') if isinstance(image.info.get(key), bytes)
    }
    if is_resolution(image.info.get('dpi')):
        found['dpi'] = image.info['dpi']
    if kind == 'TIFF':
        image.info.pop('xmp', None)  # Pillow would look for an orientation there
        found['orientation'] = image.tag_v2.get(_ORIENTATION_TAG, 1)
        tags = _copy_tags(data)
        if tags:
            found['exif'] = b'II*\0\x08\0\0\0' + tags.tobytes(8)
        lost = (['layers'] if _LAYERS_TAG in image.tag_v2 else []) + (
            ['its tags, which are damaged'] if tags is None else []
        )
        return found, _lines_on_lost(lost)
    try:
        if image.info.get('exif'):
            found['exif'], found['orientation'] = _make_upright(image.info['exif'].removeprefix(EXIF_PREFIX))
    except (struct.error, LookupError):
        return found, ['not kept: EXIF data, which are damaged']
    return found, []


def png_metadata(metadata: dict[str, Any]) -> bytes:
    """The chunks that stand behind the first one of a PNG."""
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
    """Return a chunk of a PNG."""
    return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))


def add_tags(data: bytes, metadata: dict[str, Any]) -> bytes:
    """Put EXIF data and XMP into a little-endian TIFF file."""
    directory = _read_directory(data)
    if 'exif' in metadata:
        _copy_tags(metadata['exif'], directory)
    if 'xmp' in metadata:
        directory.tagtype[_XMP_TAG] = 1
        directory[_XMP_TAG] = metadata['xmp']
    # Pillow takes it that the pixels follow the tags; the file, with its pixels where it has them, does.
    return data[:4] + struct.pack('<L', 8) + directory.tobytes(8) + data


def _read_directory(data: bytes) -> ImageFileDirectory_v2:
    """The first tags of a TIFF file or EXIF data."""
    directory = ImageFileDirectory_v2(data[: 16 if data[2] == 43 else 8])  # a BigTIFF's offsets have 8 bytes
    stream = io.BytesIO(data)
    stream.seek(directory.next)
    directory.load(stream)
    dict(directory)  # it reads its values when they are asked for, and writes those that it has read
    return directory
