"""Files that appear whole or not at all, whatever ends the writing."""

import os

import pytest

from ast_plugin.data.whole_files import partials_of, replacing, write_bytes
from ast_plugin.errors import DataError


def write_text(path, text):
    with replacing(path) as file:
        file.write(text.decode())


writers = pytest.mark.parametrize('write', [write_bytes, write_text])


@pytest.fixture
def path(tmp_path):
    path = tmp_path / 'a[1].txt'
    path.write_bytes(b'earlier')
    return path


@writers
def test_what_was_there_is_replaced(path, write):
    write(path, b'later\n')
    assert path.read_bytes() == b'later\n'
    assert list(path.parent.iterdir()) == [path]


@writers
def test_a_full_disk_leaves_the_earlier_file(path, write, monkeypatch):
    def full(_descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(DataError, match=r'cannot write .*a\[1\]\.txt: No space left on device'):
        write(path, b'later')
    assert path.read_bytes() == b'earlier'
    assert list(path.parent.iterdir()) == [path]


@writers
def test_an_interrupted_write_leaves_the_earlier_file(path, write, monkeypatch):
    def interrupt(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, 'replace', interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(path, b'later')
    assert path.read_bytes() == b'earlier'
    assert list(path.parent.iterdir()) == [path]


def test_names_as_long_as_allowed(tmp_path):
    path = tmp_path / ('x' * 255)
    write_bytes(path, b'all')
    assert path.read_bytes() == b'all'


def test_what_a_killed_run_left_is_found(path):
    with replacing(path) as file:
        (left,) = partials_of(path)
        assert os.path.samefile(left, file.name)
    assert partials_of(path) == []
