"""Text to image, token by token, with a cache of keys and values (CogView, figure 3).

In: a GPT and prompts as vocabulary ids, `ROI1 text BASE BOI1`. Out: image codes. After BOI1 only image codes are
allowed, so each step projects onto the image part of the vocabulary alone: forbidden ids are never scored. Candidates
of one prompt share its reading.
"""

# B batch, P different prompts, L prompt length, T image tokens, E hidden, K image ids, h w grid

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
    watch: Callable[[Sequence[Tensor]], None] | None = None,
) -> Tensor:
    """Image codes int64 [B, grid, grid], one image for each prompt, drawn with that prompt's seed.

    prompts_positions: position ids of each prompt's tokens (default: 0, 1, ...); the codes' positions follow the last.
    progress: called with (tokens drawn, tokens to draw); watch: with the codes of each token so far, int64 [B] each.
    Either may end the drawing by an exception. Raises ConfigError when the positions do not suffice.
    """
    if len(seeds) != len(prompts_ids):
        raise ConfigError(f"{len(seeds)} seeds for {len(prompts_ids)} prompts; give one for each")
    num_tokens = grid * grid
    positions = prompts_positions or [range(len(prompt)) for prompt in prompts_ids]
    needed = max(places[-1] for places in positions) + num_tokens
    if needed > model.config.max_positions:
        raise ConfigError(
            f"a prompt of {max(map(len, prompts_ids))} tokens and {num_tokens} image tokens need {needed} positions; "
            f"the model has {model.config.max_positions}: shorten the text"
        )
    device = model.word_embeddings.weight.device
    hidden_BE, positions_B1, cache = read_prompts(
        model, prompts_ids, positions, pad=vocabulary.command("PAD"), num_tokens=num_tokens
    )
    draws_BT = uniform_draws(seeds, length=num_tokens, device=device)
    codes: list[Tensor] = []
    for token in range(num_tokens):
        logits_BK = model.logits(hidden_BE, ids=vocabulary.image_ids).float()
        codes.append(choose(logits_BK, draws_BT[:, token], config=sampling))
        if progress is not None:
            progress(token + 1, num_tokens)
        if watch is not None:
            watch(codes)
        if token + 1 < num_tokens:
            positions_B1 = positions_B1 + 1
            ids_B1 = codes[-1][:, None] + vocabulary.image_ids.start
            hidden_BE = model(ids_B1, positions_B1, cache=cache)[:, -1]
    return torch.stack(codes, dim=1).view(len(seeds), grid, grid)


def read_prompts(
    model: GPT, prompts_ids: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], *, pad: int, num_tokens: int
) -> tuple[Tensor, Tensor, KeyValueCache]:
    """Read each different prompt once: its last hidden state [B, E], its last position [B, 1], and the filled cache."""
    numbers: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    pairs = [(tuple(prompt), tuple(places)) for prompt, places in zip(prompts_ids, positions, strict=True)]
    rows = [numbers.setdefault(pair, len(numbers)) for pair in pairs]
    parameter = model.word_embeddings.weight
    ids_PL, allowed_PL = _padded_left([prompt for prompt, _ in numbers], pad=pad)
    positions_PL = _padded_left([places for _, places in numbers], pad=0)[0].to(parameter.device)
    length = ids_PL.shape[1]

    def empty_cache(batch: int, length: int) -> KeyValueCache:
        dtype, device = parameter.dtype, parameter.device
        return KeyValueCache(model.config, batch=batch, length=length, dtype=dtype, device=device)

    prompts = empty_cache(len(numbers), length)
    prompts.allowed_BK[:], prompts.is_padded = allowed_PL, not bool(allowed_PL.all())
    hidden_PE = model(ids_PL.to(parameter.device), positions_PL, cache=prompts)[:, -1]
    rows_B = torch.tensor(rows, device=parameter.device)
    cache = empty_cache(len(rows), length + num_tokens - 1)
    cache.begin_with(prompts, rows_B=rows_B)
    return hidden_PE[rows_B], positions_PL[rows_B, -1:], cache


def _padded_left(prompts_ids: Sequence[Sequence[int]], *, pad: int) -> tuple[Tensor, Tensor]:
    """Rows of different lengths ending together: their numbers [B, L], and which of them are real [B, L]."""
    length = max(map(len, prompts_ids))
    ids_BL = torch.tensor([[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts_ids])
    real_BL = torch.tensor([[False] * (length - len(prompt)) + [True] * len(prompt) for prompt in prompts_ids])
    return ids_BL, real_BL
