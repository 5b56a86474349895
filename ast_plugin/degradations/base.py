"""What degradations share: parameters with their ranges, random fields, and arithmetic of images and maps.

Images are RGB [H, W, 3], maps [H, W], all float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import cv2
import numpy as np
from numpy.random import Generator
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

FRAME = (480, 720)  # height and width in pixels, at scale 1, of the image that a smaller patch is taken to be cut from
GAMMA = 2.2  # values are light to the power of 1 / GAMMA

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
    description = f'{description}, within [{least:g}, {most:g}]'
    return Field(default, description=description, json_schema_extra=Limits(least, most))


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


def draw_log_uniform(generator: Generator, bounds: Bounds) -> float:
    """Draw a number whose logarithm is uniform between those of `bounds`."""
    return math.exp(generator.uniform(*np.log(bounds)))


def lattice_noise(
    shape: tuple[int, int],
    generator: Generator,
    cell: float,
    low: float = -1,
    high: float = 1,
    interpolation: int = cv2.INTER_CUBIC,
) -> np.ndarray:
    """Return values that are uniform at the nodes of a lattice, and interpolated between them, [H, W] float32.

    Args:
        shape: (height, width) in pixels.
        generator: source of randomness.
        cell: pixels between nodes, at least 1; the lattice lies at a random offset.
        low, high: range of the nodes. Cubic interpolation may leave it a little.
        interpolation: cv2.INTER_LINEAR or cv2.INTER_CUBIC.
    """
    cell = max(float(cell), 1.0)
    border = 1 if interpolation == cv2.INTER_CUBIC else 0  # nodes outside the image that the interpolation needs
    size = [math.ceil(side / cell) + 2 + 2 * border for side in shape]
    grid = generator.uniform(low, high, size).astype(np.float32)
    top, left = generator.uniform(border, border + 1, 2)
    matrix = np.array([[1 / cell, 0, left], [0, 1 / cell, top]])
    flags = interpolation | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(grid, matrix, shape[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)


def fractal_noise(shape: tuple[int, int], generator: Generator, cell: float, octaves: int = 4) -> np.ndarray:
    """Return values in [0, 1], of mean 0.5, whose coarsest octave varies over `cell` pixels, [H, W] float32.

    Each octave has half the cell and half the amplitude of the one before.
    """
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        total += lattice_noise(shape, generator, cell / 2**octave) * np.float32(0.5**octave)
    weight = sum(0.5**octave for octave in range(octaves))
    return np.clip(0.5 + total / np.float32(2 * weight), 0, 1)


def to_rgb(field: np.ndarray) -> np.ndarray:
    """Repeat a map in three channels, [H, W, 3]: OpenCV is faster at this than NumPy's broadcasting."""
    return cv2.cvtColor(field, cv2.COLOR_GRAY2RGB)


def strips(image: np.ndarray, height: int = 32) -> Iterator[slice]:
    """Yield the rows of an image in strips.

    Arithmetic that touches new memory of a whole image at each step takes several times as long.
    """
    for top in range(0, len(image), height):
        yield slice(top, top + height)


def shrink(array: np.ndarray, ratio: float) -> np.ndarray:
    """Return an image or a map at 1 / max(ratio, 1) of its size, each pixel the mean of those it replaces."""
    size = [max(1, round(side / max(ratio, 1.0))) for side in array.shape[1::-1]]
    return cv2.resize(array, size, interpolation=cv2.INTER_AREA)


def add_glare(image: np.ndarray, white: float, glare: float) -> np.ndarray:
    """Return an image whose lights are brighter than an image can show.

    Args:
        image: RGB, [H, W, 3], float32 in [0, 1].
        white: gray value above which a pixel is a light.
        glare: what is added where the gray value is 1, in proportion from `white` on.
    """
    if not glare:
        return image
    light = np.maximum(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.float32(white))
    times = glare / (1 - white)
    return cv2.addWeighted(image, 1, to_rgb(light), times, -times * white)


def compress_jpeg(levels: np.ndarray, quality: int) -> np.ndarray:
    """Return an image of BGR [H, W, 3] uint8 as JPEG of this quality keeps it."""
    code = cv2.imencode('.jpg', levels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(code, cv2.IMREAD_COLOR)
