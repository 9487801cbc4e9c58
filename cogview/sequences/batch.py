"""Token rows -> SequenceBatch: shifted labels, positions and loss weights (CogView, section 2.3; spec of the release).

The loss rule is the release's: a label counts towards the text part if its *input* token is not an image code, and
towards the image part if it is. So the step from BOI1 to the first code is text, and the step from the last code to
EOI1 is image. A segment of the layout may weigh its own labels on top of that, or leave them out with weight 0.
"""

# B batch, L sequence

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cogview.errors import SchemaError
from cogview.sequences.layout import Codes, Ids, IdSequence, SequenceLayout, Weights
from cogview.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class SequenceBatch:
    """What a model is trained on. All tensors are [B, L].

    ids, positions, labels: int64; loss_weights: float32, 0 on padding; image_part: bool, True where the loss is the
    image's. Attention is causal: padding lies at the end, where no real token sees it.
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    loss_weights: Tensor
    image_part: Tensor


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """length: tokens of a full row before the shift (CogView: 1089); weights: of the text's and the image's loss.

    is_image_fixed: image tokens have the same positions after any text (see `SequenceLayout.positions`).
    """

    length: int = 1089
    is_image_fixed: bool = False
    text_loss_weight: float = 1.0
    image_loss_weight: float = 1.0


def build_batch(
    text_ids: Sequence[IdSequence],
    image_codes: Codes | Sequence[Codes],
    *,
    layout: SequenceLayout,
    config: SequenceConfig,
    vocabulary: Vocabulary,
) -> SequenceBatch:
    """Lay out n rows: `text_ids` n lists of raw text pieces, `image_codes` uint16 [n, codes].

    A layout of several images takes one such array for each of them, in its order.
    Rows are padded to the longest of the batch, which changes no loss. Texts over the budget are cut at their end.
    """
    images = [image_codes] if isinstance(image_codes, np.ndarray) else image_codes
    for codes in images:
        if len(text_ids) != len(codes):
            raise SchemaError(f"{len(text_ids)} texts for {len(codes)} images; a row has one of each")
    num_image_tokens = tuple(codes.shape[1] for codes in images)
    budget = layout.text_budget(length=config.length, num_image_tokens=num_image_tokens)
    rows = [
        layout.fill(text, [codes[row] for codes in images], vocabulary=vocabulary, budget=budget)
        for row, text in enumerate(text_ids)
    ]
    patterns = _patterns(layout, num_image_tokens, budget=budget, is_image_fixed=config.is_image_fixed)
    padded_BL = np.full((len(rows), max(map(len, rows))), vocabulary.command("PAD"), dtype=np.int64)
    positions_BL = np.zeros_like(padded_BL)
    segments_BL = np.zeros(padded_BL.shape, dtype=np.float32)
    for row, (ids, text) in enumerate(zip(rows, text_ids, strict=True)):
        padded_BL[row, : len(ids)] = ids
        positions_BL[row, : len(ids)], segments_BL[row, : len(ids)] = patterns[min(len(text), budget)]
    tokens_BL = torch.from_numpy(padded_BL)
    inputs_BL, labels_BL = tokens_BL[:, :-1].contiguous(), tokens_BL[:, 1:].contiguous()
    image_part_BL = inputs_BL < vocabulary.image_ids.stop
    weights_BL = torch.where(image_part_BL, config.image_loss_weight, config.text_loss_weight)
    weights_BL = weights_BL * torch.from_numpy(segments_BL)[:, 1:]
    weights_BL = weights_BL.masked_fill(labels_BL == vocabulary.command("PAD"), 0.0)
    return SequenceBatch(
        ids=inputs_BL,
        positions=torch.from_numpy(positions_BL)[:, :-1].contiguous(),
        labels=labels_BL,
        loss_weights=weights_BL,
        image_part=image_part_BL,
    )


class _Patterns(dict[int, tuple[Ids, Weights]]):
    """Positions and loss weights of a row by the length of its text; not to be written to."""

    def __init__(
        self, layout: SequenceLayout, num_image_tokens: tuple[int, ...], *, budget: int, is_image_fixed: bool
    ) -> None:
        self._layout, self._num_image_tokens = layout, num_image_tokens
        self._budget, self._is_image_fixed = budget, is_image_fixed

    def __missing__(self, num_text: int) -> tuple[Ids, Weights]:
        positions = self._layout.positions(
            num_text=num_text,
            num_image_tokens=self._num_image_tokens,
            budget=self._budget,
            is_image_fixed=self._is_image_fixed,
        )
        weights = self._layout.loss_weights(num_text=num_text, num_image_tokens=self._num_image_tokens)
        self[num_text] = positions, weights
        return self[num_text]


_patterns = functools.lru_cache(maxsize=64)(_Patterns)
