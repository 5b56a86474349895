"""Damaged images and weights files: read, or refused in a sentence that names the file; never a traceback or a hang.

Each case is made from its number alone. What fails is printed as `images 1234: base, mutations: what happened`, and
comes again by::

    PYTHONPATH=. python tests/field_reports/test_fuzz.py images 1234

The files are read in a process of their own, as a decoder may crash.
"""

import contextlib
import faulthandler
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from ast_plugin.archs.networks import build_network
from ast_plugin.checkpoints import read_checkpoint, save_torch, save_weights
from ast_plugin.data.image_files import encode_image, read_image, read_rgb
from ast_plugin.errors import CheckpointError, DataError

SECONDS = {'images': 2.0, 'weights': 4.0}  # of CPU time a file may take, on a busy machine
HANG = 60.0  # seconds after which a process is given up
BYTES = 2**30  # a file may take above what the process held before
PER_PIXEL = 1e-7, 48  # more of these for each pixel that was read: 46 bytes can be a sound WebP of 80 million pixels
NUMBERS = (0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 24, 32, 48, 64, 127, 128, 255, 256, 4095, 20000, 60000, 65535)
LONG_NUMBERS = (*NUMBERS, 65536, 10**6, 2**31 - 1, 2**31, 2**32 - 1)
PNG_START = b'\x89PNG\r\n\x1a\n'
CHUNKS = ('PLTE tRNS iCCP gAMA cHRM sRGB zTXt iTXt tEXt eXIf pHYs bKGD acTL fcTL fdAT cICP sBIT CgBI IDAT IEND').split()  # noqa: SIM905
# metadata of wrong kinds, chunks whose length or checksum is wrong, missing palettes, strips, tiles and rows
WORST = (45, 59, 118, 139, 174, 256, 810, 815, 2063, 2853, 3858, 4349, 4887, 7231, 7858, 9142, 10956, 15798, 16581)
ENDINGS = ('.png', '.jpg', '.tif', '.bmp', '.webp', '.jpeg', '.PNG', '.tiff', '')


# ---- images


def png(chunks):
    """The bytes of chunks (name, body, checksum or None for the right one)."""
    return PNG_START + b''.join(
        struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body) if crc is None else crc)
        for name, body, crc in chunks
    )


def chunks_of(data):
    position, chunks = 8, []
    while position + 12 <= len(data):
        length, name = struct.unpack_from('>I4s', data, position)
        chunks.append((name, data[position + 8 : position + 8 + length], None))
        position += length + 12
    return chunks


def saved(pixels, kind, mode=None, **options):
    output = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(output, kind, **options)
    return output.getvalue()


def raw_png(pixels, depth, color_type, extra=()):
    """A PNG of any depth; each row of `pixels` is the bytes of a row."""
    height, width = pixels.shape[0], pixels.shape[1] * 8 // depth // {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color_type]
    body = zlib.compress(b''.join(b'\0' + row.tobytes() for row in pixels))
    header = struct.pack('>IIBBBBB', width, height, depth, color_type, 0, 0, 0)
    return png([(b'IHDR', header, None), *extra, (b'IDAT', body, None), (b'IEND', b'', None)])


