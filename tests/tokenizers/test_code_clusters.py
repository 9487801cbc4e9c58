"""Clusters of codes: what lies together is together, every cluster has a code, and the release's file is read."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cogview.errors import CheckpointError, ConfigError, VocabularyError
from cogview.tokenizers.code_clusters import CodeClusters, cluster_codes


def test_codes_that_lie_together_are_one_cluster() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 50 * torch.randn(6, 8, generator=generator)
    families = torch.arange(120) % 6
    vectors = centres[families] + torch.randn(120, 8, generator=generator)
    clusters = cluster_codes(vectors, num_clusters=6, seed=1)
    assert clusters.num_clusters == 6
    for family in range(6):
        assert len(set(clusters.labels_K[families == family].tolist())) == 1
    assert torch.equal(clusters.labels_K, cluster_codes(vectors, num_clusters=6, seed=1).labels_K)


@pytest.mark.parametrize("num_clusters", [1, 7, 40])
def test_no_cluster_is_empty_and_each_code_is_with_its_nearest_mean(num_clusters: int) -> None:
    vectors = torch.randn(40, 3, generator=torch.Generator().manual_seed(2))
    clusters = cluster_codes(vectors, num_clusters=num_clusters, seed=0)
    assert clusters.sizes_C.min() >= 1
    assert clusters.sizes_C.sum() == 40
    means = torch.stack([vectors[clusters.labels_K == one].mean(dim=0) for one in range(num_clusters)])
    assert torch.equal(torch.cdist(vectors, means).argmin(dim=1), clusters.labels_K)


def test_more_clusters_than_different_codes_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 different vectors"):
        cluster_codes(torch.tensor([[0.0], [1.0], [1.0]]), num_clusters=3, seed=0)


def test_clusters_are_read_back_and_belong_to_one_codebook(tmp_path: Path) -> None:
    made = CodeClusters(labels_K=torch.tensor([0, 1, 1, 2]), image_tokenizer="a" * 64)
    made.save(tmp_path / "clusters")
    again = CodeClusters.load(tmp_path / "clusters", image_tokenizer="a" * 64)
    assert torch.equal(again.labels_K, made.labels_K)
    with pytest.raises(VocabularyError, match="run cluster_codes"):
        CodeClusters.load(tmp_path / "clusters", image_tokenizer="b" * 64)


def test_the_releases_file_is_read_and_others_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "cluster_label.npy", np.arange(20, dtype=np.int64) % 5)
    assert CodeClusters.load(tmp_path / "cluster_label.npy", image_tokenizer="c" * 64).num_clusters == 5
    np.save(tmp_path / "floats.npy", np.zeros(4))
    with pytest.raises(CheckpointError, match="one number for each code"):
        CodeClusters.load(tmp_path / "floats.npy", image_tokenizer="")
    (tmp_path / "text.npy").write_text("no")
    with pytest.raises(CheckpointError, match="no clusters"):
        CodeClusters.load(tmp_path / "text.npy", image_tokenizer="")
