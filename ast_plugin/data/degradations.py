"""The degradations that can be synthesised, by name. A further one is a row here and a file beside rain.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field

from ast_plugin.data.rain import RainParameters, add_rain

Apply = Callable[[np.ndarray, np.random.Generator, Any], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Degradation:
    """How a degradation is made.

    Attributes:
        parameters: its ranges, with `type: Literal[name] = name`.
        apply: pure function (image, generator, parameters) -> (degraded image, what was put over it, [H, W]); images
            RGB [H, W, 3], float32 in [0, 1].
        margin: pixels around a patch that its degradation depends on.
    """

    parameters: type[BaseModel]
    apply: Apply
    margin: int = 0


DEGRADATIONS = {
    'rain': Degradation(RainParameters, add_rain),
}

_models = tuple(row.parameters for row in DEGRADATIONS.values())
AnyParameters = Annotated[reduce(or_, _models), Field(discriminator='type')] if len(_models) > 1 else _models[0]
"""Type of the option `degradation`: parameters of one of the above, told apart by `type`."""
