"""Datasets are found as they are unpacked, whatever folders lie around them."""

import os
from pathlib import Path

import pytest

from ast_plugin.data import layouts
from ast_plugin.data.prepare.splits import find_splits, plain_layout, preparable
from ast_plugin.errors import DataError, OptionError
from tests.data.images import touch


def found(layout, root: Path, *wanted: str) -> dict[str, list[tuple[str, str]]]:
    """Splits, each with the names of its pairs; none of them may have a fault."""
    splits = find_splits(layout, root, wanted)
    assert not any(split.faults for split in splits)
    return {
        split.name: [tuple(os.path.relpath(path, root) for path in (pair.lq, pair.gt)) for pair in split.pairs]
        for split in splits
    }


SNOW = 'media/jdway/GameSSD/overlapping/test'
UNPACKED = [  # layout, and by split the files of a pair
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
]  # fmt: skip


@pytest.mark.parametrize(('layout', 'pairs'), UNPACKED, ids=[f'{row[0]}-{n}' for n, row in enumerate(UNPACKED)])
def test_unpacked_datasets(tmp_path, layout, pairs):
    touch(tmp_path, *(name for pair in pairs.values() for name in pair), 'readme.txt', '__MACOSX/._x.png')
    assert found(layout, tmp_path) == {split: [pair] for split, pair in pairs.items()}


@pytest.mark.parametrize('folder', ['Rain100L', 'RainTrainL'])
def test_the_folder_of_a_split_itself(tmp_path, folder):
    touch(
        tmp_path,
        f'{folder}/rain-001.png',
        f'{folder}/norain-001.png',
        'Rain100H/rain-001.png',
        'Rain100H/norain-001.png',
    )
    expected = {'test' if folder == 'Rain100L' else 'train': [('rain-001.png', 'norain-001.png')]}
    assert found('rain100', tmp_path / folder) == expected


def test_every_layout_is_tried():
    assert {layout for layout, _ in UNPACKED} == set(preparable())


def test_lists_of_spad_may_lie_deeper(tmp_path):
    touch(tmp_path, 'SPA/real_world/1.png', 'SPA/real_world_gt/1.png')
    (tmp_path / 'SPA/real_world.txt').write_text('/real_world/1.png /real_world_gt/1.png\n')
    assert found('spad', tmp_path) == {'train': [('SPA/real_world/1.png', 'SPA/real_world_gt/1.png')]}


def test_many_hazy_pictures_share_a_clear_one(tmp_path):
    touch(tmp_path, 'ITS/clear/1.png', 'ITS/clear/2.png', *(f'ITS/hazy/1_{n}_0.9.png' for n in (1, 2, 10)))
    splits = find_splits('reside', tmp_path)
    assert [(pair.key, os.path.basename(pair.gt)) for pair in splits[0].pairs] == [
        ('1_10_0.9', '1.png'),
        ('1_1_0.9', '1.png'),
        ('1_2_0.9', '1.png'),
    ]
    assert not splits[0].faults  # a clear one without a hazy one is none


def test_faults_leave_the_rest(tmp_path):
    touch(tmp_path, 'train/data/1_rain.png', 'train/gt/1_clean.png', 'train/data/2_rain.png', 'train/gt/3_clean.png')
    touch(tmp_path, 'train/data/A_rain.png', 'train/gt/a_clean.png')
    (split,) = find_splits('agan', tmp_path)
    assert [pair.key for pair in split.pairs] == ['1']
    assert [(fault.kind, os.path.basename(fault.name)) for fault in split.faults] == [
        ('no partner', '2_rain.png'),
        ('no partner', 'A_rain.png'),
        ('no partner', '3_clean.png'),
        ('no partner', 'a_clean.png'),
    ]
    assert 'a_clean.png differs only in the case of its letters' in split.faults[1].text


def test_faulty_lists_leave_the_rest(tmp_path):
    touch(tmp_path, 'r/1.png', 'g/1.png', 'r/2.png', 'g/2.png')
    lines = ['/r/1.png /g/1.png', '', '/r/2.png', '/r/7.png /g/1.png', '/r/2.png /g/1.png', '/r/2.png /g/2.png']
    (tmp_path / 'real_world.txt').write_bytes(b'\xef\xbb\xbf' + '\r\n'.join(lines).encode())
    (split,) = find_splits('spad', tmp_path)
    assert [pair.key for pair in split.pairs] == ['r/1.png']
    faults = [(fault.kind, fault.name.removeprefix(f'{tmp_path}/')) for fault in split.faults]
    assert faults == [
        ('line not understood', "line 3, '/r/2.png'"),
        ('missing', 'r/7.png'),
        ('several partners', 'r/2.png'),
    ]


def test_two_clean_ones_to_choose_from(tmp_path):
    touch(tmp_path, 'lq/a.png', 'gt/a.png', 'gt/a.jpg', 'lq/b.png', 'gt/b.png')
    (split,) = find_splits('folders', tmp_path)
    assert [pair.key for pair in split.pairs] == ['b']
    assert [(fault.kind, fault.text) for fault in split.faults] == [('several partners', 'a.png with a.jpg or a.png')]


