"""Images and image files for tests, written independently of the readers under test."""

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageCms

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()


def noise(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def smooth(height, width):
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 3, columns * 3, rows + columns], axis=2).astype(np.uint8)


def write_png(path, pixels, color_type, depth=16, extra=(), height=None, width=None):
    """Return a PNG built from its specification, optionally with a wrong size."""
    height, width = height or pixels.shape[0], width or pixels.shape[1]
    chunks = [(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, color_type, 0, 0, 0)), *extra]
    rows = b''.join(b'\0' + row.astype('>u2' if depth == 16 else 'u1').tobytes() for row in pixels)
    chunks += [(b'IDAT', zlib.compress(rows)), (b'IEND', b'')]
    body = b''.join(
        struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data)) for name, data in chunks
    )
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + body)
    return path


def save(path, pixels, mode=None, **options):
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def write_noise(path: Path, seed, size: tuple[int, int] = (16, 24)) -> Path:
    """Write an image of noise, and create its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), noise(*size, 3, seed=seed))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, by relative path."""
    files = (path for path in sorted(folder.rglob('*')) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def touch(root: Path, *names: str) -> Path:
    """Create empty files and their folders; listing never opens an image."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root
