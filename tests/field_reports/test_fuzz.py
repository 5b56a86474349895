"""Damaged images and weights files are read, or rejected with a message that names the file; no traceback, no hang.

Each case is made from its number alone. What fails is printed as `images 1234: base, mutations: what happened`, and
comes again, with its file left in a folder, by::

    PYTHONPATH=. python tests/field_reports/test_fuzz.py images 1234 1235 FOLDER

The files are read in a process of their own, as a decoder may crash.
"""

import contextlib
import faulthandler
import io
import itertools
import json
import os
import pickle
import random
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
import tifffile
import torch
from PIL import Image, ImageCms, PngImagePlugin
from safetensors.torch import save

from ast_plugin.archs.networks import build_network, load_network, network_of
from ast_plugin.archs.spandrel_arch import recognise
from ast_plugin.checkpoints import read_checkpoint, read_state, save_torch, save_weights
from ast_plugin.data.image_files import encode_image, read_image, read_rgb
from ast_plugin.errors import CheckpointError, DataError
from ast_plugin.evaluation.restorer import Restorer
from ast_plugin.models.preflight import _check_resume

ROOT = Path(__file__).parents[2]
SECONDS = {'images': 2.0, 'weights': 4.0}  # of CPU time a file may take, on a busy machine
HANG = 60.0  # seconds after which a process is given up
BYTES = 2**30  # a file may take above what the process held before
PER_PIXEL = 1e-7, 48  # more of these for each pixel that was read: 46 bytes can be a sound WebP of 80 million pixels
NUMBERS = (*range(10), 12, 13, 15, 16, 17, 18, 24, 32, 48, 64, 127, 128, 255, 256, 4095, 20000, 60000, 65535, 65536)
NUMBERS += (10**6, 2**31 - 1, 2**31, 2**32 - 12, 2**32 - 1)
# images whose sizes lie, without a palette or header, with metadata of wrong kinds: these came out as tracebacks once
WORST = (359, 989, 1130, 1382, 1530, 2121, 2149, 2730, 3352, 3418, 4306, 4782, 6819, 6837, 7167)


class Draw(random.Random):
    """Seeded random choices; names of choices from tables are collected in `told`."""

    told = ()

    def of(self, table):
        self.told += (name := self.choice(list(table)),)
        return table[name]

    def place(self, data):
        """Return an offset in a file, more likely near its beginning."""
        return self.randrange(max(1, min(len(data), self.choice((16, 64, 256, len(data))))))


# ---- mutations of bytes, and of the chunks or segments of a file


def edit(draw, data):
    """Change, delete, repeat or insert bytes at an offset, or truncate there."""
    place, size = draw.choice((draw.place(data), len(data))), draw.choice((0, 1, 1, 4, 19, 30, len(data)))
    old = data[place : place + size]
    news = [
        b'',
        old * 2,
        bytes(size),
        b'\x7f' * size,
        b'\xff' * size,
        bytes(byte ^ 1 << draw.randrange(8) for byte in old),
    ]
    new = draw.choice([*news, *map(draw.randbytes, (1, 2, 100, 5000))])[:70000]
    draw.told += (f'{size} bytes at {place} become {len(new)}',)
    return data[:place] + new + data[place + size :]


def set_number(draw, data, fields, numbers=NUMBERS):
    """Change the number in one of `fields`, given as (offset, format)."""
    data, (place, form) = bytearray(data), draw.choice(fields)
    value = draw.choice(numbers) % 256 ** struct.calcsize(form)
    draw.told += (f'{value} at {place}',)
    if place + struct.calcsize(form) <= len(data):
        struct.pack_into(form, data, place, value)
    return bytes(data)


FORMATS = {  # where parts begin, the form of their heads, the size's place and form, what follows, a part
    '.png': (8, '>I4s', (0, '>I'), lambda size: 4, lambda n, b: struct.pack('>I4s', len(b), n) + b + crc(n + b)),
    '.jpg': (2, '>2sH', (2, '>H'), lambda size: -2, lambda n, b: struct.pack('>2sH', n, len(b) + 2 & 65535) + b),
    '.webp': (12, '<4sI', (4, '<I'), lambda size: size % 2, lambda n, b: struct.pack('<4sI', n, len(b)) + b + pad(b)),
}


def crc(data):
    return struct.pack('>I', zlib.crc32(data))


