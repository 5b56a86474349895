import struct
from dataclasses import replace

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from ast_plugin.data.image_files import ImageFile, read_image, read_rgb, sniff_format, write_image
from ast_plugin.errors import DataError
from tests.data.images import SRGB, noise, save, smooth, write_png


def assert_pixels(picture, color, alpha=None):
    np.testing.assert_array_equal(picture.color, color)
    assert picture.color.dtype == color.dtype
    if alpha is None:
        assert picture.alpha is None
    else:
        np.testing.assert_array_equal(picture.alpha, alpha)
        assert picture.alpha.dtype == color.dtype


@pytest.mark.parametrize('suffix', ['.png', '.bmp', '.tif', '.webp'])
def test_rgb_of_8_bits(tmp_path, suffix):
    pixels = noise(13, 17, 3)
    path = save(tmp_path / f'a{suffix}', pixels, **({'lossless': True} if suffix == '.webp' else {}))
    picture = read_image(path)
    assert_pixels(picture, pixels)
    assert picture.lossless and not picture.is_gray
    np.testing.assert_array_equal(read_rgb(path), pixels)


@pytest.mark.parametrize(('suffix', 'lossless'), [('.jpg', False), ('.webp', False)])
def test_lossy_formats_are_known_as_such(tmp_path, suffix, lossless):
    pixels = smooth(24, 32)
    picture = read_image(save(tmp_path / f'a{suffix}', pixels, quality=95))
    assert picture.lossless is lossless
    assert np.abs(picture.color.astype(int) - pixels).mean() < 3


@pytest.mark.parametrize('suffix', ['.png', '.bmp', '.tif', '.jpg'])
def test_gray_stays_gray(tmp_path, suffix):
    pixels = smooth(24, 32)[..., 0]
    path = save(tmp_path / f'a{suffix}', pixels)
    picture = read_image(path)
    assert picture.is_gray and picture.color.shape == (24, 32)
    assert np.abs(picture.color.astype(int) - pixels).max() <= (4 if suffix == '.jpg' else 0)
    np.testing.assert_array_equal(read_rgb(path), np.repeat(picture.color[..., None], 3, axis=2))


@pytest.mark.parametrize('suffix', ['.png', '.tif', '.webp'])
def test_alpha_is_kept_beside_the_colours(tmp_path, suffix):
    pixels = noise(13, 17, 4)
    options = {'lossless': True, 'exact': True} if suffix == '.webp' else {}
    path = save(tmp_path / f'a{suffix}', pixels, **options)
    assert_pixels(read_image(path), pixels[..., :3], pixels[..., 3])
    np.testing.assert_array_equal(read_rgb(path), pixels[..., :3])


@pytest.mark.parametrize('suffix', ['.png', '.tif'])
def test_gray_with_alpha(tmp_path, suffix):
    pixels = noise(13, 17, 2)
    path = save(tmp_path / f'a{suffix}', pixels)
    assert_pixels(read_image(path), pixels[..., 0], pixels[..., 1])
    np.testing.assert_array_equal(read_rgb(path), np.repeat(pixels[..., :1], 3, axis=2))


def test_bmp_with_alpha(tmp_path):
    pixels = noise(13, 17, 4)
    cv2.imwrite(str(tmp_path / 'a.bmp'), cv2.cvtColor(pixels, cv2.COLOR_RGBA2BGRA))
    assert_pixels(read_image(tmp_path / 'a.bmp'), pixels[..., :3], pixels[..., 3])


@pytest.mark.parametrize('transparent', [False, True])
def test_palette(tmp_path, transparent):
    indices, palette = noise(13, 17) % 8, noise(8, 3)
    extra = [(b'PLTE', palette.tobytes())] + ([(b'tRNS', bytes([0, 80]))] if transparent else [])
    path = write_png(tmp_path / 'a.png', indices[..., None], 3, depth=8, extra=extra)
    alpha = np.array([0, 80, *[255] * 6], np.uint8)[indices] if transparent else None
    assert_pixels(read_image(path), palette[indices], alpha)
    np.testing.assert_array_equal(read_rgb(path), palette[indices])


@pytest.mark.parametrize('suffix', ['.png', '.bmp', '.tif'])
def test_single_bits_become_gray(tmp_path, suffix):
    bits = noise(13, 17) > 127
    picture = read_image(save(tmp_path / f'a{suffix}', bits))
    assert_pixels(picture, bits.astype(np.uint8) * 255)
    assert 'instead of 1' in picture.notes[0]


def test_a_transparent_colour(tmp_path):
    pixels = noise(5, 6, 3)
    path = write_png(tmp_path / 'a.png', pixels, 2, depth=8, extra=[(b'tRNS', struct.pack('>HHH', *pixels[0, 0]))])
    assert_pixels(read_image(path), pixels, np.where((pixels == pixels[0, 0]).all(2), 0, 255))
    np.testing.assert_array_equal(read_rgb(path), pixels)


