"""Fixtures of the writer tests."""

from pathlib import Path

import pytest

from ast_plugin.data.lmdb import writer as lmdb_writer
from tests.data.lmdb_sources import write_folders


@pytest.fixture
def root(tmp_path) -> Path:
    return write_folders(tmp_path / 'source', 7)


@pytest.fixture
def small_batches(monkeypatch) -> None:
    monkeypatch.setattr(lmdb_writer, 'COMMIT_PAIRS', 3)