def pad(data):
    return bytes(len(data) % 2)


def split(ending, data):
    """Return the chunks of a file as (name, body, all bytes), and the bytes after them."""
    (place, form, _, tail, _), parts = FORMATS[ending], []
    head = struct.calcsize(form)
    while place + head <= len(data) and data[place : place + 2] != b'\xff\xda':
        size, name = sorted(struct.unpack_from(form, data, place), key=lambda field: isinstance(field, bytes))
        end = max(place + head, place + head + size + tail(size))
        parts.append((name, data[place + head : min(place + head + size, end)], data[place:end]))
        place = end
    return parts, data[place:]


def on_parts(ending, names, headers=(), fields=()):
    """Mutate one chunk or a number in one of `headers`; sizes and checksums stay valid unless they are the target."""
    start, _, size, _, join = FORMATS[ending]
    changes = {
        'left out': lambda draw, name, body, part: b'',
        'twice': lambda draw, name, body, part: part * 2,
        'renamed': lambda draw, name, body, part: join(draw.choice(names), body),
        'new one before': lambda draw, name, body, part: join(draw.choice(names), draw.choice(BODIES)) + part,
        'changed': lambda draw, name, body, part: join(name, edit(draw, body)),
        'wrong size': lambda draw, name, body, part: set_number(draw, part, [size]),
        'wrong checksum': lambda draw, name, body, part: part[:-4] + draw.randbytes(4),
    }

    def mutate(draw, data):
        parts, rest = split(ending, data)
        number = draw.randrange(len(parts) or 1)
        bytes_of, header = [part[2] for part in parts], [n for n, part in enumerate(parts) if part[0] in headers]
        if not parts:
            return edit(draw, data)
        if header and draw.random() < 0.2:
            name, body, _ = parts[header[0]]
            bytes_of[header[0]] = join(name, set_number(draw, body, fields))
        elif draw.random() < 0.15:
            bytes_of.insert(draw.randrange(len(parts)), bytes_of.pop(number))
            draw.told += (f'{parts[number][0]} moved',)
        else:
            draw.told += (str(parts[number][0]),)
            bytes_of[number] = draw.of(changes)(draw, *parts[number])
        data = data[:start] + b''.join(bytes_of) + rest
        return data[:4] + struct.pack('<I', len(data) - 8) + data[8:] if ending == '.webp' else data

    return mutate


def change_pixels(draw, data):
    """Change the rows of a PNG, with valid compression and checksums."""
    parts, rest = split('.png', data)
    rows = b'\0' * 600
    with contextlib.suppress(zlib.error):  # an earlier mutation's doing
        rows = zlib.decompress(b''.join(body for name, body, _ in parts if name == b'IDAT'))
    before, end = b''.join(part for name, _, part in parts if name not in (b'IDAT', b'IEND')), b'IEND'
    chunk = FORMATS['.png'][-1]
    return data[:8] + before + chunk(b'IDAT', zlib.compress(edit(draw, rows))) + chunk(end, b'') + rest


def change_tag(draw, data):
    """Change number, type, count or value of a TIFF tag, or the offset of the next page."""
    order, is_big = '<>'[data[:2] == b'MM'], data[2:4] in (b'+\0', b'\0+')
    long, head, entry = (order + 'Q', 8, 20) if is_big else (order + 'I', 2, 12)
    try:
        start = struct.unpack_from(long, data, 8 if is_big else 4)[0]
        count = min(struct.unpack_from(order + ('Q' if is_big else 'H'), data, start)[0], 40)
    except struct.error:
        return edit(draw, data)
    place = start + head + entry * draw.randrange(count or 1)
    short = order + ('H' if data[place + 2 : place + 4] in (b'\3\0', b'\0\3') else 'I')
    draw.told += (f'tag {int.from_bytes(data[place : place + 2], "little" if order == "<" else "big")}',)
    fields = [(place + (12 if is_big else 8), short)] * 3 + [(place + 2, order + 'H'), (place + 4, long)]
    fields += [(start + head + entry * count, long)]
    if draw.random() < 0.15:
        return set_number(draw, data, [(place, order + 'H')], TAGS)
    return set_number(draw, data, fields, (*NUMBERS, start, len(data)))