def make_images():
    """Whole files of all kinds that are read, (name, ending, bytes)."""
    import tifffile

    draw = np.random.default_rng(0)
    rgb, gray = draw.integers(0, 256, (12, 16, 3), np.uint8), draw.integers(0, 256, (12, 16), np.uint8)
    rgba, deep = np.dstack([rgb, gray]), draw.integers(0, 65536, (12, 16, 3), np.uint16)
    rows = draw.integers(0, 256, (12, 16), np.uint8)
    palette = (b'PLTE', draw.integers(0, 256, 768, np.uint8).tobytes(), None)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8769] = 6, 'maker', {0x9003: '2020:01:01 00:00:00'}
    from PIL import ImageCms, PngImagePlugin

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    info = PngImagePlugin.PngInfo()
    info.add_text('Comment', 'words ' * 9, zip=True)
    info.add_itxt('Title', 'x')
    full = {'icc_profile': profile, 'dpi': (72, 72), 'exif': exif}
    images = {
        'png rgb': saved(rgb, 'PNG'),
        'png rgba with metadata': saved(rgba, 'PNG', pnginfo=info, **full),
        'png gray': saved(gray, 'PNG', transparency=7),
        'png palette': raw_png(rows, 8, 3, [palette, (b'tRNS', bytes(range(200)), None)]),
        'png palette 4 bits': raw_png(rows, 4, 3, [(palette[0], palette[1][:48], None)]),
        'png gray 1 bit': raw_png(rows, 1, 0),
        'png gray 2 bits': raw_png(rows, 2, 0, [(b'tRNS', b'\0\1', None)]),
        'png gray alpha': raw_png(rows, 8, 4),
        'png gray 16': raw_png(rows, 16, 0, [(b'gAMA', struct.pack('>I', 45455), None)]),
        'png rgb 16': raw_png(draw.integers(0, 256, (12, 60), np.uint8), 16, 2, [(b'tRNS', bytes(6), None)]),
        'png rgba 16': raw_png(draw.integers(0, 256, (12, 64), np.uint8), 16, 6, [(b'sRGB', b'\0', None)]),
        'jpg': saved(rgb, 'JPEG', quality=90),
        'jpg with metadata': saved(rgb, 'JPEG', comment='words', **full),
        'jpg progressive': saved(rgb, 'JPEG', progressive=True, subsampling=2),
        'jpg gray': saved(gray, 'JPEG'),
        'jpg cmyk': saved(rgb, 'JPEG', 'CMYK'),
        'jpg restart': cv2.imencode('.jpg', np.tile(rgb, (3, 3, 1)), [cv2.IMWRITE_JPEG_RST_INTERVAL, 2])[1].tobytes(),
        'bmp': saved(rgb, 'BMP'),
        'bmp palette': saved(rgb, 'BMP', 'P'),
        'bmp 1 bit': saved(gray, 'BMP', '1'),
        'bmp gray': saved(gray, 'BMP', dpi=(72, 72)),
        'bmp rgba': cv2.imencode('.bmp', rgba)[1].tobytes(),
        'webp': saved(rgb, 'WEBP'),
        'webp lossless': saved(rgba, 'WEBP', lossless=True, icc_profile=profile, exif=exif),
        'webp alpha': saved(rgba, 'WEBP', quality=60),
        'webp animated': saved(rgb, 'WEBP', save_all=True, append_images=[Image.fromarray(rgb[::-1])]),
        'tif': saved(rgb, 'TIFF', icc_profile=profile, dpi=(72, 72)),
        'tif lzw': saved(rgba, 'TIFF', compression='tiff_lzw'),
        'tif deflate': saved(gray, 'TIFF', compression='tiff_adobe_deflate'),
        'tif packbits palette': saved(rgb, 'TIFF', 'P', compression='packbits'),
        'tif fax': saved(gray, 'TIFF', '1', compression='group4'),
        'tif jpeg': saved(rgb, 'TIFF', compression='jpeg'),
        'tif cmyk': saved(rgb, 'TIFF', 'CMYK'),
        'tif big 1 bit': saved(gray, 'TIFF', '1', big_tiff=True),
        'tif pages': saved(rgb, 'TIFF', save_all=True, append_images=[Image.fromarray(rgb)]),
    }
    for name, pixels, options in (
        ('tif rgb 16', deep, {'photometric': 'rgb', 'compression': 'zlib', 'predictor': True}),
        ('tif gray 16', deep[..., 0], {}),
        ('tif gray 16 white is zero', deep[..., 0], {'photometric': 'miniswhite', 'byteorder': '>'}),
        ('tif rgba 16', np.dstack([deep, deep[..., 0]]), {'photometric': 'rgb', 'extrasamples': ['assocalpha']}),
        ('tif planar 16', deep.transpose(2, 0, 1), {'photometric': 'rgb', 'planarconfig': 'separate'}),
        ('tif tiles', np.tile(rgb, (3, 3, 1)), {'photometric': 'rgb', 'tile': (16, 16), 'bigtiff': True}),
        ('tif float', deep[..., 0].astype(np.float32), {}),
    ):
        output = io.BytesIO()
        tifffile.imwrite(output, pixels, **options)
        images[name] = output.getvalue()
    return [(name, '.' + name.split()[0], data) for name, data in images.items()]


def choose(draw, values):
    return values[int(draw.integers(len(values)))]


def spot(draw, size):
    """A place in a file, more often at its beginning."""
    return int(draw.integers(max(1, min(size, choose(draw, (16, 64, 256, size))))))


def cut(draw, data):
    size = int(draw.integers(len(data) + 1)) if draw.random() < 0.7 else max(0, len(data) - int(draw.integers(1, 20)))
    return data[:size], f'cut to {size} of {len(data)} bytes'


def flip(draw, data):
    data, places = bytearray(data), [spot(draw, len(data)) for _ in range(int(draw.integers(1, 9)))]
    for place in places:
        if place < len(data):
            data[place] ^= 1 << int(draw.integers(8))
    return bytes(data), f'bits flipped at {places}'


def overwrite(draw, data):
    place, size, value = spot(draw, len(data)), choose(draw, (1, 2, 4, 30)), choose(draw, (0, 1, 127, 255))
    return data[:place] + bytes([value]) * size + data[place + size :], f'{size} bytes at {place} set to {value}'


def leave_out(draw, data):
    place, size = spot(draw, len(data)), int(draw.integers(1, 20))
    return data[:place] + data[place + size :], f'{size} bytes at {place} left out'


def insert(draw, data):
    place, size = spot(draw, len(data)), choose(draw, (1, 2, 100, 5000))
    return data[:place] + draw.bytes(size) + data[place:], f'{size} random bytes put in at {place}'


def repeat(draw, data):
    place, size = spot(draw, len(data)), int(draw.integers(1, 60))
    return data[: place + size] + data[place:], f'{size} bytes at {place} twice'


def append(draw, data):
    size = choose(draw, (1, 100, 70000))
    return data + draw.bytes(size), f'{size} random bytes appended'