@pytest.mark.parametrize(('color_type', 'channels'), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_png_of_16_bits(tmp_path, color_type, channels):
    pixels = noise(13, 17, channels, dtype=np.uint16)
    path = write_png(tmp_path / 'a.png', pixels, color_type)
    color = pixels[..., 0] if channels < 3 else pixels[..., :3]
    assert_pixels(read_image(path), color, pixels[..., -1] if channels in (2, 4) else None)
    np.testing.assert_array_equal(read_rgb(path), np.broadcast_to(color.reshape(13, 17, -1), (13, 17, 3)))


def test_transparent_values_of_16_bits(tmp_path):
    pixels = noise(5, 6, 3, dtype=np.uint16)
    path = write_png(tmp_path / 'a.png', pixels, 2, extra=[(b'tRNS', pixels[1, 2].astype('>u2').tobytes())])
    assert_pixels(read_image(path), pixels, np.where((pixels == pixels[1, 2]).all(2), 0, 65535))
    gray = pixels[..., 0]
    path = write_png(tmp_path / 'b.png', gray[..., None], 0, extra=[(b'tRNS', struct.pack('>H', gray[1, 2]))])
    assert_pixels(read_image(path), gray, np.where(gray == gray[1, 2], 0, 65535))


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'compression': 'zlib', 'predictor': True},
        {'byteorder': '>'},
        {'tile': (16, 16)},
        {'rowsperstrip': 3},
        {'bigtiff': True},
    ],
)
def test_tiff_of_16_bits(tmp_path, options):
    pixels = noise(33, 17, 4, dtype=np.uint16)
    path = tmp_path / 'a.tif'
    tifffile.imwrite(path, pixels, photometric='rgb', extrasamples=['unassalpha'], **options)
    assert_pixels(read_image(path), pixels[..., :3], pixels[..., 3])
    tifffile.imwrite(path, pixels[..., :3].copy(), photometric='rgb', **options)
    assert_pixels(read_image(path), pixels[..., :3])
    tifffile.imwrite(path, pixels[..., 0].copy(), photometric='minisblack', **options)
    assert_pixels(read_image(path), pixels[..., 0])
    np.testing.assert_array_equal(read_rgb(path), np.repeat(pixels[..., :1], 3, axis=2))


def test_tiff_of_16_bits_where_white_is_zero(tmp_path):
    pixels = noise(33, 17, dtype=np.uint16)
    tifffile.imwrite(tmp_path / 'a.tif', pixels, photometric='miniswhite')
    assert_pixels(read_image(tmp_path / 'a.tif'), 65535 - pixels)


def test_premultiplied_colours_are_divided(tmp_path):
    color, alpha = noise(9, 9, 3, dtype=np.uint16), noise(9, 9, 1, dtype=np.uint16, seed=1) | 0x8000
    multiplied = np.round(color * (alpha / 65535)).astype(np.uint16)
    path = tmp_path / 'a.tif'
    tifffile.imwrite(path, np.dstack([multiplied, alpha]), photometric='rgb', extrasamples=['assocalpha'])
    picture = read_image(path)
    assert np.abs(picture.color.astype(int) - color).max() <= 1
    np.testing.assert_array_equal(picture.alpha, alpha[..., 0])


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('kind', ['jpg', 'webp', 'png', 'png16', 'tif', 'tif16'])
def test_exif_orientation_is_applied_and_forgotten(tmp_path, kind, orientation):
    """The picture is a ramp of known corners, so that each of the eight positions is told from the others."""
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24] = (240, 10, 10), (10, 240, 10), (10, 10, 240)
    # What a camera stores, by the definition of the tag: row 0 and column 0 of the file lie on these sides.
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
    again = read_image(path)
    assert again.color.shape == upright.shape
    with Image.open(path) as image:
        exif = image.getexif()
        assert exif.get(0x0112, 1) == 1
        assert kind.startswith('tif') or exif[0x010F] == 'a camera'


def test_cmyk_is_converted_and_said(tmp_path):
    picture = read_image(save(tmp_path / 'a.jpg', smooth(24, 32), 'CMYK', quality=95))
    assert np.abs(picture.color.astype(int) - smooth(24, 32)).mean() < 4
    assert 'CMYK' in picture.notes[0]
    np.testing.assert_array_equal(read_rgb(tmp_path / 'a.jpg'), picture.color)


@pytest.mark.parametrize('options', [{}, {'progressive': True}, {'subsampling': 0}, {'optimize': True}])
def test_fast_and_thorough_readers_agree_on_jpeg(tmp_path, options):
    path = save(tmp_path / 'a.jpg', noise(33, 47, 3), quality=90, **options)
    np.testing.assert_array_equal(read_rgb(path), read_image(path).color)


