"""Codes drawn by CogLM where a mask hides them: a whole picture, or a hole in one (CogView2).

In: texts, grids of codes and masks of what is hidden, one of each for every row. Out: the grids with hidden codes
drawn, row by row of the picture; visible codes are never changed. The text is read first, each of its tokens seeing all
of them; then, if anything is visible, the token that begins the image and the visible codes, which see the text and
each other; then the hidden codes one by one, each run of them led by a copy of the code before it. With everything
hidden that is CogLM's text to image.
"""

# B batch, N codes of a picture, L prefix, K prefix and steps, S steps, h w grid

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cogview.errors import ConfigError, SchemaError
from cogview.models.attention import staged_mask
from cogview.models.gpt import GPT, KeyValueCache
from cogview.sampling.choice import uniform_draws
from cogview.sampling.cluster_choice import CogLMSampling, choose_codes
from cogview.sequences.coglm import CogLMLayout
from cogview.sequences.coglm_batch import PADDED_STAGE
from cogview.sequences.hidden_regions import runs
from cogview.tokenizers.bilingual_vocabulary import BilingualVocabulary

TEXT_STAGE, IMAGE_STAGE = 0, 1


@torch.inference_mode()
def fill_hidden_codes(
    model: GPT,
    texts: Sequence[Sequence[int]],
    codes_Bhw: Tensor,
    hidden_Bhw: Tensor,
    *,
    vocabulary: BilingualVocabulary,
    layout: CogLMLayout,
    sampling: CogLMSampling,
    seeds: Sequence[int],
    labels_K: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
    watch: Callable[[Sequence[Tensor]], None] | None = None,
) -> Tensor:
    """Codes int64 [B, h, w] with those drawn that `hidden_Bhw` (bool) hides; there `codes_Bhw` may hold any code.

    texts: pieces of the text tokenizer, an empty list for no text; longer ones than the layout's are cut. seeds: one
    for each row, which alone decides its draws. labels_K: int64, the cluster of each code, where `sampling` asks for
    clusters. progress: called with (steps done, steps); watch: with the codes [B] drawn at each step so far (rows with
    fewer hidden codes than others repeat their last). Rows may hide different places, and different numbers of them.
    Raises ConfigError for another grid than the layout's, SchemaError for numbers of rows that differ.
    """
    _check(texts, codes_Bhw, hidden_Bhw, seeds, layout=layout)
    device = model.word_embeddings.weight.device
    codes_BN, hidden_BN = codes_Bhw.flatten(1).to(device, torch.int64).clone(), hidden_Bhw.flatten(1).cpu()
    steps = [_steps(hidden_N) for hidden_N in hidden_BN]
    num_steps = max(map(len, steps))
    if not num_steps:
        return codes_BN.view_as(codes_Bhw)
    sources_BS, targets_BS = _side_by_side(steps, length=num_steps).to(device).unbind(2)
    bias_BK, cache = _read_prefix(
        model,
        texts,
        codes_BN,
        hidden_BN,
        vocabulary=vocabulary,
        layout=layout,
        bonus=sampling.text_bonus,
        steps=num_steps,
    )
    draws_BS2 = uniform_draws(list(seeds), length=2 * num_steps, device=device).view(len(texts), num_steps, 2)
    drawn: list[Tensor] = []
    for step in range(num_steps):
        source_B1, target_B1 = sources_BS[:, step, None], targets_BS[:, step, None]
        ids_B1 = codes_BN.gather(1, source_B1.clamp(min=0)).masked_fill(source_B1 < 0, vocabulary.start_of_image)
        places_B1 = layout.image_position + 1 + source_B1
        allowed = bias_BK[:, None, None, : cache.filled + 1]
        hidden_BE = model(ids_B1, places_B1, cache=cache, allowed=allowed)[:, -1]
        logits_BK = model.logits(hidden_BE, ids=vocabulary.image_ids).float()
        chosen_B1 = choose_codes(logits_BK, draws_BS2[:, step], labels_K=labels_K, sampling=sampling)[:, None]
        kept_B1 = codes_BN.gather(1, target_B1.clamp(min=0))
        codes_BN.scatter_(1, target_B1.clamp(min=0), torch.where(target_B1 < 0, kept_B1, chosen_B1))
        drawn.append(torch.where(target_B1 < 0, kept_B1, chosen_B1)[:, 0])
        if progress is not None:
            progress(step + 1, num_steps)
        if watch is not None:
            watch(drawn)
    return codes_BN.view_as(codes_Bhw)


