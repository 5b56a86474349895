"""Atomic file writes, folder locks between processes, and file digests."""

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

PARTIAL_SUFFIX = '.part'  # of the temporary file during a write; its name starts with a dot
_BLOCK_BYTES = 2**20


def write_file(path: str | os.PathLike, content: bytes, make_folder: bool = False) -> None:
    """Write a file atomically: the new content is read back and compared before it replaces the old file.

    Args:
        path: the file.
        content: the complete new content.
        make_folder: create missing parent folders.
    Raises:
        FileError: if any step fails; the old file is kept.
    """
    with _replacement(Path(path)) as partial:
        if make_folder:
            partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open('xb') as file:
            file.write(content)
            _sync(file)
        if partial.read_bytes() != content:
            raise OSError('the content read back differs from the content written')


@contextmanager
def replace_text(path: str | os.PathLike) -> Iterator[IO[str]]:
    """Open a UTF-8 text file that replaces `path` when the block succeeds and is deleted when the block fails.

    Raises:
        FileError: if the file cannot be written; the old file is kept.
    """
    with _replacement(Path(path)) as partial, partial.open('x', encoding='utf-8', newline='\n') as file:
        yield file
        _sync(file)


def partials_of(path: Path) -> list[Path]:
    """Return the temporary files that killed processes left while writing `path`."""
    return list(path.parent.glob(f'{glob.escape(_partial_start(path))}*{PARTIAL_SUFFIX}'))


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk where the system supports it; the files are already synced by then."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_folder(partial: Path, destination: Path, old: Path) -> None:
    """Move a finished folder to its destination, replacing an existing one.

    The existing folder is renamed to `old`, restored if the move fails, and deleted if it succeeds.

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
    """Lock a folder against other processes of this machine; the lock ends with its process, even a killed one.

    No effect on file systems without locks, and on Windows, which does not allow open files to be removed.

    Args:
        folder: an existing folder.
        occupied: the error message, after the folder's name, if another process holds the lock.
        patience: seconds to wait for the other process.
    Yields:
        File descriptors; a child process that inherits them holds the lock as long as it lives.
    Raises:
        FileError: if another process holds the lock, or has just replaced the folder.
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
            except OSError:  # a file system without locks
                break
        if not folder.exists() or not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            raise FileError(f'{folder}: another process has just replaced this folder; run the command again')
        yield [descriptor]
    finally:
        os.close(descriptor)


def file_digest(path: str | os.PathLike) -> str:
    """Return the SHA-256 digest of a file as a hexadecimal string, as printed by sha256sum."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _replacement(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file next to `path` that replaces `path` at the end of the block."""
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
    # Truncated, because the file's own name may already have the maximum length.
    return f'.{path.name[:32]}.'


def _sync(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())