@pytest.mark.parametrize(
    ('suffix', 'dtype', 'channels'),
    [
        *[('.png', dtype, channels) for dtype in (np.uint8, np.uint16) for channels in (1, 2, 3, 4)],
        *[('.tif', np.uint8, channels) for channels in (1, 2, 3, 4)],
        *[('.tif', np.uint16, channels) for channels in (1, 3, 4)],
        *[(suffix, np.uint8, channels) for suffix in ('.webp', '.bmp') for channels in (3, 4)],
    ],
)
def test_written_pictures_read_back(tmp_path, suffix, dtype, channels):
    pixels = noise(13, 17, channels, dtype=dtype)
    color = pixels[..., 0] if channels < 3 else pixels[..., :3]
    picture = ImageFile(color, pixels[..., -1] if channels in (2, 4) else None, icc_profile=SRGB)
    write_image(tmp_path / f'a{suffix}', picture)
    again = read_image(tmp_path / f'a{suffix}')
    assert_pixels(again, color, picture.alpha)
    assert again.icc_profile == (None if suffix == '.bmp' else SRGB)
    assert [entry.name for entry in tmp_path.iterdir()] == [f'a{suffix}']


def test_16_bits_as_others_read_them(tmp_path):
    pixels = noise(13, 17, 4, dtype=np.uint16)
    for name, color, alpha in [('rgba', pixels[..., :3], pixels[..., 3]), ('la', pixels[..., 0], pixels[..., 3])]:
        expected = pixels if name == 'rgba' else pixels[..., [0, 3]]
        write_image(tmp_path / f'{name}.tif', ImageFile(color, alpha))
        np.testing.assert_array_equal(tifffile.imread(tmp_path / f'{name}.tif'), expected)
    write_image(tmp_path / 'rgba.png', ImageFile(pixels[..., :3], pixels[..., 3], dpi=(300, 300), icc_profile=SRGB))
    again = cv2.imread(str(tmp_path / 'rgba.png'), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(cv2.cvtColor(again, cv2.COLOR_BGRA2RGBA), pixels)
    with Image.open(tmp_path / 'rgba.png') as image:
        image.verify()
        assert image.info['dpi'] == pytest.approx((300, 300), abs=0.1)
        assert image.info['icc_profile'] == SRGB


def test_jpeg_keeps_quality_profile_and_resolution(tmp_path):
    path = save(tmp_path / 'a.jpg', smooth(24, 32), quality=95, icc_profile=SRGB, dpi=(240, 240))
    picture = read_image(path)
    write_image(tmp_path / 'b.jpeg', picture)
    again = read_image(tmp_path / 'b.jpeg')
    assert np.abs(again.color.astype(int) - picture.color).mean() < 1.5
    assert again.icc_profile == SRGB and again.dpi == (240, 240)


def test_the_first_picture_of_a_stereo_jpeg(tmp_path):
    frames = [Image.fromarray(smooth(16, 16)) for _ in range(2)]
    frames[0].save(tmp_path / 'a.jpg', format='MPO', save_all=True, append_images=frames[1:])
    picture = read_image(tmp_path / 'a.jpg')
    assert picture.format == 'JPEG' and 'only the first' in picture.notes[0]


@pytest.mark.parametrize(
    ('suffix', 'picture', 'reason'),
    [
        ('.jpg', ImageFile(noise(4, 4, 3), noise(4, 4)), 'no transparency'),
        ('.jpg', ImageFile(noise(4, 4, 3, dtype=np.uint16)), '8 bits'),
        ('.bmp', ImageFile(noise(4, 4, 3, dtype=np.uint16)), '8 bits'),
        ('.webp', ImageFile(np.zeros((1, 16400, 3), np.uint8)), 'cannot be written as WEBP'),
        ('.xyz', ImageFile(noise(4, 4, 3)), 'ends in one of'),
    ],
)
def test_what_a_format_cannot_hold_is_refused(tmp_path, suffix, picture, reason):
    with pytest.raises(DataError, match=reason):
        write_image(tmp_path / f'a{suffix}', picture)
    assert not list(tmp_path.iterdir())


def test_write_takes_every_suffix_of_a_format(tmp_path):
    for suffix, kind in [('.JPG', 'JPEG'), ('.jpeg', 'JPEG'), ('.TIFF', 'TIFF'), ('.WebP', 'WEBP'), ('.Png', 'PNG')]:
        write_image(tmp_path / f'a{suffix}', replace(ImageFile(noise(4, 4, 3)), lossless=False))
        assert sniff_format((tmp_path / f'a{suffix}').read_bytes()[:16]) == kind


def test_training_never_pays_for_the_thorough_reader(tmp_path, monkeypatch):
    paths = [
        save(tmp_path / 'a.png', noise(8, 8, 3)),
        save(tmp_path / 'a.jpg', noise(8, 8, 3)),
        write_png(tmp_path / 'b.png', noise(8, 8, 3, dtype=np.uint16), 2),
    ]
    monkeypatch.setattr(Image, 'open', None)
    for path in paths:
        assert read_rgb(path).shape == (8, 8, 3)
