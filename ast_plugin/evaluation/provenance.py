"""How a result was made: protocol, metrics, weights and versions, without which a figure cannot be compared."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import ast_plugin
from ast_plugin.evaluation.protocols import Metrics, Protocol

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Provenance:
    """How a result was made, in words.

    Attributes:
        protocol: how images were restored.
        metrics: the definition of each metric.
        weights: path of the file; empty where the network's weights came from none.
        sha256: its checksum.
        versions: of the packages, and the device.
    """

    protocol: str
    metrics: str
    weights: str
    sha256: str
    versions: str

    @classmethod
    def of(
        cls, protocol: Protocol, metrics: Metrics, weights: str | os.PathLike | None, device: torch.device
    ) -> 'Provenance':
        """Describe results that are made now; reads the weights file once.

        Raises:
            OSError: if that cannot be read.
        """
        found = {'ast_plugin': ast_plugin.__version__, 'basicsr': _version('basicsr'), 'torch': torch.__version__}
        name = f'{device.type} ({torch.cuda.get_device_name(device)})' if device.type == 'cuda' else device.type
        return cls(
            protocol=protocol.describe(),
            metrics='; '.join(f'{name}: {_described(options)}' for name, options in metrics.items()),
            weights=str(weights or ''),
            sha256=checksum(weights) if weights else '',
            versions=', '.join([*(f'{package} {number}' for package, number in found.items()), f'device {name}']),
        )

    def items(self) -> Iterator[tuple[str, str]]:
        """Name and value of each."""
        return iter(vars(self).items())


def checksum(path: str | os.PathLike) -> str:
    """SHA-256 of a file, as sha256sum prints it."""
    digest = hashlib.sha256()
    with Path(path).open('rb') as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _described(options: dict) -> str:
    arguments = [f'{key} {value}' for key, value in options.items() if key not in ('type', 'better')]
    return ', '.join([options['type'], *arguments])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return 'unknown'
