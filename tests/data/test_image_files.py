"""Image files are read and written without loss of depth, alpha, gray or metadata, or rejected by name."""

import io
import struct
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from ast_plugin.data import image_files
from ast_plugin.data.checks import check_image
from ast_plugin.data.image_files import ImageFile, read_image, read_rgb, sniff_format, write_image
from ast_plugin.errors import DataError
from tests.data.images import SRGB, noise, save, smooth, write_png

DEEP = noise(33, 17, 4, dtype=np.uint16)


def split_channels(pixels):
    """Split gray, gray with alpha, RGB or RGBA, [H, W, C], into colour and alpha."""
    channels = pixels.shape[2]
    return pixels[..., 0] if channels < 3 else pixels[..., :3], pixels[..., -1] if channels in (2, 4) else None


def assert_pixels(image, color, alpha=None):
    np.testing.assert_array_equal(image.color, color)
    assert image.color.dtype == color.dtype and image.is_gray == (color.ndim == 2)
    assert (image.alpha is None) == (alpha is None)
    if alpha is not None:
        np.testing.assert_array_equal(image.alpha, alpha)
        assert image.alpha.dtype == color.dtype


def assert_read(path, color, alpha=None):
    assert_pixels(read_image(path), color, alpha)
    expected = np.repeat(color[..., None], 3, axis=2) if color.ndim == 2 else color
    np.testing.assert_array_equal(read_rgb(path), expected)


def write_foreign(path, pixels, **options):
    """Write a file with a third-party encoder."""
    channels, is_deep = pixels.shape[2], pixels.dtype == np.uint16
    if is_deep and path.suffix == '.png':
        write_png(path, pixels, {1: 0, 2: 4, 3: 2, 4: 6}[channels])
    elif is_deep:
        options |= {'extrasamples': ['unassalpha']} if channels == 4 else {}
        tifffile.imwrite(path, pixels.squeeze(), photometric='rgb' if channels > 1 else 'minisblack', **options)
    elif (path.suffix, channels) == ('.bmp', 4):
        cv2.imwrite(str(path), cv2.cvtColor(pixels, cv2.COLOR_RGBA2BGRA))
    else:
        save(path, pixels.squeeze(), **({'lossless': True, 'exact': True} if path.suffix == '.webp' else {}))


@pytest.mark.parametrize(
    ('suffix', 'bits', 'channels', 'options'),
    [
        *[('.png', bits, channels, {}) for bits in (8, 16) for channels in (1, 2, 3, 4)],
        *[('.tif', 8, channels, {}) for channels in (1, 2, 3, 4)],
        *[('.webp', 8, channels, {}) for channels in (3, 4)],
        *[('.bmp', 8, channels, {}) for channels in (1, 3, 4)],
        ('.tif', 16, 1, {}),
        ('.tif', 16, 4, {'compression': 'zlib', 'predictor': True}),
        ('.tif', 16, 3, {'byteorder': '>'}),
        ('.tif', 16, 1, {'tile': (16, 16), 'byteorder': '>'}),
        ('.tif', 16, 4, {'rowsperstrip': 3}),
        ('.tif', 16, 3, {'bigtiff': True}),
    ],
)
def test_lossless_formats(tmp_path, suffix, bits, channels, options):
    pixels = noise(33, 17, channels) if bits == 8 else DEEP[..., :channels]
    path, again = tmp_path / f'a{suffix}', tmp_path / f'b{suffix}'
    write_foreign(path, pixels, **options)
    assert_read(path, *split_channels(pixels))
    image = read_image(path)
    assert image.lossless
    write_image(again, replace(image, icc_profile=SRGB))
    assert_read(again, *split_channels(pixels))
    assert read_image(again).icc_profile == (None if suffix == '.bmp' else SRGB)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.name, again.name]


@pytest.mark.parametrize(('suffix', 'gray'), [('.jpg', False), ('.webp', False), ('.jpg', True)])
def test_lossy_formats(tmp_path, suffix, gray):
    pixels = smooth(24, 32)[..., 0] if gray else smooth(24, 32)
    image = read_image(save(tmp_path / f'a{suffix}', pixels, quality=95, dpi=(240, 240)))
    assert not image.lossless and image.is_gray == gray
    assert np.abs(image.color.astype(int) - pixels).mean() < 3
    write_image(tmp_path / f'b{suffix}', image)
    again = read_image(tmp_path / f'b{suffix}')
    assert np.abs(again.color.astype(int) - image.color).mean() < 1.5
    assert again.dpi == ((240, 240) if suffix == '.jpg' else None)


