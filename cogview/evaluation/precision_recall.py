"""Improved precision and recall (Kynkaanniemi et al., 2019): do pictures look real, and is all that is real drawn?

In: features of pictures and of real ones. Out: the share of pictures that lie in the manifold of the real ones, and the
share of real ones in that of the pictures. A manifold is the union of balls around its points, each of which reaches to
the k-th nearest neighbour. Distances are taken in blocks, so that memory does not grow with the square of the number.
"""

# N pictures, D feature, A B rows of two blocks

import numpy as np
import torch
from torch import Tensor

from cogview.errors import ConfigError
from cogview.evaluation.feature_rows import FeatureRows
from cogview.evaluation.intervals import Estimate, mean_estimate

NEIGHBOURS = 3


def precision_and_recall(
    rows: FeatureRows, reference: FeatureRows, *, seed: int, neighbours: int = NEIGHBOURS, device: str = "cpu"
) -> tuple[Estimate, Estimate]:
    """(precision, recall), with bootstrap intervals over the pictures that are asked about, the manifolds given.

    ConfigError for sets with no more than `neighbours` pictures.
    """
    smallest = min(len(rows), len(reference))
    if smallest <= neighbours:
        raise ConfigError(
            f"precision and recall of {smallest} pictures with {neighbours} neighbours; give more pictures"
        )
    realistic = _inside(rows, reference, neighbours=neighbours, device=device)
    covered = _inside(reference, rows, neighbours=neighbours, device=device)
    return mean_estimate(realistic, seed=seed), mean_estimate(covered, seed=seed + 1)


def _inside(points: FeatureRows, manifold: FeatureRows, *, neighbours: int, device: str) -> np.ndarray:
    """Whether each point lies in the manifold of other points, bool [N]."""
    radii_N = _squared_radii(manifold, neighbours=neighbours, device=device)
    found = []
    for block_AD in points.batches():
        first_AD = _block(block_AD, device=device)
        inside_A, start = torch.zeros(len(first_AD), dtype=torch.bool, device=device), 0
        for other in manifold.batches():
            distances_AB = _squared_distances(first_AD, _block(other, device=device))
            inside_A |= (distances_AB <= radii_N[start : start + len(other)]).any(dim=1)
            start += len(other)
        found.append(inside_A.cpu().numpy())
    return np.concatenate(found)


def _squared_radii(rows: FeatureRows, *, neighbours: int, device: str) -> Tensor:
    """The squared distance of each row from its k-th nearest neighbour, float64 [N]."""
    radii = []
    for block_AD in rows.batches():
        first_AD = _block(block_AD, device=device)
        nearest_AK = torch.full((len(first_AD), neighbours + 1), torch.inf, dtype=torch.float64, device=device)
        for other in rows.batches():
            distances_AB = _squared_distances(first_AD, _block(other, device=device))
            nearest_AK = torch.cat([nearest_AK, distances_AB], dim=1).topk(neighbours + 1, dim=1, largest=False)[0]
        radii.append(nearest_AK[:, -1])  # the nearest of all is the row itself
    return torch.cat(radii)


def _squared_distances(first_AD: Tensor, second_BD: Tensor) -> Tensor:
    """[A, B]; what rounding puts below 0 is 0."""
    squares = first_AD.square().sum(dim=1)[:, None] + second_BD.square().sum(dim=1)
    return (squares - 2 * first_AD @ second_BD.T).clamp_min(0)


def _block(rows: np.ndarray, *, device: str) -> Tensor:
    return torch.from_numpy(rows).to(device=device, dtype=torch.float64)
