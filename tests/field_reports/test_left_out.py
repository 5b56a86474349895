"""Kind H in data: images are paired within scenes, and unpaired files are counted by reason."""

import logging
import unicodedata

import pytest

from ast_plugin.cli.main import main
from ast_plugin.data.layouts import Source, list_pairs, plain_layout
from ast_plugin.data.prepare import find_splits, find_unused
from ast_plugin.errors import DataError
from tests.data.images import touch, write_noise

SCENES = [f'{split}/scene{number}' for split in ('train', 'test') for number in (1, 2, 3)]


def scenes(root, *sides, below=SCENES):
    return touch(root, *(f'{scene}/{side}/{name}.png' for scene in below for side in sides for name in '12'))


def splits_of(root, *given, wanted=()):
    return {split.name: split for split in find_splits(plain_layout(*(given or [None] * 4)), root, wanted)}


@pytest.mark.parametrize(
    ('sides', 'given', 'below', 'counts'),
    [
        (('blur', 'sharp'), (), SCENES, {'train': 6, 'test': 6}),
        (('input', 'target'), (), SCENES, {'train': 6, 'test': 6}),
        (('noisy', 'good'), ('noisy', 'good', None, None), SCENES, {'train': 6, 'test': 6}),
        (('noisy', 'good'), ('{split}/noisy', '{split}/good', None, None), SCENES, {'train': 6, 'test': 6}),
        (('blur', 'sharp'), (), ['train/a', 'train/b', 'test'], {'train': 4, 'test': 2}),
        (('blur', 'sharp'), (), ['train/a', 'test/a'], {'train': 2, 'test': 2}),
        (('blur', 'sharp'), (), ['a', 'b', 'c'], {'train': 6}),
        (('blur', 'sharp'), (), ['Train/part/a', 'Train/b', 'valid/a', 'valid/b'], {'train': 4, 'val': 4}),
    ],
)
def test_images_pair_scene_by_scene(tmp_path, sides, given, below, counts):
    found = splits_of(scenes(tmp_path, *sides, below=below), *given)
    assert {name: len(split.pairs) for name, split in found.items()} == counts
    for split in found.values():
        assert all(pair.lq.split('/')[-3] == pair.gt.split('/')[-3] for pair in split.pairs)
    assert below is not SCENES or [pair.key for pair in found['test'].pairs][1:3] == ['scene1/2', 'scene2/1']
    assert find_unused(tmp_path, list(found.values())) == []


def test_what_no_split_has_is_counted(tmp_path):
    scenes(tmp_path, 'blur', 'sharp', 'blur_gamma')
    touch(tmp_path, 'train/scene1/blur/9.heic', 'notes.txt', 'train/more.txt', 'train/loose.png', '.cache/a.png')
    lines = find_unused(tmp_path, list(splits_of(tmp_path).values()))
    assert 'left out: train: 1 unpaired image' in lines
    assert f'left out: {"test/scene2/blur_gamma"}: 2 unpaired images' in lines
    assert lines[-1] == 'left out: 2 .txt, 1 hidden, 1 .heic' and len(lines) == 8


def test_prepare_counts_in_its_notes(tmp_path, capsys):
    for number, scene in enumerate(('train/a', 'train/b')):
        for side in ('blur', 'sharp'):
            write_noise(tmp_path / 'data' / scene / side / '1.png', f'{number}{side}'.encode()[0] + len(side))
    touch(tmp_path / 'data', 'train/a/blur/2.heic')
    assert main(['data', 'prepare', 'folders', str(tmp_path / 'data'), str(tmp_path / 'out')]) == 0
    out = capsys.readouterr().out
    assert 'left out: 1 .heic' in out and 'prepared 2 pairs' in out


def pairs_of(lq, gt, **options):
    logging.getLogger('basicsr').propagate = True
    return list_pairs('folders', Source('train', dataroot_lq=str(lq), dataroot_gt=str(gt), **options))


def test_training_warns_of_what_it_leaves_out(tmp_path, caplog):
    touch(tmp_path, 'lq/a.png', 'lq/b.heic', 'lq/b.avif', 'lq/._a.png')
    touch(tmp_path, 'gt/a.png', 'gt/inner/b.png', 'gt/list.txt', 'gt/none')
    assert len(pairs_of(tmp_path / 'lq', tmp_path / 'gt')) == 1
    told = [message.partition(': left out of ')[2].partition(': ') for message in caplog.messages]
    assert {folder: sorted(reasons.split(', ')) for folder, _, reasons in told} == {
        str(tmp_path / 'lq'): ['1 .avif', '1 .heic', '1 hidden'],
        str(tmp_path / 'gt'): ['1 .txt', '1 folders with images', '1 without extension'],
    }


def test_training_warns_of_names_of_no_template(tmp_path, caplog):
    touch(tmp_path, 'a_rain.png', 'a_clean.png', 'c_mask.png')
    assert len(pairs_of(tmp_path, tmp_path, lq_template='{}_rain', gt_template='{}_clean')) == 1
    assert all('1 not named {}_' in message for message in caplog.messages) and caplog.messages


@pytest.mark.parametrize(
    ('lq', 'gt', 'hint'),
    [
        (unicodedata.normalize('NFC', 'é'), unicodedata.normalize('NFD', 'é'), 'NFC and NFD'),
        (unicodedata.normalize('NFD', '가'), unicodedata.normalize('NFC', '가'), 'NFC and NFD'),
        ('A', 'a', 'the case of its letters'),
    ],
)
def test_names_that_look_alike(tmp_path, lq, gt, hint):
    touch(tmp_path, f'lq/{lq}.png', f'gt/{gt}.png', 'lq/b.png', 'gt/b.png')
    with pytest.raises(DataError, match=f'no partner.*{hint}'):
        pairs_of(tmp_path / 'lq', tmp_path / 'gt')
