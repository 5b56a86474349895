"""Where LMDBs may be written."""

import pytest

from ast_plugin.data.lmdb import writer as lmdb_writer
from ast_plugin.errors import DataError
from tests.data.lmdb_sources import pack, write_folders


def test_the_root_of_the_disk_is_none(tmp_path):
    with pytest.raises(DataError, match=r'^/: exists, and is not a pair of LMDBs; choose another place'):
        pack(write_folders(tmp_path / 'source', 2), '/')


def test_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.chdir(tmp_path)
    pack(write_folders(tmp_path / 'source', 2), '~/out')
    assert (tmp_path / 'home/out/lq.lmdb').is_dir() and not (tmp_path / '~').exists()


@pytest.mark.parametrize('overwrite', [True, False])
def test_what_comes_there_meanwhile_is_kept(tmp_path, monkeypatch, overwrite):
    root, written = write_folders(tmp_path / 'source', 2), lmdb_writer._write_texts

    def somebody_writes(staging, plan):
        written(staging, plan)
        (tmp_path / 'out').mkdir()
        (tmp_path / 'out/thesis.tex').write_text('all of it')

    monkeypatch.setattr(lmdb_writer, '_write_texts', somebody_writes)
    with pytest.raises(DataError, match='out: exists, and is not a pair of LMDBs'):
        pack(root, tmp_path / 'out', overwrite=overwrite)
    assert (tmp_path / 'out/thesis.tex').read_text() == 'all of it'
    (tmp_path / 'out/thesis.tex').unlink()
    monkeypatch.undo()
    assert pack(root, tmp_path / 'out').num_resumed == 2