PLAIN = [
    (('{split}/x', '{split}/y', None, None), {'train': ('train/x/1.png', 'train/y/1.png')}),
    (('x', 'y', '{}_noisy', '{}_clean'), {'train': ('x/1_noisy.png', 'y/1_clean.png')}),
    (('x', 'x', '{}_noisy', '{}_clean'), {'train': ('x/1_noisy.png', 'x/1_clean.png')}),
    (('x', 'y', '{}_*', '{}'), {'train': ('x/1_0.8.png', 'y/1.png')}),
]


@pytest.mark.parametrize(('arguments', 'pairs'), PLAIN)
def test_plain_folders_by_name(tmp_path, arguments, pairs):
    touch(tmp_path, *(name for pair in pairs.values() for name in pair))
    assert found(plain_layout(*arguments), tmp_path) == {split: [pair] for split, pair in pairs.items()}


def test_a_wanted_split_may_be_the_root(tmp_path):
    touch(tmp_path, 'input/1.png', 'target/1.png')
    assert found('folders', tmp_path, 'test') == {'test': [('input/1.png', 'target/1.png')]}
    assert list(found('folders', tmp_path)) == ['train']


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [(('x', None, None, None), 'go together'), (('{split}/x', 'y', None, None), 'both or none have {split}')],
)
def test_plain_folders_that_do_not_go_together(arguments, expected):
    with pytest.raises(OptionError, match=expected):
        plain_layout(*arguments)


@pytest.mark.parametrize(
    ('layout', 'files', 'wanted', 'error', 'expected'),
    [
        ('agn', [], [], OptionError, 'no layout agn, did you mean agan'),
        ('manifest', [], [], OptionError, 'no layout manifest'),
        ('agan', ['train/data/1_rain.png', 'train/gt/1_clean.png'], ['test_c'], OptionError, 'no split test_c.*test_b'),
        ('agan', ['train/data/1_rain.png', 'train/gt/1_clean.png'], ['test_a'], DataError, 'the split test_a of AGAN'),
        ('rain200', ['train/input/1.png', 'train/target/1.png'], ['test'], DataError, 'the split test of Rain200L'),
        ('agan', [], [], DataError, 'there is nothing'),
        ('agan', ['train.zip', 'test_a.tar.gz'], [], DataError, 'Unpack test_a.tar.gz, train.zip first'),
        ('agan', [f'{n}.txt' for n in range(20)], [], DataError, '15.txt and 12 more. Name its folder'),
        ('agan', ['train/data/1.png', 'train/gt/1.png'], [], DataError, 'expected train/, test_a/'),
        ('rain100', [f'{a}/{b}.png' for a in ('Rain100L', 'Rain100H') for b in ('rain-1', 'norain-1')], [], DataError,
         'the split test of Rain100L or Rain100H may be in .*Rain100L, .*Rain100H'),
        ('spad', ['a/real_world.txt', 'b/real_world.txt'], [], DataError, 'may be in .*a/real_world.txt'),
    ],
)  # fmt: skip
def test_what_is_not_found(tmp_path, layout, files, wanted, error, expected):
    touch(tmp_path, *files)
    with pytest.raises(error, match=expected):
        find_splits(layout, tmp_path, wanted)


def test_files_and_nothing_instead_of_folders(tmp_path):
    touch(tmp_path, 'train.zip', 'train.txt')
    for name, expected in (('train.zip', 'an archive: unpack it'), ('train.txt', 'a file'), ('no', 'no such folder')):
        with pytest.raises(DataError, match=expected):
            find_splits('agan', tmp_path / name)


def test_loops_of_links(tmp_path):
    touch(tmp_path, 'train/data/1_rain.png', 'train/gt/1_clean.png')
    os.symlink('..', tmp_path / 'train' / 'loop')
    os.symlink('self', tmp_path / 'self')
    os.symlink('train', tmp_path / 'train_again')
    assert found('agan', tmp_path) == {'train': [('train/data/1_rain.png', 'train/gt/1_clean.png')]}


def test_linked_folders_are_followed(tmp_path):
    touch(tmp_path / 'disk', 'data/1_rain.png', 'gt/1_clean.png')
    (tmp_path / 'set').mkdir()
    os.symlink(tmp_path / 'disk', tmp_path / 'set' / 'train')
    assert list(found('agan', tmp_path / 'set')) == ['train']


def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
    """Root may read everything, so that the system's refusal is imitated."""
    touch(tmp_path, 'train/data/1_rain.png', 'train/gt/1_clean.png', 'secret/x.png')
    listdir = os.listdir

    def guarded(path='.'):
        if os.path.basename(path) == 'secret':
            raise PermissionError(13, 'Permission denied', str(path))
        return listdir(path)

    monkeypatch.setattr(os, 'listdir', guarded)
    with pytest.raises(DataError, match=r'secret: this folder cannot be read: Permission denied. Make it readable'):
        find_splits('agan', tmp_path)


def test_a_folder_of_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, '_MAX_FOLDERS', 20)
    for number in range(30):
        (tmp_path / str(number)).mkdir()
    with pytest.raises(DataError, match='more than 20 folders in it'):
        find_splits('agan', tmp_path)
