"""`basicsr infer`: output files, messages and errors."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ast_plugin.archs.networks import build_network
from ast_plugin.checkpoints import save_weights
from ast_plugin.data.image_files import ImageFile, read_image, write_image
from ast_plugin.data.matching import fold
from ast_plugin.errors import MemoryShortage, ShapeError
from ast_plugin.evaluation.file_restorer import Job, plan_jobs, restore_files
from ast_plugin.evaluation.restorer import Restorer

from ..data.images import noise
from ..docs.pages import ROOT
from ..weights.helpers import TINY, identity


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """Weights of a network that leaves images unchanged."""
    path = tmp_path_factory.mktemp('weights') / 'identity.safetensors'
    save_weights(path, identity().state_dict(), TINY)
    return path


@pytest.fixture
def infer(basicsr, weights, tmp_path):
    """Run the command on paths below `tmp_path`, check its status, and return its output and errors."""

    def run(source, *more, output='out', weights=weights, status=0):
        sources = [tmp_path / name for name in ([source] if isinstance(source, str) else source)]
        arguments = ['-i', *sources, '-o', tmp_path / output, '--weights', weights, '--device', 'cpu', *more]
        return basicsr('infer', *arguments, status=status)

    return run


def put(path, pixels=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(12, 10, 3) if pixels is None else pixels).save(path, **options)
    return path


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


def test_depth_gray_and_transparency(infer, tmp_path):
    kinds = itertools.product(('png', 'tif'), (np.uint8, np.uint16), (1, 2, 3, 4))
    images = {f'{np.dtype(dtype).name}_{channels}.{suffix}': (dtype, channels) for suffix, dtype, channels in kinds}
    del images['uint16_2.tif']  # not supported for writing
    (tmp_path / 'in').mkdir()
    for name, (dtype, channels) in images.items():
        pixels = noise(12, 10, channels, dtype=dtype)
        color = pixels[..., 0] if channels < 3 else pixels[..., :3]
        images[name] = ImageFile(color, pixels[..., -1] if channels in (2, 4) else None)
        write_image(tmp_path / 'in' / name, images[name])
    out, err = infer('in')
    assert err == '' and 'restored 15 images in' in out
    for name, image in images.items():
        restored = read_image(tmp_path / 'out' / name)
        np.testing.assert_array_equal(restored.color, image.color, strict=True, err_msg=name)
        np.testing.assert_equal(restored.alpha, image.alpha, name)


def test_formats_keep_their_kind(infer, tmp_path):
    rows, columns = np.mgrid[0:24, 0:32]
    pixels = np.stack([rows * 9, columns * 7, rows + columns], 2).astype(np.uint8)
    names = ['a.jpg', 'b.JPEG', 'c.webp', 'd.webp', 'e.bmp']
    for name in names:
        put(tmp_path / 'in' / name, pixels, lossless=name == 'd.webp', quality=95)
    infer('in')
    for name in names:
        before, after = read_image(tmp_path / 'in' / name), read_image(tmp_path / 'out' / name)
        assert (after.format, after.lossless) == (before.format, before.lossless)
        assert np.abs(after.color.astype(int) - before.color).mean() <= (0 if before.lossless else 2), name


def test_folder_with_all_sorts(infer, tmp_path):
    folder = tmp_path / 'photos'
    put(folder / 'a.png')
    put(folder / 'a.jpg')
    put(folder / 'bits.png', noise(9, 9) > 127)
    Image.fromarray(noise(9, 9, 3)).quantize(8).save(folder / 'palette.png')
    Image.fromarray(noise(9, 9, 3)).convert('CMYK').save(folder / 'cmyk.jpg')
    put(folder / '.hidden.png')
    put(folder / 'inside' / 'deep.png')
    (folder / 'notes.txt').write_text('not a picture')
    out, err = infer('photos')
    assert files_below(tmp_path / 'out') == ['a.jpg', 'a.png', 'bits.png', 'cmyk.jpg', 'palette.png']
    assert f'note: {folder / "bits.png"}: written with 8 bits instead of 1\n' in err
    assert f'note: {folder / "cmyk.jpg"}: converted from CMYK to RGB\n' in err
    assert out.splitlines()[0].startswith(f'[1/5] {tmp_path / "out" / "a.jpg"} (')
    assert out.splitlines()[-1].startswith('restored 5 images in ')
    assert out.splitlines()[-1].endswith(str(tmp_path / 'out'))


def test_bad_files_are_told_and_others_restored(infer, tmp_path):
    folder = tmp_path / 'photos'
    put(folder / 'a.png')
    whole = put(folder / 'b.png', noise(40, 40, 3)).read_bytes()
    (folder / 'b.png').write_bytes(whole[: len(whole) // 2])
    frames = [Image.fromarray(noise(9, 9, 3)), Image.fromarray(255 - noise(9, 9, 3))]
    frames[0].save(folder / 'c.webp', save_all=True, append_images=frames[1:])
    put(folder / 'd.png', noise(50, 40, 3))
    (folder / 'e.png').symlink_to('nowhere.png')
    put(folder / 'f.png')
    out, err = infer('photos', '--max-megapixels', 0.0017, status=1)
    reasons = ('truncated', 'animations are not supported', '40x50 is', 'cannot be read: No such file')
    for line, name, reason in zip(err.splitlines(), 'bcde', reasons, strict=True):
        assert line.startswith(f'basicsr: error: {folder / name}.') and reason in line
    assert files_below(tmp_path / 'out') == ['a.png', 'f.png']
    assert 'restored 2 of 6 images in' in out


def test_kinds_of_failures(weights, tmp_path, monkeypatch):
    restorer = Restorer.from_weights(weights, device='cpu')
    real, shapes_restored = restorer.restore, []

    def restore(image, **callbacks):
        shapes_restored.append(image.shape[:2])
        if image.shape[0] == 9:
            raise MemoryShortage('too large')
        if image.shape[0] == 10:
            raise ShapeError('fails on 10x10')
        return real(image, **callbacks)

    monkeypatch.setattr(restorer, 'restore', restore)
    shapes = {'a': (12, 10, 3), 'b': (9, 9, 3), 'c': (10, 10, 3), 'd': (8, 8, 4), 'e': (12, 10, 3)}
    images = [put(tmp_path / f'{name}.png', noise(*shape)) for name, shape in shapes.items()]
    (tmp_path / 'f.png').write_bytes(b'nothing')
    jobs = [Job(image, image.with_suffix('.bmp')) for image in (*images, tmp_path / 'f.png')]
    jobs[3] = Job(images[3], tmp_path / 'd.jpg')  # JPEG has no transparency
    results = list(restore_files(jobs, restorer))
    assert [result.kind for result in results] == ['', 'memory', 'network', 'unwritable', '', 'unreadable']
    assert [bool(result.failure) for result in results] == [bool(result.kind) for result in results]
    assert results[1].failure == f'{tmp_path / "b.png"}: too large'
    assert (8, 8) not in shapes_restored  # rejected before the network runs
    assert [job.source.stem for job in jobs if job.target.exists()] == ['a', 'e']


def test_folders_inside_folders(infer, tmp_path):
    put(tmp_path / 'photos' / 'a.png')
    put(tmp_path / 'photos' / 'x' / 'a.png')
    put(tmp_path / 'photos' / 'x' / 'y' / 'b.jpg')
    put(tmp_path / 'photos' / '.cache' / 'c.jpg')
    for _ in range(2):  # in the second run the results are inside the input
        infer('photos', '--recursive', output='photos/out')
        results = ['.basicsr_results', 'a.png', 'x/a.png', 'x/y/b.jpg']
        assert files_below(tmp_path / 'photos' / 'out') == results


def test_distinct_names(infer, tmp_path):
    for name in ('a.png', 'a.jpg', 'b.PNG', 'a_png.bmp'):
        put(tmp_path / 'one' / name)
    put(tmp_path / 'two' / 'B.png')
    infer(['one', 'two', 'one/a.png'], '--format', 'png')
    assert files_below(tmp_path / 'out') == ['B_png_2.png', 'a_jpg.png', 'a_png.png', 'a_png_2.png', 'b_png.PNG']


def test_names_that_lie_about_the_format(infer, tmp_path):
    """Results next to the inputs have a suffix; results of an earlier run are replaced."""
    put(tmp_path / 'a.jpg', noise(9, 9, 4), format='PNG')
    put(tmp_path / 'b', noise(9, 9, 3), format='BMP')
    put(tmp_path / 'a_new.png', noise(3, 3, 3))
    infer(['a.jpg', 'b'], '--suffix', '_new', output='.')
    assert files_below(tmp_path) == ['a.jpg', 'a_new.png', 'b', 'b_new.bmp']
    np.testing.assert_array_equal(read_image(tmp_path / 'a_new.png').alpha, noise(9, 9, 4)[..., 3])


@pytest.mark.parametrize(
    ('output', 'link', 'more'),
    [
        ('photos', None, []),
        ('photos/../photos/.', None, []),
        ('photos', None, ['--suffix', '_new']),  # different input
        ('linked', None, []),
        ('out', os.symlink, []),
        ('out', os.link, []),
    ],
)
def test_inputs_are_never_replaced(infer, tmp_path, output, link, more):
    before = put(tmp_path / 'photos' / 'a.png').read_bytes()
    put(tmp_path / 'photos' / 'a_new.png')
    (tmp_path / 'linked').symlink_to(tmp_path / 'photos')
    (tmp_path / 'out').mkdir()
    if link is not None:
        link(tmp_path / 'photos' / 'a.png', tmp_path / 'out' / 'a.png')
    listing = files_below(tmp_path)
    _, err = infer('photos', *more, output=output, status=2)
    assert 'is an input' in err and 'would be replaced' in err and '--suffix' in err
    assert (tmp_path / 'photos' / 'a.png').read_bytes() == before
    assert files_below(tmp_path) == listing


@pytest.fixture(scope='module')
def lively_weights(tmp_path_factory):
    """Weights of a network whose result depends on the orientation of the image."""
    torch.manual_seed(0)
    network = build_network(TINY)
    torch.nn.init.normal_(network.output_proj.weight, std=0.3)
    path = tmp_path_factory.mktemp('weights') / 'lively.safetensors'
    save_weights(path, network.state_dict(), TINY)
    return path


def test_tile_batches_and_self_ensemble(infer, tmp_path, lively_weights):
    pixels = noise(40, 40, 3)
    put(tmp_path / 'a.png', pixels)
    put(tmp_path / 'b.png', np.ascontiguousarray(pixels[:, ::-1]))

    def restored(name, *options):
        infer(name, *options, weights=lively_weights)
        return read_image(tmp_path / 'out' / name).color.astype(int)

    tiles = restored('a.png', '--tile', 24, '--overlap', 8)
    np.testing.assert_allclose(restored('a.png', '--tile', 24, '--overlap', 8, '--batch', 4), tiles, atol=1)
    whole = restored('a.png', '--tile', 'auto')
    assert np.abs(whole - restored('b.png')[:, ::-1]).max() > 5
    ensemble = restored('a.png', '--self-ensemble')
    assert np.abs(whole - ensemble).max() > 1
    np.testing.assert_allclose(restored('b.png', '--self-ensemble')[:, ::-1], ensemble, atol=1)


def test_short_memory_is_reported(infer, tmp_path, monkeypatch):
    monkeypatch.setattr('ast_plugin.evaluation.tiling.available_bytes', lambda device: 10**6)
    put(tmp_path / 'a.png', noise(20, 150, 3))
    _, err = infer('a.png')
    assert err.startswith(f'note: {tmp_path / "a.png"}: 150x20 needs about') and 'in tiles of 128' in err
    np.testing.assert_array_equal(read_image(tmp_path / 'out' / 'a.png').color, noise(20, 150, 3))


def test_assumed_options_are_reported(infer, tmp_path):
    torch.save({'params': build_network(TINY | {'img_size': 128}).state_dict()}, tmp_path / 'bare.pth')
    put(tmp_path / 'a.png')
    _, err = infer('a.png', weights=tmp_path / 'bare.pth')
    assert err.startswith(f'note: {tmp_path / "bare.pth"}: img_size cannot be inferred') and '-opt FILE' in err


def test_enlarging_network_of_basicsr(infer, tmp_path):
    options = tmp_path / 'net.yml'
    network_g = {'type': 'SRVGGNetCompact', 'num_feat': 4, 'num_conv': 1, 'upscale': 2}
    options.write_text(f'network_g: {network_g}')
    torch.save({'params': build_network(network_g).state_dict()}, tmp_path / 'net.pth')
    pixels = noise(12, 10, 4)
    pixels[..., 3] = 77
    put(tmp_path / 'a.png', pixels)
    assert infer('a.png', '-opt', options, weights=tmp_path / 'net.pth')[1] == ''
    restored = read_image(tmp_path / 'out' / 'a.png')
    assert restored.color.shape == (24, 20, 3)
    np.testing.assert_array_equal(restored.alpha, np.full((24, 20), 77))


def test_full_disk(infer, tmp_path, monkeypatch):
    put(tmp_path / 'photos' / 'a.png')
    put(tmp_path / 'photos' / 'b.png')

    def full(_descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    _, err = infer('photos', status=2)
    assert err == f'basicsr: error: {tmp_path / "out" / "a.png"} cannot be written: No space left on device\n'
    assert files_below(tmp_path / 'out') == []


def test_bar_in_a_terminal(infer, tmp_path, monkeypatch):
    put(tmp_path / 'a.png', noise(50, 40, 3))
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    out, err = infer('a.png', '--tile', 32)
    assert '1/1' in err and 'tile 4/4' in err
    assert out.count('\n') == 1 and out.startswith('restored 1 image in ')


def test_plan_names_no_output_twice(tmp_path):
    names = ['a.png', 'A.png', 'a.jpg', 'a_png.png', 'a_png_2.png', 'ä.png', 'a\u0308.png']
    names += [f'{"x" * 250}.{ending}' for ending in ('png', 'bmp')]  # with a suffix, longer than file systems allow
    images = [(put(tmp_path / name), Path()) for name in names]
    for suffix in ('', '_new'):
        jobs = plan_jobs(images, tmp_path / 'out', suffix, 'png')
        assert [job.source.name for job in jobs] == names
        assert len({fold(str(job.target)) for job in jobs}) == len(names)
        assert max(len(os.fsencode(job.target.name)) for job in jobs) <= 255


def start(tmp_path, *arguments):
    """Start the command in a separate process that lists its imported modules on stderr at exit."""
    code = (
        'import sys\n'
        'from ast_plugin.cli.main import main\n'
        'status = main(["infer", *sys.argv[1:]])\n'
        'print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)\n'
        'sys.exit(status)'
    )
    return subprocess.Popen(
        [sys.executable, '-c', code, '-i', 'photos', '-o', 'out', '--device', 'cpu', *map(str, arguments)],
        env=os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_process_needs_no_basicsr(tmp_path, weights):
    put(tmp_path / 'photos' / 'a.png', noise(20, 30, 3))
    (tmp_path / 'photos' / 'b.jpg').write_bytes(b'\xff\xd8\xff nothing')
    process = start(tmp_path, '--weights', weights)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    failure, modules = err.splitlines()
    assert failure.startswith('basicsr: error: photos/b.jpg: ')
    assert [line.split(' (')[0] for line in out.splitlines()[:-1]] == ['[1/2] out/a.png']
    np.testing.assert_array_equal(read_image(tmp_path / 'out' / 'a.png').color, noise(20, 30, 3))
    heavy = {'basicsr', 'torchvision', 'scipy', 'matplotlib', 'mmengine', 'pydantic', 'pandas', 'sympy', 'spandrel'}
    assert 'torch' in modules.split() and not heavy & set(modules.split())


def test_ctrl_c(tmp_path, weights):
    """Interrupted among many tiles: status 130, a message, no traceback, no partial files."""
    put(tmp_path / 'photos' / 'a.png')
    put(tmp_path / 'photos' / 'b.png', noise(300, 300, 3))
    process = start(tmp_path, '--weights', weights, '--tile', 4, '--overlap', 3)
    deadline = time.monotonic() + 100
    while not (tmp_path / 'out' / 'a.png').exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert 'interrupted' in err and 'Traceback' not in err
    assert files_below(tmp_path / 'out') == ['a.png']
