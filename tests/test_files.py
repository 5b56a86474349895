"""Tests of atomic file writes under interruption, and of folder locks."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ast_plugin import files
from ast_plugin.errors import FileError
from ast_plugin.files import file_digest, lock_folder, partials_of, replace_text, write_file


def write_text(path, text):
    with replace_text(path) as file:
        file.write(text.decode())


writers = pytest.mark.parametrize('write', [write_file, write_text])


@pytest.fixture
def path(tmp_path):
    path = tmp_path / 'a[1].txt'
    path.write_bytes(b'earlier')
    return path


@writers
def test_replaces_what_was_there(path, write):
    write(path, b'later\n')
    assert path.read_bytes() == b'later\n'
    assert list(path.parent.iterdir()) == [path]


def fail(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')


def interrupt(*_):
    raise KeyboardInterrupt


@writers
@pytest.mark.parametrize(
    ('owner', 'step', 'fault', 'message'),
    [
        (os, 'fsync', fail, r'a\[1\]\.txt cannot be written: No space left on device'),
        (Path, 'replace', fail, r'a\[1\]\.txt cannot be written: No space left on device'),
        (Path, 'replace', interrupt, None),
    ],
)
def test_failed_write_keeps_the_old_file(path, write, monkeypatch, owner, step, fault, message):
    monkeypatch.setattr(owner, step, fault)
    with pytest.raises(FileError if message else KeyboardInterrupt, match=message):
        write(path, b'later')
    assert path.read_bytes() == b'earlier'
    assert list(path.parent.iterdir()) == [path]


def test_disk_that_loses_a_byte(path, monkeypatch):
    monkeypatch.setattr(os, 'fsync', lambda descriptor: os.ftruncate(descriptor, 1))
    with pytest.raises(FileError, match='the content read back differs from the content written'):
        write_file(path, b'later')
    assert path.read_bytes() == b'earlier'


@writers
def test_names_as_long_as_allowed(tmp_path, write):
    path = tmp_path / ('x' * 255)
    write(path, b'all')
    assert path.read_bytes() == b'all'


def test_creates_the_folder_on_request(tmp_path):
    with pytest.raises(FileError, match='No such file or directory'):
        write_file(tmp_path / 'new/a', b'')
    write_file(tmp_path / 'new/a', b'1', make_folder=True)
    with pytest.raises(FileError, match='a/b cannot be written'):
        write_file(tmp_path / 'new/a/b', b'', make_folder=True)


def test_mode_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_file(tmp_path / 'a', b'')
    finally:
        os.umask(old)
    assert (tmp_path / 'a').stat().st_mode & 0o777 == 0o640


def test_partials_of_killed_writes(path):
    with replace_text(path) as file:
        (left,) = partials_of(path)
        assert os.path.samefile(left, file.name)
    assert partials_of(path) == []


def test_digest(tmp_path):
    (tmp_path / 'a').write_bytes(b'abc')
    assert file_digest(tmp_path / 'a') == 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no such locks')
def test_one_process_in_a_folder(tmp_path):
    folder = tmp_path / 'in'
    folder.mkdir()
    with lock_folder(folder, 'busy') as descriptors:
        child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE, pass_fds=descriptors)
        with pytest.raises(FileError, match='in: busy'), lock_folder(folder, 'busy'):
            pass
    with pytest.raises(FileError, match='in: busy'), lock_folder(folder, 'busy'):  # the child has inherited it
        pass
    child.kill()
    child.wait()
    with lock_folder(folder, 'busy', patience=5.0):
        pass


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no such locks')
def test_lock_that_cannot_be_taken(tmp_path, monkeypatch):
    folder = tmp_path / 'in'
    folder.mkdir()
    monkeypatch.setattr(files.fcntl, 'flock', fail)
    with lock_folder(folder, 'busy'):  # a file system without locks
        pass
    monkeypatch.setattr(files.fcntl, 'flock', lambda *_: folder.rename(tmp_path / 'out'))
    with pytest.raises(FileError, match='another process has just replaced this folder'), lock_folder(folder, 'busy'):
        pass
