"""Parameters of degradations: [lowest, highest] ranges that pydantic checks, and how they are drawn from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Bounds = tuple[float, float]


def _check_order(bounds: Bounds) -> Bounds:
    if bounds[0] > bounds[1]:
        raise ValueError(f'a range is [lowest, highest]; got {list(bounds)}')
    return bounds


Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Range = Annotated[tuple[Number, Number], AfterValidator(_check_order)]
PositiveRange = Annotated[tuple[Positive, Positive], AfterValidator(_check_order)]


@dataclass(frozen=True)
class Limits:
    """The least and the most that the ends of a range may be; as `json_schema_extra`, JSON schemas say so too."""

    least: float
    most: float

    def __call__(self, schema: dict[str, Any]) -> None:
        """Add the limits to the schema of a range."""
        for item in schema['prefixItems']:
            item.update(minimum=self.least, maximum=self.most)


def limited(default: Any, least: float, most: float, description: str) -> Any:
    """Return the field of a range whose ends lie in [least, most]; `default` ... makes it a required one."""
    return Field(
        default,
        description=f'{description}, within [{least:g}, {most:g}]',
        json_schema_extra=Limits(least, most),
    )


class Parameters(BaseModel):
    """Parameters of a degradation or of one of its layers: immutable, unknown keys are refused."""

    model_config = ConfigDict(extra='forbid', frozen=True)

    @field_validator('*')
    @classmethod
    def _check_limits(cls, value: Any, info: ValidationInfo) -> Any:
        limits = cls.model_fields[info.field_name].json_schema_extra
        if isinstance(limits, Limits) and not limits.least <= value[0] <= value[1] <= limits.most:
            raise ValueError(f'must lie within [{limits.least:g}, {limits.most:g}]; got {list(value)}')
        return value


def draw_log_uniform(generator: np.random.Generator, bounds: Bounds) -> float:
    """Draw a number whose logarithm is uniform between those of `bounds`."""
    return math.exp(generator.uniform(*np.log(bounds)))
