"""Tried beyond the reports: devices among images, options given twice, and data that is there and wrong."""

import io
import os
import unicodedata

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image

from ast_plugin.cli.main import main
from ast_plugin.data.image_files import decode_image, encode_image
from ast_plugin.models import preflight
from tests import tiny_run
from tests.data.images import noise, save

needs_pipes = pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no pipes with a name')


@needs_pipes
@pytest.mark.parametrize('device', [None, '/dev/zero', '/dev/null'])
def test_device_among_images_fails_at_once(tmp_path, capsys, device):
    photos = tmp_path / 'photos'
    photos.mkdir()
    save(photos / 'a.png', noise(16, 16, 3))
    os.symlink(device, photos / 'b.png') if device else os.mkfifo(photos / 'b.png')
    os.symlink(device, photos / 'c') if device else os.mkfifo(photos / 'c')
    assert main(['infer', '-i', str(photos), '-o', str(tmp_path / 'out'), '--task', 'rain']) == 1
    out, err = capsys.readouterr()
    assert 'restored 1 of 2 images' in out and 'b.png: cannot be read: a pipe or device, expected a file' in err
    assert 'left out: 1 without ending' in err
    save(photos / 'd.png', noise(16, 16, 3))
    synthesis = ['data', 'synth', '--task', 'rain', '-i', str(photos), '-o', str(tmp_path / 'pairs')]
    assert main(synthesis) == 1
    assert 'made 2 pairs' in capsys.readouterr().out


def test_inputs_given_twice_are_all_taken(tmp_path, capsys):
    for name in 'ab':
        save(tmp_path / f'{name}.png', noise(40, 40, 3))
    inputs = ['-i', str(tmp_path / 'a.png'), '-i', str(tmp_path / 'b.png')]
    assert main(['infer', *inputs, '-o', str(tmp_path / 'out'), '--task', 'rain']) == 0
    assert main(['data', 'synth', *inputs, '-o', str(tmp_path / 'pairs'), '--task', 'rain']) == 0
    assert 'made 2 pairs' in capsys.readouterr().out and len(list((tmp_path / 'out').iterdir())) == 2


def test_cmyk_tiff_becomes_rgb():
    stream = io.BytesIO()
    Image.fromarray(noise(16, 24, 3)).convert('CMYK').save(stream, 'TIFF')
    image = decode_image(stream.getvalue(), 'a.tif')
    assert image.color.shape == (16, 24, 3) and image.notes == ('converted from CMYK to RGB',)


def test_big_tiff_keeps_its_tags():
    stream = io.BytesIO()
    pixels = noise(16, 24, 3)
    tifffile.imwrite(stream, pixels, bigtiff=True, photometric='rgb', metadata=None, software='a camera')
    image = decode_image(stream.getvalue(), 'a.tif')
    assert image.notes == ()
    with tifffile.TiffFile(io.BytesIO(encode_image('a.tif', image))) as file:
        assert file.pages[0].tags['Software'].value == 'a camera'
        np.testing.assert_array_equal(file.asarray(), pixels)


def test_names_that_look_alike_are_measured_with_a_hint(tmp_path, capsys):
    for side, form in (('restored', 'NFC'), ('gt', 'NFD')):
        (tmp_path / side).mkdir()
        save(tmp_path / side / f'{unicodedata.normalize(form, "é")}.png', noise(40, 40, 3))
    arguments = ['measure', str(tmp_path / 'restored'), str(tmp_path / 'gt')]
    assert main(arguments) == 2
    assert 'NFC and NFD' in capsys.readouterr().err
    for side in ('restored', 'gt'):
        save(tmp_path / side / 'b.png', noise(40, 40, 3))
    assert main(arguments) == 1
    assert 'NFC and NFD' in ''.join(capsys.readouterr())


DAMAGES = {
    'empty': lambda folder: [path.write_bytes(b'') for path in folder.iterdir()],
    'one more': lambda folder: save(folder / 'more.png', noise(40, 40, 3)),
    'other size': lambda folder: [save(path, noise(44, 40, 3)) for path in folder.iterdir()],
}


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('command', ['check', 'train'])
def test_data_that_is_there_and_wrong(tmp_path, capsys, command, damage):
    file = tiny_run.write(tmp_path)
    opt = yaml.safe_load(file.read_text())
    for dataset in opt['datasets'].values():
        dataset |= {f'dataroot_{side}': str(tmp_path / 'data' / side) for side in ('lq', 'gt')}
    file.write_text(yaml.safe_dump(opt))
    DAMAGES[damage](tmp_path / 'data' / 'gt')
    assert main([command, '-opt', str(file), '--root', str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert 'datasets.train: ' in err and ': right' not in err
    assert damage == 'one more' or str(tmp_path / 'data' / ('gt' if damage == 'empty' else 'lq')) in err
    assert not (tmp_path / 'experiments').exists()


@pytest.mark.parametrize('border', [0, 4, 40])
def test_niqe_with_a_border_passes(border):
    metrics = {'niqe': {'type': 'calculate_niqe', 'crop_border': border}}
    preflight._check_metrics({'metrics': metrics}, 'o.yml')
