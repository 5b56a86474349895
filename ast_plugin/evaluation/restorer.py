"""Restoration of images with a trained network."""

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
from ast_plugin.errors import CheckpointError, DataError, OptionError, ShapeError
from ast_plugin.evaluation.protocols import PROTOCOLS, eight_turns
from ast_plugin.evaluation.tiling import OnNote, OnTile
from ast_plugin.weights import find_weights

_LARGEST = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}


class Restorer:
    """Network on a device, ready to restore images.

        restorer = Restorer.from_task('rain')  # or Restorer.from_weights('AST_derain.safetensors')
        restored = restorer.restore(image)     # RGB [H, W, 3], uint8, as is `image`

    Images that do not fit in memory are restored in tiles. The network runs in float32, in evaluation mode.

    Args:
        network: maps [1, C, H, W] in [0, 1] to [1, D, s·H, s·W], where C and D are 1 or 3. It is itself moved to the
            device in float32, set to evaluation mode, and its parameters are frozen.
        in_channels: number of input channels C.
        device: 'auto', 'cpu', 'cuda', 'cuda:1' …, 'mps'; see `ast_plugin.devices.find_device`.
        tile: tile size in pixels; 'auto' or None uses tiles only for images that do not fit in memory.
        overlap: overlap of neighbouring tiles in pixels; None for a quarter of the tile size.
        batch: number of tiles processed together.
        self_ensemble: average the results over the eight flips and rotations of the image.
        processing_resolution: shorter side in pixels to which larger images are downscaled for the network; the change
            is then applied to the full image, see `Protocol`. None or 0 for full resolution.
    Attributes:
        notes: messages about assumptions made for the network and about unused entries of its file.
    Raises:
        OptionError: if the device is not available, or tile or overlap is invalid.
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
        processing_resolution: int | None = None,
    ) -> None:
        if in_channels not in (1, 3):
            raise OptionError(f'the network has {in_channels} input channels: expected 1 (gray) or 3 (RGB)')
        self.device = find_device(device)
        self.network = network.to(self.device, torch.float32).eval().requires_grad_(False)
        self.in_channels = in_channels
        self.protocol = replace(
            PROTOCOLS['tiled'],
            tile=AUTO if tile is None else tile,
            overlap=overlap,
            batch=batch,
            self_ensemble=self_ensemble,
            processing_resolution=processing_resolution or None,
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
        processing_resolution: int | None = None,
        **tiling: Any,
    ) -> 'Restorer':
        """Build the network of a weights file and load the weights.

        Args:
            path: .safetensors or .pth file of this package, BasicSR or the official AST release.
            network: network options, as under `network_g` in an option file. By default read from the metadata of the
                file, else inferred from the names and shapes of AST weights; assumptions are listed in `notes`.
            param_key: key of the weights in a .pth file, such as 'params_ema'; None tries the common keys.
            device: see `Restorer`.
            processing_resolution: see `Restorer`; None reads it from the metadata of the file, 0 is full resolution.
            tiling: tile, overlap, batch and self_ensemble, see `Restorer`.
        Raises:
            CheckpointError: if the file cannot be read, or does not match the network.
            OptionError: if the network options, the device or the tiling options are invalid.
        """
        replace(PROTOCOLS['tiled'], **tiling)  # validates the options before a large file is read
        device = find_device(device)
        loaded = load_file(path, network, param_key)
        channels = input_channels(loaded.options, loaded.network)
        if processing_resolution is None:
            processing_resolution = _read_resolution(loaded.metadata, path)
        restorer = cls(
            loaded.network,
            in_channels=channels,
            device=device,
            processing_resolution=processing_resolution,
            **tiling,
        )
        restorer.notes = tuple(loaded.report[1:])
        return restorer

    @classmethod
    def from_task(cls, task: str, *, device: str | torch.device | None = AUTO, **options: Any) -> 'Restorer':
        """Load the network and the bundled weights of a task, see `ast_plugin.weights`.

        Args:
            task: 'rain', 'raindrop' or 'haze'.
            device: see `Restorer`.
            options: tile, overlap, batch, self_ensemble and processing_resolution, see `from_weights`.
        Raises:
            OptionError: if the task is unknown, or the device or the other options are invalid.
            CheckpointError: if this installation does not include the weights, or the file was modified.
        """
        return cls.from_weights(find_weights(task), device=device, **options)

    def restore(self, image: np.ndarray, *, on_tile: OnTile | None = None, on_note: OnNote | None = None) -> np.ndarray:
        """Restore one image.

        For an RGB network, a gray image is repeated to three channels and the result is averaged over channels.

        Args:
            image: gray [H, W] or RGB [H, W, 3]; uint8, uint16, or floating point in [0, 1].
            on_tile: called with (tiles done, total number of tiles).
            on_note: called with a message when tiles are used because of low memory, or colours are lost.
        Returns:
            The restored image, [s·H, s·W] or [s·H, s·W, 3], clamped and rounded to the dtype of the input; float32 for
            floating-point input.
        Raises:
            ShapeError: if the array is not such an image, or the network fails on its size.
            DataError: if the image has colours but the network is gray, or the result is not finite or not an image.
            OptionError: if the image does not fit in memory with the requested tiles.
        """
        is_gray, largest = image.ndim == 2, _LARGEST.get(image.dtype, 1)
        result = self.protocol.restore(self.network, self._to_batch(image), on_tile, on_note)[0]
        if len(result) not in (1, 3):
            raise DataError(f'the network has {len(result)} output channels: expected 1 (gray) or 3 (RGB)')
        if len(result) == 1 and not is_gray and on_note is not None:
            on_note('the network outputs gray images: colours are lost')
        with torch.inference_mode():
            result = (result.mean(0, keepdim=True) if is_gray else result) * largest
            result = result.round_() if largest > 1 else result
            array = result.movedim(0, -1).numpy().astype(image.dtype if largest > 1 else np.float32)
        return np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array)

    def spread(self, image: np.ndarray) -> np.ndarray:
        """Return a map of uncertainty: the standard deviation of the results over the eight flips and rotations.

        Args:
            image: see `restore`.
        Returns:
            Standard deviations, averaged over channels, [s·H, s·W] float32 in [0, 0.5].
        """
        single = replace(self.protocol, self_ensemble=False)
        results = torch.cat([*eight_turns(partial(single.restore, self.network), self._to_batch(image))])
        results = results.mean(1, keepdim=True) if image.ndim == 2 else results
        return results.std(0, correction=0).mean(0).numpy()

    def _to_batch(self, image: np.ndarray) -> Tensor:
        """Convert an image to a network input [1, C, H, W], float32 in [0, 1]."""
        if image.dtype not in _LARGEST and not np.issubdtype(image.dtype, np.floating):
            raise ShapeError(f'expected an image of dtype uint8, uint16 or floating point, got {image.dtype}')
        is_gray = image.ndim == 2
        if not (is_gray or (image.ndim == 3 and image.shape[2] == 3)) or 0 in image.shape:
            raise ShapeError(f'expected an image [H, W] or [H, W, 3], got {list(image.shape)}')
        if self.in_channels == 1 and not is_gray:
            raise DataError('the network accepts gray images only, but the image has colours')
        values = torch.from_numpy(image.astype(np.float32)).div_(_LARGEST.get(image.dtype, 1))
        return values[None, None].expand(1, self.in_channels, -1, -1) if is_gray else values.permute(2, 0, 1)[None]


def _read_resolution(metadata: Mapping[str, str], path: str | os.PathLike) -> int | None:
    text = metadata.get('processing_resolution')
    if text is None or (text.isdecimal() and int(text) > 0):
        return text and int(text)
    raise CheckpointError(f'{path}: processing_resolution in its metadata is {text}: expected a number of pixels')
