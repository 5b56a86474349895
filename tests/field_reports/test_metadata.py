"""Kind D: pixels are read independently of metadata; metadata are kept if the format supports them, else reported."""

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from ast_plugin.data.image_files import FORMAT_OF, decode_image, encode_image, read_image, read_rgb
from tests.data.images import SRGB, noise, write_png

PIXELS = noise(16, 24, 3)
EXIF = Image.Exif()
EXIF[0x010F] = 'a camera'
EXIF.get_ifd(0x8769)[0x9003] = '2020:01:01 00:00:00'
EXIF.get_ifd(0x8825)[2] = (1.0, 2.0, 3.5)
TURNED = Image.Exif()
TURNED[0x0112] = 6
LARGE = noise(2_000_000).tobytes()  # neither zlib nor anybody else makes it smaller


def encoded(kind, pixels=PIXELS, **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def chunk(name, body, crc=None):
    crc = zlib.crc32(name + body) if crc is None else crc
    return struct.pack('>I', len(body)) + name + body + struct.pack('>I', crc)


def png(*chunks, pixels=PIXELS):
    data = encoded('PNG', pixels)
    return data[:33] + b''.join(chunk(*each) for each in chunks) + data[33:]


def segment(marker, body):
    return bytes([0xFF, marker]) + struct.pack('>H', len(body) + 2) + body


def jpeg(*segments, **options):
    data = encoded('JPEG', quality=95, **options)
    return data[:2] + b''.join(segment(*each) for each in segments) + data[2:]


def tiff(pixels=PIXELS, *tags, **options):
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, photometric='rgb', metadata=None, extratags=tags, **options)
    return stream.getvalue()


def restored(data, ending):
    """Return an image and the result of writing and reading it in a format."""
    image = decode_image(data, 'photo')
    return image, decode_image(encode_image(f'out{ending}', image), 'out')


@pytest.mark.parametrize(
    'data',
    [
        png((b'zTXt', b'a\0\0' + zlib.compress(LARGE))),
        png((b'iTXt', b'a\0\1\0\0\0' + zlib.compress(bytes(2**28)))),
        png((b'iCCP', b'a\0\0' + zlib.compress(SRGB + LARGE))),
        png((b'iCCP', b'a\0\0' + b'nothing')),
        png((b'eXIf', b'nothing')),
        png((b'tEXt', b'a\0b', 0)),
        png((b'tRNS', b'\0\0\0\0\0\1', 7)),
        png((b'tRNS', b'\0')),
        png((b'pHYs', b'\0')),
        jpeg((0xE2, b'MPF\0II')),
        jpeg((0xE2, b'MPF\0II*\0\xff\xff\xff\xff')),
        jpeg((0xE1, b'Exif\0\0nothing')),
        jpeg((0xE2, b'ICC_PROFILE\0')),
        jpeg((0xED, b'Photoshop 3.0\x008BIM\xff')),
        tiff(PIXELS, (34675, 'H', 1, 5, True)),
        tiff(PIXELS, (282, 's', 0, 'much', True), (700, 'd', 1, 0.5, True)),
    ],
)
def test_pixels_behind_any_metadata(data):
    image = decode_image(data, 'photo')
    np.testing.assert_array_equal(image.color, decode_image(jpeg(), '').color if image.format == 'JPEG' else PIXELS)
    assert image.alpha is None
    encode_image(f'out.{image.format.lower()}', image)


@pytest.mark.parametrize('chunks', [[], [(b'PLTE', b'')]])
def test_png_of_indices_without_a_palette(tmp_path, chunks):
    path = write_png(tmp_path / 'a.png', noise(16, 24), color_type=3, depth=8, extra=chunks)
    for read in (read_image, read_rgb):
        with pytest.raises(ValueError, match=r'a\.png: the PNG file is damaged: it has no palette'):
            read(path)


def test_jpeg_that_pillow_does_not_read(monkeypatch):
    def refuse(*_, **__):
        raise SyntaxError('not a JPEG file')

    data = jpeg(exif=TURNED)
    expected = decode_image(data, 'photo')
    monkeypatch.setattr(Image, 'open', refuse)
    image = decode_image(data, 'photo')
    np.testing.assert_array_equal(image.color, expected.color)
    assert image.color.shape == (24, 16, 3) and 'OpenCV' in image.notes[0]
    with pytest.raises(ValueError, match='photo'):
        decode_image(data[:-100], 'photo')


COLOURS = [(b'gAMA', struct.pack('>I', 45455)), (b'cHRM', bytes(32)), (b'sRGB', b'\0'), (b'cICP', b'\x09\x10\0\1')]
TEXTS = [(b'tEXt', b'Title\0a'), (b'zTXt', b'b\0\0' + zlib.compress(LARGE)), (b'iTXt', 'c\0\0\0\0\0é'.encode())]


