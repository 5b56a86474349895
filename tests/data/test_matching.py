"""PairTable returns the pairs it was given and uses little memory; folders are matched without their other files."""

import pickle
import tracemalloc

import pytest

from ast_plugin.data.matching import Pair, PairTable, match_folders
from tests.data.images import touch

PAIRS = [
    Pair('a', '/data/lq/a.png', '/data/gt/a.png'),
    Pair('lq/b.png', '/data/lq/b.png', '/data/gt/b.png'),
    Pair('é 雨', '/data/lq/é 雨.png', '/data/gt/x\ny.png'),
    Pair('\udcff', '/data/lq/\udcff.png', '/data/gt/\udcff.png'),
]


@pytest.mark.parametrize('root', ['', '/data/'])
def test_table_returns_its_pairs(root):
    table = PairTable(PAIRS, root)
    assert list(table) == list(pickle.loads(pickle.dumps(table))) == PAIRS and list(PairTable()) == []
    assert len(table) == 4 and table[-1] == PAIRS[3] and PAIRS[2] in table
    for index in (4, -5):
        with pytest.raises(IndexError, match=f'4 pairs; got index {index}'):
            table[index]


def test_table_takes_little_memory():
    names = [f'{number:06d}.png' for number in range(5_000)]
    tracemalloc.start()
    try:
        pairs = (Pair(name, f'/data/spad/rain/{name}', f'/data/spad/gt/{name}') for name in names)
        table = PairTable(pairs, '/data/spad/')
        assert tracemalloc.get_traced_memory()[0] / len(table) < 60  # as objects, about 300
    finally:
        tracemalloc.stop()


def test_left_out_files_are_counted_once(tmp_path):
    touch(tmp_path, 'a_rain.png', 'a_clean.png', 'mask.png', 'b.heic')
    pairs, (left_out,) = match_folders('train', tmp_path, tmp_path, '{}_rain', '{}_clean')
    assert [pair.key for pair in pairs] == ['a'] and left_out.name == str(tmp_path)
    assert set(left_out.text.split(', ')) == {'1 not named {}_rain.* or {}_clean.*', '1 .heic'}
    touch(tmp_path, 'in/a.png', 'in/gt/a.png')
    assert match_folders('train', tmp_path / 'in', tmp_path / 'in/gt')[1] == []  # a side is not left out of the other
    touch(tmp_path, 'deep/lq/b.png', 'deep/gt/b.png')
    (tmp_path / 'link').symlink_to(tmp_path / 'deep/lq')  # its parent is not the parent of the link
    assert len(match_folders('train', tmp_path / 'link/../lq', tmp_path / 'link/../gt')[0]) == 1
