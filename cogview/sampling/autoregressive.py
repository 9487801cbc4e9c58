"""Text to image, token by token, with a cache of keys and values (CogView, figure 3).

In: a GPT and prompts as vocabulary ids, `ROI1 text BASE BOI1`. Out: image codes. After BOI1 only image codes are
allowed, so each step projects onto the image part of the vocabulary alone: forbidden ids are never scored.
"""

# B batch, L prompt length, T image tokens, E hidden, K image ids, h w grid

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cogview.errors import ConfigError
from cogview.models.gpt import GPT, KeyValueCache
from cogview.sampling.choice import SamplingConfig, choose, uniform_draws
from cogview.tokenizers.vocabulary import Vocabulary


@torch.inference_mode()
def generate_codes(
    model: GPT,
    prompts_ids: Sequence[Sequence[int]],
    *,
    vocabulary: Vocabulary,
    grid: int,
    sampling: SamplingConfig,
    seeds: list[int],
    prompts_positions: Sequence[Sequence[int]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Image codes int64 [B, grid, grid], one image for each prompt, drawn with that prompt's seed.

    prompts_positions: position ids of each prompt's tokens (default: 0, 1, ...); the codes' positions follow the last.
    progress: called with (tokens drawn, tokens to draw). Raises ConfigError when the positions do not suffice.
    """
    if len(seeds) != len(prompts_ids):
        raise ConfigError(f"{len(seeds)} seeds for {len(prompts_ids)} prompts; give one for each")
    num_tokens = grid * grid
    prompts_BL, allowed_BL = _padded_left(prompts_ids, pad=vocabulary.command("PAD"))
    length = prompts_BL.shape[1]
    positions = prompts_positions or [range(len(prompt)) for prompt in prompts_ids]
    needed = max(places[-1] for places in positions) + num_tokens
    if needed > model.config.max_positions:
        raise ConfigError(
            f"a prompt of {length} tokens and {num_tokens} image tokens need {needed} positions; the model has "
            f"{model.config.max_positions}: shorten the text"
        )
    parameter = model.word_embeddings.weight
    cache = KeyValueCache(
        model.config, batch=len(seeds), length=length + num_tokens - 1, dtype=parameter.dtype, device=parameter.device
    )
    cache.allowed_BK[:, :length] = allowed_BL.to(parameter.device)
    draws_BT = uniform_draws(seeds, length=num_tokens, device=parameter.device)
    ids_BL, positions_BL = prompts_BL.to(parameter.device), _padded_left(positions, pad=0)[0].to(parameter.device)
    codes: list[Tensor] = []
    for token in range(num_tokens):
        hidden_BE = model(ids_BL, positions_BL, cache=cache)[:, -1]
        logits_BK = model.logits(hidden_BE, ids=vocabulary.image_ids).float()
        codes.append(choose(logits_BK, draws_BT[:, token], config=sampling))
        ids_BL = codes[-1][:, None] + vocabulary.image_ids.start
        positions_BL = positions_BL[:, -1:] + 1
        if progress is not None:
            progress(token + 1, num_tokens)
    return torch.stack(codes, dim=1).view(len(seeds), grid, grid)


def _padded_left(prompts_ids: Sequence[Sequence[int]], *, pad: int) -> tuple[Tensor, Tensor]:
    """Rows of different lengths ending together: their numbers [B, L], and which of them are real [B, L]."""
    length = max(map(len, prompts_ids))
    ids_BL = torch.tensor([[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts_ids])
    real_BL = torch.tensor([[False] * (length - len(prompt)) + [True] * len(prompt) for prompt in prompts_ids])
    return ids_BL, real_BL
