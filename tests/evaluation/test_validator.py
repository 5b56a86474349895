"""Restored images are written under any name; if that fails, the error names the file."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ast_plugin.data.image_files import read_rgb
from ast_plugin.errors import DataError, FileError
from ast_plugin.evaluation.validator import Validator


class Pictures(Dataset):
    opt = {'name': 'odd'}

    def __init__(self, name: str) -> None:
        self.name = name

    def __len__(self) -> int:
        return 1

    def __getitem__(self, number: int) -> dict:
        return {'lq': torch.arange(60).reshape(3, 4, 5) / 255, 'lq_path': f'/data/{self.name}.png'}


class Alike(Dataset):
    """Three images of one name; the first cannot be read."""

    opt, paths = {'name': 'alike'}, ['1/a.png', '2/a.png', '3/a.png']

    def __len__(self) -> int:
        return 3

    def __getitem__(self, number: int) -> dict:
        if number == 0:
            raise DataError('damaged')
        return {'lq': torch.full((3, 2, 2), number / 255), 'lq_path': self.paths[number]}


def test_images_of_one_name_after_a_failure(tmp_path):
    validator = Validator({}, lambda _, name, __: tmp_path / f'{name}.png')
    results = validator.measure(lambda sample: {'result': sample['lq']}, DataLoader(Alike()), save_img=True)
    assert list(results.restored) == ['a', 'a_2', 'a_3']
    assert [read_rgb(tmp_path / f'{name}.png').max() for name in ('a_2', 'a_3')] == [1, 2]


def measure(name: str, folder: Path) -> Path:
    path = folder / 'made' / f'{name}.png'
    validator = Validator({}, lambda *_: path)
    restore = lambda sample: {'lq': sample['lq'], 'result': sample['lq']}  # noqa: E731
    validator.measure(restore, DataLoader(Pictures(name)), save_img=True)
    return path


@pytest.mark.parametrize('name', ['plain', 'a b|ü', os.fsdecode(b'bad\xff'), 'line\nbreak'])
def test_any_name(tmp_path, name):
    pixels = read_rgb(measure(name, tmp_path))
    assert np.array_equal(pixels, np.arange(60, dtype=np.uint8).reshape(3, 4, 5).transpose(1, 2, 0))


def test_images_that_cannot_be_written(tmp_path):
    with pytest.raises(FileError, match=r'xxx\.png cannot be written: File name too long'):
        measure('x' * 252, tmp_path)
    assert list((tmp_path / 'made').iterdir()) == []
    (tmp_path / 'made').rmdir()
    (tmp_path / 'made').touch()
    with pytest.raises(FileError, match=r'plain\.png cannot be written: File exists'):
        measure('plain', tmp_path)
