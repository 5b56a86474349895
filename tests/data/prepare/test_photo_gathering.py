"""Gathering photographs: what is one, each once, out of folders, Qt's resources and Debian packages."""

import io
import os
import shutil
import struct
import tarfile
import zlib

import cv2
import numpy as np
import pytest

from ast_plugin.cli import main as command
from ast_plugin.data.image_files import read_image
from ast_plugin.data.photos import packaged_photos
from ast_plugin.data.prepare.photo_gathering import folder_pictures, gather, why_not
from ast_plugin.data.prepare.qt_resources import resource_files
from ast_plugin.errors import DataError


def encoded(name: str, height: int = 300, width: int = 400, ending: str = '.png', parameters=()) -> bytes:
    photo = next(photo for photo in packaged_photos() if photo.name == name)
    pixels = cv2.imread(str(photo.path), cv2.IMREAD_COLOR)
    return encode(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), ending, parameters)


def encode(pixels: np.ndarray, ending: str = '.png', parameters=()) -> bytes:
    return cv2.imencode(ending, pixels, list(parameters))[1].tobytes()


def drawing() -> np.ndarray:
    canvas = np.full((300, 400, 3), (200, 180, 90), np.uint8)
    for number in range(12):
        cv2.circle(canvas, (30 * number, 150), 40, (20 * number, 90, 250 - 20 * number), -1)
    return canvas


def resource(files: dict[str, bytes], version: int = 3) -> bytes:
    """A .rcc with one folder `art` that holds the files, every second one packed by zlib."""
    names, data, nodes = b'', b'', []

    def add_name(name: str) -> int:
        nonlocal names
        place = len(names)
        names += struct.pack('>HI', len(name), 0) + name.encode('utf-16-be')
        return place

    time = b'' if version == 1 else bytes(8)
    nodes.append(struct.pack('>IHII', 0, 2, 1, 1) + time)
    nodes.append(struct.pack('>IHII', add_name('art'), 2, len(files), 2) + time)
    for number, (name, content) in enumerate(files.items()):
        packed = struct.pack('>I', len(content)) + zlib.compress(content) if number % 2 else content
        nodes.append(struct.pack('>IHHHI', add_name(name), number % 2, 0, 0, len(data)) + time)
        data += struct.pack('>I', len(packed)) + packed
    head = 24 if version == 3 else 20
    tree = b''.join(nodes)
    start = b'qres' + struct.pack('>4I', version, head + len(data) + len(names), head, head + len(data))
    return start + bytes(head - 20) + data + names + tree


def debian_package(files: dict[str, bytes]) -> bytes:
    def packed(members: dict[str, bytes]) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode='w:gz') as archive:
            for name, content in members.items():
                entry = tarfile.TarInfo(f'./{name}')
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        return stream.getvalue()

    members = {
        'debian-binary': b'2.0\n',
        'control.tar.gz': packed({'control': b'Package: pictures\nVersion: 1\nArchitecture: all\n'}),
        'data.tar.gz': packed(files),
    }
    content = b'!<arch>\n'
    for name, data in members.items():
        content += f'{name:<16}{0:<12}{0:<6}{0:<6}{"100644":<8}{len(data):<10}'.encode() + b'`\n'
        content += data + b'\n' * (len(data) % 2)
    return content


@pytest.mark.parametrize('photo', packaged_photos(), ids=lambda photo: photo.name)
def test_packaged_photographs_are_photographs(photo):
    assert why_not(read_image(photo.path)) is None


@pytest.mark.parametrize(
    ('data', 'reason'),
    [
        (encoded('coffee', 200, 400), 'small'),
        (encode(cv2.imdecode(np.frombuffer(encoded('coffee'), np.uint8), 0)), 'gray'),
        (encode(cv2.cvtColor(cv2.imdecode(np.frombuffer(encoded('coffee'), np.uint8), 0), cv2.COLOR_GRAY2BGR)), 'gray'),
        (encode(drawing()), 'drawn'),
        (encoded('coffee')[:5000], 'unreadable'),
    ],
)
def test_other_pictures_are_left_out(tmp_path, data, reason):
    gathered = gather(iter([('picture.png', data)]), tmp_path)
    assert gathered.names == [] and gathered.left_out == {reason: 1} and os.listdir(tmp_path) == []


