"""The GPT's training loss: cross-entropy over all real tokens, text and image reported apart (CogView, section 2.3)."""

# B batch, L sequence, V vocabulary, N tokens that count, E hidden

from dataclasses import fields

import torch
from torch import Tensor, nn

from cogview.models.gpt import GPT
from cogview.sequences.batch import SequenceBatch
from cogview.training.loop import StepLoss, WeightedBatch


class LanguageModelLoss(nn.Module):
    """A GPT with its loss, for the training loop."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(
        self, ids: Tensor, positions: Tensor, labels: Tensor, loss_weights: Tensor, image_part: Tensor
    ) -> StepLoss:
        """The weighted sum of the tokens' losses in fp32 (arguments: see SequenceBatch). Padding is never projected."""
        counted_BL = loss_weights > 0
        hidden_NE = self.gpt(ids, positions)[counted_BL]
        logits_NV = self.gpt.logits(hidden_NE).float()
        losses_N = nn.functional.cross_entropy(logits_NV, labels[counted_BL], reduction="none")
        weights_N, image_N = loss_weights[counted_BL], image_part[counted_BL]
        loss_sum = (losses_N * weights_N).sum()
        plain_N, text_N = losses_N.detach(), ~image_N
        return StepLoss(
            loss_sum=loss_sum,
            reports={
                "loss": (loss_sum.detach(), weights_N.sum()),
                "image_loss": (plain_N[image_N].sum(), image_N.sum()),
                "text_loss": (plain_N[text_N].sum(), text_N.sum()),
                "tokens_per_row": (torch.tensor(float(len(plain_N))), torch.tensor(float(len(ids)))),
            },
        )


def weighted(batch: SequenceBatch) -> WeightedBatch:
    """A sequence batch as the loop takes it: its weight is the sum of its loss weights."""
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return WeightedBatch(tensors, float(batch.loss_weights.sum()))
