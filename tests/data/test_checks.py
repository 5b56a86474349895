"""Images and pairs are checked completely before training, and described."""

import re

import cv2
import numpy as np
import pytest
from PIL import Image

from ast_plugin.data.checks import check_image, check_pair, digest_pixels
from ast_plugin.data.image_files import read_rgb
from ast_plugin.data.matching import Pair
from ast_plugin.errors import DataError
from tests.data.images import noise

PIXELS = noise(48, 64, 3)
IMAGE = Image.fromarray(PIXELS)
TURNED = Image.Exif()
TURNED[0x0112] = 6


def test_jpeg_that_training_would_read_in_part(tmp_path, capfd):
    whole = cv2.imencode('.jpg', PIXELS)[1].tobytes()
    (tmp_path / 'a.jpg').write_bytes(whole[:1200] + b'\xff\xd9')
    with pytest.raises(DataError, match=r'a\.jpg: the JPEG file is damaged: .*remature end'):
        check_image(tmp_path / 'a.jpg')
    assert 'JPEG' not in capfd.readouterr().err  # libraries print nothing to the terminal


@pytest.mark.parametrize(
    ('name', 'save', 'traits'),
    [
        ('a.png', IMAGE.save, ()),
        ('a.jpg', IMAGE.save, ()),
        ('a.JPG', lambda path: IMAGE.save(path, 'JPEG', progressive=True, exif=TURNED), ()),
        ('a.png', IMAGE.convert('L').save, ('gray',)),
        ('a.jpg', IMAGE.convert('L').save, ('gray',)),
        ('a.tif', IMAGE.convert('L').save, ('gray',)),
        ('a.png', IMAGE.convert('LA').save, ('gray', 'transparency')),
        ('a.png', IMAGE.convert('RGBA').save, ('transparency',)),
        ('a.png', IMAGE.quantize(16).save, ('palette',)),
        ('a.jpg', IMAGE.convert('CMYK').save, ('CMYK',)),
        ('a.png', lambda path: cv2.imwrite(str(path), PIXELS.astype(np.uint16) * 257), ('16 bits',)),
        ('a.jpg', lambda path: IMAGE.save(path, 'PNG'), ('PNG named .jpg',)),
        ('a.png', lambda path: IMAGE.save(path, 'JPEG'), ('JPEG named .png',)),
    ],
)
def test_readable_images(tmp_path, name, save, traits):
    path = tmp_path / name
    save(path)
    found, size = check_image(path), (64, 48) if name == 'a.JPG' else (48, 64)  # upright
    assert (found.size, found.num_bytes, found.traits) == (size, path.stat().st_size, traits)
    assert found.digest == digest_pixels(read_rgb(path))


def test_a_digest_is_of_pixels_alone(tmp_path):
    changed = PIXELS ^ (np.arange(PIXELS.size).reshape(PIXELS.shape) == PIXELS.size - 1)
    others = [changed, PIXELS.reshape(64, 48, 3), PIXELS.astype(np.uint16), PIXELS[..., ::-1]]
    assert len({digest_pixels(PIXELS), *map(digest_pixels, others)}) == 5
    assert digest_pixels(PIXELS) == digest_pixels(np.asfortranarray(PIXELS))
    for name, level in (('a.png', 0), ('b.png', 9), ('c.bmp', 0)):
        cv2.imwrite(str(tmp_path / name), PIXELS // 64, [cv2.IMWRITE_PNG_COMPRESSION, level])
    found = [check_image(tmp_path / name) for name in ('a.png', 'b.png', 'c.bmp')]
    assert len({one.digest for one in found}) == 1 and len({one.num_bytes for one in found}) == 3


@pytest.mark.parametrize(
    ('size', 'expected'),
    [
        ((24, 32), None),
        ((32, 24), 'rotated by 90 degrees'),
        ((48, 64), '2 times smaller'),
        ((24, 31), '32x24 pixels, its clean partner .*gt.png 31x24$'),
    ],
)
def test_pairs_of_two_sizes(tmp_path, size, expected):
    pair = Pair('a', str(tmp_path / 'lq.png'), str(tmp_path / 'gt.png'))
    for path, shape in ((pair.lq, (24, 32)), (pair.gt, size)):
        cv2.imwrite(path, noise(*shape, 3))
    found = check_pair(pair)
    if expected:
        assert (found.kind, found.name) == ('sizes differ', pair.lq) and re.search(expected, found.text)
    else:
        assert found[0] == found[1]
    (tmp_path / 'gt.png').write_bytes(b'')
    fault = check_pair(pair)
    assert (fault.kind, fault.name, fault.text) == ('unreadable', pair.gt, 'the file is empty')
