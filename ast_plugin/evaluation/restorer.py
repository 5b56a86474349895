"""Restoring images with a trained network: weights, device, memory and tiles behind one class."""

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ast_plugin.archs.networks import input_channels, load_file
from ast_plugin.devices import AUTO, find_device
from ast_plugin.errors import DataError, OptionError, ShapeError
from ast_plugin.evaluation.protocols import PROTOCOLS, eight_turns
from ast_plugin.evaluation.tiling import OnNote, OnTile
from ast_plugin.weights import find_weights

_LARGEST = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}


class Restorer:
    """A network ready to restore images.

        restorer = Restorer.from_task('rain')  # or Restorer.from_weights('AST_derain.safetensors')
        restored = restorer.restore(image)     # RGB [H, W, 3], uint8, as is `image`

    Images that do not fit in memory are restored in tiles. The network runs in float32, in evaluation mode.

    Args:
        network: maps [1, C, H, W] in [0, 1] to [1, D, s·H, s·W], C and D being 1 or 3.
        in_channels: C.
        device: 'auto', 'cpu', 'cuda', 'cuda:1' …, 'mps'; see `ast_plugin.devices.find_device`.
        tile: side of a tile in pixels; 'auto' or None chooses by the free memory, and takes the whole where it fits.
        overlap: pixels that neighbouring tiles share; None takes a quarter of the tile.
        batch: tiles that go through the network together.
        self_ensemble: give the mean of the results for the eight flips and rotations of the image.
    Attributes:
        notes: lines on what was assumed about the network, and on what of its file was not taken.
    Raises:
        OptionError: if the device is not there, or tile and overlap make no sense.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        in_channels: int = 3,
        device: str | torch.device | None = AUTO,
        tile: int | str | None = None,
        overlap: int | None = None,
        batch: int = 1,
        self_ensemble: bool = False,
    ) -> None:
        if in_channels not in (1, 3):
            raise OptionError(f'the network takes {in_channels} channels: expected 1 (gray) or 3 (RGB)')
        self.device = find_device(device)
        self.network = network.to(self.device, torch.float32).eval().requires_grad_(False)
        self.in_channels = in_channels
        self.protocol = replace(
            PROTOCOLS['tiled'],
            tile=AUTO if tile is None else tile,
            overlap=overlap,
            batch=batch,
            self_ensemble=self_ensemble,
        )
        self.notes: tuple[str, ...] = ()

    @classmethod
    def from_weights(
        cls,
        path: str | os.PathLike,
        *,
        network: Mapping[str, Any] | None = None,
        param_key: str | None = None,
        device: str | torch.device | None = AUTO,
        **tiling: Any,
    ) -> 'Restorer':
        """Build the network that a weights file is of, and load it.

        Args:
            path: safetensors or .pth, ours, BasicSR's or official.
            network: its options, as under `network_g` of an option file. None takes those in the file's metadata,
                else what names and shapes of an AST's weights tell; what they do not tell is said in `notes`.
            param_key: where the weights lie in a .pth file, such as 'params_ema'; None looks in the usual places.
            device: see `Restorer`.
            tiling: tile, overlap, batch and self_ensemble, see `Restorer`.
        Raises:
            CheckpointError: if the file cannot be used, or is not of this network.
            OptionError: if the network's options, the device or the tiles are wrong.
        """
        replace(PROTOCOLS['tiled'], **tiling)  # wrong options are told before a large file is read
        device = find_device(device)
        loaded = load_file(path, network, param_key)
        channels = input_channels(loaded.options, loaded.network)
        restorer = cls(loaded.network, in_channels=channels, device=device, **tiling)
        restorer.notes = loaded.notes
        return restorer

    @classmethod
    def from_task(cls, task: str, *, device: str | torch.device | None = AUTO, **tiling: Any) -> 'Restorer':
        """Load the network of a task with the weights that come with this package; see `ast_plugin.weights`.

        Args:
            task: 'rain', 'raindrop' or 'haze'.
            device: see `Restorer`.
            tiling: tile, overlap, batch and self_ensemble, see `Restorer`.
        Raises:
            OptionError: if there is no such task, or the device or the tiles are wrong.
            CheckpointError: if the weights are not in this installation, or were altered.
        """
        return cls.from_weights(find_weights(task), device=device, **tiling)

    def restore(self, image: np.ndarray, *, on_tile: OnTile | None = None, on_note: OnNote | None = None) -> np.ndarray:
        """Restore one image.

        A gray image goes through a network of RGB as three equal channels, whose mean comes back.

        Args:
            image: gray [H, W] or RGB [H, W, 3]; uint8, uint16, or floating point in [0, 1].
            on_tile: called with (tiles done, tiles in all).
            on_note: called with a line when tiles are chosen because memory is short, or colours are lost.
        Returns:
            The restored image, [s·H, s·W] or [s·H, s·W, 3], clamped to the range of its dtype and rounded to the
            nearest value: the input's dtype, float32 for floating point.
        Raises:
            ShapeError: if the array is no such image, or the network does not take its size.
            DataError: if colours are given to a network for gray, or the network's result is not finite or no image.
            OptionError: if the image does not fit in memory with the tiles asked for.
        """
        is_gray, largest = image.ndim == 2, _LARGEST.get(image.dtype, 1)
        result = self.protocol.restore(self.network, self._to_batch(image), on_tile, on_note)[0]
        if len(result) not in (1, 3):
            raise DataError(f'the network gives {len(result)} channels: expected 1 (gray) or 3 (RGB)')
        if len(result) == 1 and not is_gray and on_note is not None:
            on_note('the network gives gray images: the colours are lost')
        with torch.inference_mode():
            result = (result.mean(0, keepdim=True) if is_gray else result) * largest
            result = result.round_() if largest > 1 else result
            array = result.movedim(0, -1).numpy().astype(image.dtype if largest > 1 else np.float32)
        return np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array)

    def spread(self, image: np.ndarray) -> np.ndarray:
        """Return how far the results for the eight flips and rotations of an image differ, a map of uncertainty.

        Args:
            image: as for `restore`.
        Returns:
            The standard deviation over the eight, the mean over the channels, [s·H, s·W] float32 in [0, 0.5].
        """
        single = replace(self.protocol, self_ensemble=False)
        results = torch.cat([*eight_turns(partial(single.restore, self.network), self._to_batch(image))])
        results = results.mean(1, keepdim=True) if image.ndim == 2 else results
        return results.std(0, correction=0).mean(0).numpy()

    def _to_batch(self, image: np.ndarray) -> Tensor:
        """An image as the network takes it, [1, C, H, W], float32 in [0, 1]."""
        if image.dtype not in _LARGEST and not np.issubdtype(image.dtype, np.floating):
            raise ShapeError(f'an image has uint8, uint16 or floating point values, not {image.dtype}')
        is_gray = image.ndim == 2
        if not (is_gray or (image.ndim == 3 and image.shape[2] == 3)) or 0 in image.shape:
            raise ShapeError(f'an image is [H, W] or [H, W, 3], not {list(image.shape)}')
        if self.in_channels == 1 and not is_gray:
            raise DataError('the image has colours, the network takes gray images only')
        values = torch.from_numpy(image.astype(np.float32)).div_(_LARGEST.get(image.dtype, 1))
        return values[None, None].expand(1, self.in_channels, -1, -1) if is_gray else values.permute(2, 0, 1)[None]
