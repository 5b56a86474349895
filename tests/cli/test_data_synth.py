"""`basicsr data synth`: reproducible files, readable as pairs; a failing disk or a kill costs no earlier output."""

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

from ast_plugin.data.image_files import read_rgb
from ast_plugin.data.pairs_dataset import PairsDataset
from ast_plugin.data.synthesis import packaged_photos
from ast_plugin.degradations import DEGRADATIONS
from tests.data.images import contents

from ..docs.pages import ROOT


def write_photo(path: Path, height: int = 96, width: int = 128, seed: int = 0, dtype=np.uint8) -> Path:
    small = np.random.default_rng(seed).uniform(0, np.iinfo(dtype).max, (6, 8, 3))
    image = np.clip(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC), 0, np.iinfo(dtype).max)
    assert cv2.imencode(path.suffix, image.astype(dtype))[1].tofile(path) is None
    return path


def read_mask(path):
    return cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)


@pytest.fixture
def synth(basicsr, tmp_path, monkeypatch):
    """Run the words of a line and further arguments in an empty folder; return the output and errors."""
    monkeypatch.chdir(tmp_path)
    return lambda line, *more, status=0: ''.join(basicsr('data', 'synth', *line.split(), *more, status=status))


@pytest.fixture
def photo(tmp_path):
    return write_photo(tmp_path / 'fenêtre ouverte.png')


@pytest.mark.parametrize('task', DEGRADATIONS)
def test_every_task_repeats_its_pairs(tmp_path, photo, task, synth):
    for name in ('one', 'two'):
        assert 'created 3 pairs' in synth(f'--task {task} -o {name} --count 3 --seed 1 --size 64 -i', photo)
    files = contents(tmp_path / 'one')
    assert files == contents(tmp_path / 'two')
    folders = ['gt', 'lq'] + ['mask'] * (task != 'moire')
    names = [f'{folder}/fenêtre ouverte_{number}.png' for folder in folders for number in (1, 2, 3)]
    assert sorted(files) == sorted([*names, 'synthesis.json'])
    assert len(set(files.values())) == len(files)
    record = json.loads(files['synthesis.json'])
    assert record['task'] == task and record['seed'] == 1 and str(tmp_path) not in json.dumps(record)


def test_pairs_are_patches_of_the_photo(tmp_path, photo, synth):
    synth('--task rain -o out --count 4 --size 48 --seed 1 -i', photo)
    clean = read_rgb(photo)
    places, masks = set(), []
    for number in range(1, 5):
        gt = read_rgb(tmp_path / f'out/gt/fenêtre ouverte_{number}.png')
        lq = read_rgb(tmp_path / f'out/lq/fenêtre ouverte_{number}.png')
        mask = read_mask(tmp_path / f'out/mask/fenêtre ouverte_{number}.png')
        assert gt.shape == lq.shape == (48, 48, 3) and mask.shape == (48, 48) and mask.dtype == np.uint8
        match = cv2.matchTemplate(clean, gt, cv2.TM_SQDIFF)
        row, column = np.unravel_index(match.argmin(), match.shape)
        assert np.array_equal(clean[row : row + 48, column : column + 48], gt)
        places.add((row, column))
        masks.append(mask.max())
        assert (lq != gt).any()
    assert len(places) == 4 and max(masks) > 0


def test_they_are_read_as_pairs(tmp_path, synth):
    for number in range(3):
        write_photo(tmp_path / f'photo{number}.jpg', seed=number)
    synth('--task shadow -i photo*.jpg -o out --count 2')
    roots = {'dataroot_lq': 'out/lq', 'dataroot_gt': 'out/gt'}
    data = PairsDataset({'phase': 'train', 'gt_size': 32, 'layout': 'folders', **roots})
    assert len(data) == 6 and (data[0]['lq'] <= data[0]['gt'] + 1 / 255).all()


def test_other_photos_and_more_pairs_change_none(tmp_path, synth):
    for number in range(2):
        write_photo(tmp_path / f'photo{number}.png', seed=number)
    synth('--task moire -i photo1.png -o one --count 2')
    synth('--task moire -i photo0.png photo1.png -o two')
    synth('--task moire -i photo1.png -o three --seed 1')
    one, two, three = (contents(tmp_path / name)['lq/photo1_1.png'] for name in ('one', 'two', 'three'))
    assert one == two != three


def test_depth_and_names_of_photos(tmp_path, synth):
    """16 bits stay; photos of one name are told apart by their extensions."""
    deep = write_photo(tmp_path / 'photo.png', dtype=np.uint16)
    write_photo(tmp_path / 'photo.jpg')
    synth('--task rain -i . -o out')
    assert sorted(os.listdir('out/lq')) == ['photo_jpg_1.png', 'photo_png_1.png']
    gt, lq = (read_rgb(tmp_path / f'out/{side}/photo_png_1.png') for side in ('gt', 'lq'))
    assert gt.dtype == lq.dtype == np.uint16 and np.array_equal(gt, read_rgb(deep))


