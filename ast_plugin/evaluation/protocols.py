"""Validation protocols: padding, tiling, rounding and metrics, by name.

protocol = read_protocol('agan')                        # or {'type': 'agan', 'self_ensemble': True}
restored = protocol.restore(network, lq)                # [1, 3, H, W], float32 in [0, 1]
scores = protocol.measure(restored, gt)                 # {'psnr': 31.2, 'ssim': 0.92}
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ast_plugin.errors import (
    DataError,
    MemoryShortage,
    OptionError,
    PluginError,
    ShapeError,
    class_of_failure,
    did_you_mean,
    one_line,
    out_of_memory,
)
from ast_plugin.evaluation.tiling import AUTO, OnNote, OnTile, Tiling, evaluating
from ast_plugin.metrics.psnr_ssim import as_array, fractions, to_integers, to_toolbox
from ast_plugin.ops.guided import apply_change, downscale

Metrics = Mapping[str, Mapping[str, Any]]

_MATLAB = {'psnr': {'type': 'calculate_psnr_matlab'}, 'ssim': {'type': 'calculate_ssim_matlab'}}
_SKIMAGE = {'psnr': {'type': 'calculate_psnr_skimage'}, 'ssim': {'type': 'calculate_ssim_skimage'}}


@dataclass(frozen=True, kw_only=True)
class Protocol(Tiling):
    """Procedure to restore and measure images.

    Attributes:
        type: key in `PROTOCOLS`.
        metrics: metric options by display name; replaced by `val.metrics` of an option file.
        square: zero-pad the image on all sides to a square whose side is a multiple of this, and crop the result; None
            for no padding.
        round: round results and references to `bit_depth` before measuring, as in image files.
        bit_depth: 8 or 16.
        self_ensemble: average the results over the eight flips and rotations of the image.
        processing_resolution: restore images whose shorter side exceeds this as a copy downscaled to it and its mirror
            image, and apply the mean change to the full image, see `apply_change`; None to restore all images at full
            resolution. For smooth degradations such as haze, for which the network must see the whole scene.
    """

    type: str
    metrics: Metrics = field(default_factory=dict)
    square: int | None = None
    tile: int | str | None = None
    round: bool = False
    bit_depth: int = 8
    self_ensemble: bool = False
    processing_resolution: int | None = None

    def __post_init__(self) -> None:
        for name in ('square', 'processing_resolution'):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f'{name} is {value}: expected at least 1 pixel')
        super().__post_init__()

    def restore(
        self,
        network: nn.Module | Callable[[Tensor], Tensor],
        lq: Tensor,
        on_tile: OnTile | None = None,
        on_note: OnNote | None = None,
    ) -> Tensor:
        """Restore an image.

        Args:
            network: maps [N, C, h, w] in [0, 1] to [N, D, s·h, s·w]. A module runs on its own device in evaluation
                mode; its mode is restored afterwards.
            lq: [B, C, H, W], in [0, 1], on any device.
            on_tile: called with (tiles done, total number of tiles), for each of the eight passes of `self_ensemble`.
            on_note: called with a message when tiles are made smaller because of low memory.
        Returns:
            [B, D, s·H, s·W], clamped to [0, 1], rounded to 1/255 or 1/65535 if `round`, on the device of `lq`; float64
            if `lq` is, else float32.
        Raises:
            MemoryShortage: if the image does not fit in memory.
            ShapeError: if `lq` is not [B, C, H, W], or the network fails on it.
            DataError: if the result is not finite.
        """
        if lq.ndim != 4 or 0 in lq.shape:
            raise ShapeError(f'expected non-empty images [B, C, H, W], got {list(lq.shape)}')

        def run(image: Tensor) -> Tensor:
            return self._run_padded(network, image, on_tile, on_note)

        with evaluating(network):
            lq = lq if lq.dtype == torch.float64 else lq.float()
            small = downscale(lq, self.processing_resolution) if self.processing_resolution else lq
            if self.self_ensemble:
                result = sum(eight_turns(run, small)) / 8
            elif small is lq:
                result = run(lq)
            else:  # haze thickens upwards, whichever way a scene faces: its mirror image is as likely
                result = (run(small) + run(small.flip(-1)).flip(-1)) / 2
            if not torch.isfinite(result).all():
                raise DataError('the output of the network is not finite; check its weights and the image')
            if small is not lq:
                if result.shape != small.shape:
                    raise ShapeError(
                        f'processing_resolution needs results of the size of their inputs {list(small.shape)}, got '
                        f'{list(result.shape)}'
                    )
                try:
                    result = apply_change(lq, small, result - small)
                except Exception as error:
                    if not out_of_memory(error):
                        raise
                    raise MemoryShortage(f'{lq.shape[-1]}x{lq.shape[-2]} does not fit in memory') from error
            result = result.clamp(0, 1)
            largest = 2**self.bit_depth - 1
            return (result * largest).round_().div_(largest) if self.round else result

    def measure(
        self,
        restored: np.ndarray | Tensor,
        reference: np.ndarray | Tensor,
        metrics: Metrics | None = None,
        on_failure: Callable[[str], None] | None = None,
    ) -> dict[str, float]:
        """Return the metrics of an image against its reference, by display name.

        Args:
            restored, reference: RGB or gray images in the format of `ast_plugin.metrics.psnr_ssim.check_pair`.
            metrics: replaces the protocol's metrics, in BasicSR's format. Metrics receive BGR images in [0, 255], uint8
                if rounded to 8 bits.
            on_failure: called with a message for each metric that fails or is NaN; its value is then NaN.
        """
        pair = [as_array(image) for image in (restored, reference)]
        pair = [to_integers(image, self.bit_depth) if self.round else fractions(image) for image in pair]
        img, img2 = map(to_toolbox, pair)
        chosen = self.metrics if metrics is None else metrics
        values: dict[str, float] = {}
        for name, options in chosen.items():
            try:
                values[name] = _measure(name, options, img, img2)
                if on_failure and math.isnan(values[name]):
                    raise DataError(f'{name} is NaN for an image of {img.shape[1]}x{img.shape[0]}')
            except PluginError as error:
                if on_failure is None:
                    raise
                on_failure(f'{class_of_failure(error, "metric")}: {error}')
                values[name] = math.nan
        return values

    def describe(self) -> str:
        """Return a one-line description, such as `agan: tiles of 384, overlap 80, mean; not rounded`."""
        parts = [f'zero-padded to a square, side a multiple of {self.square}'] if self.square else []
        if self.tile is None:
            parts.append('one pass')
        else:
            is_auto = self.tile == AUTO
            quarter = '1/4 tile' if is_auto else self.tile // 4
            tiles = 'one pass, or tiles if memory is low' if is_auto else f'tiles of {self.tile}'
            parts.append(f'{tiles}, overlap {quarter if self.overlap is None else self.overlap}, {self.blend}')
        if self.processing_resolution:
            mirrored = '' if self.self_ensemble else ', averaged with its mirror image'
            parts.append(f'downscaled to a shorter side of {self.processing_resolution}{mirrored}')
        parts += ['self-ensemble of eight flips and rotations'] if self.self_ensemble else []
        parts.append(f'rounded to {self.bit_depth} bits' if self.round else 'not rounded')
        return f'{self.type}: {"; ".join(parts)}'

    def _run_padded(self, network: Callable, image: Tensor, on_tile: OnTile | None, on_note: OnNote | None) -> Tensor:
        if self.square is None:
            return self.run(network, image, on_tile, on_note)
        height, width = image.shape[-2:]
        side = -(-max(height, width) // self.square) * self.square
        top, left = (side - height) // 2, (side - width) // 2
        try:
            padded = F.pad(image, (left, side - width - left, top, side - height - top))
        except RuntimeError as error:
            raise MemoryShortage(
                f'{width}x{height}, zero-padded to {side}x{side}, does not fit in memory; choose a smaller square'
            ) from error
        result = self.run(network, padded, on_tile, on_note)
        scale = result.shape[-1] // side
        return result[..., top * scale : (top + height) * scale, left * scale : (left + width) * scale]


PROTOCOLS: dict[str, Protocol] = {
    protocol.type: protocol
    for protocol in (
        Protocol(type='basicsr', round=True),  # as in BasicSR's models; uses val.metrics only
        Protocol(type='spad', metrics=_MATLAB, square=128, round=True),
        Protocol(type='agan', metrics=_SKIMAGE, tile=384, overlap=80, blend='mean'),
        Protocol(type='densehaze', metrics=_SKIMAGE, tile=1152, overlap=384, blend='mean'),
        Protocol(type='whole', metrics=_SKIMAGE),
        Protocol(type='tiled', metrics=_SKIMAGE, tile=AUTO),
    )
}
"""Protocols by name. Source of spad, agan and densehaze: test scripts of the AST release (Zhou et al., CVPR 2024)."""


def read_protocol(value: str | Mapping[str, Any] | None, bit_depth: int = 8) -> Protocol:
    """Return the protocol for the value of `val.protocol` in an option file.

    Args:
        value: name in `PROTOCOLS`, or a mapping with the name as `type` and any of square, tile, overlap, blend, batch,
            round, self_ensemble and processing_resolution to override; types have been validated. None for `basicsr`.
        bit_depth: bit depth of images, 8 or 16.
    Raises:
        OptionError: if the protocol is unknown or a parameter is invalid.
    """
    changes = {'type': value or 'basicsr'} if value is None or isinstance(value, str) else dict(value)
    name = changes.pop('type', None)
    if not isinstance(name, str) or name not in PROTOCOLS:
        raise OptionError(
            f'protocol: expected one of {", ".join(PROTOCOLS)}, got {name}{did_you_mean(str(name), PROTOCOLS)}'
        )
    try:
        protocol = dataclasses.replace(PROTOCOLS[name], **changes, bit_depth=bit_depth)
    except (OptionError, TypeError) as error:
        raise OptionError(f'protocol {name}: {error}') from None
    idle = [] if protocol.tile else [key for key in ('overlap', 'blend', 'batch') if key in changes]
    if idle:
        raise OptionError(f'protocol.{idle[0]}: no effect, as {name} does not use tiles; set tile as well')
    return protocol


def _measure(name: str, options: Mapping[str, Any], img: np.ndarray, img2: np.ndarray) -> float:
    try:
        from basicsr.metrics import calculate_metric  # restoration alone does not require BasicSR

        return float(calculate_metric({'img': img, 'img2': img2}, options))
    except PluginError as error:
        error.args = (f'{name}: {error}', *error.args[1:])
        raise
    except Exception as error:  # third-party metrics raise any type
        size = f'{img.shape[1]}x{img.shape[0]}'
        raise DataError(f'{name}: {options["type"]} fails on an image of {size}: {one_line(error)}') from error


def eight_turns(run: Callable[[Tensor], Tensor], image: Tensor) -> Iterator[Tensor]:
    """Yield the results for the eight flips and rotations of an image [..., H, W], transformed back."""
    for transpose, upside_down, mirror in itertools.product((False, True), repeat=3):
        dims = [dim for dim, is_flipped in ((-1, mirror), (-2, upside_down)) if is_flipped]
        turned = image.flip(dims)
        result = run(turned.transpose(-1, -2).contiguous() if transpose else turned)
        yield (result.transpose(-1, -2) if transpose else result).flip(dims)
