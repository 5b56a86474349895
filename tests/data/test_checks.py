"""Every kind of damage to an image is detected and reported before training."""

import os
import re

import cv2
import numpy as np
import pytest
from PIL import Image

from ast_plugin.data.checks import check_image, check_pair, digest_pixels
from ast_plugin.data.image_files import read_rgb
from ast_plugin.data.matching import Pair
from ast_plugin.errors import DataError
from tests.data.images import write_png


def smooth(height=48, width=64, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 2)


def image():
    return Image.fromarray(smooth())


def encoded(ending, pixels=None):
    return cv2.imencode(ending, smooth() if pixels is None else pixels)[1].tobytes()


def jpeg_bomb():
    data = bytearray(encoded('.jpg'))
    place = data.index(b'\xff\xc0') + 5
    data[place : place + 4] = b'\xff\xff\xff\xff'
    return bytes(data)


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]


def write_animated(path):
    profile = bytes(range(256)) * 4  # the animation is declared after it
    image().save(path, save_all=True, append_images=[Image.fromarray(smooth(seed=1))], icc_profile=profile)


BROKEN = {
    'empty': ('a.png', b'', 'the file is empty'),
    'text': ('a.png', b'<html>404</html>', 'not a PNG, JPEG, WebP, TIFF or BMP file'),
    'cut PNG': ('a.png', encoded('.png')[:-500], 'damaged'),
    'cut PNG in the header': ('a.png', encoded('.png')[:20], 'damaged'),
    'PNG with a wrong bit': ('a.png', flipped(encoded('.png'), 2000), 'damaged'),
    'PNG with its end, but cut': ('a.png', encoded('.png')[:3000] + encoded('.png')[-12:], 'damaged'),
    'cut JPEG': ('a.jpg', encoded('.jpg')[:-300], 'damaged'),
    'cut JPEG with its end': ('a.jpg', encoded('.jpg')[:1200] + b'\xff\xd9', 'damaged'),
    'cut TIFF': ('a.tif', encoded('.tif')[:-500], 'damaged'),
    'animated PNG': ('a.png', write_animated, '2 frames'),
    'animated WebP': ('a.webp', write_animated, '2 frames'),
    'bomb': (
        'a.png',
        lambda path: write_png(path, smooth(1, 1), 2, 8, height=60000, width=60000),
        '3600 million pixels, more than the 200 million allowed',
    ),
    'JPEG bomb': ('a.jpg', jpeg_bomb(), '4295 million pixels'),
}


@pytest.mark.parametrize('name', BROKEN)
def test_broken_images(tmp_path, capfd, name):
    file, content, expected = BROKEN[name]
    path = tmp_path / file
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        check_image(path)
    assert str(caught.value).startswith(f'{path}: ') and expected in str(caught.value), str(caught.value)
    assert 'JPEG' not in capfd.readouterr().err  # libraries print nothing to the terminal


def test_files_that_cannot_be_opened(tmp_path):
    os.symlink('loop.png', tmp_path / 'loop.png')
    (tmp_path / 'folder.png').mkdir()
    for name, expected in (('loop.png', 'symbolic links'), ('folder.png', 'directory'), ('none.png', 'No such file')):
        with pytest.raises(DataError, match=f'{name}: cannot be read: .*{expected}'):
            check_image(tmp_path / name)


@pytest.mark.parametrize(
    ('name', 'save', 'traits'),
    [
        ('a.png', lambda path: image().save(path), ()),
        ('a.jpg', lambda path: image().save(path), ()),
        ('a.JPG', lambda path: image().save(path, 'JPEG', progressive=True), ()),
        ('a.png', lambda path: image().convert('L').save(path), ('gray',)),
        ('a.jpg', lambda path: image().convert('L').save(path), ('gray',)),
        ('a.tif', lambda path: image().convert('L').save(path), ('gray',)),
        ('a.png', lambda path: image().convert('LA').save(path), ('gray', 'transparency')),
        ('a.png', lambda path: image().convert('RGBA').save(path), ('transparency',)),
        ('a.png', lambda path: image().quantize(16).save(path), ('palette',)),
        ('a.jpg', lambda path: image().convert('CMYK').save(path), ('CMYK',)),
        ('a.png', lambda path: cv2.imwrite(str(path), smooth().astype(np.uint16) * 257), ('16 bits',)),
        ('a.jpg', lambda path: image().save(path, 'PNG'), ('PNG named .jpg',)),
        ('a.png', lambda path: image().save(path, 'JPEG'), ('JPEG named .png',)),
    ],
)
def test_readable_images(tmp_path, name, save, traits):
    path = tmp_path / name
    save(path)
    found = check_image(path)
    assert (found.size, found.num_bytes, found.traits) == ((48, 64), path.stat().st_size, traits)
    assert found.digest == digest_pixels(read_rgb(path))


def test_a_digest_is_of_pixels_alone(tmp_path):
    pixels = smooth()
    changed = pixels ^ (np.arange(pixels.size).reshape(pixels.shape) == pixels.size - 1)
    others = [changed, pixels.reshape(64, 48, 3), pixels.astype(np.uint16), pixels[..., ::-1]]
    assert len({digest_pixels(pixels), *map(digest_pixels, others)}) == 5
    assert digest_pixels(pixels) == digest_pixels(np.asfortranarray(pixels))
    for name, level in (('a.png', 0), ('b.png', 9), ('c.bmp', 0)):
        cv2.imwrite(str(tmp_path / name), pixels, [cv2.IMWRITE_PNG_COMPRESSION, level])
    found = [check_image(tmp_path / name) for name in ('a.png', 'b.png', 'c.bmp')]
    assert len({one.digest for one in found}) == 1 and len({one.num_bytes for one in found}) == 3


@pytest.mark.parametrize(
    ('lq', 'gt', 'expected'),
    [
        ((48, 64), (64, 48), 'rotated by 90 degrees'),
        ((24, 32), (48, 64), '2 times smaller'),
        ((48, 64), (48, 63), '64x48 pixels, its clean partner .*gt.png 63x48$'),
    ],
)
def test_pairs_of_two_sizes(tmp_path, lq, gt, expected):
    for name, size in (('lq', lq), ('gt', gt)):
        cv2.imwrite(str(tmp_path / f'{name}.png'), smooth(*size))
    fault = check_pair(Pair('a', str(tmp_path / 'lq.png'), str(tmp_path / 'gt.png')))
    assert fault.kind == 'sizes differ' and fault.name == str(tmp_path / 'lq.png')
    assert re.search(expected, fault.text)


def test_exif_rotation_counts(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image().save(tmp_path / 'a.jpg', exif=exif)
    assert check_image(tmp_path / 'a.jpg').size == (64, 48)


def test_a_broken_half_is_named(tmp_path):
    for name in ('lq', 'gt'):
        cv2.imwrite(str(tmp_path / f'{name}.png'), smooth())
    pair = Pair('a', str(tmp_path / 'lq.png'), str(tmp_path / 'gt.png'))
    lq, gt = check_pair(pair)
    assert lq == gt
    (tmp_path / 'gt.png').write_bytes(b'')
    fault = check_pair(pair)
    assert (fault.kind, fault.name, fault.text) == ('unreadable', pair.gt, 'the file is empty')
