"""How sure a score is: 95 % intervals by resampling what was scored.

In: a value for each picture, or a score together with the same score of resampled pictures. Out: an `Estimate`. A mean
gets the percentiles of its resamples. Distances and the Inception Score of a resample are shifted as a whole, because
it holds only about 63 % of the pictures, so for them the spread of the resamples is laid around the score itself.
"""

# N pictures, R resamples

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Z_95 = 1.959964
MEANS_AT_ONCE = 4_000_000  # drawn numbers: 32 MB

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A score, the number `n` of pictures or votes behind it, and its 95 % interval."""

    value: float
    n: int
    low: float
    high: float


def mean_estimate(values: Sequence[float] | npt.NDArray[np.generic], *, seed: int, resamples: int = 1000) -> Estimate:
    """The mean of one value for each picture, with its percentile interval. ValueError without values."""
    values_N = np.asarray(values, dtype=np.float64)
    if not len(values_N):
        raise ValueError("the mean of no values")
    generator = np.random.default_rng(seed)
    means: list[Floats] = []
    at_once = max(1, MEANS_AT_ONCE // len(values_N))
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        means.append(values_N[generator.integers(len(values_N), size=(rows, len(values_N)))].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Estimate(value=float(values_N.mean()), n=len(values_N), low=float(low), high=float(high))


def spread_estimate(value: float, resampled: Sequence[float], *, n: int, least: float = -np.inf) -> Estimate:
    """The score with the spread of its resamples around it; the interval ends at `least`. Two resamples at least."""
    if len(resampled) < 2:
        raise ValueError(f"{len(resampled)} resamples have no spread")
    reach = Z_95 * float(np.std(resampled, ddof=1))
    return Estimate(value=value, n=n, low=max(least, value - reach), high=value + reach)


def resample_counts(size: int, *, resamples: int, seed: int) -> npt.NDArray[np.uint16]:
    """How often each of `size` pictures is in each resample, [R, N]."""
    generator = np.random.default_rng(seed)
    counts_RN = np.empty((resamples, size), np.uint16)
    for resample in range(resamples):
        counts_RN[resample] = np.bincount(generator.integers(size, size=size), minlength=size)
    return counts_RN