TAGS = (254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 282, 284, 317, 320, 322, 323, 324, 330, 338, 339)
TAGS += (347, 530, 34665, 34675, 33723, 65000)
CHUNKS = b'PLTE tRNS iCCP gAMA cHRM sRGB zTXt iTXt tEXt eXIf pHYs bKGD acTL fcTL fdAT cICP sBIT CgBI IDAT IEND'.split()
BODIES = (b'', b'\0', bytes(6), b'\0\0\xb1\x8f', bytes(range(250)), b'name\0\0' + zlib.compress(bytes(10**6)))
BMP_FIELDS = [(place, '<I') for place in (2, 10, 14, 18, 22, 22, 30, 34, 46, 54)] + [(26, '<H'), (28, '<H'), (28, '<H')]
change_chunk = on_parts('.png', CHUNKS, [b'IHDR'], [(0, '>I'), (4, '>I'), *[(place, 'B') for place in range(8, 13)]])
ON_FORMATS = {
    '.png': {'chunk': change_chunk, 'a chunk': change_chunk, 'a part': change_chunk, 'pixels': change_pixels},
    '.jpg': {
        'segment': on_parts(
            '.jpg',
            [bytes([0xFF, marker]) for marker in range(0xC0, 0x100) if marker != 0xDA],
            (b'\xff\xc0', b'\xff\xc1', b'\xff\xc2'),
            [(1, '>H'), (3, '>H'), *[(place, 'B') for place in (0, 5, 6, 7, 8)]],
        ),
    },
    '.tif': {'tag': change_tag},
    '.bmp': {'header': lambda draw, data: set_number(draw, data, BMP_FIELDS)},
    '.webp': {'chunk': on_parts('.webp', b'VP8 ,VP8L,VP8X,ALPH,ANIM,ANMF,ICCP,EXIF,XMP ,zzzz'.split(b','))},
}


# ---- images


def saved(pixels, ending, *options, **named):
    """Encode an image with Pillow, arrays in TIFF with tifffile, else with OpenCV."""
    output = io.BytesIO()
    if isinstance(pixels, Image.Image):
        pixels.save(output, Image.registered_extensions()[ending], **named)
    elif ending == '.tif':
        tifffile.imwrite(output, pixels, **named)
    else:
        output.write(cv2.imencode(ending, pixels, options)[1])
    return output.getvalue()


def make_images():
    """Return intact files of all supported kinds by name; the first word is the extension."""
    draw = np.random.default_rng(0)
    deep = draw.integers(0, 65536, (12, 16, 4), np.uint16)
    rgb, large = Image.fromarray(np.uint8(deep[..., :3] >> 8)), np.uint8(np.tile(deep[..., :3], (3, 3, 1)) >> 8)
    exif, info = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112], exif[0x010F], exif[0x8769] = 6, 'maker', {0x9003: '2020:01:01 00:00:00'}
    info.add_text('Comment', 'words ' * 9, zip=True)
    info.add_itxt('Title', 'x')
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    full = {'icc_profile': profile, 'dpi': (72, 72), 'exif': exif.tobytes(), 'pnginfo': info, 'comment': 'words'}
    images = {}
    for ending, mode in itertools.product(ON_FORMATS, ('1', 'L', 'P', 'LA', 'RGB', 'RGBA', 'CMYK')):
        with contextlib.suppress(OSError):  # a mode that the format does not know
            images[f'{ending} {mode}'] = saved(rgb.convert(mode), ending)
            images[f'{ending} {mode} with metadata'] = saved(rgb.convert(mode), ending, **full)
    for ending, mode, options in (
        ('.png', 'P', {'bits': 4, 'transparency': bytes(range(16))}),
        ('.png', 'P', {'bits': 2}),
        ('.png', 'L', {'transparency': 7}),
        ('.jpg', 'RGB', {'progressive': True, 'subsampling': 2}),
        ('.webp', 'RGBA', {'lossless': True}),
        ('.webp', 'RGB', {'save_all': True, 'append_images': [rgb.rotate(180)]}),
        ('.tif', 'RGBA', {'compression': 'tiff_lzw'}),
        ('.tif', 'L', {'compression': 'tiff_adobe_deflate'}),
        ('.tif', 'P', {'compression': 'packbits'}),
        ('.tif', '1', {'compression': 'group4'}),
        ('.tif', 'RGB', {'compression': 'jpeg'}),
        ('.tif', '1', {'big_tiff': True}),
        ('.tif', 'RGB', {'save_all': True, 'append_images': [rgb]}),
    ):
        images[f'{ending} {mode} {options}'[:60]] = saved(rgb.convert(mode), ending, **options)
    for pixels, options in (
        (deep[..., :3], {'photometric': 'rgb', 'compression': 'zlib', 'predictor': True}),
        (deep[..., 0], {'photometric': 'minisblack'}),
        (deep[..., 0], {'photometric': 'miniswhite', 'byteorder': '>'}),
        (deep, {'photometric': 'rgb', 'extrasamples': ['assocalpha']}),
        (deep[..., :3].transpose(2, 0, 1), {'photometric': 'rgb', 'planarconfig': 'separate'}),
        (large, {'photometric': 'rgb', 'tile': (16, 16), 'bigtiff': True}),
        (deep[..., 0].astype(np.float32), {}),
    ):
        images[f'.tif {pixels.dtype} {options}'[:60]] = saved(pixels, '.tif', **options)
    gray_16, rgb_16, rgba_16 = (saved(pixels, '.png') for pixels in (deep[..., 0], deep[..., :3], deep))
    rgb_16 = rgb_16[:33] + FORMATS['.png'][-1](b'tRNS', bytes(6)) + rgb_16[33:]
    restart = saved(large, '.jpg', cv2.IMWRITE_JPEG_RST_INTERVAL, 2)
    return images | {'.png gray 16': gray_16, '.png RGB 16': rgb_16, '.png RGBA 16': rgba_16, '.jpg restart': restart}


