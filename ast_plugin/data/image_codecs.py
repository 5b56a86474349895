"""Encoding pictures, down to what neither Pillow nor OpenCV writes: 16 bits together with profile and gray alpha."""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from ast_plugin.data.image_files import Picture

_PNG_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # by number of channels
_EXIF_PREFIX = b'Exif\0\0'


def encode_picture(picture: Picture, kind: str, quality: int) -> bytes:
    """The bytes of a file of format `kind` that holds the picture with its metadata.

    Raises:
        ValueError: if the format cannot hold it.
    """
    if picture.color.dtype == np.uint16:
        if kind not in ('PNG', 'TIFF'):
            raise ValueError(f'{kind} holds 8 bits, the picture has 16; PNG and TIFF hold it')
        return _encode_png_16_bits(picture) if kind == 'PNG' else _encode_tiff_16_bits(picture)
    if kind == 'JPEG' and picture.alpha is not None:
        raise ValueError('JPEG has no transparency, the picture has; PNG, WebP and TIFF hold it')
    channels = stack_channels(picture)
    if kind in ('WEBP', 'BMP') and channels.shape[2] == 2:
        channels = channels[..., [0, 0, 0, 1]]
    if kind == 'BMP' and channels.shape[2] == 4:
        # Pillow writes such files without saying that the fourth channel is alpha.
        return cv2.imencode('.bmp', cv2.cvtColor(channels, cv2.COLOR_RGBA2BGRA))[1].tobytes()
    output = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(channels.squeeze(2) if channels.shape[2] == 1 else channels))
    image.save(output, kind, **_save_options(picture, kind, quality))
    return output.getvalue()


def stack_channels(picture: Picture) -> np.ndarray:
    """Gray or RGB and alpha as one array, [H, W, 1 to 4]."""
    color = picture.color[..., None] if picture.is_gray else picture.color
    return color if picture.alpha is None else np.dstack([color, picture.alpha])


def _save_options(picture: Picture, kind: str, quality: int) -> dict:
    holds = {'BMP': ('dpi',), 'WEBP': ('icc_profile', 'exif'), 'TIFF': ('icc_profile', 'dpi')}
    kept = holds.get(kind, ('icc_profile', 'exif', 'dpi'))
    options = {name: getattr(picture, name) for name in kept if getattr(picture, name) is not None}
    if kind == 'JPEG':
        options |= {'quality': quality, 'subsampling': 0 if quality >= 90 else 2}
    elif kind == 'WEBP':
        options |= {'lossless': True, 'exact': True} if picture.lossless else {'quality': quality}
    elif kind == 'TIFF':
        options |= {'compression': 'tiff_adobe_deflate'}
    return options


def _encode_png_16_bits(picture: Picture) -> bytes:
    channels = stack_channels(picture)
    height, width, count = channels.shape
    rows = channels.astype('>u2').view(np.uint8).reshape(height, width * count * 2)
    # Filter 1 of PNG: each byte less the one of the pixel to the left.
    filtered = np.empty((height, 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = 1
    filtered[:, 1:] = rows
    filtered[:, 1 + count * 2 :] -= rows[:, : -count * 2]
    chunks = [(b'IHDR', struct.pack('>IIBBBBB', width, height, 16, _PNG_COLOR_TYPES[count], 0, 0, 0))]
    if picture.icc_profile:
        chunks.append((b'iCCP', b'ICC profile\0\0' + zlib.compress(picture.icc_profile)))
    if picture.exif:
        chunks.append((b'eXIf', picture.exif.removeprefix(_EXIF_PREFIX)))
    if picture.dpi:
        chunks.append((b'pHYs', struct.pack('>IIB', *(round(float(dots) / 0.0254) for dots in picture.dpi), 1)))
    chunks += [(b'IDAT', zlib.compress(filtered, 6)), (b'IEND', b'')]
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body)) for name, body in chunks
    )


def _encode_tiff_16_bits(picture: Picture) -> bytes:
    import tifffile

    output = io.BytesIO()
    channels = stack_channels(picture)
    tifffile.imwrite(
        output,
        channels.squeeze(2) if channels.shape[2] == 1 else channels,
        photometric='minisblack' if picture.is_gray else 'rgb',
        planarconfig='contig',
        metadata=None,
        extrasamples=None if picture.alpha is None else ['unassalpha'],
        compression='zlib',
        predictor=True,
        iccprofile=picture.icc_profile,
        resolution=picture.dpi and tuple(map(float, picture.dpi)),
        resolutionunit='INCH' if picture.dpi else None,
    )
    return output.getvalue()
