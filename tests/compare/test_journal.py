"""What is noted as done: only for the same digest."""

import pytest

from ast_plugin.compare.journal import Journal, digest


def test_digest_knows_values_and_not_the_order_of_keys():
    assert digest({'a': 1, 'b': [2, 3]}) == digest({'b': [2, 3], 'a': 1})
    assert len({digest(value) for value in ({'a': 1}, {'a': 2}, {'a': '1'}, {'b': 1}, [1], None)}) == 6


def test_records(tmp_path):
    notes = Journal(tmp_path / 'new')
    assert notes.read('x') is None
    notes.write('x', 'one', {'value': 3})
    assert notes.read('x', 'one') == {'value': 3, 'digest': 'one'}
    assert notes.read('x', 'two') is None
    assert notes.read('x')['value'] == 3
    notes.write('x', 'two', {'value': 4})
    assert notes.read('x', 'one') is None


@pytest.mark.parametrize('content', ['', '{', '[]', '{"digest"'])
def test_a_broken_record_is_none(tmp_path, content):
    notes = Journal(tmp_path)
    (tmp_path / 'x.json').write_text(content)
    assert notes.read('x', 'one') is None
