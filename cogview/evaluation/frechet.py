"""The Frechet distance between two sets of pictures, by the means and covariances of their features.

In: features, in batches. Out: |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)), the FID of section 4.1 of CogView if
the features are those of the published Inception network (Heusel et al., 2017). Means and covariances are streamed in
float64, so 1e5 pictures take the memory of one batch.
"""

# N pictures, D feature, B rows of a batch, R resamples

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cogview.evaluation.feature_rows import FeatureRows
from cogview.evaluation.intervals import Estimate, resample_counts, spread_estimate

RESAMPLES = 20  # each takes a pass over both sets and two decompositions


@dataclass(kw_only=True)
class Moments:
    """Mean and scatter of rows seen so far, float64, updated as Chan, Golub and LeVeque (1979) do: no cancellation.

    count: of rows, each as often as its weight says; scatter_DD: the sum of squared distances from the mean.
    """

    count: float
    mean_D: Tensor
    scatter_DD: Tensor

    @classmethod
    def none(cls, dim: int, *, device: str = "cpu") -> "Moments":
        """Of no rows."""
        return cls(
            count=0.0,
            mean_D=torch.zeros(dim, dtype=torch.float64, device=device),
            scatter_DD=torch.zeros(dim, dim, dtype=torch.float64, device=device),
        )

    def add(self, rows_BD: npt.NDArray[np.float32], *, weights_B: npt.NDArray[np.generic] | None = None) -> None:
        """Take a batch in. weights_B: how often each row counts, once if not given."""
        device = self.mean_D.device
        features_BD = torch.from_numpy(rows_BD).to(device=device, dtype=torch.float64)
        if weights_B is not None:
            weights_B = weights_B.astype(np.float64)
            there = np.flatnonzero(weights_B)
            weights = torch.from_numpy(weights_B[there]).to(device)
            features_BD = features_BD[torch.from_numpy(there).to(device)]
        else:
            weights = torch.ones(len(features_BD), dtype=torch.float64, device=device)
        count = float(weights.sum())
        if not count:
            return
        mean_D = (weights @ features_BD) / count
        centred_BD = features_BD.sub_(mean_D).mul_(weights.sqrt_()[:, None])
        scatter_DD = centred_BD.T @ centred_BD
        self.merge(Moments(count=count, mean_D=mean_D, scatter_DD=scatter_DD))

    def merge(self, other: "Moments") -> None:
        """Take in the moments of other rows."""
        total = self.count + other.count
        if not total:
            return
        step_D = other.mean_D - self.mean_D
        self.scatter_DD += other.scatter_DD
        self.scatter_DD += torch.outer(step_D, step_D) * (self.count * other.count / total)
        self.mean_D = self.mean_D + step_D * (other.count / total)
        self.count = total

    @property
    def covariance_DD(self) -> Tensor:
        """Divided by count - 1. ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"{self.count:g} rows have no covariance")
        return self.scatter_DD / (self.count - 1)


def moments_of(rows: FeatureRows, *, weights_N: npt.NDArray[np.generic] | None = None, device: str = "cpu") -> Moments:
    """The moments of all rows, in one pass. weights_N: how often each counts."""
    moments, start = Moments.none(rows.dim, device=device), 0
    for batch_BD in rows.batches():
        stop = start + len(batch_BD)
        moments.add(batch_BD, weights_B=None if weights_N is None else weights_N[start:stop])
        start = stop
    return moments


def frechet_distance(first: Moments, second: Moments) -> float:
    """The squared Frechet distance of the two Gaussians; 0 for equal ones, up to rounding.

    tr((C1 C2)^(1/2)) is the sum of the singular values of F1^T F2 for any factors C = F F^T: these come out with an
    error of float64's size, where the eigenvalues of C1 C2 would come out with its root.
    """
    means = float((first.mean_D - second.mean_D).square().sum())
    traces = float(first.covariance_DD.trace() + second.covariance_DD.trace())
    shared = torch.linalg.svdvals(_factor(first.covariance_DD).T @ _factor(second.covariance_DD)).sum()
    return max(0.0, means + traces - 2 * float(shared))  # rounding may leave -1e-12


def frechet_estimate(
    rows: FeatureRows, reference: FeatureRows, *, seed: int, resamples: int = RESAMPLES, device: str = "cpu"
) -> Estimate:
    """The distance between two sets, n pictures of the smaller one, with its bootstrap interval over both."""
    value = frechet_distance(moments_of(rows, device=device), moments_of(reference, device=device))
    counts_RN = resample_counts(len(rows), resamples=resamples, seed=seed)
    others_RN = resample_counts(len(reference), resamples=resamples, seed=seed + 1)
    resampled = [
        frechet_distance(
            moments_of(rows, weights_N=counts_N, device=device),
            moments_of(reference, weights_N=others_N, device=device),
        )
        for counts_N, others_N in zip(counts_RN, others_RN, strict=True)
    ]
    return spread_estimate(value, resampled, n=min(len(rows), len(reference)), least=0.0)


def _factor(matrix_DD: Tensor) -> Tensor:
    """F with F F^T = the covariance. Cholesky's where it has full rank, which takes a tenth of the time of its root."""
    factor_DD: Tensor
    factor_DD, failure = torch.linalg.cholesky_ex(matrix_DD)
    if not int(failure):
        return factor_DD
    values_D, vectors_DD = torch.linalg.eigh(matrix_DD)
    smallest = values_D.abs().max() * len(values_D) * torch.finfo(values_D.dtype).eps
    values_D = torch.where(values_D > smallest, values_D, 0.0)  # what is left of rounding
    factor_DD = vectors_DD * values_D.sqrt()
    return factor_DD
