"""Clusters of codes that look alike: k-means over the codebook's vectors (CogView2: 500 of 20,000 codes).

In: the vectors of a codebook. Out: the cluster of each code, for cluster sampling; on disk the release's own file,
`cluster_label.npy` (int64, one label for each code), with a JSON that says whose codes they are.
"""

# K codes, D code dimension, C clusters

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cogview.errors import CheckpointError, ConfigError, VocabularyError
from cogview.tokenizers.code_search import nearest_codes, squared_distances

LABELS_NAME = "cluster_label.npy"
SETTINGS_NAME = "clusters.json"


@dataclass(frozen=True, kw_only=True)
class CodeClusters:
    """labels_K: int64, from 0 to num_clusters - 1, every one of them there; image_tokenizer: fingerprint, if known."""

    labels_K: Tensor
    image_tokenizer: str = ""

    @property
    def num_clusters(self) -> int:
        """How many there are."""
        return int(self.labels_K.max()) + 1

    @property
    def sizes_C(self) -> Tensor:
        """Codes of each cluster, int64."""
        return torch.bincount(self.labels_K, minlength=self.num_clusters)

    def save(self, folder: Path) -> None:
        """Write the labels and whose they are."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / LABELS_NAME, self.labels_K.numpy().astype(np.int64))
        settings = {"num_clusters": self.num_clusters, "image_tokenizer": self.image_tokenizer}
        (folder / SETTINGS_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")

    @classmethod
    def load(cls, path: Path, *, image_tokenizer: str) -> "CodeClusters":
        """The output folder of cluster_codes, or a `cluster_label.npy` alone, whose codes are taken on trust.

        CheckpointError for a file that is none, VocabularyError for clusters of another codebook.
        """
        file = path / LABELS_NAME if path.is_dir() else path
        try:
            labels_K = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} holds no clusters ({error}); run cluster_codes") from error
        if (
            labels_K.ndim != 1
            or not len(labels_K)
            or not np.issubdtype(labels_K.dtype, np.integer)
            or labels_K.min() < 0
        ):
            raise CheckpointError(f"{file} is {labels_K.dtype} {labels_K.shape}; clusters are one number for each code")
        settings = path / SETTINGS_NAME
        named = json.loads(settings.read_text())["image_tokenizer"] if path.is_dir() and settings.is_file() else ""
        if named and named != image_tokenizer:
            raise VocabularyError(
                f"{path} has clusters of the image tokenizer {named[:12]}, not of {image_tokenizer[:12]}; run "
                "cluster_codes on this one"
            )
        return cls(labels_K=torch.from_numpy(labels_K.astype(np.int64)), image_tokenizer=named)


@torch.no_grad()
def cluster_codes(vectors_KD: Tensor, *, num_clusters: int, seed: int, max_rounds: int = 100) -> CodeClusters:
    """k-means from k-means++ starts, until no code moves. A cluster that empties takes the code farthest from its own.

    ConfigError for more clusters than there are different vectors.
    """
    vectors_KD = vectors_KD.detach().float().cpu()
    different = len(torch.unique(vectors_KD, dim=0))
    if not 1 <= num_clusters <= different:
        raise ConfigError(f"num_clusters={num_clusters}: the codebook has {different} different vectors; choose fewer")
    generator = torch.Generator().manual_seed(seed)
    centres_CD = _spread_starts(vectors_KD, num_clusters=num_clusters, generator=generator)
    labels_K = _without_empty(vectors_KD, centres_CD, nearest_codes(vectors_KD, centres_CD))
    for _ in range(max_rounds):
        centres_CD = _means(vectors_KD, labels_K, num_clusters=num_clusters)
        moved_K = _without_empty(vectors_KD, centres_CD, nearest_codes(vectors_KD, centres_CD))
        if torch.equal(moved_K, labels_K):
            break
        labels_K = moved_K
    return CodeClusters(labels_K=labels_K)


def _spread_starts(vectors_KD: Tensor, *, num_clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++: each further start is drawn by its squared distance to the nearest (Arthur, Vassilvitskii, 2007)."""
    first = int(torch.randint(len(vectors_KD), (1,), generator=generator))
    starts = [first]
    distances_K = (vectors_KD - vectors_KD[first]).square().sum(dim=1)
    for _ in range(num_clusters - 1):
        starts.append(int(torch.multinomial(distances_K.double(), 1, generator=generator)))
        distances_K = torch.minimum(distances_K, (vectors_KD - vectors_KD[starts[-1]]).square().sum(dim=1))
    return vectors_KD[starts]


def _means(vectors_KD: Tensor, labels_K: Tensor, *, num_clusters: int) -> Tensor:
    sums_CD = vectors_KD.new_zeros(num_clusters, vectors_KD.shape[1]).index_add_(0, labels_K, vectors_KD)
    return sums_CD / torch.bincount(labels_K, minlength=num_clusters)[:, None]


def _without_empty(vectors_KD: Tensor, centres_CD: Tensor, labels_K: Tensor) -> Tensor:
    """Give each empty cluster the code that lies farthest from its centre, of a cluster that has more than one."""
    sizes_C = torch.bincount(labels_K, minlength=len(centres_CD))
    distances_K = squared_distances(vectors_KD, centres_CD)
    for cluster in (sizes_C == 0).nonzero()[:, 0].tolist():
        spare_K = torch.where(sizes_C[labels_K] > 1, distances_K, -1.0)
        code = int(spare_K.argmax())
        sizes_C[labels_K[code]] -= 1
        labels_K[code], sizes_C[cluster] = cluster, 1
    return labels_K
