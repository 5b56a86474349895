"""Synthetic degradations of clean images. To add one, write a module like rain.py and an entry in `DEGRADATIONS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, Field

from ast_plugin.degradations.haze import HazeParameters, add_haze
from ast_plugin.degradations.moire import MoireParameters, add_moire
from ast_plugin.degradations.rain import RainParameters, add_rain
from ast_plugin.degradations.raindrops import RaindropParameters, add_raindrops
from ast_plugin.degradations.shadow import ShadowParameters, add_shadow
from ast_plugin.degradations.snow import SnowParameters, add_snow

__all__ = ['DEFAULT', 'DEGRADATIONS', 'AnyParameters', 'Degradation']


@dataclass(frozen=True)
class Degradation:
    """A type of degradation.

    Attributes:
        parameters: model of its parameters, with `type: Literal[name] = name`.
        apply: pure function (image, generator, parameters) -> (degraded image, mask). Images are RGB [H, W, 3],
            float32 in [0, 1], of any size. The generator is the only source of randomness; equal states give
            bit-identical results. The mask is the opacity of the degradation, [H, W] float32 in [0, 1], or None if
            every pixel is degraded.
        margin: number of pixels around a patch that affect its degradation.
        takes_depth: whether `apply` has an additional argument `depth`, a depth map [H, W].
    """

    parameters: type[BaseModel]
    apply: Callable[..., tuple[np.ndarray, np.ndarray | None]]
    margin: int = 0
    takes_depth: bool = False


DEGRADATIONS = {
    'rain': Degradation(RainParameters, add_rain),
    'raindrop': Degradation(RaindropParameters, add_raindrops, margin=64),
    'haze': Degradation(HazeParameters, add_haze, margin=64, takes_depth=True),
    'snow': Degradation(SnowParameters, add_snow),
    'shadow': Degradation(ShadowParameters, add_shadow),
    'moire': Degradation(MoireParameters, add_moire, margin=8),
}
DEFAULT = 'rain'
"""Default type of the option `degradation`."""


def _with_type(value: Any) -> Any:
    return {'type': DEFAULT, **value} if isinstance(value, dict) else value


AnyParameters = Annotated[
    reduce(or_, (row.parameters for row in DEGRADATIONS.values())),
    Field(discriminator='type'),
    BeforeValidator(_with_type),
]
"""Type of the option `degradation`: parameters of any of the degradations, selected by `type`."""