def mutate_image(draw, images):
    """Return the extension and bytes of a file."""
    data = draw.of(images)
    ending = draw.told[0].split()[0]
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        data = (draw.of(ON_FORMATS[ending]) if draw.random() < 0.6 else edit)(draw, data)
    if draw.random() < 0.1:
        ending = draw.choice(('.png', '.jpg', '.tif', '.bmp', '.webp', '.jpeg', '.PNG', '.tiff', ''))
    return ending, data


def try_image(path):
    """Read a file as `infer` and as training do, and write it in the same format and as PNG."""
    image, rgb = (attempt(lambda read=read: read(path), path) for read in (read_image, read_rgb))
    for pixels in [each for each in (image and image.color, rgb) if each is not None]:
        assert pixels.dtype in (np.uint8, np.uint16) and pixels.size, f'pixels are {pixels.dtype}{pixels.shape}'
        assert pixels.ndim == 2 or pixels.shape[2:] == (3,), f'pixels are {pixels.shape}'
    if image is None:
        return 0 if rgb is None else len(rgb) * len(rgb[0])
    color, alpha = image.color, image.alpha
    assert alpha is None or (alpha.shape, alpha.dtype) == (color.shape[:2], color.dtype), 'the alpha channel'
    for target in (path.with_name('x.png'), path.with_name(f'y{path.suffix}')) if color.size < 10**7 else ():
        content = attempt(lambda target=target: encode_image(target, image), target)
        if content is None:
            continue
        target.write_bytes(content)
        again = read_image(target)
        if target.suffix == '.png':
            assert np.array_equal(again.color, color), 'written as PNG, the pixels are others'
            assert (again.alpha is None) == (alpha is None), 'written as PNG, alpha is another'
    return color.shape[0] * color.shape[1]


def attempt(action, path):
    """Return the result, or None if the file is rejected with a message."""
    try:
        return action()
    except (DataError, CheckpointError) as error:
        message = str(error)
        assert str(path) in message, f'the message does not name the file: {message}'
        assert '\n' not in message and len(message) < 2000, f'the message is no sentence: {message[:300]}'


# ---- weights


