"""What of a comparison is done: a file for each piece of work, with the digest of all that it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ast_plugin.files import write_file


def digest(value: Any) -> str:
    """A digest of plain values: equal for equal ones, in whatever order their keys are."""
    text = json.dumps(value, sort_keys=True, separators=(',', ':'), default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


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
        write_file(self._path(name), text)
        return content

    def _path(self, name: str) -> Path:
        return self.folder / f'{name}.json'
