"""What a benchmark's record says besides its numbers: on what machine, with which versions."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ast_plugin.errors import DataError
from ast_plugin.files import write_file

_PACKAGES = ('torch', 'torchvision', 'basicsr', 'numpy', 'opencv-python', 'lmdb', 'triton')


def machine() -> dict[str, Any]:
    """Processor, cores, threads that torch uses, how busy the machine is, and the GPU; no names of hosts or users."""
    import torch

    return {
        'processor': _processor(),
        'cores': os.cpu_count(),
        'threads': torch.get_num_threads(),
        'load': round(os.getloadavg()[0], 1) if hasattr(os, 'getloadavg') else None,
        'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        'system': f'{platform.system()} {platform.machine()}',
    }


def versions() -> dict[str, str]:
    """Of Python, this package, and the packages that decide its speed, as far as they are installed."""
    from ast_plugin import __version__

    found = {'python': platform.python_version(), 'ast_plugin': __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_writable(path: str | Path) -> None:
    """See that a record can be written before it is measured, which can take an hour.

    Raises:
        DataError: if not.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            is_folder = path.is_dir()
    except OSError as error:
        raise DataError(f'--json {path}: cannot be written: {error.strerror}') from error
    if is_folder:
        raise DataError(f'--json {path}: is a folder, expected a file to write')


def write(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record with machine and versions as JSON, the file whole or not at all."""
    content = {**record, 'machine': machine(), 'versions': versions()}
    write_file(path, (json.dumps(content, indent=2) + '\n').encode(), make_folder=True)


def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.machine()
