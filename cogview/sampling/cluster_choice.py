"""Drawing a code by way of its cluster (CogView2; its release).

With 20,000 codes many mean nearly the same: top-k over single codes cuts such a family in two, and a family of forty
near-whites wins over a likelier code that stands alone. So the probabilities of each cluster are summed, the likeliest
clusters kept, one of them drawn, and a code inside it.
"""

# B batch, K codes, C clusters

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cogview.errors import ConfigError
from cogview.sampling.choice import SamplingConfig, choose


@dataclass(frozen=True, kw_only=True)
class ClusterSampling:
    """The release's: temperature 1.15 over codes before they are summed, 16 clusters kept, temperature 1 inside one.

    Temperature 0 takes the likeliest, of clusters or of the codes of one.
    """

    temperature: float = 1.15
    top_clusters: int = 16
    temperature_inside: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "temperature_inside"):
            if not 0 <= getattr(self, name) <= 100:  # also refuses NaN
                raise ConfigError(f"{name}={getattr(self, name)}: choose a number from 0 (the likeliest) to 100")
        if self.top_clusters < 0:
            raise ConfigError(f"top_clusters={self.top_clusters}: choose 1 or more, or 0 for all of them")


@dataclass(frozen=True, kw_only=True)
class CogLMSampling:
    """How CogLM draws a picture. text_bonus: what is added to attention scores of the text's tokens (the release: 1.4;
    0 for none). by_clusters: codes are drawn as `clusters` says, otherwise as `tokens` does, which is CogView's way."""

    text_bonus: float = 1.4
    by_clusters: bool = True
    clusters: ClusterSampling = field(default_factory=ClusterSampling)
    tokens: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.text_bonus <= 20:
            raise ConfigError(f"text_bonus={self.text_bonus}: choose a number from 0 to 20; the release's is 1.4")


def choose_in_clusters(logits_BK: Tensor, draws_B2: Tensor, *, labels_K: Tensor, config: ClusterSampling) -> Tensor:
    """One code for each row, int64 [B]. labels_K: the cluster of each code; draws_B2: for the cluster, for the code."""
    num_clusters = int(labels_K.max()) + 1
    scores_BK = logits_BK.double() / (config.temperature or 1.0)
    shares_BC = torch.zeros(len(scores_BK), num_clusters, dtype=scores_BK.dtype, device=scores_BK.device)
    shares_BC.index_add_(1, labels_K, scores_BK.softmax(dim=-1))
    of_clusters = SamplingConfig(temperature=1.0 if config.temperature else 0.0, top_k=config.top_clusters)
    cluster_B = choose(shares_BC.log(), draws_B2[:, 0], config=of_clusters)
    inside_BK = logits_BK.masked_fill(labels_K[None] != cluster_B[:, None], -torch.inf)
    of_codes = SamplingConfig(temperature=config.temperature_inside, top_k=0)
    return choose(inside_BK, draws_B2[:, 1], config=of_codes)


def choose_codes(logits_BK: Tensor, draws_B2: Tensor, *, labels_K: Tensor | None, sampling: CogLMSampling) -> Tensor:
    """One code for each row, as `sampling` says. ConfigError where it asks for clusters that are not given."""
    if not sampling.by_clusters:
        return choose(logits_BK, draws_B2[:, 0], config=sampling.tokens)
    if labels_K is None:
        raise ConfigError(
            "cluster sampling needs clusters of codes; give the output of cluster_codes, or leave it off (by_clusters)"
        )
    return choose_in_clusters(logits_BK, draws_B2, labels_K=labels_K, config=sampling.clusters)
