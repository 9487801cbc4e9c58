"""The kernel distance between two sets of pictures (KID, Binkowski et al., 2018): unbiased also for few pictures.

In: features. Out: the squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, the mean over random subsets
as published. Its interval comes from leaving out one group of pictures after the other, on both sides.
"""

# N pictures, D feature, M pictures of a subset, G groups

import numpy as np
import numpy.typing as npt

from cogview.errors import ConfigError
from cogview.evaluation.feature_rows import FeatureRows, Features
from cogview.evaluation.intervals import Z_95, Estimate, Floats

SUBSETS, SUBSET_SIZE = 100, 1000
GROUPS = 10
LEAST = 2 * GROUPS


def kernel_distance(
    rows: FeatureRows,
    reference: FeatureRows,
    *,
    seed: int,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
) -> Estimate:
    """The mean over `subsets` pairs of random subsets of `subset_size` pictures, of all if there are fewer.

    May be below 0 where the sets are alike. ConfigError for fewer than 20 pictures on a side.
    """
    n = min(len(rows), len(reference))
    if n < LEAST:
        raise ConfigError(f"a kernel distance of {n} pictures; give {LEAST} or more")
    size, generator = min(subset_size, n), np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        some = rows.take(generator.choice(len(rows), size, replace=False))
        others = reference.take(generator.choice(len(reference), size, replace=False))
        values.append(squared_discrepancy(some, others))
    group = min(subset_size, n // GROUPS)
    by_groups = _jackknife_variance(
        [rows.take(part) for part in _groups(len(rows), size=group, generator=generator)],
        [reference.take(part) for part in _groups(len(reference), size=group, generator=generator)],
    )
    variance = by_groups * group * GROUPS / n + float(np.var(values)) / subsets
    value, reach = float(np.mean(values)), Z_95 * variance**0.5
    return Estimate(value=value, n=n, low=value - reach, high=value + reach)


def squared_discrepancy(rows_MD: Features, others_MD: Features) -> float:
    """The unbiased estimate between two sets of one size M, in float64."""
    return _discrepancy([rows_MD], [others_MD])


def _discrepancy(rows: list[Features], others: list[Features]) -> float:
    sums = [_sums(*sides) for sides in ((rows, rows), (others, others), (rows, others))]
    return float(_estimates(sums, size=len(rows[0]), left_out=[-1])[0])


def _jackknife_variance(rows: list[Features], others: list[Features]) -> float:
    """The variance of the estimate over all groups, from the estimates without each of them."""
    sums = [_sums(*sides) for sides in ((rows, rows), (others, others), (rows, others))]
    without_G = _estimates(sums, size=len(rows[0]), left_out=list(range(len(rows))))
    return float((len(rows) - 1) * np.var(without_G))


def _estimates(sums: list[Floats], *, size: int, left_out: list[int]) -> Floats:
    """The unbiased estimate without each of these groups (-1: of none), from sums [2, G, G] of the three kernels."""
    found = []
    for group in left_out:
        kept = np.arange(sums[0].shape[1]) != group
        own, other, across = (table[:, kept][:, :, kept] for table in sums)
        pictures = int(kept.sum()) * size
        pairs = sum(float(table[0].sum() - table[1].sum()) for table in (own, other)) / (pictures * (pictures - 1))
        found.append(pairs - 2 * float(across[0].sum()) / pictures**2)
    return np.array(found)


def _sums(first: list[Features], second: list[Features]) -> Floats:
    """Between each two groups: the sum of the kernel, and that of its diagonal if they are the same; [2, G, G]."""
    sums_2GG = np.zeros((2, len(first), len(second)))
    for number, one in enumerate(first):
        for place, other in enumerate(second):
            kernel = _kernel(one, other)
            sums_2GG[0, number, place] = kernel.sum()
            sums_2GG[1, number, place] = np.trace(kernel) if one is other else 0.0
    return sums_2GG


def _kernel(first: Features, second: Features) -> Floats:
    base: Floats = first.astype(np.float64) @ second.astype(np.float64).T / first.shape[1] + 1
    return base * base * base  # a general power takes ten times as long


def _groups(size_of_all: int, *, size: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Numbers of pictures in random groups, [G, M]."""
    chosen: npt.NDArray[np.int64] = generator.permutation(size_of_all)[: GROUPS * size].reshape(GROUPS, size)
    return chosen
