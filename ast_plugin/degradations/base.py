"""Common parts of the degradations: parameters with ranges, random fields, and operations on images and maps.

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

FRAME = (480, 720)  # (height, width) in pixels, at scale 1, of the image that a smaller patch is assumed to come from
GAMMA = 2.2  # pixel values are light to the power of 1 / GAMMA

Bounds = tuple[float, float]


def check_order(bounds: Bounds) -> Bounds:
    """Return a range; raise ValueError if its ends are in the wrong order."""
    if bounds[0] > bounds[1]:
        raise ValueError(f'a range is [lowest, highest]; got {list(bounds)}')
    return bounds


Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Range = Annotated[tuple[Number, Number], AfterValidator(check_order)]
PositiveRange = Annotated[tuple[Positive, Positive], AfterValidator(check_order)]


@dataclass(frozen=True)
class Limits:
    """Limits of both ends of a range; as `json_schema_extra`, they are added to the JSON schema."""

    least: float
    most: float

    def __call__(self, schema: dict[str, Any]) -> None:
        """Add the limits to the schema of a range."""
        for item in schema['prefixItems']:
            item.update(minimum=self.least, maximum=self.most)


def limited(default: Any, least: float, most: float, description: str) -> Any:
    """Return a pydantic field for a range within [least, most]; with `default` `...`, the field is required."""
    description = f'{description}, within [{least:g}, {most:g}]'
    return Field(default, description=description, json_schema_extra=Limits(least, most))


class Parameters(BaseModel):
    """Immutable parameters of a degradation or of one of its layers; unknown keys are rejected."""

    model_config = ConfigDict(extra='forbid', frozen=True)

    @field_validator('*')
    @classmethod
    def _check_limits(cls, value: Any, info: ValidationInfo) -> Any:
        limits = cls.model_fields[info.field_name].json_schema_extra
        if isinstance(limits, Limits) and not limits.least <= value[0] <= value[1] <= limits.most:
            raise ValueError(f'must be within [{limits.least:g}, {limits.most:g}]; got {list(value)}')
        return value


def draw_log_uniform(generator: Generator, bounds: Bounds) -> float:
    """Draw a log-uniform number from `bounds`."""
    return math.exp(generator.uniform(*np.log(bounds)))


def lattice_noise(
    shape: tuple[int, int],
    generator: Generator,
    cell: float,
    low: float = -1,
    high: float = 1,
    interpolation: int = cv2.INTER_CUBIC,
) -> np.ndarray:
    """Return noise that is uniform at the nodes of a lattice and interpolated between them, [H, W] float32.

    Args:
        shape: (height, width) in pixels.
        generator: source of randomness.
        cell: distance of nodes in pixels, at least 1; the lattice has a random offset.
        low, high: range of values at the nodes. Cubic interpolation may exceed it slightly.
        interpolation: cv2.INTER_LINEAR or cv2.INTER_CUBIC.
    """
    cell = max(float(cell), 1.0)
    border = 1 if interpolation == cv2.INTER_CUBIC else 0  # nodes outside the image required by the interpolation
    size = [math.ceil(side / cell) + 2 + 2 * border for side in shape]
    grid = generator.uniform(low, high, size).astype(np.float32)
    top, left = generator.uniform(border, border + 1, 2)
    matrix = np.array([[1 / cell, 0, left], [0, 1 / cell, top]])
    flags = interpolation | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(grid, matrix, shape[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)


def fractal_noise(shape: tuple[int, int], generator: Generator, cell: float, octaves: int = 4) -> np.ndarray:
    """Return noise in [0, 1] with mean 0.5 whose coarsest octave varies over `cell` pixels, [H, W] float32.

    Each octave has half the cell size and half the amplitude of the previous one.
    """
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        total += lattice_noise(shape, generator, cell / 2**octave) * np.float32(0.5**octave)
    weight = sum(0.5**octave for octave in range(octaves))
    return np.clip(0.5 + total / np.float32(2 * weight), 0, 1)


def to_rgb(field: np.ndarray) -> np.ndarray:
    """Repeat a map in three channels, [H, W, 3]; OpenCV is faster at this than broadcasting in NumPy."""
    return cv2.cvtColor(field, cv2.COLOR_GRAY2RGB)


def strips(image: np.ndarray, height: int = 32) -> Iterator[slice]:
    """Yield the rows of an image in strips.

    Operations on strips reuse memory; on the whole image, each step touches new memory and takes several times as long.
    """
    for top in range(0, len(image), height):
        yield slice(top, top + height)


def shrink(array: np.ndarray, ratio: float) -> np.ndarray:
    """Downsample an image or a map by the factor max(ratio, 1), averaging over areas."""
    size = [max(1, round(side / max(ratio, 1.0))) for side in array.shape[1::-1]]
    return cv2.resize(array, size, interpolation=cv2.INTER_AREA)


def add_glare(image: np.ndarray, white: float, glare: float) -> np.ndarray:
    """Brighten light sources beyond the range of the image.

    Args:
        image: RGB, [H, W, 3], float32 in [0, 1].
        white: gray value above which a pixel is a light source.
        glare: brightness added at gray value 1, decreasing linearly to 0 at `white`.
    """
    if not glare:
        return image
    light = np.maximum(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.float32(white))
    times = glare / (1 - white)
    return cv2.addWeighted(image, 1, to_rgb(light), times, -times * white)


def compress_jpeg(levels: np.ndarray, quality: int) -> np.ndarray:
    """Return a BGR image, [H, W, 3] uint8, after JPEG compression of the given quality."""
    code = cv2.imencode('.jpg', levels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(code, cv2.IMREAD_COLOR)