class Call:
    """Object whose unpickling calls a function; unsafe readers create the folder given as argument."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


PROOF = Path(tempfile.gettempdir()) / f'basicsr_fuzz_proof_{os.getpid()}'
NETWORK = {'type': 'AST', 'img_size': 32, 'embed_dim': 4, 'depths': [1] * 9, 'num_heads': [1] * 9, 'window_size': 4}
VALUES = (None, True, -1, 0, 3, 1000, 2**31, 2**63, 10**30, 0.5, float('nan'), float('inf'), 'text', '')
VALUES += ([], [[]], {}, {'a': {}}, [1] * 9, 10**5, [10**5] * 9, 'Mixed', 'SwinIR')
FIELDS = (*NETWORK, 'attention', 'ffn', 'mlp_ratio', 'unknown', 'in_chans')
TEXTS = ('[' * 10**5, 'NaN', '{"type": 3}', '"', '1' * 5000, '{"type": "AST", "type": "AST_XS"}')
SHAPES = (*VALUES, 'F64', 'F8_E4M3', 'BF16', [0, 0], [2**62, 4], [0, 2**62])  # dtypes and places, too
KEYS = ('', 'x', 3, None, (1, 2), 'params', 'state_dict', 'a.b', 'é\n', 'module.', b'x', 1.5, 'x' * 2000)
CALLS = [Call(os.mkdir, str(PROOF)), Call(os.system, f'mkdir {PROOF}'), Call(open, str(PROOF), 'w')]
CALLS += [Call(eval, f'__import__("os").mkdir({str(PROOF)!r})'), Call(exec, f'import os; os.mkdir({str(PROOF)!r})')]
CALLS += [Call(subprocess.check_call, ['mkdir', str(PROOF)]), Call(bytearray, 10**11), Call(list, range(10**12))]
TENSORS = [torch.zeros(0), torch.zeros(1).expand(10**5, 10**5), torch.zeros(1).expand(10**5, 4, 3, 3), torch.zeros(())]
TENSORS += [torch.ones(3, dtype=dtype) for dtype in (torch.int64, torch.bool, torch.complex64)]
TENSORS += [torch.full((3,), float('nan')), torch.nn.Parameter(torch.ones(2)), torch.zeros(2, device='meta')]
TENSORS += [torch.zeros(2, 2).to_sparse()]
CODES = (  # of pickle, with sizes and numbers that are lies
    *(b'R', b'Q', b'b', b't', b's', b'u', b'(', b'.', b'0', b'2', b'N', b'\x93', b'h\xff', b'\x80\xff', b'\x8a\xff'),
    *(b'I1\n', b'Lx\n', b'F1e999\n', b'P0\n', b'cos\nsystem\n', b'ctorch\nload\n'),
    *(b'(' * 3000, b']' * 3000, b'}' * 3000 + b's' * 2999, b')' + b'\x85' * 20000),
    *(b'T\xff\xff\xff\x7f', b'\x8b\xff\xff\xff\x7f', b'r\0\0\0\x80'),
    *(code + struct.pack('<Q', size) for code, size in ((b'\x8d', 2**62), (b'\x8e', 2**40), (b'\x95', 2**60))),
)


def make_weights():
    """Return content and bytes of intact files by name."""
    with contextlib.suppress(Exception):
        recognise({'x': torch.zeros(1)})  # imports spandrel, which takes seconds, ahead of the clock
    TENSORS.append(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))  # warns
    torch.manual_seed(0)
    state = build_network(NETWORK).state_dict()
    small = {name: state[name] for name in list(state)[:5]}
    optimizer = {'state': {0: {'step': torch.tensor(1.0)}}, 'param_groups': [{'lr': 1e-4}]}
    contents = {
        'bare': state,
        'params': {'params': state},
        'both': {'params': state, 'params_ema': state},
        'module': {'state_dict': {f'module.{name}': tensor for name, tensor in state.items()}, 'epoch': 3},
        'half': {name: tensor.half() for name, tensor in state.items()},
        'small': {'params': small},
        'training': {'iter': 3, 'state_dict': small, 'optimizer': optimizer},
    }
    metadata = {'network': json.dumps(NETWORK), 'format': 'pt'}
    files = {f'{name}, zip': (content, pickled(content, True)) for name, content in contents.items()}
    files |= {f'{name}, legacy': (content, pickled(content, False)) for name, content in contents.items()}
    files |= {'bare.safetensors': (state, save(state)), 'small.safetensors': (small, save(small, metadata))}
    return files | {'with network.safetensors': (state, save(state, metadata))}


def pickled(content, is_zip, protocol=2):
    torch.save(content, output := io.BytesIO(), pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    return output.getvalue()


def nest(draw, content):
    for _ in range(draw.choice((1, 2, 30, 200))):
        content = {draw.choice(('params', 'state_dict', 'model', 'x')): content}
    return content


ON_CONTENT = {  # what is made of the content, with its innermost dictionary and a name in that
    'nested': lambda draw, content, state, name: nest(draw, content),
    'in a list': lambda draw, content, state, name: [content],
    'another value': lambda draw, content, state, name: draw.choice(VALUES),
    'a call': lambda draw, content, state, name: draw.choice(CALLS),
    'a call within': lambda draw, content, state, name: state | {draw.choice(KEYS): draw.choice(CALLS)},
    'another tensor': lambda draw, content, state, name: state | {name: draw.choice(TENSORS)},
    'a new value': lambda draw, content, state, name: state | {draw.choice(KEYS): draw.choice((*VALUES, np.zeros(2)))},
    'left out': lambda draw, content, state, name: {key: state[key] for key in state if key != name},
    'renamed': lambda draw, content, state, name: {draw.choice(KEYS) if k == name else k: v for k, v in state.items()},
    'all tensors': lambda draw, content, state, name: dict.fromkeys(state, draw.choice(TENSORS)),
}


def change_content(draw, content, is_zip):
    state = content
    while isinstance(first := next(iter(state.values())), dict):
        state = first
    content = draw.of(ON_CONTENT)(draw, content, dict(state), draw.choice(list(state)))
    if draw.random() < 0.3 and isinstance(content, dict):
        content = {'params': content}
    if draw.random() < 0.1:
        return pickle.dumps({'params': draw.choice(CALLS)})  # without torch
    return pickled(content, is_zip, draw.choice((2, 3, 4, 5)))


def change_zip(draw, data):
    """Change a member of the archive, preferably its pickle, with a valid checksum, or remove it."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = {info.filename: archive.read(info) for info in archive.infolist()}
    except Exception:  # an earlier mutation's doing
        return edit(draw, data)
    name = draw.choice([*parts, *[name for name in parts if name.endswith('data.pkl')] * len(parts)])
    parts[name] = edit(draw, parts[name])
    if draw.random() < 0.15:
        del parts[name]
    compression = draw.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(output := io.BytesIO(), 'w', compression) as archive:
        for part in parts.items():
            archive.writestr(*part)
    return output.getvalue()


