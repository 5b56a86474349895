"""What is seen through a drop of water on glass: a wide view, turned over, squeezed, and dark where it is too steep."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from ast_plugin.data.synthesis.glare import unclip

WATER = 1.333  # refractive index
STEEPEST = 0.98  # sine of the steepest slope: a surface seen edge on
DARKEST = 0.12  # light that comes from past the critical angle, reflected about inside the drop
REACH = 128  # pixels in which the view to 45 degrees aside is kept: most drops squeeze it to less than that
WHITE = 0.7  # gray above which a light is brighter than an image can show
SLOPES = 512  # entries of the tables over the sine of the slope
SHARP = 0.85  # squared error of a drop in focus by that of all of its surface: opacity falls off at the rim
SMEARING = 0.6  # decrease of its logarithm with the radius of the circle of confusion by that of the drop


def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Return, over the sine s of the slope: how far aside the view goes per focal length, and the light let through.

    A ray along the axis meets the surface at asin(s) from its normal and leaves at asin(n s), by Snell; what is lost
    is Fresnel's reflection, all of it past the critical angle.
    """
    s = np.linspace(0, 1, SLOPES)
    out = np.minimum(WATER * s, 1)
    inner, outer = np.sqrt(1 - s * s), np.sqrt(1 - out * out)
    aside = np.tan(np.arcsin(out) - np.arcsin(s))
    across = ((WATER * inner - outer) / np.maximum(WATER * inner + outer, 1e-9)) ** 2
    along = ((inner - WATER * outer) / np.maximum(inner + WATER * outer, 1e-9)) ** 2
    light = np.where(WATER * s < 1, 1 - (across + along) / 2, 0)
    return aside.astype(np.float32), (DARKEST + (1 - DARKEST) * light).astype(np.float32)


ASIDE, LIGHT = _tables()


@dataclass(frozen=True)
class Surroundings:
    """The scene as far aside as drops look, at a fraction of the resolution.

    Attributes:
        view: RGB, [h + 2 border, w + 2 border, 3].
        border: how much of it lies beyond each edge of the image.
        shrink: pixels of the image to one of `view`.
        focal: focal length of the camera, in pixels of `view`.
    """

    view: np.ndarray
    border: int
    shrink: float
    focal: float

    @property
    def picture(self) -> np.ndarray:
        """The part that the image shows, [h, w, 3]."""
        inner = slice(self.border, -self.border)
        return self.view[inner, inner]

    def look(self, x: np.ndarray, y: np.ndarray, across: np.ndarray, down: np.ndarray) -> np.ndarray:
        """Return what is seen at places of the picture through slopes of water, [n, m, 3].

        Args:
            x, y: the places, in pixels of `view` from the image's corner; these and the slopes broadcast to [n, m].
            across, down: outward components of the sine of the slope, [n, m] float32.
        """
        # Not cv2.magnitude, whose last digit depends on where in memory its arguments lie.
        size = np.minimum(np.sqrt(across * across + down * down), STEEPEST)
        entry = (size * (SLOPES - 1)).astype(np.int32)
        # Rays bend towards the thick of the drop, which is against the outward slope.
        pull = ASIDE[entry] * np.float32(-self.focal) / np.maximum(size, 1e-6)
        x = across * pull + (x + np.float32(self.border))
        y = down * pull + (y + np.float32(self.border))
        seen = cv2.remap(self.view, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        seen *= cv2.cvtColor(LIGHT[entry], cv2.COLOR_GRAY2RGB)
        return seen


def surroundings(
    image: np.ndarray,
    focal: float,
    sky: float,
    *,
    skyline: float = 5.6,
    ground: float = 0.3,
    glare: float = 0.0,
) -> Surroundings:
    """Return the scene around an image.

    Beyond the image: its mirror image, with a sky coming up above it and the ground growing dark below it.

    Args:
        image: light of the image, [H, W, 3] float32 in [0, 1].
        focal: focal length in pixels of the image.
        sky: light of the sky, in [0, 1].
        skyline: degrees above the image at which the sky is open.
        ground: light of the ground far below by the mean of the image.
        glare: how much brighter white is than an image can show. Out of focus it stays white for that.
    """
    height, width = image.shape[:2]
    shrink = max(1.0, focal / REACH)
    size = (math.ceil(width / shrink), math.ceil(height / shrink))
    view = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    border = max(1, math.ceil(focal / shrink))
    rows = len(view)
    dark = np.float32(ground) * view.reshape(-1, 3).mean(axis=0)
    view = cv2.copyMakeBorder(view, border, border, border, border, cv2.BORDER_REFLECT)
    tangent = np.arange(border, border - len(view), -1, dtype=np.float32)[:, None, None] / border  # above the image
    above, below = slice(0, border), slice(border + rows, None)
    blue = np.array([0.93, 0.98, 1.04], np.float32) * np.float32(sky)
    view[above] += (blue - view[above]) * np.clip(tangent[above] / math.tan(math.radians(skyline)), 0, 0.95)
    view[below] += (dark - view[below]) * np.clip(-(tangent[below] + np.float32(rows / border)) * 2, 0, 0.8)
    return Surroundings(unclip(view, WHITE, glare), border, shrink, focal / shrink)


def refract(scene: Surroundings, opacity: np.ndarray, slope: np.ndarray, zoom: float) -> np.ndarray:
    """Return what is seen through drops, colour times opacity and opacity, [h, w, 4] float32.

    Args:
        scene: what is around them.
        opacity: where the drops are, [h, w] in [0, 1].
        slope: [2, h, w], outward components (across, down) of the sine of the surface's slope.
        zoom: pixels of the image to one of these maps.
    """
    height, width = opacity.shape
    ratio = np.float32(zoom / scene.shrink)
    x = np.arange(width, dtype=np.float32) * ratio
    y = np.arange(height, dtype=np.float32)[:, None] * ratio
    seen = scene.look(x, y, slope[0], slope[1])
    return cv2.merge([*cv2.split(seen * cv2.cvtColor(opacity, cv2.COLOR_GRAY2RGB)), opacity])


def expected_error(scene: Surroundings, rim: float, defocus: float, directions: int = 24) -> float:
    """Return the mean squared error of the values, roots of light, where drops are, before any is placed.

    It is taken over places of the image and over the surface of a round drop, whose slope grows from its middle to
    the sine `rim` at its edge. `defocus` is the radius of the circle of confusion by that of the drop.
    """
    picture = scene.picture
    step = max(1, int(math.sqrt(picture.shape[0] * picture.shape[1] / 700)))
    clean = picture[::step, ::step].reshape(1, -1, 3)
    rows, columns = -(-picture.shape[0] // step), -(-picture.shape[1] // step)
    y, x = np.divmod(np.arange(rows * columns, dtype=np.float32), np.float32(columns))
    number = np.arange(directions)[:, None]
    radius, angle = rim * np.sqrt((number + 0.5) / directions), number * math.pi * (3 - math.sqrt(5))
    spread = np.ones((1, rows * columns))
    across, down = ((radius * turn(angle) * spread).astype(np.float32) for turn in (np.cos, np.sin))
    seen = scene.look(x * step, y * step, across, down)
    change = np.sqrt(np.clip(seen, 0, 1)) - np.sqrt(np.clip(clean, 0, 1))
    return SHARP * math.exp(-SMEARING * defocus) * float(np.mean(change**2))