def mutate_png(draw, data):
    chunks = chunks_of(data)
    if not chunks:
        return cut(draw, data)
    number = int(draw.integers(len(chunks)))
    name, body, _ = chunks[number]
    what = choose(draw, ('header', 'header', 'drop', 'twice', 'move', 'crc', 'body', 'short', 'new', 'pixels', 'name'))
    if what == 'header':
        number, (name, body, _) = 0, chunks[0]
        place, value = choose(draw, [(0, '>I'), (4, '>I'), *[(i, 'B') for i in range(8, 13)]]), 0
        value = choose(draw, LONG_NUMBERS if place[1] == '>I' else NUMBERS[:-6])
        body = bytearray(body.ljust(13, b'\0'))
        struct.pack_into(place[1], body, place[0], value)
        chunks[0] = (name, bytes(body), None)
        what = f'header byte {place[0]} = {value}'
    elif what == 'drop':
        del chunks[number]
    elif what == 'twice':
        chunks.insert(int(draw.integers(len(chunks) + 1)), chunks[number])
    elif what == 'move':
        chunks.insert(int(draw.integers(len(chunks))), chunks.pop(number))
    elif what == 'crc':
        chunks[number] = (name, body, int(draw.integers(2**32)))
    elif what == 'body':
        body, more = choose(draw, (flip, overwrite, leave_out, insert))(draw, body or b'\0')
        chunks[number] = (name, body, None)
        what = more
    elif what == 'short':
        chunks[number] = (name, body[: int(draw.integers(len(body) + 1))], None)
    elif what == 'pixels':
        try:
            rows = zlib.decompress(b''.join(body for name, body, _ in chunks if name == b'IDAT'))
        except zlib.error:  # an earlier mutation's doing
            rows = b'\0' * 600
        rows, more = choose(draw, (flip, overwrite, leave_out, insert))(draw, rows)
        chunks = [chunk for chunk in chunks if chunk[0] != b'IDAT']
        chunks.insert(max(1, len(chunks) - 1), (b'IDAT', zlib.compress(rows), None))
        what += f', {more}'
    else:
        new = choose(draw, CHUNKS)
        if what == 'name':
            chunks[number] = (new.encode(), body, None)
        else:
            body = choose(draw, (b'', b'\0', draw.bytes(5), draw.bytes(300), b'name\0\0' + zlib.compress(bytes(10**6))))
            chunks.insert(choose(draw, (1, len(chunks) - 1, number)), (new.encode(), body, None))
        what += f' {new}'
    return png(chunks), f'chunk {name.decode("latin-1")}: {what}'


def mutate_jpeg(draw, data):
    segments, position = [], 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], 'big')
        segments.append(data[position:end])
        position = end
    if not segments:
        return flip(draw, data)
    number = int(draw.integers(len(segments)))
    segment = segments[number]
    what = choose(draw, ('frame', 'frame', 'drop', 'twice', 'move', 'length', 'body', 'marker', 'scan'))
    if what == 'frame':
        number = next((n for n, each in enumerate(segments) if each[1] in (0xC0, 0xC1, 0xC2)), number)
        segment = bytearray(segments[number])
        place = choose(draw, (1, 4, (5, 2), (7, 2), 9, 10, 11, 12))
        place, size = place if isinstance(place, tuple) else (place, 1)
        value = choose(draw, (0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCF) if place == 1 else NUMBERS) % 256**size
        if len(segment) >= place + size:
            segment[place : place + size] = value.to_bytes(size, 'big')
        segments[number] = bytes(segment)
        what = f'frame byte {place} = {value}'
    elif what == 'drop':
        del segments[number]
    elif what == 'twice':
        segments.insert(int(draw.integers(len(segments) + 1)), segment)
    elif what == 'move':
        segments.insert(int(draw.integers(len(segments))), segments.pop(number))
    elif what == 'length':
        value = choose(draw, NUMBERS) % 65536
        segments[number] = segment[:2] + value.to_bytes(2, 'big') + segment[4:]
        what += f' = {value}'
    elif what == 'body':
        body, more = choose(draw, (flip, overwrite, leave_out, insert))(draw, segment[4:] or b'\0')
        segments[number] = segment[:2] + (len(body) + 2 & 0xFFFF).to_bytes(2, 'big') + body
        what = more
    elif what == 'marker':
        value = int(draw.integers(0xC0, 0x100))
        segments[number] = bytes([0xFF, value]) + segment[2:]
        what += f' = {value:02x}'
    else:
        scan, more = choose(draw, (flip, overwrite, leave_out, insert, cut))(draw, data[position:] or b'\0')
        return data[:position] + scan, f'scan: {more}'
    return data[:2] + b''.join(segments) + data[position:], f'segment {segment[1]:02x}: {what}'


