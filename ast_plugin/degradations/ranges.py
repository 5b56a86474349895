"""Types of the parameters of degradations: [lowest, highest] ranges that pydantic checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f'a range is [lowest, highest]; got {list(bounds)}')
    return bounds


Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Range = Annotated[tuple[Number, Number], AfterValidator(_ordered)]
PositiveRange = Annotated[tuple[Positive, Positive], AfterValidator(_ordered)]


class Parameters(BaseModel):
    """What a degradation, or a layer of it, may look like: keys that it knows, and ranges within `LIMITS`."""

    model_config = ConfigDict(extra='forbid', frozen=True)

    LIMITS: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """By the name of a range, the least and the most that its bounds may be, themselves included."""

    def model_post_init(self, context: object, /) -> None:
        """Check what the types of single values cannot say."""
        for name, (least, most) in self.LIMITS.items():
            low, high = getattr(self, name)
            if low < least or high > most:
                raise ValueError(f'{name} must lie within [{least}, {most}]; got {[low, high]}')