@pytest.mark.parametrize('transparent', [False, True])
def test_palette(tmp_path, transparent):
    indices, palette = noise(13, 17) % 8, noise(8, 3)
    extra = [(b'PLTE', palette.tobytes())] + ([(b'tRNS', bytes([0, 80]))] if transparent else [])
    path = write_png(tmp_path / 'a.png', indices[..., None], 3, depth=8, extra=extra)
    assert_read(path, palette[indices], np.array([0, 80, *[255] * 6], np.uint8)[indices] if transparent else None)


@pytest.mark.parametrize('suffix', ['.png', '.bmp', '.tif'])
def test_single_bits_become_gray(tmp_path, suffix):
    bits = noise(13, 17) > 127
    image = read_image(save(tmp_path / f'a{suffix}', bits))
    assert_pixels(image, bits.astype(np.uint8) * 255)
    assert 'instead of 1' in image.notes[0]


@pytest.mark.parametrize('depth', [8, 16])
def test_a_transparent_colour(tmp_path, depth):
    pixels, top = noise(5, 6, 3, dtype=np.uint16 if depth == 16 else np.uint8), 2**depth - 1
    extra = [(b'tRNS', struct.pack('>HHH', *pixels[1, 2]))]
    path = write_png(tmp_path / 'a.png', pixels, 2, depth, extra=extra)
    assert_read(path, pixels, np.where((pixels == pixels[1, 2]).all(2), 0, top))
    gray = pixels[..., 0]
    path = write_png(tmp_path / 'b.png', gray[..., None], 0, depth, extra=[(b'tRNS', struct.pack('>H', gray[1, 2]))])
    assert_read(path, gray, np.where(gray == gray[1, 2], 0, top))


def test_tiff_where_white_is_zero(tmp_path):
    tifffile.imwrite(tmp_path / 'a.tif', DEEP[..., 0], photometric='miniswhite')
    assert_read(tmp_path / 'a.tif', 65535 - DEEP[..., 0])


def test_premultiplied_colours_are_divided(tmp_path):
    color, alpha = DEEP[..., :3], DEEP[..., 3:] | 0x8000
    multiplied = np.round(color * (alpha / 65535)).astype(np.uint16)
    path = tmp_path / 'a.tif'
    tifffile.imwrite(path, np.dstack([multiplied, alpha]), photometric='rgb', extrasamples=['assocalpha'])
    image = read_image(path)
    assert np.abs(image.color.astype(int) - color).max() <= 1
    np.testing.assert_array_equal(image.alpha, alpha[..., 0])


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('kind', ['jpg', 'webp', 'png', 'png16', 'tif', 'tif16'])
def test_exif_orientation_is_applied(tmp_path, kind, orientation):
    """The image is a ramp with known corners, which distinguishes all eight orientations."""
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24] = (240, 10, 10), (10, 240, 10), (10, 10, 240)
    # Stored pixels by definition of the tag: sides of the upright image at row 0 and column 0 of the file.
    stored = {
        1: upright,
        2: np.fliplr(upright),
        3: np.flipud(np.fliplr(upright)),
        4: np.flipud(upright),
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation].copy()
    path = tmp_path / f'a.{kind.removesuffix("16")}'
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, 'a camera'
    if kind == 'tif16':
        tag = (274, 'H', 1, orientation, True)
        tifffile.imwrite(path, stored.astype(np.uint16) * 257, photometric='rgb', extratags=[tag])
    elif kind == 'png16':
        write_png(path, stored.astype(np.uint16) * 257, 2, extra=[(b'eXIf', exif.tobytes().removeprefix(b'Exif\0\0'))])
    else:
        Image.fromarray(stored).save(path, exif=exif, quality=95)
    for pixels in (read_image(path).color, read_rgb(path)):
        assert pixels.shape == upright.shape
        values = pixels / (257 if kind.endswith('16') else 1)
        assert np.abs(values[4:12, 4:-4] - upright[4:12, 4:-4]).mean() < 12
        assert np.abs(values - upright).mean() < 8
    write_image(path, read_image(path))
    assert read_image(path).color.shape == upright.shape
    with Image.open(path) as file:
        exif = file.getexif()
        assert exif.get(0x0112, 1) == 1
        assert kind.startswith('tif') or exif[0x010F] == 'a camera'