def mutate_tiff(draw, data):
    if len(data) < 16 or data[:2] not in (b'II', b'MM'):
        return cut(draw, data)
    order, is_big = '<' if data[:2] == b'II' else '>', data[2:4] in (b'+\0', b'\0+')
    offset = struct.unpack_from(order + ('Q' if is_big else 'I'), data, 8 if is_big else 4)[0]
    head, entry, value_at = (8, 20, 12) if is_big else (2, 12, 8)
    if offset + head > len(data):
        return flip(draw, data)
    count = min(struct.unpack_from(order + ('Q' if is_big else 'H'), data, offset)[0], 40)
    data = bytearray(data)
    place = offset + head + entry * int(draw.integers(max(1, count)))
    if place + entry > len(data):
        return flip(draw, bytes(data))
    tag = struct.unpack_from(order + 'H', data, place)[0]
    what = choose(draw, ('value', 'value', 'value', 'type', 'count', 'tag', 'next'))
    if what == 'value':
        kind = struct.unpack_from(order + 'H', data, place + 2)[0]
        value = choose(draw, LONG_NUMBERS)
        struct.pack_into(
            order + ('H' if kind == 3 else 'I'), data, place + value_at, value % (65536 if kind == 3 else 2**32)
        )
    elif what == 'type':
        value = choose(draw, (*range(19), 255))
        struct.pack_into(order + 'H', data, place + 2, value)
    elif what == 'count':
        value = choose(draw, LONG_NUMBERS)
        struct.pack_into(order + ('Q' if is_big else 'I'), data, place + 4, value)
    elif what == 'tag':
        value = choose(
            draw,
            (
                254,
                256,
                257,
                258,
                259,
                262,
                266,
                273,
                274,
                277,
                278,
                279,
                284,
                317,
                320,
                322,
                323,
                324,
                330,
                338,
                339,
                347,
                530,
                34665,
                34675,
                33723,
                65000,
            ),
        )
        struct.pack_into(order + 'H', data, place, value)
    else:
        value = choose(draw, (offset, 8, 1, len(data), 2**31))
        end = offset + head + entry * count
        if end + 4 <= len(data):
            struct.pack_into(order + 'I', data, end, value)
    return bytes(data), f'tag {tag}: {what} = {value}'


def mutate_bmp(draw, data):
    place, form = choose(
        draw,
        (
            (2, 'I'),
            (10, 'I'),
            (14, 'I'),
            (18, 'i'),
            (22, 'i'),
            (22, 'i'),
            (26, 'H'),
            (28, 'H'),
            (28, 'H'),
            (30, 'I'),
            (34, 'I'),
            (46, 'I'),
            (54, 'I'),
        ),
    )
    value = choose(draw, NUMBERS[:-1]) if form == 'H' else choose(draw, (*NUMBERS, 10**6, 2**31 - 1, -1, -12, -(2**31)))
    data = bytearray(data)
    if len(data) >= place + 4:
        struct.pack_into('<' + form, data, place, value % 2**32 if form == 'I' else value)
    return bytes(data), f'header byte {place} = {value}'


def mutate_webp(draw, data):
    chunks, position = [], 12
    while position + 8 <= len(data):
        size = int.from_bytes(data[position + 4 : position + 8], 'little')
        chunks.append((data[position : position + 4], data[position + 8 : position + 8 + size]))
        position += 8 + size + size % 2
    if not chunks:
        return flip(draw, data)
    number = int(draw.integers(len(chunks)))
    name, body = chunks[number]
    what = choose(draw, ('drop', 'twice', 'move', 'body', 'body', 'name', 'size', 'short'))
    lie = None
    if what == 'drop':
        del chunks[number]
    elif what == 'twice':
        chunks.insert(int(draw.integers(len(chunks) + 1)), chunks[number])
    elif what == 'move':
        chunks.insert(int(draw.integers(len(chunks))), chunks.pop(number))
    elif what == 'body':
        body, more = choose(draw, (flip, overwrite, leave_out, insert))(draw, body or b'\0')
        chunks[number], what = (name, body), more
    elif what == 'name':
        new = choose(draw, (b'VP8 ', b'VP8L', b'VP8X', b'ALPH', b'ANIM', b'ANMF', b'ICCP', b'EXIF', b'XMP ', b'zzzz'))
        chunks[number], what = (new, body), f'name = {new.decode()}'
    elif what == 'short':
        chunks[number] = (name, body[: int(draw.integers(len(body) + 1))])
    else:
        lie = choose(draw, LONG_NUMBERS)
        what += f' = {lie}'
    parts = [name + struct.pack('<I', len(body)) + body + b'\0' * (len(body) % 2) for name, body in chunks]
    if lie is not None:
        parts[number] = parts[number][:4] + struct.pack('<I', lie) + parts[number][8:]
    body = b'WEBP' + b''.join(parts)
    return b'RIFF' + struct.pack('<I', len(body)) + body, f'chunk {name.decode("latin-1")}: {what}'


BY_FORMAT = {'.png': mutate_png, '.jpg': mutate_jpeg, '.tif': mutate_tiff, '.bmp': mutate_bmp, '.webp': mutate_webp}
ON_BYTES = (cut, flip, overwrite, leave_out, insert, repeat, append)


