"""The Inception Score: are pictures clear, and are they different? (Salimans et al., 2016; CogView, Table 1.)

In: a classifier's scores of each picture. Out: exp of the mean divergence of p(class | picture) from p(class), the mean
over splits. It compares pictures with nothing real, and it says nothing about captions.
"""

# N pictures, C classes, B rows of a batch, R resamples, S splits

import numpy as np
import torch

from cogview.errors import ConfigError
from cogview.evaluation.feature_rows import FeatureRows
from cogview.evaluation.intervals import Estimate, spread_estimate

SPLITS = 10
RESAMPLES = 100


def inception_score(logits: FeatureRows, *, seed: int, splits: int = SPLITS, resamples: int = RESAMPLES) -> Estimate:
    """The mean over `splits` random parts of the pictures, with its bootstrap interval; resampled within each part.

    KL(p || q) over a part is the mean of sum p log p less sum q log q, so one pass over the rows is enough.
    ConfigError for fewer pictures than parts.
    """
    if len(logits) < splits:
        raise ConfigError(f"an Inception Score of {len(logits)} pictures in {splits} parts; give {splits} or more")
    generator = np.random.default_rng(seed)
    parts_N = np.empty(len(logits), np.int64)
    order_N = generator.permutation(len(logits))
    weights_RN = np.ones((resamples + 1, len(logits)))  # the first is no resample
    for number, part in enumerate(np.array_split(order_N, splits)):
        parts_N[part] = number
        for resample in range(1, resamples + 1):
            drawn = part[generator.integers(len(part), size=len(part))]
            weights_RN[resample, part] = np.bincount(drawn, minlength=len(logits))[part]
    scores_R = _scores(logits, weights_RN=torch.from_numpy(weights_RN), parts_N=parts_N, splits=splits)
    return spread_estimate(float(scores_R[0]), scores_R[1:].tolist(), n=len(logits), least=1.0)


def _scores(logits: FeatureRows, *, weights_RN: torch.Tensor, parts_N: np.ndarray, splits: int) -> np.ndarray:
    """The score under each row of weights, [R]."""
    resamples = len(weights_RN)
    sums_SRC = torch.zeros(splits, resamples, logits.dim, dtype=torch.float64)
    certainty_SR, counts_SR = torch.zeros(2, splits, resamples, dtype=torch.float64)
    start = 0
    for batch_BC in logits.batches():
        log_p_BC = torch.from_numpy(batch_BC).double().log_softmax(dim=1)
        p_BC = log_p_BC.exp()
        certainty_B = (p_BC * log_p_BC).sum(dim=1)
        stop = start + len(batch_BC)
        for part in range(splits):
            chosen = torch.from_numpy(parts_N[start:stop] == part)
            weights_RB = weights_RN[:, start:stop][:, chosen]
            sums_SRC[part] += weights_RB @ p_BC[chosen]
            certainty_SR[part] += weights_RB @ certainty_B[chosen]
            counts_SR[part] += weights_RB.sum(dim=1)
        start = stop
    q_SRC = sums_SRC / counts_SR[:, :, None]
    spread_SR = torch.special.entr(q_SRC).sum(dim=2)
    scores_R: np.ndarray = (certainty_SR / counts_SR + spread_SR).exp().mean(dim=0).numpy()
    return scores_R
