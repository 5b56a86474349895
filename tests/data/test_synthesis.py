"""Packaged photos and folders of photos, and their splits."""

import importlib.util

import numpy as np
import pytest

from ast_plugin.data.image_files import read_rgb
from ast_plugin.data.synthesis import folder_photos, packaged_photos, read_depth
from ast_plugin.errors import DataError


def test_packaged_photos_and_their_splits():
    photos = packaged_photos()
    assert len(photos) >= 8 and len({photo.name for photo in photos}) == len(photos)
    for photo in photos:
        image = read_rgb(photo.path)
        assert image.ndim == 3 and min(image.shape[:2]) >= 256
        assert (image[..., 0] != image[..., 2]).mean() > 0.5
    train, val = packaged_photos('train'), packaged_photos('val')
    assert len(train) + len(val) == len(photos)
    scenes = [{photo.name.partition('_')[0] for photo in split} for split in (train, val)]
    assert scenes[0] and scenes[1] and not scenes[0] & scenes[1]
    assert [photo.name for photo in packaged_photos('train', ['china', 'coffee'])] == ['china', 'coffee']
    with pytest.raises(DataError, match='did you mean china'):
        packaged_photos(names=['chinna'])


def test_a_missing_package_names_the_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'sklearn' else find(name))
    with pytest.raises(DataError, match=r'need sklearn.*pip install "ast_plugin\[photos\]"') as caught:
        packaged_photos()
    assert '\n' not in str(caught.value)
    assert packaged_photos(names=['coffee'])


def test_folder_splits_are_by_name_alone(tmp_path):
    for number in range(40):
        (tmp_path / f'{number}.jpg').touch()
    before = {split: {p.name for p in folder_photos(tmp_path, 'train', split)} for split in ('train', 'val', 'all')}
    assert before['train'] | before['val'] == before['all'] and not before['train'] & before['val']
    assert 2 <= len(before['val']) <= 16
    (tmp_path / 'a.jpg').touch()
    assert before['train'] <= {p.name for p in folder_photos(tmp_path, 'train', 'train')}
    assert [p.name for p in folder_photos(tmp_path, 'val', names=['a', 'a.jpg'])] == ['a', 'a']
    (tmp_path / 'one').mkdir()
    (tmp_path / 'one/a.jpg').touch()  # belongs to train
    for folder, options, message in (
        (tmp_path, {'names': ['b']}, "no photo 'b'"),
        (tmp_path / 'one', {'split': 'val'}, r"datasets\.val: none of the 1 .*'val'.*split: all"),
        (tmp_path / 'x', {}, 'no such folder'),
    ):
        with pytest.raises(DataError, match=message):
            folder_photos(folder, 'val', **options)


def test_depth_is_known_in_every_patch(tmp_path):
    depth = np.full((30, 40), np.inf)
    depth[20:], depth[:5, :5] = 5, np.nan
    np.save(tmp_path / 'a.npy', depth)
    np.testing.assert_allclose(read_depth(tmp_path / 'a.npy', depth.shape)[:20], 10)
