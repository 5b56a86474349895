"""Files that appear whole or not at all, folders in which one process works at a time, and digests."""

from __future__ import annotations

import glob
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ast_plugin.errors import FileError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PARTIAL_SUFFIX = '.part'  # of a file that is being written, hidden by a dot before its name
_BLOCK_BYTES = 2**20


def write_file(path: str | os.PathLike, content: bytes, make_folder: bool = False) -> None:
    """Write a file whole or not at all: what lies on disk is read back before it replaces what was there.

    Args:
        path: the file.
        content: all that it will hold.
        make_folder: make its folder where that is not there.
    Raises:
        FileError: if anything on the way fails; what was there stays.
    """
    with _replacement(Path(path)) as partial:
        if make_folder:
            partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open('xb') as file:
            file.write(content)
            _sync(file)
        if partial.read_bytes() != content:
            raise OSError('what was read back is not what had been written')


@contextmanager
def replace_text(path: str | os.PathLike) -> Iterator[IO[str]]:
    """Open a text file, UTF-8, that replaces `path` when the block ends, and leaves nothing when the block fails.

    Raises:
        FileError: if it cannot be written; what was there stays.
    """
    with _replacement(Path(path)) as partial, partial.open('x', encoding='utf-8', newline='\n') as file:
        yield file
        _sync(file)


def partials_of(path: Path) -> list[Path]:
    """Files that killed processes have left beside `path` while they wrote it."""
    return list(path.parent.glob(f'{glob.escape(_partial_start(path))}*{PARTIAL_SUFFIX}'))


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk. Not every system can; the files themselves are safe by then."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_folder(partial: Path, destination: Path, old: Path) -> None:
    """Put a finished folder in its place; what is there lies in `old` meanwhile, comes back on failure, or goes.

    Raises:
        OSError: if a folder cannot be renamed.
    """
    is_there = destination.is_dir() and any(destination.iterdir())
    if is_there:
        shutil.rmtree(old, ignore_errors=True)
        destination.rename(old)
    elif os.name == 'nt' and destination.is_dir():
        destination.rmdir()
    try:
        partial.rename(destination)
    except OSError:
        if is_there:
            old.rename(destination)
        raise
    sync_folder(destination.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def lock_folder(folder: Path, occupied: str, patience: float = 0.0) -> Iterator[list[int]]:
    """Keep other processes of this machine from working in a folder; one that is killed lets go by itself.

    Windows has no such locks. Files that are open cannot be removed there, which is protection enough.

    Args:
        folder: an existing folder.
        occupied: what the error says behind the folder's name where another process is at work.
        patience: seconds to wait for the other process.
    Yields:
        Descriptors; a child process that inherits them holds the lock as long as it lives.
    Raises:
        FileError: if another process is at work there, or has just put another folder in its place.
    """
    if fcntl is None:
        yield []
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        give_up_at = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= give_up_at:
                    raise FileError(f'{folder}: {occupied}; wait for it to end') from None
                time.sleep(0.2)
        if not folder.exists() or not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            raise FileError(f'{folder}: another process has just finished there; give the command again')
        yield [descriptor]
    finally:
        os.close(descriptor)


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file, as sha256sum prints it."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _replacement(path: Path) -> Iterator[Path]:
    """Yield the name of a file to be written beside `path`, which takes the place of `path` in the end."""
    partial = path.with_name(f'{_partial_start(path)}{os.getpid()}-{secrets.token_hex(4)}{PARTIAL_SUFFIX}')
    try:
        yield partial
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise FileError(f'{path} cannot be written: {error.strerror or error}') from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _partial_start(path: Path) -> str:
    # Cut, as the file's own name may be as long as the file system allows.
    return f'.{path.name[:32]}.'


def _sync(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())