def test_transparent_and_cut_out_pictures_are_left_out(tmp_path):
    pixels = cv2.imdecode(np.frombuffer(encoded('chelsea'), np.uint8), 1)
    cut = pixels.copy()
    cut[50:200, 50:200] = 255
    transparent = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    opaque = encode(transparent)
    transparent[:50, :, 3] = 0
    pictures = [('a.png', encode(cut)), ('b.png', encode(transparent)), ('c.png', opaque)]
    gathered = gather(iter(pictures), tmp_path)
    assert gathered.names == ['c.png'] and gathered.left_out == {'burnt out': 1, 'transparent': 1}


def test_folders_of_anything(tmp_path):
    source, destination = tmp_path / 'source', tmp_path / 'photos'
    (source / 'deep' / 'er').mkdir(parents=True)
    (source / 'deep' / 'one.dat').write_bytes(encoded('coffee'))  # a picture by its content
    (source / 'deep' / 'er' / 'one.jpg').write_bytes(encoded('chelsea', ending='.jpg'))
    (source / 'text.png').write_text('no picture')
    (source / 'empty.png').touch()
    (source / 'art.rcc').write_bytes(resource({'one.webp': encoded('rocket', ending='.webp'), 'page.qml': b'text'}))
    os.symlink(packaged_photos()[0].path, source / 'link.png')
    gathered = gather(folder_pictures(source), destination)
    assert sorted(gathered.names) == sorted(os.listdir(destination)) == ['deep_one.png', 'er_one.jpg', 'one.webp']
    assert gathered.left_out == {}
    assert (destination / 'deep_one.png').read_bytes() == encoded('coffee')


def test_each_once_whatever_size_and_format(tmp_path):
    pictures = [
        ('a.png', encoded('coffee')),
        ('b.png', encoded('coffee')),
        ('c.jpg', encoded('coffee', 450, 600, '.jpg', (cv2.IMWRITE_JPEG_QUALITY, 80))),
        ('d.png', encoded('rocket')),
    ]
    gathered = gather(iter(pictures), tmp_path)
    assert gathered.names == ['a.png', 'd.png'] and gathered.left_out == {'there already': 2}
    again = gather(iter([*pictures, ('e.png', encoded('chelsea'))]), tmp_path)
    assert again.names == ['e.png'] and again.left_out == {'there already': 4}


def test_names_that_are_taken(tmp_path):
    places = ['x/a.png', 'y/A.png', 'a.jpg', '.png']
    pictures = [
        (place, encoded(name)) for place, name in zip(places, ['coffee', 'rocket', 'chelsea', 'flower'], strict=True)
    ]
    names = gather(iter(pictures), tmp_path).names
    assert len({name.casefold() for name in names}) == 4 and names[:3] == ['a.png', 'y_A.png', 'a_2.png']


@pytest.mark.parametrize('version', [1, 2, 3])
def test_resources_of_every_version(tmp_path, version):
    files = {'ä.webp': b'first', 'b.txt': b'second' * 100, 'c': b''}
    (tmp_path / 'x.rcc').write_bytes(resource(files, version))
    assert dict(resource_files(tmp_path / 'x.rcc')) == {f'art/{name}': data for name, data in files.items()}


def test_damaged_resources_are_named(tmp_path):
    whole = resource({'a': b'first' * 20, 'b': b'second' * 100})
    path = tmp_path / 'broken.rcc'
    refused = 0
    for cut in range(4, len(whole), 7):
        path.write_bytes(whole[:cut])
        try:
            assert dict(resource_files(path)) != {}
        except DataError as error:
            assert 'broken.rcc' in str(error)
            refused += 1
    assert refused == len(range(4, len(whole), 7))
    loop = bytearray(whole)
    tree = struct.unpack_from('>I', whole, 8)[0]
    loop[tree + 22 + 10 : tree + 22 + 14] = struct.pack('>I', 0)  # the folder's first child: the root
    path.write_bytes(loop)
    with pytest.raises(DataError, match='holds itself'):
        list(resource_files(path))


