"""Preparing: splits of unpacked datasets are found, and unfinished results never look finished."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import cv2
import pytest
import yaml
from pydantic import TypeAdapter

from ast_plugin.cli.main import main
from ast_plugin.data import checks as pair_checks
from ast_plugin.data.layouts import plain_layout, preparable
from ast_plugin.data.manifest import read_manifest
from ast_plugin.data.prepare import Preparation, find_splits, format_notes, format_options
from ast_plugin.errors import DataError, OptionError
from ast_plugin.files import lock_folder
from ast_plugin.options.sections import FolderName
from tests.data.images import contents, touch, write_noise


def splits_of(layout, root: Path, *wanted: str) -> dict[str, list[tuple[str, str]]]:
    """Return the pair names of each split, which must have no faults."""
    splits = find_splits(layout if isinstance(layout, str) else plain_layout(*layout), root, wanted)
    assert not any(split.faults for split in splits)
    return {
        split.name: [tuple(os.path.relpath(path, root) for path in (pair.lq, pair.gt)) for pair in split.pairs]
        for split in splits
    }


SNOW = 'media/jdway/GameSSD/overlapping/test'
UNPACKED = [  # layout or arguments of `plain_layout`, and the files of a pair by split
    ('agan', {'train': ('train/train/data/0_rain.png', 'train/train/gt/0_clean.png'),
              'test_a': ('test_a/data/0_rain.png', 'test_a/gt/0_clean.png'),
              'test_b': ('test_b/test_b/data/0_rain.jpg', 'test_b/test_b/gt/0_clean.jpg')}),
    ('densehaze', {'train': ('Dense_Haze_NTIRE19/hazy/50_hazy.png', 'Dense_Haze_NTIRE19/GT/50_GT.png'),
                   'test': ('Dense_Haze_NTIRE19/hazy/51_hazy.png', 'Dense_Haze_NTIRE19/GT/51_GT.png')}),
    ('densehaze', {'train': ('input/50.png', 'gt/50.png'), 'test': ('input/51.png', 'gt/51.png')}),
    ('rain100', {'train': ('RainTrainL/rain-1.png', 'RainTrainL/norain-1.png'),
                 'test': ('Rain100L/rainy/rain-001.png', 'Rain100L/norain-001.png')}),
    ('rain100', {'train': ('rain_data_train_Heavy/rain/norain-1x2.png', 'rain_data_train_Heavy/norain/norain-1.png'),
                 'test': ('rain_data_test_Heavy/rain/X2/norain-1x2.png', 'rain_data_test_Heavy/norain/norain-1.png')}),
    ('rain100', {'test': ('Rain100H/input/1.png', 'Rain100H/target/1.png')}),
    ('rain100', {'test': ('rainy/rain-001.png', 'norain-001.png')}),
    ('rain100', {'test': ('input/1.png', 'target/1.png')}),
    ('rain200', {'train': ('train/input/1.png', 'train/target/1.png'),
                 'test': ('test/input/1.png', 'test/target/1.png')}),
    ('rain200', {'train': ('x/Rain200H/train/rain/norain-9x2.png', 'x/Rain200H/train/norain/norain-9.png'),
                 'test': ('x/Rain200H/test/rain/X2/norain-1x2.png', 'x/Rain200H/test/norain/norain-1.png')}),
    ('rain200', {'train': ('train/input/rain-1.png', 'train/groundtruth/norain-1.png')}),
    ('snow100k', {'train': ('all/synthetic/a.jpg', 'all/gt/a.jpg'),
                  'Snow100K-S': (f'{SNOW}/Snow100K-S/synthetic/b.jpg', f'{SNOW}/Snow100K-S/gt/b.jpg'),
                  'Snow100K-L': (f'{SNOW}/Snow100K-L/synthetic/c.jpg', f'{SNOW}/Snow100K-L/gt/c.jpg')}),
    ('istd', {'train': ('ISTD_Dataset/train/train_A/1-1.png', 'ISTD_Dataset/train/train_C/1-1.png'),
              'test': ('ISTD_Dataset/test/test_A/1-1.png', 'ISTD_Dataset/test/test_C/1-1.png')}),
    ('srd', {'train': ('Train/shadow/IMG_1.jpg', 'Train/shadow_free/IMG_1_no_shadow.jpg'),
             'test': ('test_data/shadow/IMG_2.jpg', 'test_data/shadow_free/IMG_2_free.jpg')}),
    ('srd', {'train': ('train_A/IMG_1.jpg', 'train_C/IMG_1_no_shadow.jpg'),
             'test': ('test_A/a.jpg', 'test_C/a_free.jpg')}),
    ('moire', {'train': ('trainData/source/image_train_part_001_00000000_source.png',
                         'trainData/target/image_train_part_001_00000000_target.png'),
               'test': ('testData/source/x_source.png', 'testData/target/x_target.png')}),
    ('moire', {'train': ('TrainData/source/1_source.png', 'TrainData/target/1_target.png')}),
    ('reside', {'ITS': ('ITS/hazy/1_1_0.90179.png', 'ITS/clear/1.png'),
                'OTS': ('OTS/haze/part1/0005_0.8_0.04.jpg', 'OTS/clear/clear_images/0005.jpg'),
                'indoor': ('SOTS/indoor/nyuhaze500/hazy/1400_1.png', 'SOTS/indoor/nyuhaze500/gt/1400.png'),
                'outdoor': ('SOTS/outdoor/hazy/0001_0.8_0.2.jpg', 'SOTS/outdoor/gt/0001.png')}),
    ('reside', {'train': ('train/hazy/1.png', 'train/GT/1.png'), 'test': ('test/hazy/2.png', 'test/GT/2.png')}),
    ('spad', {'train': ('train/input/1.png', 'train/target/1.png'), 'test': ('test/input/2.png', 'test/target/2.png')}),
    ('folders', {'train': ('train/input/1.png', 'train/target/1.png'),
                 'test': ('test/input/2.png', 'test/target/2.png')}),
    ('folders', {'train': ('lq/1.png', 'gt/1.jpg')}),
    ('folders', {'train': ('mine/rainy/1.png', 'mine/clean/1.png')}),
    (('{split}/x', '{split}/y', None, None), {'train': ('train/x/1.png', 'train/y/1.png')}),
    (('x', 'y', '{}_noisy', '{}_clean'), {'train': ('x/1_noisy.png', 'y/1_clean.png')}),
    (('x', 'x', '{}_noisy', '{}_clean'), {'train': ('x/1_noisy.png', 'x/1_clean.png')}),
    (('x', 'y', '{}_*', '{}'), {'train': ('x/1_0.8.png', 'y/1.png')}),
]  # fmt: skip


@pytest.mark.parametrize(('layout', 'pairs'), UNPACKED)
def test_unpacked_datasets(tmp_path, layout, pairs):
    touch(tmp_path, *(name for pair in pairs.values() for name in pair), 'readme.txt', '__MACOSX/._x.png')
    assert splits_of(layout, tmp_path) == {split: [pair] for split, pair in pairs.items()}


def test_every_layout_is_tried():
    assert {layout for layout, _ in UNPACKED if isinstance(layout, str)} == set(preparable())


@pytest.mark.parametrize(('folder', 'split'), [('Rain100L', 'test'), ('RainTrainL', 'train')])
def test_the_folder_of_a_split_itself(tmp_path, folder, split):
    touch(tmp_path, *(f'{place}/{name}-001.png' for place in (folder, 'Rain100H') for name in ('rain', 'norain')))
    assert splits_of('rain100', tmp_path / folder) == {split: [('rain-001.png', 'norain-001.png')]}


LIST = ['/r/1.png /g/1.png', '', '/r/2.png', '/r/7.png /g/1.png', '/r/2.png /g/1.png', '/r/2.png /g/2.png']
FAULTY = {  # by layout: files, keys of the pairs, and kinds, names and texts of the faults
    'agan': (
        [f'train/data/{name}_rain.png' for name in '12A'] + [f'train/gt/{name}_clean.png' for name in '13a'],
        ['1'],
        [
            ('no partner', 'train/data/2_rain.png', 'no 2_clean.*'),
            ('no partner', 'train/data/A_rain.png', 'a_clean.png differs only in the case of its letters'),
            ('no partner', 'train/gt/3_clean.png', 'no 3_rain.*'),
            ('no partner', 'train/gt/a_clean.png', 'no a_rain.*'),
        ],
    ),
    'spad': (
        ['r/1.png', 'g/1.png', 'r/2.png', 'g/2.png'],
        ['r/1.png'],
        [
            ('line not understood', "line 3, '/r/2.png'", 'expected two image files'),
            ('missing', 'r/7.png', 'named in'),
            ('several partners', 'r/2.png', 'lists several clean partners'),
        ],
    ),
    'folders': (
        ['lq/a.png', 'gt/a.png', 'gt/a.jpg', 'lq/b.png', 'gt/b.png'],
        ['b'],
        [('several partners', 'lq/a.png', 'a.png with a.jpg or a.png')],
    ),
    'reside': (  # a clear image may have several hazy ones, or none
        ['ITS/clear/1.png', 'ITS/clear/2.png', *(f'ITS/hazy/1_{n}_0.9.png' for n in (1, 2, 10))],
        ['1_10_0.9', '1_1_0.9', '1_2_0.9'],
        [],
    ),
}


@pytest.mark.parametrize('layout', FAULTY)
def test_faults_leave_the_rest(tmp_path, layout):
    files, keys, faults = FAULTY[layout]
    root = touch(tmp_path / 'inner', *files)
    (root / 'real_world.txt').write_bytes(b'\xef\xbb\xbf' + '\r\n'.join(LIST).encode())
    (split,) = find_splits(layout, tmp_path)
    assert [pair.key for pair in split.pairs] == keys
    assert layout != 'reside' or {os.path.basename(pair.gt) for pair in split.pairs} == {'1.png'}
    for fault, (kind, name, text) in zip(split.faults, faults, strict=True):
        assert (fault.kind, fault.name.removeprefix(f'{root}/')) == (kind, name) and text in fault.text


def test_a_wanted_split_may_be_the_root(tmp_path):
    touch(tmp_path, 'input/1.png', 'target/1.png')
    assert splits_of('folders', tmp_path, 'test') == {'test': [('input/1.png', 'target/1.png')]}
    assert list(splits_of('folders', tmp_path)) == ['train']


@pytest.mark.parametrize(
    ('layout', 'files', 'wanted', 'error', 'expected'),
    [
        ('agn', [], [], OptionError, 'unknown layout agn, did you mean agan'),
        ('manifest', [], [], OptionError, 'unknown layout manifest'),
        ('agan', ['train/data/1_rain.png', 'train/gt/1_clean.png'], ['test_c'], OptionError, 'no split test_c.*test_b'),
        ('agan', ['train/data/1_rain.png', 'train/gt/1_clean.png'], ['test_a'], DataError, 'the split test_a of AGAN'),
        ('agan', [], [], DataError, 'got nothing'),
        ('rain100', ['Rain100L/1.png', 'Rain100L/2.png'], [], DataError, 'Rain100L or Rain100H was not found in'),
        ('agan', ['train.zip', 'test_a.tar.gz'], [], DataError, 'Unpack test_a.tar.gz, train.zip first'),
        ('agan', [f'{n}.txt' for n in range(20)], [], DataError, '15.txt and 12 more. Give its folder'),
        ('agan', ['train/data/1.png', 'train/gt/1.png'], [], DataError, 'expected train/, test_a/'),
        ('rain100', [f'{a}/{b}.png' for a in ('Rain100L', 'Rain100H') for b in ('rain-1', 'norain-1')], [], DataError,
         'the split test of Rain100L or Rain100H may be in .*Rain100L, .*Rain100H'),
        ('spad', ['a/real_world.txt', 'b/real_world.txt'], [], DataError, 'may be in .*a/real_world.txt'),
        (('x', None, None, None), [], [], OptionError, 'go together'),
        (('{split}/x', 'y', None, None), [], [], OptionError, 'both or none contain {split}'),
    ],
)  # fmt: skip
def test_what_is_not_found(tmp_path, layout, files, wanted, error, expected):
    touch(tmp_path, *files)
    with pytest.raises(error, match=expected):
        splits_of(layout, tmp_path, *wanted)


def test_files_and_nothing_instead_of_folders(tmp_path):
    touch(tmp_path, 'train.zip', 'train.txt')
    for name, expected in (('train.zip', 'an archive: unpack it'), ('train.txt', 'a file'), ('no', 'no such folder')):
        with pytest.raises(DataError, match=expected):
            find_splits('agan', tmp_path / name)


def test_links_and_loops_of_links(tmp_path):
    root = tmp_path / 'set'
    touch(tmp_path / 'disk', 'data/1_rain.png', 'gt/1_clean.png')
    root.mkdir()
    for name, target in (('train', '../disk'), ('train/loop', '..'), ('self', 'self'), ('train_again', 'train')):
        os.symlink(target, root / name)
    assert splits_of('agan', root) == {'train': [('train/data/1_rain.png', 'train/gt/1_clean.png')]}


def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
    """The permission error is simulated, since root may read everything."""
    touch(tmp_path, 'train/data/1_rain.png', 'train/gt/1_clean.png', 'secret/x.png')
    listdir = os.listdir

    def guarded(path='.'):
        if os.path.basename(path) == 'secret':
            raise PermissionError(13, 'Permission denied', str(path))
        return listdir(path)

    monkeypatch.setattr(os, 'listdir', guarded)
    with pytest.raises(DataError, match=r'secret: this folder cannot be read: Permission denied. Make it readable'):
        find_splits('agan', tmp_path)


def test_a_folder_of_too_much_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr('ast_plugin.data.prepare._MAX_FOLDERS', 20)
    for number in range(30):
        (tmp_path / str(number)).mkdir()
    with pytest.raises(DataError, match='more than 20 subfolders'):
        find_splits('agan', tmp_path)


# ---- manifests


def make_agan(root: Path, train=6, test=3) -> Path:
    for split, count in (('train', train), ('test_a', test)):
        for number in range(count):
            write_noise(root / split / 'data' / f'{number}_rain.png', [len(split), number, 0])
            write_noise(root / split / 'gt' / f'{number}_clean.png', [len(split), number, 1])
    return root


@pytest.fixture
def agan(tmp_path) -> Path:
    return make_agan(tmp_path / 'data')


def prepare(root: Path, target: Path, place=None, workers=1, layout='agan'):
    preparation = Preparation(find_splits(layout, root), root, target)
    preparation.check(workers)
    return preparation, preparation.write(layout, place)


def test_a_manifest_of_each_split(agan, tmp_path):
    before = contents(agan)
    touch(tmp_path / 'out', '.train.jsonl.17-0a1b2c3d.part', '.train.jsonl.mine')  # the first of a killed run
    checks, paths = prepare(agan, tmp_path / 'out')
    assert [path.name for path in paths] == ['train.jsonl', 'test_a.jsonl']
    assert sorted(os.listdir(tmp_path / 'out')) == ['.train.jsonl.mine', 'test_a.jsonl', 'train.jsonl']
    assert checks.num_faults == 0 and checks.leaks == []
    entry = next(read_manifest(paths[0]).entries())
    lq = agan / 'train/data/0_rain.png'
    assert (entry.key, entry.lq, entry.gt, entry.size) == ('0', 'data/0_rain.png', 'gt/0_clean.png', (16, 24))
    assert entry.bytes[0] == lq.stat().st_size
    assert entry.digests[0] == pair_checks.digest_pixels(cv2.imread(str(lq))[..., ::-1])
    assert contents(agan) == before


def test_properties_of_the_images(agan, tmp_path):
    gray = cv2.imread(str(agan / 'train/data/0_rain.png'), cv2.IMREAD_GRAYSCALE)
    cv2.imwrite(str(agan / 'train/data/0_rain.png'), gray)
    write_noise(agan / 'train/data/1_rain.png', 9, (8, 8))
    write_noise(agan / 'train/gt/1_clean.png', 8, (8, 8))
    shutil.copy(agan / 'train/data/2_rain.png', agan / 'train/data/4_rain.png')
    shutil.copy(agan / 'train/gt/0_clean.png', agan / 'train/gt/2_clean.png')
    shutil.copy(agan / 'train/gt/3_clean.png', agan / 'train/data/3_rain.png')
    checks, _ = prepare(agan, tmp_path / 'out')
    found = checks.checked[0]
    assert found.sizes == {(16, 24): 5, (8, 8): 1}
    assert found.num_bytes == sum(path.stat().st_size for path in (agan / 'train').rglob('*.png'))
    assert format_notes(checks) == [
        'train: 1 image in gray; read as RGB',
        'train: 1 degraded image repeated: 2_rain.png = 4_rain.png',
        'train: 1 pair with equal degraded and clean images',
        'train: 6 degraded images of 5 clean images',
    ]


def test_faulty_pairs_are_left_out(tmp_path):
    root = make_agan(tmp_path / 'data', test=1)
    for name in ('train/data/2_rain.png', 'test_a/data/0_rain.png'):
        (root / name).write_bytes(b'')
    (root / 'train/gt/3_clean.png').unlink()
    checks, (train,) = prepare(root, tmp_path / 'out')  # no manifest without a good pair
    assert [(fault.kind, Path(fault.name).name) for fault in checks.checked[0].faults] == [
        ('no partner', '3_rain.png'),
        ('unreadable', '2_rain.png'),
    ]
    manifest = read_manifest(train)
    assert [entry.key for entry in manifest.entries()] == ['0', '1', '4', '5']
    assert sorted(manifest.others) == ['data/2_rain.png', 'data/3_rain.png', 'gt/2_clean.png']


def test_leaks_of_test_images_into_training(agan, tmp_path):
    shutil.copy(agan / 'train/data/4_rain.png', agan / 'test_a/data/1_rain.png')
    shutil.copy(agan / 'train/gt/5_clean.png', agan / 'test_a/gt/2_clean.png')
    pixels = cv2.imread(str(agan / 'train/gt/0_clean.png'))  # the same pixels in another file
    cv2.imwrite(str(agan / 'test_a/gt/0_clean.png'), pixels, [cv2.IMWRITE_PNG_COMPRESSION, 0])
    leaks = prepare(agan, tmp_path / 'out')[0].leaks
    assert [(leak.first, leak.second, leak.kind, leak.num) for leak in leaks] == [
        ('train', 'test_a', 'degraded', 1),
        ('train', 'test_a', 'clean', 2),
    ]
    names = [[tuple(Path(name).name for name in pair) for pair in leak.examples] for leak in leaks]
    assert names == [[('4_rain.png', '1_rain.png')], [('0_clean.png', '0_clean.png'), ('5_clean.png', '2_clean.png')]]


# ---- interrupted runs


def count_checks(monkeypatch) -> list[str]:
    """Record the pairs that are read from now on."""
    read, check = [], pair_checks.check_pair

    def noted(pair):
        read.append(Path(pair.lq).name)
        return check(pair)

    monkeypatch.setattr(pair_checks, 'check_pair', noted)
    return read


def test_a_stopped_run_continues(agan, tmp_path, monkeypatch):
    prepare(agan, tmp_path / 'whole')
    (tmp_path / 'out').mkdir()
    lines = ['', 'null', '[]', '{"a": 1}', '[["x"]]', '\x00', '[' * 2000]  # an earlier journal, larger and useless
    (tmp_path / 'out/.train.checked').write_text('\n'.join(lines))
    preparation = Preparation(find_splits('agan', agan), agan, tmp_path / 'out')
    stop = Mock(side_effect=[None, None, None, KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        preparation.check(1, stop)
    assert not list((tmp_path / 'out').glob('*.jsonl'))
    journal = tmp_path / 'out/.train.checked.new'
    journal.write_bytes(journal.read_bytes()[:-20])  # as after a kill in the middle of a line
    read = count_checks(monkeypatch)
    prepare(agan, tmp_path / 'out')
    assert read == ['3_rain.png', '4_rain.png', '5_rain.png', '0_rain.png', '1_rain.png', '2_rain.png']
    assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')


def test_rejected_run_rereads_only_fixed_files(agan, tmp_path, monkeypatch):
    (agan / 'train/data/2_rain.png').write_bytes(b'')
    preparation = Preparation(find_splits('agan', agan), agan, tmp_path / 'out')
    preparation.check(1)
    assert preparation.num_faults == 1
    read = count_checks(monkeypatch)
    preparation.check(1)
    assert preparation.num_faults == 1 and read == []
    write_noise(agan / 'train/data/2_rain.png', 77)
    preparation.check(1)
    assert preparation.num_faults == 0 and read == ['2_rain.png']


def test_killed_at_any_moment(tmp_path):
    root, out = make_agan(tmp_path / 'data', train=150, test=60), tmp_path / 'out'
    arguments = ['data', 'prepare', 'agan', str(root), str(out), '--copy', '--workers']
    prepare(root, tmp_path / 'whole', 'copy')
    kills = 0
    for moment in ('.train.checked.new', 'train'):  # while reading, and before writing manifests
        run = subprocess.Popen([sys.executable, '-m', 'ast_plugin', *arguments, '1'], stdout=subprocess.DEVNULL)
        while run.poll() is None and not (out / moment).exists():
            time.sleep(0.002)
        run.kill()
        kills += run.wait() == -signal.SIGKILL
        for path in out.glob('*.jsonl'):
            assert read_manifest(path).num_pairs == len(read_manifest(path).pairs())
    assert kills
    assert main([*arguments, '2']) == 0
    assert contents(out) == contents(tmp_path / 'whole')


# ---- full disks and other errors


@pytest.mark.parametrize('place', [None, 'copy'])
def test_a_full_disk(tmp_path, capsys, place):
    """Limit file sizes to 2 kB; exceeding it raises an error like a full disk."""
    root = make_agan(tmp_path / 'data', train=20)
    if place:  # the journal already exists, and the images are larger than the limit
        write_noise(root / 'train/data/7_rain.png', 1, (64, 64))
        write_noise(root / 'train/gt/7_clean.png', 2, (64, 64))
        Preparation(find_splits('agan', root), root, tmp_path / 'out').check(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        status = main(['data', 'prepare', 'agan', str(root), str(tmp_path / 'out'), *(['--copy'] if place else [])])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    err = capsys.readouterr().err
    assert status == 2 and err.startswith('basicsr: error: cannot ') and 'File too large' in err
    assert not list((tmp_path / 'out').glob('*.jsonl'))
    prepare(root, tmp_path / 'out', place)
    prepare(root, tmp_path / 'whole', place)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')


@pytest.mark.parametrize(
    ('target', 'reason'),
    [
        ('data', 'is inside the dataset'),
        ('link/deep/out', 'is inside the dataset'),
        ('file', 'cannot be created'),
        ('file/out', 'cannot be created'),
    ],
)
def test_targets_that_cannot_be(tmp_path, target, reason):
    root = make_agan(tmp_path / 'data', train=1, test=0)
    os.symlink(root, tmp_path / 'link')
    (tmp_path / 'file').touch()
    with pytest.raises(DataError, match=reason):
        Preparation(find_splits('agan', root), root, tmp_path / target)


@pytest.mark.parametrize('name', ['train.jsonl', 'train/mine.png'])
def test_files_of_others_are_left_alone(agan, tmp_path, name):
    (tmp_path / 'out' / name).parent.mkdir(parents=True)
    (tmp_path / 'out' / name).write_text('mine')
    with pytest.raises(DataError, match='exists and is not'):
        prepare(agan, tmp_path / 'out', 'copy')
    assert (tmp_path / 'out' / name).read_text() == 'mine'


def test_two_runs_do_not_meet(agan, tmp_path, capsys):
    command = ['data', 'prepare', 'agan', str(agan), str(tmp_path / 'out')]
    (tmp_path / 'out').mkdir()
    with lock_folder(tmp_path / 'out', 'taken'):
        assert main(command) == 2
        assert 'out: another run is preparing there; wait for it' in capsys.readouterr().err
        assert os.listdir(tmp_path / 'out') == []
    assert main(command) == 0  # the lock was released


# ---- copies and links


@pytest.mark.parametrize('place', ['copy', 'link'])
def test_copies_and_links(agan, tmp_path, place):
    _, (train, _) = prepare(agan, tmp_path / 'out', place)
    manifest = read_manifest(train)
    assert json.loads(train.read_text().splitlines()[0])['root'] == 'train'
    for entry, pair in zip(manifest.entries(), manifest.pairs(), strict=True):
        assert (entry.lq, entry.gt) == (f'lq/{entry.key}.png', f'gt/{entry.key}.png')
        assert Path(pair.lq).read_bytes() == (agan / f'train/data/{entry.key}_rain.png').read_bytes()
        assert Path(pair.gt).is_symlink() == (place == 'link')


def test_a_second_run_drops_what_is_gone(agan, tmp_path):
    prepare(agan, tmp_path / 'out', 'copy')
    for name in ('data/0_rain.png', 'gt/0_clean.png'):
        (agan / 'train' / name).unlink()
    write_noise(agan / 'train/data/1_rain.png', 55)
    prepare(agan, tmp_path / 'out', 'copy')
    prepare(agan, tmp_path / 'anew', 'copy')
    assert contents(tmp_path / 'out') == contents(tmp_path / 'anew')
    prepare(agan, tmp_path / 'out', 'link')
    assert (tmp_path / 'out/train/lq/1.png').is_symlink()


def test_copies_differ_beyond_capitals(tmp_path):
    root = tmp_path / 'data'
    for number, name in enumerate(('a', 'A', 'sub_x')):
        write_noise(root / 'lq' / f'{name}.png', number)
        write_noise(root / 'gt' / f'{name}.png', number + 10)
    _, (train,) = prepare(root, tmp_path / 'out', 'copy', layout='folders')
    assert sorted(os.listdir(tmp_path / 'out/train/lq')) == ['A.png', 'a_2.png', 'sub_x.png']
    for pair in read_manifest(train).pairs():
        assert Path(pair.lq).name == Path(pair.gt).name


def test_a_clean_image_of_many_is_copied_once(tmp_path):
    root = tmp_path / 'data'
    write_noise(root / 'ITS/clear/1.png', 0)
    for number in range(4):
        write_noise(root / f'ITS/hazy/1_{number}_0.9.png', number + 1)
    _, (manifest,) = prepare(root, tmp_path / 'out', 'copy', layout='reside')
    clean = [Path(pair.gt) for pair in read_manifest(manifest).pairs()]
    assert len(clean) == 4 and len({path.stat().st_ino for path in clean}) == 1


@pytest.mark.parametrize(
    ('folder', 'name'),
    [
        ('agan', 'agan_train'),
        ('.cache', 'cache_train'),
        ('', 'train'),
        ("it's: #1", "it's: #1_train"),
        ('a\\b', 'a_b_train'),
        (os.fsdecode(b'fog\xff\n'), '_'.join(('fog', 'udcff', 'n', 'train'))),
        ('x' * 250, f'{"x" * 80}_train'),
    ],
)
def test_names_of_datasets(folder, name):
    lines = format_options([('train', Path('/data') / folder / 'train.jsonl' if folder else Path('/train.jsonl'))])
    # YAML cannot represent a path that is not valid text.
    readable = '\n'.join(lines).encode('utf-8', 'replace').decode()
    assert TypeAdapter(FolderName).validate_python(yaml.safe_load(readable)['datasets']['train']['name']) == name
