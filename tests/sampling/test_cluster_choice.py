"""Cluster sampling, against the chances worked out by hand."""

import pytest
import torch

from cogview.errors import ConfigError
from cogview.sampling.cluster_choice import ClusterSampling, choose_in_clusters

LABELS = torch.tensor([0, 0, 0, 1, 2, 2])
LOGITS = torch.tensor([1.0, 0.9, 0.8, 1.5, -1.0, -2.0])


def shares(config: ClusterSampling, number: int = 60) -> torch.Tensor:
    """How often each code comes, over an even grid of both draws."""
    grid = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    draws = torch.cartesian_prod(grid, grid)
    chosen = choose_in_clusters(LOGITS.expand(len(draws), -1), draws, labels_K=LABELS, config=config)
    return torch.bincount(chosen, minlength=6) / len(draws)


def test_a_cluster_is_drawn_by_its_sum_and_a_code_by_its_share_of_it() -> None:
    found = shares(ClusterSampling(temperature=1.0, top_clusters=0))
    assert torch.allclose(found, LOGITS.softmax(0), atol=0.02), "with all clusters and temperature 1: the plain chances"
    found = shares(ClusterSampling(temperature=2.0, top_clusters=2, temperature_inside=1.0))
    chances = (LOGITS / 2).softmax(0)
    first, second = chances[:3].sum(), chances[3]
    assert found[4:].sum() == 0, "the third cluster is cut"
    assert found[3].item() == pytest.approx(float(second / (first + second)), abs=0.02)
    expected = LOGITS[:3].softmax(0) * first / (first + second)
    assert torch.allclose(found[:3], expected.float(), atol=0.02)


def test_a_family_is_not_cut_where_single_codes_would_be() -> None:
    found = shares(ClusterSampling(temperature=1.0, top_clusters=1))
    assert found[3] == 0, "the likeliest code stands alone; three that are alike weigh more"
    assert (found[:3] > 0.2).all()


def test_temperature_0_takes_the_likeliest_code_of_the_likeliest_cluster() -> None:
    assert shares(ClusterSampling(temperature=0.0, temperature_inside=0.0)).tolist() == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"temperature_inside": float("nan")}, {"top_clusters": -1}])
def test_settings_that_mean_nothing_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        ClusterSampling(**wrong)
