"""CogLM's rows side by side: padded to the longest, with the weight of each label in the loss."""

# B batch, L sequence

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from cogview.errors import ConfigError
from cogview.sequences.coglm import NO_LABEL, PARTS, CogLMRow

PADDED_STAGE = 2**31  # later than any token: nobody but other padding sees it


@dataclass(frozen=True, kw_only=True)
class CogLMBatch:
    """What CogLM is trained on. All tensors are [B, L], int64 but for the float32 loss weights, 0 without a label.

    stages, groups: who sees whom (see `cogview.models.attention.staged_mask`); parts: places in `coglm.PARTS`.
    """

    ids: Tensor
    positions: Tensor
    stages: Tensor
    groups: Tensor
    labels: Tensor
    parts: Tensor
    loss_weights: Tensor


def collate(rows: Sequence[CogLMRow], *, pad: int, weights: Mapping[str, float]) -> CogLMBatch:
    """Rows as a batch. weights: of the loss of each part, 1 for those that are not named. ConfigError for no part."""
    unknown = sorted(weights.keys() - set(PARTS))
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is no part of the loss; the parts are {', '.join(PARTS)}")
    filling = {"ids": pad, "stages": PADDED_STAGE, "labels": NO_LABEL, "parts": NO_LABEL}
    length = max(len(row.ids) for row in rows)
    columns = {}
    for column in fields(CogLMRow):
        padded_BL = np.full((len(rows), length), filling.get(column.name, 0), dtype=np.int64)
        for place, row in enumerate(rows):
            values = getattr(row, column.name)
            padded_BL[place, : len(values)] = values
        columns[column.name] = torch.from_numpy(padded_BL)
    by_part = torch.tensor([*(weights.get(part, 1.0) for part in PARTS), 0.0])  # the last is that of NO_LABEL
    return CogLMBatch(**columns, loss_weights=by_part[columns["parts"]])
