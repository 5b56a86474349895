"""Two LMDBs that were not made together are told, though each is whole."""

import shutil
from pathlib import Path

import pytest

from ast_plugin.cli.main import main
from ast_plugin.data.lmdb.reader import check_together
from ast_plugin.errors import DataError
from tests.data.lmdb_sources import pack, write_folders


@pytest.fixture
def packed(tmp_path) -> Path:
    pack(write_folders(tmp_path / 'source', 3), tmp_path / 'out')
    return tmp_path / 'out'


def swap(folder: Path) -> None:
    (folder / 'lq.lmdb').rename(folder / 'other')
    (folder / 'gt.lmdb').rename(folder / 'lq.lmdb')
    (folder / 'other').rename(folder / 'gt.lmdb')


def exchange(folder: Path) -> None:
    pack(write_folders(folder.parent / 'others', 3, seed=1), folder.parent / 'more')
    shutil.rmtree(folder / 'gt.lmdb')
    (folder.parent / 'more/gt.lmdb').rename(folder / 'gt.lmdb')


BREAKS = [
    (swap, "lq.lmdb and gt.lmdb are in each other's place"),
    (exchange, 'gt.lmdb: is not the one that was written here'),
    (lambda folder: shutil.rmtree(folder / 'gt.lmdb'), 'gt.lmdb is missing'),
    (lambda folder: (folder / 'gt.lmdb/digests.txt').unlink(), 'lacks digests.txt of an LMDB'),
    *[
        (lambda folder, text=text: (folder / 'source.json').write_text(text), 'source.json: does not say what')
        for text in ('', '[]', '{}', '{"digests": 3}', '{"digests": {"lq": "a"}}')
    ],
]


@pytest.mark.parametrize(('damage', 'expected'), BREAKS)
def test_what_is_not_together(packed, capfd, damage, expected):
    assert check_together(packed) == []
    damage(packed)
    (fault,) = check_together(packed)
    assert expected in fault and str(packed) in fault
    assert main(['data', 'check', str(packed)]) == 1
    assert expected in capfd.readouterr().out


def test_packing_does_not_pass_what_was_swapped_since(packed, tmp_path):
    swap(packed)
    with pytest.raises(DataError, match=r'out: exists, but is damaged: .* each other.* Replace it with --overwrite'):
        pack(tmp_path / 'source', packed)


def test_lmdbs_of_others_may_lie_anywhere(packed):
    (packed / 'source.json').unlink()
    swap(packed)
    assert check_together(packed) == []
