"""What of a comparison is done: a file for each piece of work, with the digest of all that it depends on."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ast_plugin.checkpoints import write_atomically
from ast_plugin.errors import OptionError

_BLOCK_BYTES = 2**20
_PATIENCE = 30.0  # seconds that what a killed comparison has started may take to end


def digest(value: Any) -> str:
    """A digest of plain values: equal for equal ones, in whatever order their keys are."""
    text = json.dumps(value, sort_keys=True, separators=(',', ':'), default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """A digest of what a file holds."""
    found = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(_BLOCK_BYTES):
            found.update(block)
    return found.hexdigest()


class Journal:
    """Records by name in a folder; each is written whole or not at all.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str, wanted: str | None = None) -> dict[str, Any] | None:
        """The record of that name; None if there is none, or it is of another digest than `wanted`."""
        try:
            record = json.loads(self._path(name).read_text(encoding='utf-8'))
        except (OSError, ValueError):
            return None
        if not isinstance(record, dict) or (wanted is not None and record.get('digest') != wanted):
            return None
        return record

    def write(self, name: str, digest: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Put a record in the place of an older one of that name."""
        content = {**record, 'digest': digest}
        text = json.dumps(content, indent=1).encode()
        write_atomically(self._path(name), lambda file: file.write(text))
        return content

    def _path(self, name: str) -> Path:
        return self.folder / f'{name}.json'


@contextmanager
def locked(folder: Path) -> Iterator[list[int]]:
    """Keep other comparisons out of a folder, also while processes of a killed one still run in it.

    Yields:
        Descriptors that such processes must inherit.
    Raises:
        OptionError: if another one is at work there.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield []
        return
    descriptor = os.open(folder / '.lock', os.O_RDWR | os.O_CREAT, 0o666)
    try:
        give_up_at = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up_at:
                    raise OptionError(
                        f'{folder}: another comparison is at work there; wait for its end, or choose another name or '
                        '--root'
                    ) from None
                time.sleep(0.2)
        yield [descriptor]
    finally:
        os.close(descriptor)
