"""How a result was made: protocol, metrics, weights and versions, without which a figure cannot be compared."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

import ast_plugin
from ast_plugin.evaluation.protocols import Metrics, Protocol
from ast_plugin.files import file_digest


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
            sha256=file_digest(weights) if weights else '',
            versions=', '.join([*(f'{package} {number}' for package, number in found.items()), f'device {name}']),
        )

    def items(self) -> Iterator[tuple[str, str]]:
        """Name and value of each."""
        return iter(vars(self).items())


def _described(options: dict) -> str:
    arguments = [f'{key} {value}' for key, value in options.items() if key not in ('type', 'better')]
    return ', '.join([options['type'], *arguments])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return 'unknown'
