"""Kinds C and H: failures of single items are reported by class, the rest continues; left-out files are counted."""

import os
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ast_plugin.cli.main import main
from ast_plugin.compare import report
from ast_plugin.data import checks, image_files
from ast_plugin.data.image_files import decode_image, read_image
from ast_plugin.data.matching import Pair
from ast_plugin.errors import DataError, FileError, MemoryShortage, OptionError
from ast_plugin.evaluation.file_restorer import Job, find_images, plan_jobs, restore_files
from ast_plugin.evaluation.restorer import Restorer
from tests.data.images import noise, save


def jobs_of(folder, *heights):
    """Write images of these heights; return the jobs that restore them."""
    sources = [save(folder / f'{number}.png', noise(height, 9, 3)) for number, height in enumerate(heights)]
    return [Job(source, folder / f'out{source.name}') for source in sources]


class Changes(nn.Module):
    """Identity network that fails on images of one height."""

    def __init__(self, height=None, error=None):
        super().__init__()
        self.height, self.error = height, error

    def forward(self, x):
        if x.shape[-2] == self.height:
            raise self.error
        return x


OUT_OF_MEMORY = [
    MemoryError(),
    MemoryShortage('too large'),
    torch.cuda.OutOfMemoryError('CUDA out of memory'),
    RuntimeError('[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes'),
    RuntimeError("can't allocate memory: you tried to allocate 9 bytes. Error code 12 (Cannot allocate memory)"),
    RuntimeError('CUDNN_STATUS_ALLOC_FAILED'),
]
BROKEN = [AssertionError(), IndexError('x'), RuntimeError('shape'), ZeroDivisionError('x'), NotImplementedError()]


@pytest.mark.parametrize(
    ('error', 'kind'),
    [*((error, 'memory') for error in OUT_OF_MEMORY), *((error, 'network') for error in BROKEN)],
    ids=repr,
)
def test_network_fails_on_one_image(tmp_path, error, kind):
    jobs = jobs_of(tmp_path, 8, 9, 10)
    results = list(restore_files(jobs, Restorer(Changes(9, error), device='cpu')))
    assert [result.kind for result in results] == ['', kind, '']
    assert results[1].failure.startswith(f'{jobs[1].source}: ') and not jobs[1].target.exists()


@pytest.mark.parametrize('place', ['read_bytes', '_decode', 'encode_image', 'Change.between', 'draw_spread'])
def test_memory_runs_out_anywhere(tmp_path, monkeypatch, place):
    from ast_plugin.evaluation import file_restorer

    jobs = jobs_of(tmp_path, 8, 8)
    where = image_files if place in ('read_bytes', '_decode') else file_restorer
    *owner, name = place.split('.')
    where = getattr(where, owner[0]) if owner else where
    real, errors = getattr(where, name), [MemoryError()]

    def fail_once(*args, **options):
        if errors:
            raise errors.pop()
        return real(*args, **options)

    monkeypatch.setattr(where, name, fail_once)
    results = list(restore_files(jobs, Restorer(Changes(), device='cpu'), uncertainty=True))
    assert [result.kind for result in results] == ['memory', '']
    assert str(jobs[0].source) in results[0].failure and 'damaged' not in results[0].failure


@pytest.mark.parametrize('ending', ['.png', '.jpg', '.webp', '.tif', '.bmp'])
def test_decoders_without_memory(tmp_path, monkeypatch, ending):
    data = save(tmp_path / f'a{ending}', noise(30, 40, 3)).read_bytes()

    def fail(*_):
        raise OSError('decoder error')

    monkeypatch.setattr(image_files, '_decode', fail)
    monkeypatch.setattr(image_files, '_decode_plainly', lambda *_: None)
    with pytest.raises(DataError, match='decoder error'):
        decode_image(data, 'a')
    monkeypatch.setattr(image_files, '_has_memory', lambda num_bytes: num_bytes < 1000)
    with pytest.raises(MemoryShortage, match='40x30 does not fit in memory'):
        decode_image(data, 'a')


@pytest.mark.parametrize('error', [OptionError('no such backend'), FileError('disk full')], ids=repr)
def test_what_no_image_can_do_ends_the_batch(tmp_path, error):
    with pytest.raises(type(error), match=str(error)):
        list(restore_files(jobs_of(tmp_path, 8, 8), Restorer(Changes(8, error), device='cpu')))


def test_what_is_left_out_of_a_folder(tmp_path):
    image = save(tmp_path / 'a.jpg', noise(8, 9, 3)).read_bytes()
    assert find_images([tmp_path], tmp_path / 'out').lines() == []
    Image.fromarray(noise(8, 9, 3)).save(tmp_path / 'drawing', 'PNG')
    for name in ('a.heic', 'a.HEIC', 'a.avif', 'a.exr', 'a.gif', 'README'):
        (tmp_path / name).write_bytes(b'x')
    for name in ('b.jpg~', '.c.jpg'):
        (tmp_path / name).write_bytes(image)
    (tmp_path / 'inside').mkdir()
    (tmp_path / 'b.jpg').symlink_to('a.jpg')
    found = find_images([tmp_path], tmp_path / 'out')
    assert [path.name for path, _ in found.images] == ['a.jpg']
    (line,) = found.lines()
    reasons = ['2 .heic', '1 .avif', '1 .exr', '1 .gif', '1 PNG without extension', '1 JPEG named .jpg~', '1 hidden']
    reasons += ['1 subfolders', '1 links to the same file', '1 without extension']
    assert sorted(line.removeprefix('note: left out: ').split(', ')) == sorted(reasons)


