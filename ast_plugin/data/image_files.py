"""Reading and writing picture files without losing depth, transparency, gray or profile.

Pillow reads everything of 8 bits and all metadata; OpenCV reads what has 16, which Pillow cannot hold in colour.
"""

import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from ast_plugin.data.image_codecs import encode_picture
from ast_plugin.data.image_headers import count_plain_pixels, is_lossless_webp, sniff_format
from ast_plugin.data.pillow_limits import PILLOW_UNLIMITED
from ast_plugin.errors import DataError
from ast_plugin.files import write_file

SUFFIXES = {
    'PNG': ('.png',),
    'JPEG': ('.jpg', '.jpeg', '.jpe', '.jfif'),
    'WEBP': ('.webp',),
    'TIFF': ('.tif', '.tiff'),
    'BMP': ('.bmp', '.dib'),
}
"""File name endings of every format that can be read and written; the first is the usual one."""

MAX_PIXELS = 200_000_000
"""Pictures that claim more pixels than this are refused, unless the reader is told otherwise."""

# OpenCV 4.10 and later swap no channels, which costs a pass over the picture.
_DECODES_TO_RGB = hasattr(cv2, 'IMREAD_COLOR_RGB')
_IMREAD_RGB = cv2.IMREAD_COLOR_RGB if _DECODES_TO_RGB else cv2.IMREAD_COLOR

_ORIENTATION_TAG = 0x0112
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANAR, _EXTRA_SAMPLES = 258, 262, 284, 338
# What decoders raise on damaged data: they index, unpack and convert what the file claims.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zlib.error,
    cv2.error,
)
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda array: array[:, ::-1],
    3: lambda array: array[::-1, ::-1],
    4: lambda array: array[::-1],
    5: lambda array: array.swapaxes(0, 1),
    6: lambda array: np.rot90(array, -1),
    7: lambda array: array.swapaxes(0, 1)[::-1, ::-1],
    8: lambda array: np.rot90(array),
}


@dataclass(frozen=True)
class Picture:
    """A picture as it is looked at, upright, with what its file said beside the pixels.

    Attributes:
        color: gray [H, W] or RGB [H, W, 3], uint8 or uint16.
        alpha: opacity [H, W] in the dtype of `color`, or None. Colours are not multiplied by it.
        format: a key of `SUFFIXES`.
        lossless: whether the file's compression kept every value.
        icc_profile: the colour profile that `color` is in, or None for sRGB.
        exif: EXIF data without orientation and thumbnail, as Pillow takes it, or None.
        dpi: resolution (across, down), or None.
        notes: lines on what could not be kept.
    """

    color: np.ndarray
    alpha: np.ndarray | None = None
    format: str = 'PNG'
    lossless: bool = True
    icc_profile: bytes | None = None
    exif: bytes | None = None
    dpi: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_gray(self) -> bool:
        """Whether the picture has one channel of brightness instead of three colours."""
        return self.color.ndim == 2


def read_image(path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read a PNG, JPEG, WebP, TIFF or BMP file of 1 to 16 bits, gray or colour, with or without transparency.

    EXIF orientation is applied; palettes, CMYK and single bits become RGB or gray of 8 bits.

    Args:
        path: the file.
        max_pixels: larger pictures are refused before their pixels are decoded.
    Raises:
        DataError: if the file cannot be read whole, is animated, too large, or of a kind that is not supported;
            the message names the file.
    """
    path = Path(path)
    return decode_image(_read_bytes(path), path, max_pixels=max_pixels)


def decode_image(data: bytes, path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Do the same with the content of a file, wherever it lies; `path` is for messages. Threads may do so at once."""
    path = Path(path)
    kind = sniff_format(data)
    if kind is None:
        raise DataError(f'{path}: not a PNG, JPEG, WebP, TIFF or BMP file' if data else f'{path}: the file is empty')
    try:
        with (
            PILLOW_UNLIMITED,
            Image.open(io.BytesIO(data), formats=[kind, 'MPO'] if kind == 'JPEG' else [kind]) as image,
        ):
            return _decode(path, data, kind, image, max_pixels)
    except UnidentifiedImageError as error:
        raise DataError(
            f'{path}: damaged, or a kind of {kind} that is not supported; save it anew with 8 or 16 bits in gray or RGB'
        ) from error
    except DataError:
        raise
    except _DECODE_ERRORS as error:
        raise DataError(f'{path}: the {kind} file is damaged: {error or type(error).__name__}') from error


def read_rgb(path: str | os.PathLike) -> np.ndarray:
    """Read a picture as RGB, upright, gray expanded and transparency dropped.

    Returns:
        [H, W, 3], uint8, or uint16 for a file of 16 bits.
    Raises:
        DataError: as `read_image`.
    """
    return decode_rgb(_read_bytes(path), path)


def decode_rgb(data: bytes | memoryview, path: str | os.PathLike) -> np.ndarray:
    """Do the same with the content of a file, wherever it lies; `path` is for messages.

    PNG and JPEG go straight through OpenCV, for the rate that training needs.
    """
    num_pixels = count_plain_pixels(data)
    if num_pixels is not None and num_pixels <= MAX_PIXELS:
        try:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _IMREAD_RGB | cv2.IMREAD_ANYDEPTH)
        except cv2.error:
            pixels = None
        if pixels is not None:
            return pixels if _DECODES_TO_RGB else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    # The thorough reader takes what is left, and says what is wrong with it.
    color = decode_image(bytes(data), path, max_pixels=MAX_PIXELS).color
    return np.repeat(color[..., None], 3, axis=2) if color.ndim == 2 else color


