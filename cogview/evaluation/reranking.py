"""Self-reranking: of several candidates for a prompt, keep the one that the captioner finds likeliest (section 3.2).

In: CapLoss of M candidates for each of P prompts, and a value of each candidate, such as the share of wrong attributes.
Out: the candidates' order, and what the best of n would have had, for every n up to M (the curves of figure 9).
"""

# P prompts, M candidates of each

from collections.abc import Sequence
from math import comb

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def ranking(losses: Sequence[float]) -> list[int]:
    """Numbers of candidates, the lowest loss first; equal ones stay in their order."""
    return [int(number) for number in np.argsort(losses, kind="stable")]


def best_of(losses_PM: Floats, values_PM: Floats, *, n: int) -> float:
    """The mean value of the candidate with the lowest loss among n of the M, over all such choices and all prompts.

    The candidate that is r-th in the order (from 0) is the best of n in C(M - 1 - r, n - 1) of C(M, n) choices, so this
    is the exact expectation, not one draw. n = 1 is the plain mean. ValueError unless 1 <= n <= M.
    """
    candidates = losses_PM.shape[1]
    if not 1 <= n <= candidates:
        raise ValueError(f"the best of {n} among {candidates} candidates")
    chances_M = np.array([comb(candidates - 1 - rank, n - 1) for rank in range(candidates)]) / comb(candidates, n)
    order_PM = np.argsort(losses_PM, axis=1, kind="stable")
    return float((np.take_along_axis(values_PM, order_PM, axis=1) @ chances_M).mean())