def test_patterns_are_expanded(tmp_path):
    for name in ('b.jpg', 'a.jpg', 'c.png', '[x].png', 'x.png'):
        save(tmp_path / name, noise(8, 9, 3))
    (tmp_path / 'link.jpg').symlink_to('a.jpg')
    found = find_images([tmp_path / '*.jpg', tmp_path / 'a.jpg', tmp_path / '[x].png'], tmp_path / 'out')
    assert found.lines() == ['note: left out: 1 links to the same file']
    assert [path.name for path, _ in found.images] == ['a.jpg', 'b.jpg', '[x].png']
    with pytest.raises(DataError, match=r'\*\.bmp: no file matches this pattern'):
        find_images([tmp_path / '*.bmp'], tmp_path / 'out')


def test_inputs_that_are_missing(tmp_path):
    good = save(tmp_path / 'a.png', noise(8, 9, 3))
    (tmp_path / 'link.png').symlink_to('nowhere')
    (tmp_path / 'text').write_text('x')
    (tmp_path / 'empty').mkdir()
    found = find_images(
        [tmp_path / name for name in ('link.png', 'gone.png', 'text', 'empty', 'a.png')], tmp_path / 'o'
    )
    assert len(found.failures) == 1 and 'empty' in found.failures[0]
    jobs = plan_jobs(found.images, tmp_path / 'o')
    assert [path for path, _ in found.images][-1] == good and len(jobs) == 4
    with pytest.raises(DataError, match=r'gone\.png: cannot be read: No such file'):
        find_images([tmp_path / 'gone.png', tmp_path / 'text'], tmp_path / 'o')


@pytest.mark.skipif(os.name == 'nt' or os.geteuid() == 0, reason='root reads everything')
def test_folder_that_cannot_be_read(tmp_path):
    save(tmp_path / 'a.png', noise(8, 9, 3))
    (tmp_path / 'closed').mkdir(mode=0)
    found = find_images([tmp_path], tmp_path / 'o', recursive=True)
    assert len(found.images) == 1 and 'closed' in found.failures[0]


def test_infer_ends_with_a_summary(tmp_path, capsys, monkeypatch):
    jobs_of(tmp_path, 8, 9, 8)
    (tmp_path / 'd.png').symlink_to('nowhere')
    (tmp_path / 'e.heic').write_bytes(b'x')
    restorer = Restorer(Changes(9, MemoryError()), device='cpu')
    monkeypatch.setattr(Restorer, 'from_task', lambda *_, **__: restorer)
    arguments = ['infer', '-i', tmp_path, tmp_path / 'gone.png', '-o', tmp_path / 'out', '--task', 'rain']
    assert main([*map(str, arguments)]) == 1
    out, err = capsys.readouterr()
    assert 'restored 2 of 5 images in ' in out and '(failed: 1 memory, 2 unreadable)' in out
    assert err.splitlines()[-1] == 'note: left out: 1 .heic'
    np.testing.assert_array_equal(read_image(tmp_path / 'out' / '2.png').color, noise(8, 9, 3))


def test_synth_continues_without_a_bad_photo(tmp_path, capsys):
    photos = tmp_path / 'photos'
    photos.mkdir()
    save(photos / 'a.png', noise(40, 50, 3))
    (photos / 'b.png').write_bytes(b'x')
    (photos / 'c.png').symlink_to('nowhere')
    (photos / 'd.heic').write_bytes(b'x')
    arguments = ['data', 'synth', '--task', 'rain', '-i', str(photos), '-o', str(tmp_path / 'out')]
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert 'created 1 pair (' in out and '2 of 3 photos failed' in out
    assert f'{photos / "b.png"}: not a PNG' in err and 'c.png: cannot be read' in err and '1 .heic' in err
    assert [path.name for path in (tmp_path / 'out' / 'lq').iterdir()] == ['a_1.png']
    (photos / 'a.png').unlink()
    assert main([*arguments[:-1], str(tmp_path / 'none')]) == 2
    assert not (tmp_path / 'none').exists()


def test_prepare_distinguishes_memory_errors(monkeypatch, tmp_path):
    def fail(*_):
        raise MemoryShortage('large')

    monkeypatch.setattr(checks, 'read_bytes', fail)
    fault = checks.check_pair(Pair('a', str(tmp_path / 'a.png'), str(tmp_path / 'b.png')))
    assert fault.kind == 'too large for memory'