def test_cmyk_is_converted_and_reported(tmp_path):
    image = read_image(save(tmp_path / 'a.jpg', smooth(24, 32), 'CMYK', quality=95))
    assert np.abs(image.color.astype(int) - smooth(24, 32)).mean() < 4
    assert 'CMYK' in image.notes[0]
    np.testing.assert_array_equal(read_rgb(tmp_path / 'a.jpg'), image.color)


@pytest.mark.parametrize('options', [{}, {'progressive': True}, {'subsampling': 0}])
def test_fast_and_thorough_jpeg_agree(tmp_path, options):
    path = save(tmp_path / 'a.jpg', noise(33, 47, 3), quality=90, **options)
    np.testing.assert_array_equal(read_rgb(path), read_image(path).color)


def test_16_bits_as_others_read_them(tmp_path):
    for name, pixels in (('rgba', DEEP), ('la', DEEP[..., [0, 3]])):
        write_image(tmp_path / f'{name}.tif', ImageFile(*split_channels(pixels)))
        np.testing.assert_array_equal(tifffile.imread(tmp_path / f'{name}.tif'), pixels)
    write_image(tmp_path / 'rgba.png', ImageFile(*split_channels(DEEP), dpi=(300, 300), icc_profile=SRGB))
    again = cv2.imread(str(tmp_path / 'rgba.png'), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(cv2.cvtColor(again, cv2.COLOR_BGRA2RGBA), DEEP)
    with Image.open(tmp_path / 'rgba.png') as image:
        image.verify()
        assert image.info['dpi'] == pytest.approx((300, 300), abs=0.1)
        assert image.info['icc_profile'] == SRGB


def test_the_first_image_of_a_stereo_jpeg(tmp_path):
    frame = Image.fromarray(smooth(16, 16))
    frame.save(tmp_path / 'a.jpg', format='MPO', save_all=True, append_images=[frame])
    image = read_image(tmp_path / 'a.jpg')
    assert image.format == 'JPEG' and 'only the first' in image.notes[0]


@pytest.mark.parametrize(
    ('suffix', 'image', 'reason'),
    [
        ('.jpg', ImageFile(noise(4, 4, 3), noise(4, 4)), 'does not support transparency'),
        ('.jpg', ImageFile(noise(4, 4, 3, dtype=np.uint16)), '8 bits'),
        ('.webp', ImageFile(np.zeros((1, 16400, 3), np.uint8)), 'cannot be written as WEBP'),
        ('.xyz', ImageFile(noise(4, 4, 3)), 'ends in one of'),
    ],
)
def test_what_a_format_cannot_hold(tmp_path, suffix, image, reason):
    with pytest.raises(DataError, match=reason):
        write_image(tmp_path / f'a{suffix}', image)
    assert not list(tmp_path.iterdir())


def test_write_takes_every_suffix(tmp_path):
    for suffix, kind in [('.JPG', 'JPEG'), ('.jpeg', 'JPEG'), ('.TIFF', 'TIFF'), ('.WebP', 'WEBP'), ('.Png', 'PNG')]:
        write_image(tmp_path / f'a{suffix}', ImageFile(noise(4, 4, 3), lossless=False))
        assert sniff_format((tmp_path / f'a{suffix}').read_bytes()[:16]) == kind


def test_training_takes_the_fast_reader(tmp_path, monkeypatch):
    paths = [
        save(tmp_path / 'a.png', noise(8, 8, 3)),
        save(tmp_path / 'a.jpg', noise(8, 8, 3)),
        write_png(tmp_path / 'b.png', DEEP[:8, :8, :3], 2),
    ]
    monkeypatch.setattr(Image, 'open', None)
    for path in paths:
        assert read_rgb(path).shape == (8, 8, 3)


def assert_refused(path, reason, readers=(read_image, read_rgb, check_image)):
    for reader in readers:
        with pytest.raises(DataError, match=rf'^{path}: .*{reason}'):
            reader(path)


@pytest.mark.parametrize('suffix', ['.png', '.jpg', '.webp', '.tif', '.bmp'])
def test_truncated_files_are_rejected(tmp_path, suffix):
    """A file truncated anywhere is rejected by name; OpenCV would return the existing rows."""
    whole = save(tmp_path / f'whole{suffix}', noise(64, 64, 3)).read_bytes()
    path = tmp_path / f'broken{suffix}'
    for length in (0, 1, 10, 40, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        assert_refused(path, 'damaged' if length > 20 else '' if length else 'the file is empty')


def flipped(data, place, bits=0x10):
    return data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :]


def jpeg_bomb(path):
    data = save(path, noise(8, 8, 3)).read_bytes()
    place = data.index(b'\xff\xc0') + 5
    path.write_bytes(data[:place] + b'\xff\xff\xff\xff' + data[place + 4 :])


def animated(path):
    """The animation is declared after a long profile."""
    frames = [Image.fromarray(noise(16, 16, 3, seed=seed)) for seed in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:], icc_profile=bytes(range(256)) * 4)


