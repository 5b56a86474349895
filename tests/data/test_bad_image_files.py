"""Files that are no pictures, cut, damaged, too large or of other kinds: refused by name, and nothing else happens."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from ast_plugin.data import image_files
from ast_plugin.data.image_files import ImageFile, read_image, read_rgb, write_image
from ast_plugin.errors import DataError
from tests.data.images import SRGB, noise, save, smooth


@pytest.mark.parametrize('suffix', ['.png', '.jpg', '.webp', '.tif', '.bmp'])
@pytest.mark.parametrize('reader', [read_image, read_rgb])
def test_truncated_files_are_refused(tmp_path, suffix, reader):
    """Wherever a file ends early, it is refused by name; OpenCV would return the rows that it has."""
    whole = save(tmp_path / f'whole{suffix}', noise(64, 64, 3)).read_bytes()
    path = tmp_path / f'broken{suffix}'
    for length in (1, 10, 40, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match='broken'):
            reader(path)


def test_truncation_is_seen_through_a_thumbnail(tmp_path):
    """A thumbnail before the picture holds a whole JPEG with an end of its own."""
    thumbnail = io.BytesIO()
    Image.fromarray(noise(16, 16, 3)).save(thumbnail, 'JPEG')
    application = b'Exif\0\0' + thumbnail.getvalue()
    whole = save(tmp_path / 'a.jpg', noise(64, 64, 3)).read_bytes()
    whole = whole[:2] + b'\xff\xe1' + struct.pack('>H', len(application) + 2) + application + whole[2:]
    (tmp_path / 'a.jpg').write_bytes(whole)
    assert read_rgb(tmp_path / 'a.jpg').shape == (64, 64, 3)
    (tmp_path / 'a.jpg').write_bytes(whole[:-200])
    for reader in (read_image, read_rgb):
        with pytest.raises(DataError, match=r'a\.jpg'):
            reader(tmp_path / 'a.jpg')


@pytest.mark.parametrize('suffix', ['.png', '.webp', '.tif'])
def test_animated_files_are_refused(tmp_path, suffix):
    frames = [Image.fromarray(noise(16, 16, 3, seed=seed)) for seed in range(3)]
    path = tmp_path / f'a{suffix}'
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match='3 frames or pages'):
        read_image(path)


@pytest.mark.parametrize('kind', ['png', 'jpg'])
def test_what_training_reads_is_refused_before_decoding_too(tmp_path, monkeypatch, kind):
    path = tmp_path / f'large.{kind}'
    cv2.imwrite(str(path), smooth(20, 30))
    assert read_rgb(path).shape == (20, 30, 3)
    monkeypatch.setattr(image_files, 'MAX_PIXELS', 599)
    monkeypatch.setattr(image_files.cv2, 'imdecode', lambda *_: pytest.fail('decoded'))
    with pytest.raises(DataError, match='30x20 is 0 million pixels, more than the'):
        read_rgb(path)


def test_a_png_of_nothing_but_its_end(tmp_path):
    (tmp_path / 'x.png').write_bytes(b'\x89PNG\r\n\x1a\nIEND\xaeB`\x82')
    with pytest.raises(DataError, match=r'x\.png'):
        read_rgb(tmp_path / 'x.png')


def test_decompression_bombs_are_refused_before_decoding(tmp_path):
    header = struct.pack('>IIBBBBB', 40000, 30000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    body = b''.join(
        struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
        for name, data in [(b'IHDR', header), (b'IDAT', rows), (b'IEND', b'')]
    )
    (tmp_path / 'bomb.png').write_bytes(b'\x89PNG\r\n\x1a\n' + body)
    with pytest.raises(DataError, match=r'bomb\.png: 40000x30000 is 1200 million pixels.*--max-megapixels'):
        read_image(tmp_path / 'bomb.png')
    save(tmp_path / 'a.png', noise(20, 20, 3))
    with pytest.raises(DataError, match='20x20'):
        read_image(tmp_path / 'a.png', max_pixels=399)
    limit = Image.MAX_IMAGE_PIXELS
    assert read_image(tmp_path / 'a.png', max_pixels=400).color.shape == (20, 20, 3)
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize('reader', [read_image, read_rgb])
def test_what_is_no_picture(tmp_path, reader):
    (tmp_path / 'text.png').write_text('hello')
    (tmp_path / 'empty.png').write_bytes(b'')
    (tmp_path / 'folder.png').mkdir()
    for name, reason in [('text', 'not a PNG'), ('empty', 'empty'), ('folder', 'cannot be read'), ('none', 'No such')]:
        with pytest.raises(DataError, match=rf'{name}\.png.*{reason}'):
            reader(tmp_path / f'{name}.png')


@pytest.mark.parametrize(
    'pixels',
    [
        noise(8, 8, 3).astype(np.float32),
        noise(8, 8).astype(np.float32),
        noise(8, 8).astype(np.int32),
        noise(3, 8, 8, dtype=np.uint16),
    ],
)
def test_tiffs_of_other_kinds_are_refused(tmp_path, pixels):
    planar = pixels.dtype == np.uint16
    options = {'planarconfig': 'separate'} if planar else {}
    tifffile.imwrite(tmp_path / 'a.tif', pixels, photometric='rgb' if pixels.ndim == 3 else 'minisblack', **options)
    with pytest.raises(DataError, match=r'a\.tif.*support'):
        read_image(tmp_path / 'a.tif')


def test_damaged_files_never_raise_anything_else(tmp_path):
    """Flips bytes all over small files of every format and depth; a picture or a DataError must come out."""
    sources = {
        'png': save(tmp_path / 'a.png', noise(9, 9, 3)),
        'jpg': save(tmp_path / 'a.jpg', noise(9, 9, 3)),
        'webp': save(tmp_path / 'a.webp', noise(9, 9, 4)),
        'bmp': save(tmp_path / 'a.bmp', noise(9, 9, 3)),
        'tif': save(tmp_path / 'a.tif', noise(9, 9, 3), compression='tiff_adobe_deflate'),
    }
    write_image(tmp_path / 'b.tif', ImageFile(noise(9, 9, 3, dtype=np.uint16)))
    write_image(tmp_path / 'b.png', ImageFile(noise(9, 9, 3, dtype=np.uint16), icc_profile=SRGB))
    rng = np.random.default_rng(0)
    for path in [*sources.values(), tmp_path / 'b.tif', tmp_path / 'b.png']:
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        broken = tmp_path / f'broken{path.suffix}'
        for _ in range(40):
            data = whole.copy()
            data[rng.integers(0, len(data), 3)] = rng.integers(0, 256, 3)
            broken.write_bytes(data.tobytes())
            for reader in (read_image, read_rgb):
                try:
                    reader(broken)
                except DataError as error:
                    assert 'broken' in str(error)
