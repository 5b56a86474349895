"""`basicsr data synth`: reproducible files, readable as pairs, and clear errors that leave no files."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from ast_plugin.cli import main as command
from ast_plugin.data.image_files import read_rgb
from ast_plugin.data.pairs_dataset import PairsDataset
from ast_plugin.data.synthesis import packaged_photos
from ast_plugin.degradations import DEGRADATIONS
from tests.data.images import contents

ROOT = Path(__file__).parents[2]


def write_photo(path: Path, height: int = 96, width: int = 128, seed: int = 0, dtype=np.uint8) -> Path:
    small = np.random.default_rng(seed).uniform(0, np.iinfo(dtype).max, (6, 8, 3))
    image = np.clip(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC), 0, np.iinfo(dtype).max)
    assert cv2.imencode(path.suffix, image.astype(dtype))[1].tofile(path) is None
    return path


def synth(*arguments) -> int:
    return command.main(['data', 'synth', *map(str, arguments)])


@pytest.fixture
def photo(tmp_path):
    return write_photo(tmp_path / 'fenêtre ouverte.png')


@pytest.mark.parametrize('task', ['rain', 'raindrop', 'haze', 'snow', 'shadow', 'moire'])
def test_every_task_repeats_its_pairs(tmp_path, photo, task, capsys):
    for name in ('one', 'two'):
        assert synth('--task', task, '-i', photo, '-o', tmp_path / name, '--count', 3, '--seed', 1, '--size', 64) == 0
    files = contents(tmp_path / 'one')
    assert files == contents(tmp_path / 'two')
    folders = ['gt', 'lq'] + ['mask'] * (task != 'moire')
    names = [f'{folder}/fenêtre ouverte_{number}.png' for folder in folders for number in (1, 2, 3)]
    assert sorted(files) == sorted([*names, 'synthesis.json'])
    assert len(set(files.values())) == len(files)
    record = json.loads((tmp_path / 'one' / 'synthesis.json').read_text(encoding='utf-8'))
    assert record['task'] == task and record['seed'] == 1 and str(tmp_path) not in json.dumps(record)
    assert 'created 3 pairs' in capsys.readouterr().out


def test_pairs_are_patches_of_the_photo(tmp_path, photo):
    assert synth('--task', 'rain', '-i', photo, '-o', tmp_path / 'out', '--count', 4, '--size', 48, '--seed', 1) == 0
    clean = read_rgb(photo)
    places, masks = set(), []
    for number in range(1, 5):
        gt = read_rgb(tmp_path / f'out/gt/fenêtre ouverte_{number}.png')
        lq = read_rgb(tmp_path / f'out/lq/fenêtre ouverte_{number}.png')
        mask = cv2.imdecode(np.fromfile(tmp_path / f'out/mask/fenêtre ouverte_{number}.png', np.uint8), -1)
        assert gt.shape == lq.shape == (48, 48, 3) and mask.shape == (48, 48) and mask.dtype == np.uint8
        match = cv2.matchTemplate(clean, gt, cv2.TM_SQDIFF)
        row, column = np.unravel_index(match.argmin(), match.shape)
        assert np.array_equal(clean[row : row + 48, column : column + 48], gt)
        places.add((row, column))
        masks.append(mask.max())
        assert (lq != gt).any()
    assert len(places) == 4 and max(masks) > 0


def test_they_are_read_as_pairs(tmp_path):
    for number in range(3):
        write_photo(tmp_path / f'photo{number}.jpg', seed=number)
    out = tmp_path / 'out'
    assert synth('--task', 'shadow', '-i', str(tmp_path / 'photo*.jpg'), '-o', out, '--count', 2) == 0
    roots = {'dataroot_lq': str(out / 'lq'), 'dataroot_gt': str(out / 'gt')}
    data = PairsDataset({'phase': 'train', 'gt_size': 32, 'layout': 'folders', **roots})
    assert len(data) == 6 and (data[0]['lq'] <= data[0]['gt'] + 1 / 255).all()


def test_other_photos_and_more_pairs_change_none(tmp_path):
    for number in range(2):
        write_photo(tmp_path / f'photo{number}.png', seed=number)
    assert synth('--task', 'moire', '-i', tmp_path / 'photo1.png', '-o', tmp_path / 'one', '--count', 2) == 0
    assert synth('--task', 'moire', '-i', tmp_path / 'photo0.png', tmp_path / 'photo1.png', '-o', tmp_path / 'two') == 0
    one, two = contents(tmp_path / 'one'), contents(tmp_path / 'two')
    assert one['lq/photo1_1.png'] == two['lq/photo1_1.png']
    assert synth('--task', 'moire', '-i', tmp_path / 'photo1.png', '-o', tmp_path / 'three', '--seed', 1) == 0
    assert contents(tmp_path / 'three')['lq/photo1_1.png'] != one['lq/photo1_1.png']


def test_16_bits_stay(tmp_path):
    photo = write_photo(tmp_path / 'deep.png', dtype=np.uint16)
    assert synth('--task', 'rain', '-i', photo, '-o', tmp_path / 'out') == 0
    gt, lq = (read_rgb(tmp_path / f'out/{folder}/deep_1.png') for folder in ('gt', 'lq'))
    assert gt.dtype == lq.dtype == np.uint16 and np.array_equal(gt, read_rgb(photo))


def test_photos_of_one_name_get_own_names(tmp_path):
    for ending in ('png', 'jpg'):
        write_photo(tmp_path / f'photo.{ending}')
    assert synth('--task', 'rain', '-i', tmp_path, '-o', tmp_path / 'out') == 0
    assert sorted(os.listdir(tmp_path / 'out/lq')) == ['photo_jpg_1.png', 'photo_png_1.png']


def test_parameters_are_set(tmp_path, photo):
    settings = ['--set', 'psnr=30', '--set', 'veil=0,0', '--set', 'angle=[0, 5]', '--set', 'scale=0.5']
    assert synth('--task', 'rain', '-i', photo, '-o', tmp_path / 'out', *settings) == 0
    parameters = json.loads((tmp_path / 'out/synthesis.json').read_text())['parameters']
    assert [parameters[name] for name in ('psnr', 'veil', 'angle', 'scale')] == [[30, 30], [0, 0], [0, 5], 0.5]
    assert synth('--task', 'shadow', '-i', photo, '-o', tmp_path / 'walls', '--set', 'casters=wall,bars') == 0


def test_haze_takes_depth(tmp_path):
    photo = write_photo(tmp_path / 'room.png')
    depth = np.tile(np.linspace(1, 30, 128, dtype=np.float32), (96, 1))
    np.save(tmp_path / 'room.npy', depth)
    arguments = ['--task', 'haze', '-i', photo, '--set', 'visibility=30', '--set', 'unevenness=0', '--seed', 2]
    np.savez(tmp_path / 'room.npz', depth)
    assert synth(*arguments, '-o', tmp_path / 'one', '--depth', tmp_path / 'room.npz') == 0
    mask = cv2.imread(str(tmp_path / 'one/mask/room_1.png'), cv2.IMREAD_UNCHANGED).astype(float)
    assert mask[:, -8:].mean() > mask[:, :8].mean() + 100
    assert synth(*arguments, '-o', tmp_path / 'patches', '--depth', tmp_path, '--size', 64) == 0
    cv2.imwrite(str(tmp_path / 'gray.png'), np.round(depth * 1000).astype(np.uint16))
    assert synth(*arguments, '-o', tmp_path / 'two', '--depth', tmp_path / 'gray.png') == 0
    other = cv2.imread(str(tmp_path / 'two/mask/room_1.png'), cv2.IMREAD_UNCHANGED).astype(float)
    assert other.shape == mask.shape and other.min() > mask.min()  # other units: much denser haze


def test_earlier_output_is_kept(tmp_path, photo, capsys):
    out = tmp_path / 'out'
    assert synth('--task', 'snow', '-i', photo, '-o', out, '--count', 2) == 0
    before = contents(out)
    assert synth('--task', 'rain', '-i', photo, '-o', out) == 2
    assert '--overwrite' in capsys.readouterr().err and contents(out) == before
    assert synth('--task', 'rain', '-i', photo, '-o', out, '--overwrite') == 0
    assert len(os.listdir(out / 'lq')) == 1
    (out / 'mine.txt').write_text('x')
    assert synth('--task', 'rain', '-i', photo, '-o', out, '--overwrite') == 2
    assert 'mine.txt' in capsys.readouterr().err and (out / 'mine.txt').exists()
    (out / 'mine.txt').unlink()
    assert synth('--task', 'rain', '-i', out / 'gt', '-o', out, '--overwrite') == 2
    assert f'is in {out}' in capsys.readouterr().err
    assert not [name for name in os.listdir(tmp_path) if name.endswith(('.part', '.old'))]


def fail_to_sync(*_):
    raise OSError(28, 'No space left on device')


def fail_to_rename(path, target, rename=Path.rename):
    if path.suffix == '.part':
        raise OSError(5, 'Input/output error')
    return rename(path, target)


@pytest.mark.parametrize(
    ('owner', 'name', 'fault', 'message'),
    [(os, 'fsync', fail_to_sync, 'No space left'), (Path, 'rename', fail_to_rename, 'Input/output error')],
)
def test_a_failing_disk_leaves_the_earlier_output(tmp_path, photo, monkeypatch, capsys, owner, name, fault, message):
    out = tmp_path / 'out'
    assert synth('--task', 'rain', '-i', photo, '-o', out) == 0
    before = contents(out)
    monkeypatch.setattr(owner, name, fault)
    assert synth('--task', 'snow', '-i', photo, '-o', out, '--overwrite') == 2
    assert message in capsys.readouterr().err
    assert contents(out) == before and sorted(os.listdir(tmp_path)) == sorted([photo.name, 'out'])


def test_killed_run_in_another_process(tmp_path, photo, capsys):
    """Another process synthesises the same pairs; the files that it leaves when killed are removed."""
    arguments = ['data', 'synth', '--task', 'snow', '-i', str(photo), '-o', 'out', '--seed', '7', '--count', '100000']
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONHASHSEED': '3'}
    run = subprocess.Popen([sys.executable, '-m', 'ast_plugin', *arguments], cwd=tmp_path, env=environment)
    part = tmp_path / '.out.synth.part'
    while run.poll() is None and not (part / 'lq' / f'{photo.stem}_000002.png').exists():
        time.sleep(0.01)
    command = ('--task', 'snow', '-i', photo, '-o', tmp_path / 'out', '--seed', 7)
    assert synth(*command) == 2
    assert 'another run is making pairs there; wait for it to end' in capsys.readouterr().err
    run.kill()
    run.wait()
    others = {f'{kind}/{photo.stem}_1.png': (part / kind / f'{photo.stem}_000001.png') for kind in ('lq', 'gt', 'mask')}
    others = {name: path.read_bytes() for name, path in others.items()}
    assert sorted(os.listdir(tmp_path)) == sorted(['.out.synth.part', photo.name])
    shutil.copytree(part, tmp_path / '.out.synth.old')  # a kill between two renames
    assert synth(*command) == 0
    assert sorted(os.listdir(tmp_path)) == sorted([photo.name, 'out'])
    assert {name: data for name, data in contents(tmp_path / 'out').items() if name.endswith('.png')} == others


def test_the_sheet_of_degradations(tmp_path):
    assert synth('--sheet', tmp_path / 'sheet.jpg') == 0
    sheet = read_rgb(tmp_path / 'sheet.jpg')
    assert sheet.shape[0] > sheet.shape[1] > 900 and (tmp_path / 'sheet.jpg').stat().st_size <= 250_000
    shutil.copy(packaged_photos()[0].path, tmp_path / 'own.png')
    for name in ('one.png', 'two.png'):
        assert synth('--sheet', tmp_path / name, '--task', 'snow', '-i', tmp_path / 'own.png') == 0
    assert read_rgb(tmp_path / 'one.png').shape[0] < sheet.shape[0] / 3
    assert (tmp_path / 'one.png').read_bytes() == (tmp_path / 'two.png').read_bytes()


def test_the_list_names_every_parameter(capsys):
    assert synth('--list') == 0
    printed = capsys.readouterr().out
    for task, row in DEGRADATIONS.items():
        assert f'{task}\n' in printed
        assert all(f'  {name} = ' in printed for name in row.parameters.model_fields if name not in ('type', 'layers'))