def mutated_image(number, images):
    """File `number`: its ending, its bytes, and how it was made."""
    draw = np.random.default_rng([1, number])
    name, ending, data = choose(draw, images)
    told = [name]
    for _ in range(choose(draw, (1, 1, 1, 2, 3))):
        mutate = BY_FORMAT[ending] if draw.random() < 0.6 else choose(draw, ON_BYTES)
        data, line = mutate(draw, data)
        told.append(line)
    if draw.random() < 0.1:
        ending = choose(draw, ENDINGS)
        told.append(f'named {ending or "nothing"}')
    return ending, data, '; '.join(told)


def try_image(path):
    """Read a file as infer and as training do, and write it again as it is and as PNG."""
    problems, ways = [], {}
    for read in (read_image, read_rgb):
        try:
            ways[read] = read(path)
        except DataError as error:
            check_message(error, path)
    image, rgb = ways.get(read_image), ways.get(read_rgb)
    if image is None:
        return 'refused' if rgb is None else 'training alone reads it'
    check_array(image.color)
    if image.alpha is not None:
        assert image.alpha.shape == image.color.shape[:2] and image.alpha.dtype == image.color.dtype, (
            'the alpha channel'
        )
    if rgb is None:
        problems.append('infer alone reads it')
    else:
        check_array(rgb)
        color = image.color if image.color.ndim == 3 else np.repeat(image.color[..., None], 3, 2)
        if rgb.dtype != color.dtype or rgb.shape != color.shape:
            problems.append(f'differs: {rgb.dtype}{rgb.shape} {color.dtype}{color.shape}')
        elif not np.array_equal(rgb, color):
            problems.append(f'differs by {np.abs(rgb.astype(int) - color).max()}')
    if image.color.size > 10**7:
        return f'read {image.color.shape[0] * image.color.shape[1]} pixels'
    for target in (path.with_name('x.png'), path.with_name(f'y{path.suffix}')):
        try:
            content = encode_image(target, image)
        except DataError as error:
            check_message(error, target)
            problems.append(f'not written: {error}')
            continue
        target.write_bytes(content)
        again = read_image(target)
        if target.suffix == '.png':
            assert np.array_equal(again.color, image.color), 'written as PNG, the pixels are others'
            assert (again.alpha is None) == (image.alpha is None), 'written as PNG, alpha is another'
    return '; '.join(problems) or 'read'


def check_array(pixels):
    assert pixels.dtype in (np.uint8, np.uint16), f'pixels are {pixels.dtype}'
    assert pixels.ndim == 2 or pixels.shape[2:] == (3,), f'pixels are {pixels.shape}'
    assert pixels.size, f'pixels are {pixels.shape}'


def check_message(error, path):
    message = str(error)
    assert str(path) in message, f'the message does not name the file: {message}'
    assert '\n' not in message and len(message) < 2000, f'the message is no sentence: {message[:300]}'


# ---- weights


