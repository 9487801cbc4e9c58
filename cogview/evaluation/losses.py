"""How surprised a GPT is by pairs that it was not trained on: the held-out loss of text and of image tokens.

In: a GPT and batches of held-out rows. Out: nats per token, text and image apart, each with its number of tokens. The
parts and weights are those of training (see `cogview.sequences.batch`), so these losses continue the training curves.
"""

# B batch, L sequence, N tokens, E hidden

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cogview.models.gpt import GPT
from cogview.sequences.batch import SequenceBatch

TOKENS_AT_ONCE = 1024  # logits of so many tokens: 1024 x 58,240 ids x 4 bytes = 239 MB
PARTS = ("text", "image")


@dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """Mean cross-entropy in nats per token over `n` tokens."""

    value: float
    n: int


@torch.inference_mode()
def held_out_losses(model: GPT, batches: Iterable[SequenceBatch]) -> dict[str, HeldOutLoss]:
    """The losses `text` and `image` over all tokens that count (weight above 0). A part without tokens is left out.

    The model is left in evaluation mode.
    """
    model.eval()
    device = model.word_embeddings.weight.device
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    for batch in batches:
        counts_BL = batch.loss_weights > 0
        hidden_NE = model(batch.ids.to(device), batch.positions.to(device))[counts_BL.to(device)]
        losses_N = token_losses(model, hidden_NE, labels_N=batch.labels[counts_BL].to(device))
        part_N = batch.image_part[counts_BL].long()
        sums.index_add_(0, part_N, losses_N.double().cpu())
        counts += torch.bincount(part_N, minlength=2)
    return {
        name: HeldOutLoss(value=float(total / count), n=int(count))
        for name, total, count in zip(PARTS, sums, counts, strict=True)
        if count
    }


def token_losses(model: GPT, hidden_NE: Tensor, *, labels_N: Tensor) -> Tensor:
    """Cross-entropy in nats of each label over the whole vocabulary, float32 [N]."""
    losses = [
        nn.functional.cross_entropy(model.logits(hidden).float(), labels, reduction="none")
        for hidden, labels in zip(
            torch.split(hidden_NE, TOKENS_AT_ONCE), torch.split(labels_N, TOKENS_AT_ONCE), strict=True
        )
    ]
    return torch.cat(losses)
