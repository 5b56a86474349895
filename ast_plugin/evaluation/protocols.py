"""Validation protocols by name: how an image is restored, whether it is rounded, and what it is measured by.

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
)
from ast_plugin.evaluation.tiling import AUTO, OnNote, OnTile, Tiling, evaluating
from ast_plugin.metrics.psnr_ssim import as_array, fractions, to_integers, to_toolbox

Metrics = Mapping[str, Mapping[str, Any]]

_MATLAB = {'psnr': {'type': 'calculate_psnr_matlab'}, 'ssim': {'type': 'calculate_ssim_matlab'}}
_SKIMAGE = {'psnr': {'type': 'calculate_psnr_skimage'}, 'ssim': {'type': 'calculate_ssim_skimage'}}


@dataclass(frozen=True, kw_only=True)
class Protocol(Tiling):
    """How a network's results are made, in tiles perhaps, and measured.

    Attributes:
        type: name in the table.
        metrics: options of each metric, by the name it is printed under; those of an option file's `val.metrics` take
            their place.
        square: zeros are put around the image, which stays in the middle, up to a square whose side is a multiple of
            this; cut away again after the network. None for no padding.
        round: results and references are rounded to `bit_depth` before they are measured, as files hold them.
        bit_depth: 8 or 16.
        self_ensemble: the result is the mean over the eight flips and rotations of the image.
    """

    type: str
    metrics: Metrics = field(default_factory=dict)
    square: int | None = None
    tile: int | str | None = None
    round: bool = False
    bit_depth: int = 8
    self_ensemble: bool = False

    def __post_init__(self) -> None:
        if self.square is not None and self.square < 1:
            raise OptionError(f'square is {self.square}: expected a number of pixels, 1 or more')
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
            network: maps [N, C, h, w] in [0, 1] to [N, D, s·h, s·w]; a module is run on its own device, in evaluation
                mode, and returned to the mode it was in.
            lq: [B, C, H, W], in [0, 1], on any device.
            on_tile: called with (tiles done, tiles in all), eight times over with `self_ensemble`.
            on_note: called with a line when memory is short and tiles are made smaller.
        Returns:
            [B, D, s·H, s·W], clamped to [0, 1], rounded to 255ths or 65535ths if `round`; float32 (float64 of float64)
            on the device of `lq`.
        Raises:
            MemoryShortage: if the image does not fit in memory.
            ShapeError: if `lq` is not [B, C, H, W], or the network does not take it.
            DataError: if the result is not finite.
        """
        if lq.ndim != 4 or 0 in lq.shape:
            raise ShapeError(f'a protocol restores images [B, C, H, W] that are not empty, got {list(lq.shape)}')

        def run(image: Tensor) -> Tensor:
            return self._run_padded(network, image, on_tile, on_note)

        with evaluating(network):
            result = sum(eight_turns(run, lq)) / 8 if self.self_ensemble else run(lq)
            if not torch.isfinite(result).all():
                raise DataError('the network gave values that are not finite; its weights or the image are at fault')
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
        """Measure an image against its reference, both as `ast_plugin.metrics.psnr_ssim.check_pair` takes them.

        Args:
            restored, reference: RGB or gray.
            metrics: other ones than the protocol's, in BasicSR's form; each gets BGR in [0, 255], which is
                uint8 if rounded to 8 bits.
            on_failure: called with a line on each metric that fails or is not a number, whose value then is NaN.
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
                    raise DataError(f'{name} is not a number, of an image of {img.shape[1]}x{img.shape[0]}')
            except PluginError as error:
                if on_failure is None:
                    raise
                on_failure(f'{class_of_failure(error, "metric")}: {error}')
                values[name] = math.nan
        return values

    def describe(self) -> str:
        """Return what is done, in a line: `agan: tiles of 384, overlap 80, mean; not rounded`."""
        parts = [f'zeros around to a square multiple of {self.square}'] if self.square else []
        if self.tile is None:
            parts.append('one pass')
        else:
            is_auto = self.tile == AUTO
            quarter = 'a quarter' if is_auto else self.tile // 4
            tiles = 'one pass or tiles as memory allows' if is_auto else f'tiles of {self.tile}'
            parts.append(f'{tiles}, overlap {quarter if self.overlap is None else self.overlap}, {self.blend}')
        parts += ['mean over eight flips and rotations'] if self.self_ensemble else []
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
                f'{width}x{height} with zeros around it, {side}x{side}, does not fit in memory; choose a smaller square'
            ) from error
        result = self.run(network, padded, on_tile, on_note)
        scale = result.shape[-1] // side
        return result[..., top * scale : (top + height) * scale, left * scale : (left + width) * scale]


PROTOCOLS: dict[str, Protocol] = {
    protocol.type: protocol
    for protocol in (
        Protocol(type='basicsr', round=True),  # as BasicSR's own models; measures by val.metrics alone
        Protocol(type='spad', metrics=_MATLAB, square=128, round=True),
        Protocol(type='agan', metrics=_SKIMAGE, tile=384, overlap=80, blend='mean'),
        Protocol(type='densehaze', metrics=_SKIMAGE, tile=1152, overlap=384, blend='mean'),
        Protocol(type='whole', metrics=_SKIMAGE),
        Protocol(type='tiled', metrics=_SKIMAGE, tile=AUTO),
    )
}
"""The protocols by name. Source of spad, agan, densehaze: test scripts of the AST release (Zhou et al., CVPR 2024)."""


def read_protocol(value: str | Mapping[str, Any] | None, bit_depth: int = 8) -> Protocol:
    """Return the protocol of an option file's `val.protocol`, whose types its schema has checked.

    Args:
        value: a name of `PROTOCOLS`; or a mapping with that as `type`, and any of square, tile, overlap, blend, batch,
            round and self_ensemble, which replace the protocol's own. None for BasicSR's own way.
        bit_depth: of images, 8 or 16.
    Raises:
        OptionError: if there is no such protocol, or its parameters make no sense.
    """
    changes = {'type': value or 'basicsr'} if value is None or isinstance(value, str) else dict(value)
    name = changes.pop('type', None)
    if not isinstance(name, str) or name not in PROTOCOLS:
        raise OptionError(
            f'no validation protocol is called {name}{did_you_mean(str(name), PROTOCOLS)}; '
            f'there are {", ".join(PROTOCOLS)}'
        )
    try:
        protocol = dataclasses.replace(PROTOCOLS[name], **changes, bit_depth=bit_depth)
    except (OptionError, TypeError) as error:
        raise OptionError(f'protocol {name}: {error}') from None
    idle = [] if protocol.tile else [key for key in ('overlap', 'blend', 'batch') if key in changes]
    if idle:
        raise OptionError(f'protocol.{idle[0]}: {name} has no tiles that this could say something of; set tile, too')
    return protocol


def _measure(name: str, options: Mapping[str, Any], img: np.ndarray, img2: np.ndarray) -> float:
    try:
        from basicsr.metrics import calculate_metric  # here: images are restored without BasicSR

        return float(calculate_metric({'img': img, 'img2': img2}, options))
    except PluginError as error:
        error.args = (f'{name}: {error}', *error.args[1:])
        raise
    except Exception as error:  # metrics of others raise what they like
        size = f'{img.shape[1]}x{img.shape[0]}'
        raise DataError(f'{name}: {options["type"]} fails on an image of {size}: {one_line(error)}') from error


def eight_turns(run: Callable[[Tensor], Tensor], image: Tensor) -> Iterator[Tensor]:
    """Run on the eight flips and rotations of an image [..., H, W], and yield each result turned back."""
    for transpose, upside_down, mirror in itertools.product((False, True), repeat=3):
        dims = [dim for dim, is_flipped in ((-1, mirror), (-2, upside_down)) if is_flipped]
        turned = image.flip(dims)
        result = run(turned.transpose(-1, -2).contiguous() if transpose else turned)
        yield (result.transpose(-1, -2) if transpose else result).flip(dims)