class Call:
    """Pickled, it calls a function when it is read; a careless reader makes the folder of its argument."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


PROOF = Path(tempfile.gettempdir()) / f'basicsr_fuzz_proof_{os.getpid()}'
SOUND_NETWORK = {
    'type': 'AST',
    'img_size': 32,
    'embed_dim': 4,
    'depths': [1] * 9,
    'num_heads': [1] * 9,
    'window_size': 4,
}
VALUES = (
    None,
    True,
    -1,
    0,
    3,
    1000,
    2**31,
    2**63,
    10**30,
    0.5,
    float('nan'),
    float('inf'),
    'text',
    '',
    [],
    [[]],
    {},
    {'a': {}},
    [1] * 9,
)


def make_weights():
    """What whole files hold: (name, ending, content or bytes)."""
    from safetensors.torch import save

    from ast_plugin.archs.spandrel_arch import recognise

    with contextlib.suppress(Exception):
        recognise({'x': torch.zeros(1)})  # imports spandrel, which takes seconds, ahead of the clock
    torch.manual_seed(0)
    state = build_network(SOUND_NETWORK).state_dict()
    small = {name: state[name] for name in list(state)[:5]}
    metadata = {'network': json.dumps(SOUND_NETWORK), 'format': 'pt'}
    contents = [
        ('bare', state),
        ('params', {'params': state}),
        ('both', {'params': state, 'params_ema': state}),
        ('module', {'state_dict': {f'module.{name}': tensor for name, tensor in state.items()}, 'epoch': 3}),
        ('half', {name: tensor.half() for name, tensor in state.items()}),
        ('small', {'params': small}),
        (
            'training',
            {
                'iter': 3,
                'state_dict': small,
                'optimizer': {'state': {0: {'step': torch.tensor(1.0)}}, 'param_groups': [{'lr': 1e-4}]},
            },
        ),
    ]
    files = []
    for name, content in contents:
        for is_zip in (True, False):
            output = io.BytesIO()
            torch.save(content, output, _use_new_zipfile_serialization=is_zip)
            files.append((f'{name}, {"zip" if is_zip else "legacy"}', '.pth', output.getvalue(), content))
    files.append(('bare, safetensors', '.safetensors', save(state), state))
    files.append(('with network, safetensors', '.safetensors', save(state, metadata), state))
    files.append(('small, safetensors', '.safetensors', save(small, metadata), small))
    return files


def hostile(draw, function=os.mkdir):
    calls = (
        Call(os.mkdir, str(PROOF)),
        Call(os.system, f'mkdir {PROOF}'),
        Call(eval, f'__import__("os").mkdir({str(PROOF)!r})'),
        Call(exec, f'import os; os.mkdir({str(PROOF)!r})'),
        Call(subprocess.check_call, ['mkdir', str(PROOF)]),
        Call(getattr, '', 'join'),
        Call(bytearray, 10**11),
        Call(list, range(10**12)),
        Call(open, str(PROOF), 'w'),
    )
    number = int(draw.integers(len(calls)))
    return calls[number], f'a call, {number}'


def change_content(draw, content):
    """Another content: what a dictionary of weights may be by mistake or ill will."""
    from collections import OrderedDict

    def tensor():
        one = torch.zeros(1)
        number = int(draw.integers(12))
        return (
            torch.zeros(0),
            one.expand(10**5, 10**5),
            torch.zeros(()),
            torch.ones(3, dtype=torch.int64),
            torch.ones(2, 3, dtype=torch.complex64),
            torch.zeros(2, 2).to_sparse(),
            torch.full((3,), float('nan')),
            torch.nn.Parameter(torch.ones(2)),
            torch.zeros(2, device='meta'),
            torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            torch.zeros(2, dtype=torch.bool),
            one.expand(10**5, 4, 3, 3),
        )[number], f'tensor {number}'

    def key():
        return choose(
            draw, ('', 'x', 3, None, (1, 2), 'params', 'state_dict', 'a.b', 'é\n', 'module.', b'x', 1.5, 'x' * 2000)
        )

    def nest(value, depth):
        for _ in range(depth):
            value = {choose(draw, ('params', 'state_dict', 'model', 'x')): value}
        return value

    what = int(draw.integers(10))
    place = content
    while isinstance(place, dict) and place and isinstance(next(iter(place.values())), dict):
        place = next(iter(place.values()))
    names = list(place)
    if what == 0:
        return nest(content, depth := choose(draw, (1, 2, 30, 900, 3000))), f'nested {depth} times'
    if what == 1:
        return [content], 'in a list'
    if what == 2:
        value = choose(draw, VALUES)
        return value, f'{value!r} instead'
    call, told = hostile(draw)
    if what == 3:
        return call, told
    changed = OrderedDict(place) if draw.random() < 0.5 else dict(place)
    name = choose(draw, names)
    if what == 4:
        changed[key()] = call
    elif what in (5, 6):
        changed[name], told = tensor()
        told = f'{name} is {told}'
    elif what == 7:
        new, value = key(), choose(draw, (*VALUES, np.float64(1), np.zeros(2)))
        changed[new], told = value, f'{new!r:.20} is {value!r}'
    elif what == 8:
        old, told = changed.pop(name), f'{name} is left out'
        if draw.random() < 0.5:
            new = key()
            changed[new], told = old, f'{name} is called {new!r:.20}'
    else:
        changed, told = dict.fromkeys(changed, tensor()[0]), 'all tensors are others'
    return {'params': changed} if draw.random() < 0.5 else changed, told


def mutate_zip(draw, data):
    """A part of the archive is changed with its checksum right, or left out."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:
        return flip(draw, data)
    number = (
        next((n for n, part in enumerate(parts) if part[0].endswith('data.pkl')), 0)
        if draw.random() < 0.6
        else int(draw.integers(len(parts)))
    )
    name, body = parts[number]
    if draw.random() < 0.15:
        del parts[number]
        told = 'left out'
    else:
        body, told = choose(draw, ON_BYTES)(draw, body or b'\0')
        parts[number] = name, body
    output = io.BytesIO()
    how = zipfile.ZIP_STORED if draw.random() < 0.9 else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(output, 'w', how) as archive:
        for part in parts:
            archive.writestr(*part)
    return output.getvalue(), f'{name}: {told}'


def mutate_safetensors(draw, data):
    size = int.from_bytes(data[:8], 'little')
    try:
        header = dict(json.loads(data[8 : 8 + size]))
    except (ValueError, TypeError):
        return flip(draw, data)
    what = int(draw.integers(6))
    name = choose(
        draw, [name for name, value in header.items() if name != '__metadata__' and isinstance(value, dict)] or ['x']
    )
    if what == 0:
        value = choose(draw, (0, 1, size - 1, size + 1, 2**31, 2**40, 2**63, 2**64 - 1))
        return value.to_bytes(8, 'little') + data[8:], f'the header is of {value} bytes'
    if what == 1:
        field, value = (
            choose(draw, ('dtype', 'shape', 'data_offsets')),
            choose(draw, (*VALUES, 'F64', 'F8_E4M3', 'BF16', [0, 0], [2**62, 4], [0, 2**62])),
        )
        header[name] = {**header.get(name, {}), field: value}
        told = f'{name} has {field} {value!r}'
    elif what in (2, 3):
        network = dict(SOUND_NETWORK)
        field = choose(draw, (*network, 'attention', 'ffn', 'mlp_ratio', 'unknown', 'in_chans'))
        network[field] = choose(draw, (*VALUES, 10**5, [10**5] * 9, 'Mixed', 'SwinIR'))
        header['__metadata__'] = {'network': json.dumps(network)}
        told = f'network has {field} {network[field]!r}'
    elif what == 4:
        value = choose(
            draw,
            (
                '[' * 10**5,
                'NaN',
                '{"type": 3}',
                '"',
                '1' * 5000,
                '{"type": "AST", "type": "AST_XS"}',
                '{"type": "os.system"}',
            ),
        )
        header['__metadata__'] = {'network': value}
        told = f'network is {value:.30}'
    else:
        header['__metadata__'] = value = choose(draw, VALUES)
        told = f'metadata are {value!r}'
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, 'little') + text + data[8 + size :], told


