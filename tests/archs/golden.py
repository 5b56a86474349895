"""Golden cases: outputs of the official network in float64, for reproducible weights and inputs."""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ast_plugin.ops import relative_position_index

FOLDER = Path(__file__).parents[1] / 'data' / 'golden'
NAMES = sorted(path.stem for path in FOLDER.glob('*.json'))
OURS = {'win_size': 'window_size', 'token_mlp': 'ffn', 'dd_in': 'in_chans'}  # official option names


@dataclass
class GoldenCase:
    """One case: options with the plugin's names, official state dict, input, and output of the official network."""

    name: str

    def __post_init__(self) -> None:
        self.facts = json.loads((FOLDER / f'{self.name}.json').read_text())
        self.options = {OURS.get(key, key): value for key, value in self.facts['official_config'].items()}
        self.output = torch.from_numpy(np.load(FOLDER / f'{self.name}.npz')['output']).double()

    def state(self) -> dict[str, Tensor]:
        """Return the official state dict; each array is sampled from a generator seeded by its name."""
        return {name: _draw(name, shape) for name, shape in self.facts['state_dict'].items()}

    def input(self) -> Tensor:
        return torch.from_numpy(np.random.default_rng(0).random(self.facts['input_shape'], dtype=np.float32))

    def target(self, output: Tensor) -> Tensor:
        return torch.from_numpy(np.random.default_rng(1).random(tuple(output.shape), dtype=np.float32))

    def mask(self) -> Tensor | None:
        if not self.facts['mask']:
            return None
        mask = torch.zeros(1, 1, *self.facts['input_shape'][-2:])
        mask[..., -40:] = 1
        return mask

    def error(self, output: Tensor) -> float:
        """Relative error against the official output, on the pixels stored in the case."""
        kept = output.detach().double()[:, :, 1::3, 2::3]
        return float((kept - self.output).norm() / self.output.norm())


def _draw(name: str, shape: list[int]) -> Tensor:
    if name.endswith('relative_position_index'):
        return relative_position_index(round(shape[0] ** 0.5)).clone()
    g = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if '.norm1.weight' in name or '.norm2.weight' in name:
        g = 1 + 0.1 * g
    elif name.endswith('relative_position_bias_table'):
        g = 0.2 * g
    elif name.endswith('attn.w'):
        g = 0.5 * g
    elif len(shape) >= 2:
        g = g / np.sqrt(np.prod(shape[1:]))
    else:
        g = 0.02 * g
    return torch.from_numpy(g.astype(np.float32))