def write_image(path: str | os.PathLike, picture: Picture, *, quality: int = 95) -> None:
    """Write a picture in the format that the file's name ends with; the file appears whole or not at all.

    PNG and TIFF hold every picture. WebP is written without loss where the picture came without loss.

    Args:
        path: the file; its folder must exist. A file of that name is replaced.
        picture: what to write.
        quality: of JPEG and lossy WebP, in [1, 100].
    Raises:
        DataError: if the format cannot hold the picture, or the file cannot be written.
    """
    write_file(path, encode_image(path, picture, quality=quality))


def encode_image(path: str | os.PathLike, picture: Picture, *, quality: int = 95) -> bytes:
    """The bytes that `write_image` writes.

    Raises:
        DataError: if the format that the file's name ends with cannot hold the picture.
    """
    path = Path(path)
    kind = next((kind for kind, suffixes in SUFFIXES.items() if path.suffix.lower() in suffixes), None)
    if kind is None:
        raise DataError(
            f'{path}: expected a name that ends in one of '
            f'{", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)}'
        )
    try:
        return encode_picture(picture, kind, quality)
    except (OSError, ValueError, struct.error, cv2.error) as error:
        raise DataError(f'{path}: this picture cannot be written as {kind}: {error}') from error


def _read_bytes(path: str | os.PathLike) -> bytes:
    try:
        with open(path, 'rb', buffering=0) as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise DataError(f'{path}: cannot be read: {getattr(error, "strerror", None) or error}') from error


def _decode(path: Path, data: bytes, kind: str, image: Image.Image, max_pixels: int) -> Picture:
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(
            f'{path}: {width}x{height} is {width * height / 1e6:.0f} million pixels, more than the '
            f'{max_pixels / 1e6:.0f} million allowed; scale it down, or if you trust the file and the '
            'command has that, raise --max-megapixels'
        )
    frames = getattr(image, 'n_frames', 1)
    notes = []
    if frames > 1 and image.format == 'MPO':
        notes.append(f'the file holds {frames} pictures, only the first is used')
    elif frames > 1:
        raise DataError(
            f'{path}: holds {frames} frames or pages; animated files are not supported, '
            'save its frames as single pictures'
        )
    profile = image.info.get('icc_profile') or None
    bits = _bits(data, kind, image)
    image.load()
    if bits == 16 and image.mode != 'CMYK':
        color, alpha = _decode_16_bits(path, data, kind, image)
    else:
        if image.mode == '1':
            notes.append('written with 8 bits instead of 1')
        if image.mode == 'CMYK':
            notes.append('converted from CMYK to RGB')
            image, profile = _from_cmyk(image, profile), None
        color, alpha = _split_alpha(path, image)
    exif, orientation = _exif(image, kind)
    # Decoders of TIFF have applied the orientation already.
    upright = _UPRIGHT.get(1 if kind == 'TIFF' else orientation, lambda array: array)
    color, alpha = (None if part is None else np.ascontiguousarray(upright(part)) for part in (color, alpha))
    lossless = kind != 'JPEG' and (kind != 'WEBP' or is_lossless_webp(data))
    dpi = image.info.get('dpi') if kind != 'WEBP' else None
    return Picture(color, alpha, kind, lossless, profile, exif, dpi, tuple(notes))


def _bits(data: bytes, kind: str, image: Image.Image) -> int:
    """Bits of a sample, before decoding."""
    if kind == 'PNG':
        return data[24]
    if kind == 'TIFF':
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
    return 8


def _split_alpha(path: Path, image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """Gray or RGB, and opacity where the file has any, of a picture of at most 8 bits."""
    gray = image.mode in ('1', 'L', 'LA')
    if image.mode not in ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'RGBa', 'RGBX', 'YCbCr'):
        raise DataError(
            f'{path}: pixels of kind {image.mode} are not supported; save it with 8 or 16 bits in gray or RGB'
        )
    if image.has_transparency_data:
        pixels = np.asarray(image.convert('RGBA'))
        return pixels[..., 0] if gray else pixels[..., :3], pixels[..., 3]
    return np.asarray(image.convert('L' if gray else 'RGB')), None


def _decode_16_bits(path: Path, data: bytes, kind: str, image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """The same for 16 bits; Pillow has opened and checked the file, OpenCV keeps its depth."""
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
    if kind == 'PNG' and data[25] == 4:
        color = color[..., 0]
    if kind == 'TIFF' and alpha is not None and image.tag_v2.get(_EXTRA_SAMPLES) == (1,):
        opacity = np.maximum(alpha, 1)[..., None].astype(np.uint32)
        color = np.minimum((color.astype(np.uint32) * 65535 + opacity // 2) // opacity, 65535).astype(np.uint16)
    return color, alpha


def _from_cmyk(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB of a CMYK picture, in sRGB through its own profile where it has a usable one."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile('sRGB'), outputMode='RGB')
        except (ImageCms.PyCMSError, OSError):
            pass  # a damaged profile: the plain conversion remains
    return image.convert('RGB')


def _exif(image: Image.Image, kind: str) -> tuple[bytes | None, int]:
    """EXIF data without orientation, and the orientation; a TIFF's tags describe its own pixels and stay behind."""
    try:
        exif = image.getexif()
        orientation = exif.pop(_ORIENTATION_TAG, 1)
        return (exif.tobytes() if len(exif) and kind != 'TIFF' else None), orientation
    except _DECODE_ERRORS:
        return None, 1  # damaged metadata do not cost the picture