def test_damaged_resources_do_not_keep_the_rest_back(tmp_path):
    (tmp_path / 'broken.rcc').write_bytes(b'qres\0\0')
    (tmp_path / 'z.png').write_bytes(b'\x89PNG\r\n\x1a\n')
    assert dict(folder_pictures(tmp_path)) == {'broken.rcc': b'', 'z.png': b'\x89PNG\r\n\x1a\n'}
    assert gather(folder_pictures(tmp_path), tmp_path / 'out').left_out == {'unreadable': 2}


def test_the_command_gathers_from_a_folder(tmp_path, capsys):
    source = tmp_path / 'my pictures'
    source.mkdir()
    (source / 'ü.png').write_bytes(encoded('coffee'))
    (source / 'drawing.png').write_bytes(encode(drawing()))
    assert command.main(['data', 'photos', str(tmp_path / 'photos'), '--from', str(source)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ['left out: 1 drawn']
    assert os.listdir(tmp_path / 'photos') == ['ü.png']
    assert command.main(['data', 'photos', str(tmp_path / 'photos'), '--from', str(source)]) == 0
    assert os.listdir(tmp_path / 'photos') == ['ü.png']


@pytest.mark.skipif(shutil.which('dpkg-deb') is None, reason='dpkg-deb unpacks Debian packages')
def test_the_command_gathers_from_a_debian_package(tmp_path, capsys):
    package = tmp_path / 'pictures_1_all.deb'
    art = resource({'a.webp': encoded('rocket', ending='.webp')})
    package.write_bytes(
        debian_package(
            {
                'usr/share/pictures/one.jpg': encoded('coffee', ending='.jpg'),
                'usr/share/pictures/art.rcc': art,
                'usr/share/doc/pictures/copyright': b'License: CC0',
            }
        )
    )
    assert command.main(['data', 'photos', str(tmp_path / 'photos'), '--debian', str(package)]) == 0
    assert sorted(os.listdir(tmp_path / 'photos')) == ['a.webp', 'one.jpg', 'pictures.copyright']
    assert 'pictures.copyright' in capsys.readouterr().out
    package.write_bytes(package.read_bytes()[:300])
    assert command.main(['data', 'photos', str(tmp_path / 'more'), '--debian', str(package)]) == 2
    assert 'dpkg-deb failed' in capsys.readouterr().err and not (tmp_path / 'more').exists()


@pytest.mark.parametrize(
    ('arguments', 'complaint'),
    [
        (['photos', '--from', 'nowhere'], 'nowhere: there is no such folder'),
        (['photos', '--from', 'empty'], 'no photograph in empty, nor any picture'),
        (['photos', '--from', 'drawn'], 'no photograph in drawn (left out: 1 drawn)'),
        (['drawn/photos', '--from', 'drawn'], 'lies in the folder to gather from'),
        (['photos', '--from', 'drawn', '--min-side', '2'], '--min-side is 2: expected 16 or more'),
        (['photos', '--debian', '--x'], None),
        (['photos', '--debian', '../x'], 'is no name of a Debian package'),
        (['photos', '--debian', 'x.deb'], 'x.deb: there is no such file'),
        (['photos'], None),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'drawn').mkdir()
    (tmp_path / 'drawn' / 'x.png').write_bytes(encode(drawing()))
    if complaint is None:
        with pytest.raises(SystemExit) as caught:
            command.main(['data', 'photos', *arguments])
        assert caught.value.code == 2
        return
    assert command.main(['data', 'photos', *arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error and 'Traceback' not in error


def test_without_apt_the_command_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert command.main(['data', 'photos', str(tmp_path / 'photos'), '--debian', 'some-pictures']) == 2
    error = capsys.readouterr().err
    assert 'needs apt-get, which this machine does not have' in error and '--from' in error