def change_pickle(draw, data):
    place = draw.place(data)
    return data[:place] + draw.choice(CODES) + data[place:]


def change_safetensors(draw, data):
    """Change size, dtype, shape, offset, network or metadata in the header."""
    size = int.from_bytes(data[:8], 'little')
    try:
        header = dict(json.loads(data[8 : 8 + size]))
        tensor = header[draw.choice([name for name in header if name != '__metadata__'])]
        network = json.dumps({**NETWORK, draw.choice(FIELDS): draw.choice(VALUES)})
        network = draw.choice(
            ({'network': network}, {'network': network}, {'network': draw.choice(TEXTS)}, draw.choice(VALUES))
        )
        field = draw.choice(('dtype', 'shape', 'data_offsets'))
        if what := draw.of(
            {'size': 0, 'tensor': (tensor, field, draw.choice(SHAPES)), 'network': (header, '__metadata__', network)}
        ):
            what[0][what[1]] = what[2]
    except (ValueError, TypeError, AttributeError, IndexError):  # an earlier mutation's doing
        return edit(draw, data)
    text = json.dumps(header).encode()
    new_size = len(text) if what else draw.choice((0, 1, size - 1, 2**31, 2**40, 2**63, 2**64 - 1))
    return new_size.to_bytes(8, 'little') + text + data[8 + size :]


def mutate_weights(draw, files):
    """Return the extension and bytes of a file."""
    content, data = draw.of(files)
    name = draw.told[0]
    ending = '.safetensors' if name.endswith('.safetensors') else '.pth'
    special = change_safetensors if ending != '.pth' else change_zip if name.endswith('zip') else change_pickle
    is_content = ending == '.pth' and draw.random() < 0.45
    if is_content:
        data = change_content(draw, content, name.endswith('zip'))
    for _ in range(draw.choice((1, 1, 2)) if not is_content or draw.random() < 0.1 else 0):
        data = (special if draw.random() < 0.6 else edit)(draw, data)
    return draw.choice(('.pth', '.safetensors')) if draw.random() < 0.1 else ending, data