def tiff_of(pixels, **options):
    return lambda path: tifffile.imwrite(path, pixels, **options)


PNG = cv2.imencode('.png', noise(48, 64, 3))[1].tobytes()
PLANES = noise(3, 8, 8, dtype=np.uint16)
BROKEN = [  # name of the file, content or function that writes it, and the reason
    ('a.png', b'<html>404</html>', 'not a PNG, JPEG, WebP, TIFF or BMP file'),
    ('a.png', b'\x89PNG\r\n\x1a\nIEND\xaeB`\x82', 'damaged'),
    ('a.png', flipped(PNG, 2000), 'damaged'),
    ('a.png', PNG[:3000] + PNG[-12:], 'damaged'),
    ('a.png', lambda path: write_png(path, noise(8, 8, 3), 2, 8, height=9), 'its pixels are 200 bytes, expected 225'),
    ('a.png', lambda path: write_png(path, noise(1, 1, 3), 2, 8, height=60000, width=60000), '3600 million pixels'),
    ('a.jpg', jpeg_bomb, '4295 million pixels.*--max-megapixels'),
    *((name, animated, '3 frames or pages') for name in ('a.png', 'a.webp', 'a.tif')),
    ('a.tif', tiff_of(noise(8, 8, 3).astype(np.float32), photometric='rgb'), 'support'),
    ('a.tif', tiff_of(noise(8, 8).astype(np.float32)), 'support'),
    ('a.tif', tiff_of(noise(8, 8).astype(np.int32)), 'support'),
    ('a.tif', tiff_of(PLANES, photometric='rgb', planarconfig='separate'), 'support'),
    ('a.png', Path.mkdir, 'cannot be read'),
    ('a.png', lambda path: path.symlink_to(path), 'cannot be read: .*symbolic links'),
    ('a.png', lambda path: None, 'No such file'),
]


@pytest.mark.parametrize(('name', 'content', 'reason'), BROKEN)
def test_broken_files_are_rejected(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    assert_refused(path, reason)


def test_truncation_is_seen_through_a_thumbnail(tmp_path):
    """A thumbnail before the image is a complete JPEG with its own end marker."""
    thumbnail = io.BytesIO()
    Image.fromarray(noise(16, 16, 3)).save(thumbnail, 'JPEG')
    application = b'Exif\0\0' + thumbnail.getvalue()
    path = save(tmp_path / 'a.jpg', noise(64, 64, 3))
    whole = path.read_bytes()
    whole = whole[:2] + b'\xff\xe1' + struct.pack('>H', len(application) + 2) + application + whole[2:]
    path.write_bytes(whole)
    assert read_rgb(path).shape == (64, 64, 3)
    path.write_bytes(whole[:-200])
    assert_refused(path, '')


def test_the_limit_of_pixels(tmp_path, monkeypatch):
    path, limit = save(tmp_path / 'a.png', noise(20, 30, 3)), Image.MAX_IMAGE_PIXELS
    with pytest.raises(DataError, match='30x20'):
        read_image(path, max_pixels=599)
    assert read_image(path, max_pixels=600).color.shape == read_rgb(path).shape == (20, 30, 3)
    assert limit == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(image_files, 'MAX_PIXELS', 599)
    monkeypatch.setattr(image_files.cv2, 'imdecode', lambda *_: pytest.fail('decoded'))
    for other in (path, save(tmp_path / 'a.jpg', noise(20, 30, 3))):
        assert_refused(other, '30x20 is 0 million pixels, more than the', [read_rgb])