@pytest.mark.parametrize('channels', [1, 2])
def test_network_that_changes_the_channels(tmp_path, channels):
    (result,) = restore_files(jobs_of(tmp_path, 8), Restorer(nn.Conv2d(3, channels, 1), device='cpu'))
    if channels == 1:
        assert result.notes == ['the network outputs gray images: colours are lost'] and not result.failure
    else:
        assert result.kind == 'network' and f'has {channels} output channels: expected 1 (gray) or 3' in result.failure


def test_basicsr_names_what_it_cannot_decode(tmp_path):
    from basicsr.data.single_image_dataset import SingleImageDataset

    content = save(tmp_path / 'a.jpg', noise(30, 40, 3)).read_bytes()
    (tmp_path / 'b.jpg').write_bytes(b'')
    (tmp_path / 'c.jpg').write_bytes(content[:40])
    dataset = SingleImageDataset({'dataroot_lq': str(tmp_path), 'io_backend': {'type': 'disk'}})
    assert dataset[0]['lq'].shape == (3, 30, 40)
    for number, name in ((1, 'b'), (2, 'c')):
        with pytest.raises(DataError, match=rf'{name}\.jpg: '):
            dataset[number]


def test_report_shows_the_images_that_were_kept(tmp_path):
    for folder, side in (('input', 'restored'), ('input', 'clean'), ('a', 'restored')):
        (tmp_path / 'pictures' / folder / side).mkdir(parents=True)
        for name in 'bcd':
            save(tmp_path / 'pictures' / folder / side / f'{name}.png', noise(8, 9, 3))
    rows = [SimpleNamespace(name=name, values={'b': {}}) for name in ('input', 'a', 'failed')]
    plan = SimpleNamespace(folder=tmp_path, settings=SimpleNamespace(pictures=2))
    scenes = report._scenes(plan, SimpleNamespace(images=list('abcd'), rows=rows))
    assert {name: len(files) for name, files in scenes.items()} == {'b': 3, 'c': 3}


def test_results_inside_an_input(tmp_path, capsys, monkeypatch):
    """Results of earlier runs are left out for any output folder; a trailing slash denotes a folder."""
    (tmp_path / 'in' / 'deep').mkdir(parents=True)
    for name in ('a.png', 'deep/b.png'):
        save(tmp_path / 'in' / name, noise(8, 9, 3))
    restorer = Restorer(nn.Identity(), device='cpu')
    monkeypatch.setattr(Restorer, 'from_task', lambda *_, **__: restorer)
    monkeypatch.chdir(tmp_path)
    for output in ('in/first', 'in/second', 'in/deep/third.jpg/', 'in/first'):
        assert main(['infer', '-i', 'in', '-o', output, '--recursive', '--task', 'rain']) == 0
        assert 'restored 2 images' in capsys.readouterr().out
        assert (tmp_path / output / 'a.png').is_file() and (tmp_path / output / 'deep' / 'b.png').is_file()
    for left_out in (3, 4):
        assert main(['infer', '-i', 'in/*', '-o', 'in/fourth', '--task', 'rain']) == 0
        out, err = capsys.readouterr()
        assert 'restored 2 images' in out and f'left out: {left_out} folders with earlier results' in err
    assert main(['infer', '-i', 'in/**/*.png', '-o', 'in/fifth', '--recursive', '--task', 'rain']) == 0
    assert 'restored 2 images' in capsys.readouterr().out
    assert main(['infer', '-i', 'in/f*', '-o', 'sixth', '--task', 'rain']) == 2
    assert 'in/f*: only earlier results match this pattern' in capsys.readouterr().err
    assert main(['infer', '-i', 'in/first/*.png', '-o', 'sixth', '--task', 'rain']) == 0  # chosen on purpose
    assert 'restored 1 image' in capsys.readouterr().out
    assert main(['infer', '-i', 'in/[a].png', '-o', 'in/a.png', '--task', 'rain']) == 2
    assert 'in/a.png is an input' in capsys.readouterr().err
    assert main(['infer', '-i', 'in/a.png', '-o', 'one.jpg/', '--task', 'rain']) == 0
    assert (tmp_path / 'one.jpg' / 'a.png').is_file()


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no pipes with a name')
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
    assert 'left out: 1 without extension' in err
    save(photos / 'd.png', noise(16, 16, 3))
    synthesis = ['data', 'synth', '--task', 'rain', '-i', str(photos), '-o', str(tmp_path / 'pairs')]
    assert main(synthesis) == 1
    assert 'created 2 pairs' in capsys.readouterr().out


def test_inputs_given_twice_are_all_taken(tmp_path, capsys):
    for name in 'ab':
        save(tmp_path / f'{name}.png', noise(40, 40, 3))
    inputs = ['-i', str(tmp_path / 'a.png'), '-i', str(tmp_path / 'b.png')]
    assert main(['infer', *inputs, '-o', str(tmp_path / 'out'), '--task', 'rain']) == 0
    assert main(['data', 'synth', *inputs, '-o', str(tmp_path / 'pairs'), '--task', 'rain']) == 0
    assert 'created 2 pairs' in capsys.readouterr().out and len(list((tmp_path / 'out').iterdir())) == 2


def test_names_that_look_alike_are_measured(tmp_path, capsys):
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