@pytest.mark.parametrize('pixels', [PIXELS, PIXELS[..., 0]])
@pytest.mark.parametrize('body', [*COLOURS, *TEXTS])
def test_png_chunks_are_kept_or_named(body, pixels):
    image, again = restored(png(body, pixels=pixels), '.png')
    assert again.extra == image.extra != ()
    assert chunk(*body) in encode_image('out.png', image)
    _, lost = image.metadata('TIFF')
    assert lost == [body[0].decode()]


XMP = b'<x:xmpmeta tiff:Orientation="6">' + bytes(range(32, 127)) + b'</x:xmpmeta>'


@pytest.mark.parametrize('source', ['.png', '.jpg', '.webp', '.tif'])
def test_exif_xmp_and_profile_in_any_format(source):
    data = jpeg(exif=EXIF, xmp=XMP, icc_profile=SRGB, dpi=(240, 240))
    ending = {'.png': '.jpg', '.jpg': '.webp', '.webp': '.tif', '.tif': '.png'}[source]
    image, again = restored(encode_image(f'photo{source}', decode_image(data, 'photo')), ending)
    assert (again.icc_profile, again.xmp) == (SRGB, XMP)
    assert image.notes == () and image.metadata(FORMAT_OF[ending])[1] in ([], ['the resolution'])
    with Image.open(io.BytesIO(encode_image(f'out{ending}', image))) as file:
        exif = file.getexif()
        assert exif[0x010F] == 'a camera' and exif.get_ifd(0x8769)[0x9003] == '2020:01:01 00:00:00'
        assert exif.get_ifd(0x8825)[2] == (1.0, 2.0, 3.5)


@pytest.mark.parametrize('ending', ['.png', '.jpg', '.webp'])
def test_turned_images_are_turned_once(ending):
    if ending == '.png':
        text = b'XML:com.adobe.xmp\0\1\0\0\0' + zlib.compress(XMP)
        data = png((b'eXIf', TURNED.tobytes().removeprefix(b'Exif\0\0')), (b'iTXt', text))
    else:
        data = encoded(FORMAT_OF[ending], exif=TURNED, xmp=XMP)
    image, again = restored(data, ending)
    assert image.color.shape == again.color.shape == (24, 16, 3)
    assert again.xmp == XMP.replace(b'"6"', b'"1"')


@pytest.mark.parametrize('body', [(0xED, b'Photoshop 3.0\x008BIM\4\4'), (0xFE, b'a comment')])
def test_jpeg_segments_are_kept_or_named(body):
    image = decode_image(jpeg(body), 'photo')
    assert segment(*body) in encode_image('out.jpg', image)
    assert len(image.metadata('PNG')[1]) == 1


PALETTE = io.BytesIO()
Image.fromarray(PIXELS).quantize(16).save(PALETTE, 'PNG')


@pytest.mark.parametrize(
    ('data', 'note'),
    [
        (png((b'bKGD', bytes(6))), 'not kept: bKGD'),
        (jpeg((0xEB, b'JP\0\0c2pa')), 'not kept: APP11 JP'),
        (jpeg((0xEC, b'Ducky\0')), 'not kept: APP12 Ducky'),
        (PALETTE.getvalue(), 'written in RGB instead of a palette'),
    ],
)
def test_what_is_not_kept_is_named(data, note):
    assert decode_image(data, 'photo').notes == (note,)


def test_metadata_too_long_for_jpeg_are_named():
    image = decode_image(png((b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0' + bytes(70000))), 'photo')
    assert image.metadata('JPEG')[1] == ['XMP'] and image.metadata('PNG')[1] == []
    encode_image('out.jpg', image)


GEO = [(33550, 'd', 3, (0.5, 0.5, 0.0), True), (33922, 'd', 6, (0.0, 0.0, 0.0, 4e5, 5e6, 0.0), True)]
GEO += [(34735, 'H', 4, (1, 1, 0, 0), True), (34737, 's', 0, 'WGS 84|', True), (33432, 's', 0, b'\xa9 me', True)]


@pytest.mark.parametrize(('pixels', 'options'), [(PIXELS, {'bigtiff': True}), (PIXELS.astype(np.uint16) * 257, {})])
def test_tiff_tags_are_kept(pixels, options):
    image, again = restored(tiff(pixels, *GEO, **options), '.tif')
    assert image.notes == ()
    np.testing.assert_array_equal(again.color, pixels)
    assert again.exif == image.exif
    with tifffile.TiffFile(io.BytesIO(encode_image('out.tif', image))) as file:
        for tag, _, _, value, _ in GEO[:4]:
            assert file.pages[0].tags[tag].value == value
        assert file.pages[0].tags[33432].value in ('© me', b'\xa9 me')


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize(('meaning', 'is_alpha'), [('unspecified', False), ('unassalpha', True)])
def test_fourth_channel_of_a_tiff(dtype, meaning, is_alpha):
    pixels = np.zeros((16, 24, 4), dtype)
    pixels[..., :3] = PIXELS
    image = decode_image(tiff(pixels, extrasamples=[meaning]), 'photo')
    np.testing.assert_array_equal(image.color, pixels[..., :3])
    assert (image.alpha is not None) == is_alpha and bool(image.notes) != is_alpha
