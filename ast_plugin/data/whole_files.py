"""Files that appear whole or not at all: written beside their place, then renamed, so that no crash leaves a half."""

from __future__ import annotations

import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ast_plugin.errors import DataError

_PARTIAL = '.part'


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        DataError: if the file cannot be written; what was there stays.
    """
    path = Path(path)
    # The name is short and of its own: the file's own name may already be as long as the file system allows.
    with _replacing(path, f'.{_unique()}', mode='xb') as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """Open a text file, UTF-8, that takes the place of `path` when all is written, and leaves nothing behind otherwise.

    Raises:
        DataError: if it cannot be written; what was there stays.
    """
    with _replacing(path, f'.{path.name}.{_unique()}', mode='x', encoding='utf-8', newline='\n') as file:
        yield file


def partials_of(path: Path) -> list[Path]:
    """What runs of `replacing` that were killed have left beside `path`."""
    return list(path.parent.glob(f'.{glob.escape(path.name)}.*{_PARTIAL}'))


@contextmanager
def _replacing(path: Path, name: str, **how: str) -> Iterator[IO]:
    """The same with a file beside `path` that is called `name` meanwhile and opened as `how` says."""
    partial = path.parent / (name + _PARTIAL)
    try:
        try:
            with open(partial, **how) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DataError(f'cannot write {path}: {error.strerror or error}') from error


def _unique() -> str:
    return f'{os.getpid()}-{secrets.token_hex(4)}'
