"""The degradations that can be synthesised, by name. A further one is a row here and a file beside rain.py."""

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

Apply = Callable[[np.ndarray, np.random.Generator, Any], tuple[np.ndarray, np.ndarray | None]]


@dataclass(frozen=True)
class Degradation:
    """How a degradation is made.

    Attributes:
        parameters: its ranges, with `type: Literal[name] = name`.
        apply: pure function (image, generator, parameters) -> (degraded image, mask); images RGB [H, W, 3], float32 in
            [0, 1]; the mask is what was put over it, [H, W] float32 in [0, 1], or None where that is nowhere and
            everywhere.
        margin: pixels around a patch that its degradation depends on.
    """

    parameters: type[BaseModel]
    apply: Apply
    margin: int = 0


DEGRADATIONS = {
    'rain': Degradation(RainParameters, add_rain),
    'raindrop': Degradation(RaindropParameters, add_raindrops, margin=64),
    'haze': Degradation(HazeParameters, add_haze, margin=64),
    'snow': Degradation(SnowParameters, add_snow),
    'shadow': Degradation(ShadowParameters, add_shadow),
    'moire': Degradation(MoireParameters, add_moire, margin=8),
}
DEFAULT = 'rain'
"""What `degradation` is without a `type`."""


def _with_type(value: Any) -> Any:
    return {'type': DEFAULT, **value} if isinstance(value, dict) else value


AnyParameters = Annotated[
    reduce(or_, (row.parameters for row in DEGRADATIONS.values())),
    Field(discriminator='type'),
    BeforeValidator(_with_type),
]
"""Type of the option `degradation`: parameters of one of the above, told apart by `type`."""