def mutate_pickle(draw, data):
    """Opcodes are put in between, with lengths that are lies."""
    codes = (
        b'T' + struct.pack('<I', 2**31 - 1),
        b'\x8d' + struct.pack('<Q', 2**62),
        b'\x8e' + struct.pack('<Q', 2**40),
        b'\x8b' + struct.pack('<i', 2**31 - 1),
        b'\x95' + struct.pack('<Q', 2**60),
        b'\x8a\xff',
        b'R',
        b'Q',
        b'b',
        b't',
        b's',
        b'u',
        b'(',
        b'.',
        b'0',
        b'2',
        b'(' * 3000,
        b']' * 3000,
        b'}' * 3000 + b's' * 2999,
        b')' + b'\x85' * 20000,
        b'h\xff',
        b'r' + struct.pack('<I', 2**31),
        b'cos\nsystem\n',
        b'ctorch\nload\n',
        b'\x80\xff',
        b'N',
        b'I1\n',
        b'Lx\n',
        b'F1e999\n',
        b'\x93',
        b'P0\n',
    )
    place, code = spot(draw, len(data)), choose(draw, codes)
    return data[:place] + code + data[place:], f'{code[:12]!r} ({len(code)}) put in at {place}'


def mutated_weights(number, files):
    """File `number`: its ending, its bytes, and how it was made."""

    draw = np.random.default_rng([2, number])
    name, ending, data, content = choose(draw, files)
    told, first = [name], draw.random()
    if first < 0.45 and ending == '.pth':
        content, line = change_content(draw, content)
        output = io.BytesIO()
        protocol = choose(draw, (2, 3, 4, 5))
        if draw.random() < 0.15 and 'tensor' not in line:
            data = pickle.dumps(
                content if isinstance(content, Call) else {'params': Call(os.mkdir, str(PROOF))}, protocol
            )
            line = f'a pickle without torch, {line}'
        else:
            sys.setrecursionlimit(50000)
            torch.save(content, output, pickle_protocol=protocol, _use_new_zipfile_serialization=', zip' in name)
            sys.setrecursionlimit(1000)
            data = output.getvalue()
        told.append(line)
    if first >= 0.45 or draw.random() < 0.1 or ending == '.safetensors':
        for _ in range(choose(draw, (1, 1, 2))):
            special = (
                mutate_safetensors if ending == '.safetensors' else mutate_zip if ', zip' in name else mutate_pickle
            )
            data, line = (special if draw.random() < 0.6 else choose(draw, ON_BYTES))(draw, data)
            told.append(line)
    if draw.random() < 0.05:
        ending = '.safetensors' if ending == '.pth' else '.pth'
        told.append(f'named {ending}')
    return ending, data, '; '.join(told)


def try_weights(path):
    """Build what infer builds of a file, or load it as info does and read it as a training state."""
    from ast_plugin.archs.networks import load_network, network_of
    from ast_plugin.checkpoints import read_checkpoint, read_state
    from ast_plugin.evaluation.restorer import Restorer

    def load(path):
        return load_network(SOUND_NETWORK, path)

    ways = [
        (Restorer.from_weights,),
        (load, read_state),
        (lambda path: network_of(read_checkpoint(path)),),
        (read_checkpoint,),
    ]
    ways += [(read_checkpoint,)] * 2
    results = []
    for way in ways[int(path.stem[4:]) % len(ways)]:
        try:
            way(path)
            results.append('read')
        except CheckpointError as error:
            results.append('refused')
            check_message(error, path)
    assert not PROOF.exists(), 'the file has run code'
    return ' '.join(results)


# ---- running them


def held(name):
    """VmRSS or VmHWM of this process in bytes; 0 where the system does not tell."""
    try:
        lines = Path('/proc/self/status').read_text()
        return 1024 * int(lines.partition(f'{name}:')[2].split()[0])
    except OSError:
        return 0


def forget_peak():
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')


