"""Folders in which one process works at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ast_plugin.errors import DataError


@contextmanager
def alone_in(folder: Path, complaint: str) -> Iterator[None]:
    """Keep other processes from working in a folder meanwhile; one that is killed lets go by itself.

    Args:
        folder: which is there.
        complaint: what is told, behind the folder's name, where another process is at it.
    Raises:
        DataError: if another process is at it, or has just put another folder in its place.
    """
    try:
        import fcntl
    except ImportError:  # Windows: files that are open cannot be removed there, which is protection enough
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f'{folder}: {complaint}; wait for it to end') from None
        if not folder.exists() or not os.path.samestat(os.fstat(handle), os.stat(folder)):
            raise DataError(f'{folder}: another process has just finished there; give the command again')
        yield
    finally:
        os.close(handle)
