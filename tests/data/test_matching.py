"""PairTable returns the pairs it was given and uses little memory."""

import pickle
import tracemalloc

import pytest

from ast_plugin.data.matching import Pair, PairTable

PAIRS = [
    Pair('a', '/data/lq/a.png', '/data/gt/a.png'),
    Pair('lq/b.png', '/data/lq/b.png', '/data/gt/b.png'),
    Pair('é 雨', '/data/lq/é 雨.png', '/data/gt/x\ny.png'),
    Pair('\udcff', '/data/lq/\udcff.png', '/data/gt/\udcff.png'),
]


@pytest.mark.parametrize('root', ['', '/data/'])
def test_it_gives_back_what_was_put_in(root):
    table = PairTable(PAIRS, root)
    assert list(table) == PAIRS
    assert len(table) == 4 and table[-1] == PAIRS[3] and table[1] == PAIRS[1]
    assert list(pickle.loads(pickle.dumps(table))) == PAIRS
    assert PAIRS[2] in table


@pytest.mark.parametrize('index', [4, -5])
def test_what_is_not_there(index):
    with pytest.raises(IndexError, match=f'4 pairs; got index {index}'):
        PairTable(PAIRS)[index]
    assert list(PairTable()) == []


def test_memory_of_many_pairs():
    count = 5_000
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        names = (f'{number:06d}.png' for number in range(count))
        table = PairTable(
            (Pair(name, f'/data/spad/rain/{name}', f'/data/spad/gt/{name}') for name in names), '/data/spad/'
        )
        per_pair = (tracemalloc.get_traced_memory()[0] - before) / count
    finally:
        tracemalloc.stop()
    assert len(table) == count and table[count - 1].gt == '/data/spad/gt/004999.png'
    assert per_pair < 60  # as objects, about 300