def run(kind, numbers, folder):
    """Try files and print a line of JSON for each: [number, how it was made, what became of it, is it a fault]."""
    make, attempt = KINDS[kind]
    sources = make()
    for number in numbers:
        ending, data, told = MUTATED[kind](number, sources)
        path = folder / f'case{number}{ending}'
        path.write_bytes(data)
        print(json.dumps([number, told]), flush=True)
        faulthandler.dump_traceback_later(HANG, exit=True)
        forget_peak()
        before, start, is_fault = held('VmRSS'), time.process_time(), False
        try:
            result = attempt(path)
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)
            where = next((f for f in reversed(place) if 'ast_plugin' in f.filename), place[-1])
            is_fault = True
            file, line = Path(where.filename).name, where.lineno
            result = f'{type(error).__name__}: {str(error)[:300]} (at {file}:{line})'
        seconds, used = time.process_time() - start, held('VmHWM') - before
        faulthandler.cancel_dump_traceback_later()
        pixels = int(result.split()[1]) if result.endswith(' pixels') else 0
        if seconds > SECONDS[kind] + pixels * PER_PIXEL[0]:
            is_fault, result = True, f'took {seconds:.1f} s: {result}'
        if used > BYTES + pixels * PER_PIXEL[1]:
            is_fault, result = True, f'took {used / 2**20:.0f} MiB: {result}'
        print(json.dumps([number, result, is_fault, round(seconds, 3), used >> 20]), flush=True)
        path.unlink()


KINDS = {'images': (make_images, try_image), 'weights': (make_weights, try_weights)}
MUTATED = {'images': mutated_image, 'weights': mutated_weights}


def find_faults(kind, numbers, folder):
    """Try files in a process of their own, in another one from where that died; a line for each fault."""
    told, faults = {}, []
    while numbers:
        arguments = [sys.executable, __file__, kind, str(numbers[0]), str(numbers[-1] + 1), str(folder)]
        child = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        for number, line, *rest in map(json.loads, child.stdout.splitlines()):
            if not rest:
                told[number] = line
            elif rest[0]:
                faults.append(f'{kind} {number}: {told[number]}: {line}')
        if not child.returncode:
            break
        assert told, child.stderr
        last = max(told)
        faults.append(f'{kind} {last}: {told[last]}: exit status {child.returncode}: {child.stderr[-1500:]}')
        numbers = range(last + 1, numbers[-1] + 1)
    return faults


@pytest.mark.parametrize('kind, count', [('images', 2000), ('weights', 500)])
def test_fuzz(kind, count, tmp_path):
    faults = find_faults(kind, range(count), tmp_path)
    assert not faults, '\n'.join(faults)


def test_fuzz_infer(tmp_path):
    """A folder of the worst: each is restored or told in a line."""
    images = make_images()
    folder, out = tmp_path / 'in', tmp_path / 'out'
    folder.mkdir()
    save_weights(tmp_path / 'w.safetensors', build_network(SOUND_NETWORK).state_dict(), SOUND_NETWORK)
    for number in (*WORST, *range(100 - len(WORST))):
        ending, data, _ = mutated_image(number, images)
        (folder / f'{number}.{ending or ".png"}').write_bytes(data)
    command = [sys.executable, '-m', 'ast_plugin', 'infer', '--weights', tmp_path / 'w.safetensors']
    command += ['-i', folder, '-o', out]
    child = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert 'Traceback' not in child.stderr and child.returncode == 1, child.stderr
    told = {line.split(': ')[2] for line in child.stderr.splitlines() if line.startswith('basicsr: error: ')}
    for file in folder.iterdir():
        assert (str(file) in told) != any(out.glob(f'{file.stem}*')), f'{file.name}: {child.stderr}'


@pytest.mark.parametrize('part', ['epoch', 'optimizers', 'schedulers'])
def test_states_without_a_part(part, tmp_path):
    from ast_plugin.models.preflight import _check_resume

    whole = {'epoch': 1, 'iter': 2, 'optimizers': [], 'schedulers': []}
    for change in ({key: value for key, value in whole.items() if key != part}, {**whole, part: 'text'}):
        save_torch(tmp_path / '2.state', change)
        with pytest.raises(CheckpointError, match=f'2.state lacks {part}'):
            _check_resume({'path': {'resume_state': str(tmp_path / '2.state')}})


@pytest.mark.parametrize('place', ['data.pkl', 'data/0'])
def test_flipped_bit_in_weights(place, tmp_path):
    save_torch(tmp_path / 'w.pth', {'params': {'a': torch.zeros(100)}})
    with zipfile.ZipFile(tmp_path / 'w.pth') as file:
        part = next(info for info in file.infolist() if info.filename.endswith(place))
    content = bytearray((tmp_path / 'w.pth').read_bytes())
    content[content.index(part.filename.encode()) + 60 if place == 'data.pkl' else len(content) // 2] ^= 1
    (tmp_path / 'w.pth').write_bytes(content)
    with pytest.raises(CheckpointError, match=r'w\.pth.*'):
        read_checkpoint(tmp_path / 'w.pth')


if __name__ == '__main__':
    first, last = int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else int(sys.argv[2]) + 1
    if len(sys.argv) > 4:
        run(sys.argv[1], range(first, last), Path(sys.argv[4]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(sys.argv[1], range(first, last), Path(folder))