def try_weights(path):
    """Build the network of a file as `infer` does, or load it as `info` does and as a training state."""
    load, build = lambda path: load_network(NETWORK, path), lambda path: network_of(read_checkpoint(path))
    ways = [(Restorer.from_weights,), (load, read_state), (build,), *[(read_checkpoint,)] * 3]
    for way in ways[int(path.stem) % len(ways)]:
        attempt(lambda way=way: way(path), path)
    assert not PROOF.exists(), 'the file has run code'
    return 0


# ---- running them

KINDS = {'images': (make_images, mutate_image, try_image), 'weights': (make_weights, mutate_weights, try_weights)}


def held(name):
    """Return VmRSS or VmHWM of this process in bytes, or 0 if the system does not report it."""
    try:
        return 1024 * int(Path('/proc/self/status').read_text().partition(f'{name}:')[2].split()[0])
    except OSError:
        return 0


def run(kind, numbers, folder):
    """Test files: print each before it is read, and what fails on stderr; return the number of faults."""
    make, mutate, try_file = KINDS[kind]
    sources, num_faults = make(), 0
    for number in numbers:
        draw, fault, pixels = Draw(f'{kind} {number}'), None, 0
        ending, data = mutate(draw, sources)
        (path := folder / f'{number}{ending}').write_bytes(data)
        told = f'{kind} {number}: {", ".join(draw.told)}, as {ending}'
        print(told, flush=True)
        faulthandler.dump_traceback_later(HANG, exit=True)
        with contextlib.suppress(OSError):
            Path('/proc/self/clear_refs').write_text('5')  # forgets VmHWM
        before, start = held('VmRSS'), time.process_time()
        try:
            pixels = try_file(path)
        except BaseException:
            fault = traceback.format_exc()[-1500:]
        seconds, used = time.process_time() - start, held('VmHWM') - before
        faulthandler.cancel_dump_traceback_later()
        if seconds > SECONDS[kind] + pixels * PER_PIXEL[0] or used > BYTES + pixels * PER_PIXEL[1]:
            fault = f'took {seconds:.1f} s and {used >> 20} MiB: {fault}'
        if fault:
            num_faults += 1
            print(f'{told}: {fault}', file=sys.stderr)
        else:
            path.unlink()
    return num_faults


@pytest.mark.parametrize('kind, count', [('images', 1000), ('weights', 200)])
def test_fuzz(kind, count, tmp_path):
    command = [sys.executable, __file__, kind, '0', str(count), tmp_path]
    child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert not child.returncode, f'{child.stderr[-9000:]}\nThe last one was {child.stdout[-300:]}'


def test_fuzz_infer(tmp_path):
    """Of a folder with damaged files, each is restored or reported in one line."""
    images = make_images()
    folder, out = tmp_path / 'in', tmp_path / 'out'
    folder.mkdir()
    save_weights(tmp_path / 'w.safetensors', build_network(NETWORK).state_dict(), NETWORK)
    for number in (*WORST, *range(100 - len(WORST))):
        ending, data = mutate_image(Draw(f'images {number}'), images)
        (folder / f'{number}.{ending or ".png"}').write_bytes(data)
    command = [sys.executable, '-m', 'ast_plugin', 'infer', '--weights', tmp_path / 'w.safetensors']
    command += ['-i', folder, '-o', out]
    child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert 'Traceback' not in child.stderr and child.returncode == 1, child.stderr
    told = {line.split(': ')[2] for line in child.stderr.splitlines() if line.startswith('basicsr: error: ')}
    for file in folder.iterdir():
        assert (str(file) in told) != any(out.glob(f'{file.stem}*')), f'{file.name}: {child.stderr}'


@pytest.mark.parametrize('part', ['epoch', 'optimizers', 'schedulers'])
def test_states_without_a_part(part, tmp_path):
    whole = {'epoch': 1, 'iter': 2, 'optimizers': [], 'schedulers': []}
    for change in ({key: value for key, value in whole.items() if key != part}, {**whole, part: 'text'}):
        save_torch(tmp_path / '2.state', change)
        with pytest.raises(CheckpointError, match=f'2.state lacks {part}'):
            _check_resume({'path': {'resume_state': str(tmp_path / '2.state')}})


if __name__ == '__main__':
    sys.exit(run(sys.argv[1], range(int(sys.argv[2]), int(sys.argv[3])), Path(sys.argv[4])) > 0)
