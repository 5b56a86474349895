"""Types of the parameters of degradations: [lowest, highest] ranges that pydantic checks."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f'a range is [lowest, highest]; got {list(bounds)}')
    return bounds


Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Range = Annotated[tuple[Number, Number], AfterValidator(_ordered)]
PositiveRange = Annotated[tuple[Positive, Positive], AfterValidator(_ordered)]
