"""Drawing the next token: temperature, top-k, top-p, and one recorded seed for each sample (CogView, section 2.3)."""

# B batch, K allowed ids, T tokens to draw

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cogview.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """temperature 1.0 and top_k 200 are the release's.

    temperature 0 takes the likeliest token; top_k 0 and top_p 0 keep all of them.
    """

    temperature: float = 1.0
    top_k: int = 200
    top_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:  # also refuses NaN
            raise ConfigError(f"temperature={self.temperature}: choose a number from 0 (the likeliest token) to 100")
        if self.top_k < 0 or not 0 <= self.top_p <= 1:
            raise ConfigError(f"top_k={self.top_k}, top_p={self.top_p}: top_k is 0 or more, top_p from 0 to 1")


def uniform_draws(seeds: list[int], *, length: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1), float64 [B, T], row b from seed b alone: the rest of a batch cannot change a sample."""
    rows = [torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows).to(device)


def choose(logits_BK: Tensor, draws_B: Tensor, *, config: SamplingConfig) -> Tensor:
    """One index for each row, int64 [B], by inverting the cumulative distribution at `draws_B`."""
    if config.temperature == 0:
        return logits_BK.argmax(dim=-1)
    if 0 < config.top_k < logits_BK.shape[-1]:
        # Of thousands of ids some hundred are left: only they are summed up, in the order in which they stand.
        likeliest_BT = logits_BK.topk(config.top_k, dim=-1, sorted=False).indices.sort(dim=-1).values
        place_B = choose(logits_BK.gather(1, likeliest_BT), draws_B, config=replace(config, top_k=0))
        return likeliest_BT.gather(1, place_B[:, None])[:, 0]
    probabilities_BK = (logits_BK.double() / config.temperature).softmax(dim=-1)
    if 0 < config.top_p < 1:
        probabilities_BK = _nucleus(probabilities_BK, top_p=config.top_p)
    cumulative_BK = probabilities_BK.cumsum(dim=-1)
    targets_B1 = draws_B[:, None] * cumulative_BK[:, -1:]
    chosen_B = torch.searchsorted(cumulative_BK, targets_B1, right=True).squeeze(1)
    last_possible_B = probabilities_BK.shape[-1] - 1 - (probabilities_BK > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(chosen_B, last_possible_B)


def _nucleus(probabilities_BK: Tensor, *, top_p: float) -> Tensor:
    """Zero the tokens outside the smallest set whose probability reaches `top_p`; the likeliest always stays."""
    ordered_BK, order_BK = probabilities_BK.sort(dim=-1, descending=True)
    before_BK = ordered_BK.cumsum(dim=-1) - ordered_BK
    kept_BK = ordered_BK.masked_fill(before_BK >= top_p, 0.0)
    return torch.zeros_like(probabilities_BK).scatter(-1, order_BK, kept_BK)