def test_parameters_are_set(photo, synth):
    synth('--task rain -o out --set psnr=30 --set veil=0,0 --set scale=0.5 --set', 'angle=[0, 5]', '-i', photo)
    parameters = json.loads(Path('out/synthesis.json').read_text())['parameters']
    assert [parameters[name] for name in ('psnr', 'veil', 'angle', 'scale')] == [[30, 30], [0, 0], [0, 5], 0.5]
    synth('--task shadow -o walls --set casters=wall,bars -i', photo)


def test_haze_takes_depth(tmp_path, synth):
    write_photo(tmp_path / 'room.png')
    depth = np.tile(np.linspace(1, 30, 128, dtype=np.float32), (96, 1))
    np.save('room.npy', depth)
    np.savez('room.npz', depth)
    cv2.imwrite('gray.png', np.round(depth * 1000).astype(np.uint16))
    command = '--task haze -i room.png --set visibility=30 --set unevenness=0 --seed 2'
    synth(f'{command} -o one --depth room.npz')
    synth(f'{command} -o patches --depth . --size 64')
    synth(f'{command} -o two --depth gray.png')
    mask, other = (read_mask(f'{name}/mask/room_1.png').astype(float) for name in ('one', 'two'))
    assert mask[:, -8:].mean() > mask[:, :8].mean() + 100
    assert other.shape == mask.shape and other.min() > mask.min()  # other units: much denser haze


def test_earlier_output_is_kept(tmp_path, photo, synth):
    out = tmp_path / 'out'
    synth('--task snow -o out --count 2 -i', photo)
    before = contents(out)
    assert '--overwrite' in synth('--task rain -o out -i', photo, status=2)
    assert contents(out) == before
    synth('--task rain -o out --overwrite -i', photo)
    assert len(os.listdir(out / 'lq')) == 1
    (out / 'mine.txt').write_text('x')
    assert 'mine.txt' in synth('--task rain -o out --overwrite -i', photo, status=2)
    assert (out / 'mine.txt').exists()
    (out / 'mine.txt').unlink()
    assert 'is in out' in synth('--task rain -i out/gt -o out --overwrite', status=2)
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
def test_a_failing_disk_leaves_the_earlier_output(tmp_path, photo, monkeypatch, synth, owner, name, fault, message):
    synth('--task rain -o out -i', photo)
    before = contents(tmp_path)
    monkeypatch.setattr(owner, name, fault)
    assert message in synth('--task snow -o out --overwrite -i', photo, status=2)
    assert contents(tmp_path) == before


def test_killed_run_in_another_process(tmp_path, photo, synth):
    """Another process synthesises the same pairs; the files that it leaves when killed are removed."""
    line = '-m ast_plugin data synth --task snow --seed 7 --count 100000 -o out -i'
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONHASHSEED': '3'}
    run = subprocess.Popen([sys.executable, *line.split(), photo], cwd=tmp_path, env=environment)
    part = tmp_path / '.out.synth.part'
    while run.poll() is None and not (part / 'lq' / f'{photo.stem}_000002.png').exists():
        time.sleep(0.01)
    out = synth('--task snow --seed 7 -o out -i', photo, status=2)
    assert 'another run is making pairs there; wait for it to end' in out
    run.kill()
    run.wait()
    names = {f'{kind}/{photo.stem}_1.png': f'{kind}/{photo.stem}_000001.png' for kind in ('lq', 'gt', 'mask')}
    others = {name: (part / other).read_bytes() for name, other in names.items()}
    assert sorted(os.listdir(tmp_path)) == sorted(['.out.synth.part', photo.name])
    shutil.copytree(part, tmp_path / '.out.synth.old')  # a kill between two renames
    synth('--task snow --seed 7 -o out -i', photo)
    assert sorted(os.listdir(tmp_path)) == sorted([photo.name, 'out'])
    assert {name: data for name, data in contents(tmp_path / 'out').items() if name.endswith('.png')} == others


def test_the_sheet_of_degradations(tmp_path, synth):
    synth('--sheet sheet.jpg')
    sheet = read_rgb(tmp_path / 'sheet.jpg')
    assert sheet.shape[0] > sheet.shape[1] > 900 and (tmp_path / 'sheet.jpg').stat().st_size <= 250_000
    shutil.copy(packaged_photos()[0].path, tmp_path / 'own.png')
    for name in ('one.png', 'two.png'):
        synth(f'--sheet {name} --task snow -i own.png')
    assert read_rgb(tmp_path / 'one.png').shape[0] < sheet.shape[0] / 3
    assert (tmp_path / 'one.png').read_bytes() == (tmp_path / 'two.png').read_bytes()


def test_the_list_names_every_parameter(synth):
    printed = synth('--list')
    for task, row in DEGRADATIONS.items():
        assert f'{task}\n' in printed
        assert all(f'  {name} = ' in printed for name in row.parameters.model_fields if name not in ('type', 'layers'))
