"""What a super-resolution model reads before it draws: a caption and, for the direct stage, a small picture.

In: text pieces and codes. Out: a `ContextBatch`, each row of which begins with its padding, so that the codes come
last, as in CogView2's release. `ContextForm` says which tokens stand where, as the backbone learned it: `gpt_form` for
a GPT of CogView, which reads from left to right; a CogLM has no command tokens, and reads both ways.
"""

# B batch, C context, M codes of the small picture

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogview.sequences.layout import TASKS, Codes, IdSequence
from cogview.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class ContextForm:
    """Where tokens stand in front of a picture.

    before_text, before_codes: ids of the tokens that begin either; text_offset: of text pieces; max_text: longer
    captions are cut. image_position: of the first code, or -1 where positions run through. is_causal: every token sees
    those before it; otherwise the caption sees itself, and the codes the caption and themselves.
    mask_id: what stands where a code is to be predicted, the release's <start_of_image>; pad_id: before short captions.
    """

    before_text: tuple[int, ...] = ()
    before_codes: tuple[int, ...] = ()
    text_offset: int
    max_text: int
    image_position: int
    is_causal: bool
    mask_id: int
    pad_id: int

    @property
    def first_position(self) -> int:
        """The position of the first code behind the longest caption."""
        if self.image_position >= 0:
            return self.image_position
        return len(self.before_text) + self.max_text + len(self.before_codes)

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> "ContextForm":
        """From what `asdict` made of it, and JSON of that."""
        before = {name: tuple(stored[name]) for name in ("before_text", "before_codes")}
        return cls(**{**stored, **before})


@dataclass(frozen=True, kw_only=True)
class ContextBatch:
    """ids, positions: int64 [B, C]; allowed: bool [B, C, C], who sees whom; seen: bool [B, C], the caption."""

    ids: Tensor
    positions: Tensor
    allowed: Tensor
    seen: Tensor


def gpt_form(vocabulary: Vocabulary, *, length: int, grid: int, is_image_fixed: bool) -> ContextForm:
    """Of a GPT that was trained to draw: ROI1 text BASE BOI1 codes. length, is_image_fixed: of its training; grid: of
    its pictures. ConfigError where they do not fit."""
    layout = TASKS["text_to_image"]
    text, image = layout.segments
    before_text, before_codes = (
        tuple(vocabulary.command(name) for name in segment.before) for segment in (text, image)
    )
    max_text = layout.text_budget(length=length, num_image_tokens=grid**2)
    return ContextForm(
        before_text=before_text,
        before_codes=before_codes,
        text_offset=vocabulary.text_offset,
        max_text=max_text,
        image_position=len(before_text) + max_text + len(before_codes) if is_image_fixed else -1,
        is_causal=True,
        mask_id=vocabulary.command("BOI1"),
        pad_id=vocabulary.command("PAD"),
    )


def build_context(texts: Sequence[IdSequence], codes: Codes | None, *, form: ContextForm) -> ContextBatch:
    """Contexts of n captions (raw pieces) and, if they are read, their small pictures: uint16 [n, M]."""
    rows = [_caption(text, form) for text in texts]
    num_codes = 0 if codes is None else codes.shape[1] + len(form.before_codes)
    width = max(1, max(map(len, rows)) + num_codes)  # one token of padding where there is nothing
    ids_BC = np.full((len(rows), width), form.pad_id, dtype=np.int64)
    positions_BC = np.zeros_like(ids_BC)
    stages_BC = np.full_like(ids_BC, -1)  # of padding, which nobody sees
    for place, row in enumerate(rows):
        start, end = width - num_codes - len(row), width - num_codes
        ids_BC[place, start:end], positions_BC[place, start:end] = row, np.arange(len(row))
        stages_BC[place, start:end] = 0
        if codes is None:
            continue
        first = len(row) + len(form.before_codes) if form.image_position < 0 else form.image_position
        ids_BC[place, end:] = [*form.before_codes, *codes[place].tolist()]
        positions_BC[place, end:] = np.arange(first - len(form.before_codes), first + codes.shape[1])
        stages_BC[place, end:] = 1
    stages = torch.from_numpy(stages_BC)
    return ContextBatch(
        ids=torch.from_numpy(ids_BC),
        positions=torch.from_numpy(positions_BC),
        allowed=_allowed(stages, is_causal=form.is_causal),
        seen=stages == 0,
    )


def _caption(text: IdSequence, form: ContextForm) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    pieces = np.asarray(text[: form.max_text], dtype=np.int64) + form.text_offset
    return np.concatenate([np.asarray(form.before_text, dtype=np.int64), pieces])


def _allowed(stages_BC: Tensor, *, is_causal: bool) -> Tensor:
    """bool [B, C, C]; padding sees itself, or its softmax would have nothing to sum over."""
    length = stages_BC.shape[1]
    is_token_B1C = (stages_BC >= 0)[:, None, :]
    if is_causal:
        reached = torch.ones(length, length, dtype=torch.bool).tril()[None]
    else:
        reached = stages_BC[:, None, :] <= stages_BC[:, :, None]
    return (reached & is_token_B1C) | torch.eye(length, dtype=torch.bool)