def _check(
    texts: Sequence[Sequence[int]], codes_Bhw: Tensor, hidden_Bhw: Tensor, seeds: Sequence[int], *, layout: CogLMLayout
) -> None:
    if not len(texts) == len(codes_Bhw) == len(hidden_Bhw) == len(seeds):
        raise SchemaError(
            f"{len(texts)} texts, {len(codes_Bhw)} pictures, {len(hidden_Bhw)} masks and {len(seeds)} seeds; "
            "give one of each"
        )
    if codes_Bhw.shape != hidden_Bhw.shape or codes_Bhw.shape[1:] != (layout.grid, layout.grid):
        raise ConfigError(
            f"codes {tuple(codes_Bhw.shape)} and masks {tuple(hidden_Bhw.shape)}: this model draws grids of "
            f"{layout.grid} x {layout.grid} codes"
        )


def _steps(hidden_N: Tensor) -> list[tuple[int, int]]:
    """(code that is read, -1 for the start of the image; code that is drawn behind it, -1 for none) of each step."""
    found: list[tuple[int, int]] = []
    for first, end in runs(hidden_N.numpy()):
        found += [(place - 1, place) for place in range(first, end)]
        found.append((end - 1, -1))  # later runs see the last code of this one
    return found[:-1]


def _side_by_side(steps: Sequence[Sequence[tuple[int, int]]], *, length: int) -> Tensor:
    """int64 [B, S, 2]; a row that is done reads its first code again and draws nothing."""
    return torch.tensor([[*row, *[(0, -1)] * (length - len(row))] for row in steps])


def _read_prefix(
    model: GPT,
    texts: Sequence[Sequence[int]],
    codes_BN: Tensor,
    hidden_BN: Tensor,
    *,
    vocabulary: BilingualVocabulary,
    layout: CogLMLayout,
    bonus: float,
    steps: int,
) -> tuple[Tensor, KeyValueCache]:
    """What is added to the scores of each column, [B, K], and the cache with texts and visible codes read."""
    rows = []
    for text, codes_N, hidden_N in zip(texts, codes_BN.tolist(), hidden_BN.tolist(), strict=True):
        pieces = list(text)[: layout.max_text]
        tokens = [(piece + vocabulary.text_offset, place, TEXT_STAGE) for place, piece in enumerate(pieces)]
        visible = [(code, 1 + place) for place, code in enumerate(codes_N) if not hidden_N[place]]
        image = [(vocabulary.start_of_image, 0), *visible] if visible else []
        rows.append(tokens + [(code, layout.image_position + place, IMAGE_STAGE) for code, place in image])
    length = max(map(len, rows))
    padding = (vocabulary.pad, 0, PADDED_STAGE)
    padded = [[*[padding] * (length - len(row)), *row] for row in rows]
    parameter = model.word_embeddings.weight
    tokens_BL3 = torch.tensor(padded, device=parameter.device).view(len(rows), length, 3)
    ids_BL, positions_BL, stages_BL = tokens_BL3.unbind(2)
    bias_BL = bonus * (stages_BL == TEXT_STAGE).to(parameter.dtype)
    cache = KeyValueCache(
        model.config, batch=len(rows), length=length + steps, dtype=parameter.dtype, device=parameter.device
    )
    if length:
        seen_BLL = staged_mask(stages_BL, torch.zeros_like(stages_BL))
        model(ids_BL, positions_BL, cache=cache, allowed=torch.where(seen_BLL, bias_BL[:, None, None], -torch.inf))
    bias_BL = bias_BL.masked_fill(stages_BL == PADDED_STAGE, -torch.inf)
    return torch.cat([bias_BL, bias_BL.new_zeros(len(rows), steps)], dim=1), cache
