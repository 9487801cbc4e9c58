"""Codes drawn between codes that are known already: what a window of super-resolution needs (CogView, section 3.1).

In: prompts, the codes that follow them, and which of these are still to be drawn. Out: all of them. Known codes are
taken as given, and a run of them is read in one step, so that the work goes with the codes that are drawn.
"""

# B batch, T codes after the prompt, N codes to draw, E hidden, K image ids

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cogview.models.gpt import GPT
from cogview.sampling.autoregressive import read_prompts
from cogview.sampling.choice import SamplingConfig, choose
from cogview.tokenizers.vocabulary import Vocabulary


@torch.inference_mode()
def fill_codes(
    model: GPT,
    prompts_ids: Sequence[Sequence[int]],
    codes_BT: Tensor,
    *,
    is_new_T: npt.NDArray[np.bool_],
    prompts_positions: Sequence[Sequence[int]],
    draws_BN: Tensor,
    vocabulary: Vocabulary,
    sampling: SamplingConfig,
) -> Tensor:
    """The codes int64 [B, T] with those drawn where `is_new_T` says so; there `codes_BT` may hold any code.

    prompts_positions: position ids of the prompts' tokens; those of the codes follow the last one. Positions beyond the
    model's table take its last row, as in the release. draws_BN: numbers in [0, 1), one for each code to draw.
    """
    new_N = np.flatnonzero(is_new_T)
    if not len(new_N):
        return codes_BT
    last_position = model.config.max_positions - 1
    hidden_BE, before_B1, cache = read_prompts(
        model,
        prompts_ids,
        [[min(place, last_position) for place in places] for places in prompts_positions],
        pad=vocabulary.command("PAD"),
        num_tokens=int(new_N[-1]) + 1,
    )
    first_B1 = before_B1 + 1
    filled_BT, read = codes_BT.clone(), 0
    for number, token in enumerate(new_N.tolist()):
        if token > read:
            ids_BR = filled_BT[:, read:token] + vocabulary.image_ids.start
            places_BR = first_B1 + torch.arange(read, token, device=ids_BR.device)
            hidden_BE = model(ids_BR, places_BR.clamp(max=last_position), cache=cache)[:, -1]
            read = token
        logits_BK = model.logits(hidden_BE, ids=vocabulary.image_ids).float()
        filled_BT[:, token] = choose(logits_BK, draws_BN[:, number], config=sampling)
    return filled_BT
