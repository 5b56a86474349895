"""How sure a mean over pictures is: percentile intervals by bootstrap, of means and of paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SEED = 0
_BLOCK = 2**22  # drawn numbers in memory at once


@dataclass(frozen=True)
class Estimate:
    """A mean, and between what it lies.

    Attributes:
        mean: over the pictures.
        low, high: ends of the confidence interval; None for fewer than two pictures.
    """

    mean: float
    low: float | None = None
    high: float | None = None


def estimate(values: Sequence[float], confidence: float = 0.95, resamples: int = 10_000) -> Estimate:
    """The mean of one value a picture, with a percentile interval.

    Equal numbers of pictures are drawn alike, whatever the values: the intervals of several networks on the same
    pictures, and those of their differences, rest on the same draws.

    Args:
        values: one a picture. Those that are not finite (the PSNR of a perfect result) make the mean that, without an
            interval.
        confidence: in (0, 1).
        resamples: how often as many pictures as there are are drawn from them, with replacement.
    """
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2 or not np.isfinite(array).all():
        return Estimate(mean)
    means = _resampled_means(array, resamples)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(mean, float(low), float(high))


def paired_difference(
    values: Sequence[float], baseline: Sequence[float], confidence: float = 0.95, resamples: int = 10_000
) -> Estimate:
    """The mean difference from a baseline, picture by picture: what hard and easy pictures have in common cancels.

    Args:
        values, baseline: of the same pictures in the same order.
    """
    first, second = np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    with np.errstate(invalid='ignore'):
        return estimate(first - second, confidence, resamples)


def _resampled_means(array: np.ndarray, resamples: int) -> np.ndarray:
    generator = np.random.default_rng(_SEED)
    rows = max(1, _BLOCK // len(array))
    means = [
        array[generator.integers(0, len(array), (min(rows, resamples - start), len(array)))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(means)
