"""The GPT's training loss: cross-entropy over all real tokens, text and image reported apart (CogView, section 2.3)."""

# B batch, L sequence, N tokens that count, E hidden, V vocabulary

from dataclasses import fields

import torch
from torch import Tensor, nn

from cogview.models.gpt import GPT
from cogview.sequences.batch import SequenceBatch
from cogview.sequences.coglm_batch import CogLMBatch
from cogview.training.cross_entropy import LOGITS_BYTES, token_losses
from cogview.training.loop import StepLoss, WeightedBatch


class LanguageModelLoss(nn.Module):
    """A GPT with its loss, for the training loop. logits_bytes: see `token_losses`."""

    def __init__(self, gpt: GPT, *, logits_bytes: int = LOGITS_BYTES) -> None:
        super().__init__()
        self.gpt, self.logits_bytes = gpt, logits_bytes

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        labels: Tensor,
        loss_weights: Tensor,
        image_part: Tensor,
        pivot_keys: Tensor | None = None,
    ) -> StepLoss:
        """The weighted sum of the tokens' losses in fp32 (arguments: see SequenceBatch). Padding is never projected.

        pivot_keys: int64 [B], which pivots sparse attention draws; see `cogview.models.pivots.pivot_keys`.
        """
        counted_BL = loss_weights > 0
        hidden_NE = self.gpt(ids, positions, pivot_keys_B=pivot_keys)[counted_BL]
        output_VE = self.gpt.word_embeddings.weight
        losses_N = token_losses(hidden_NE, output_VE, labels[counted_BL], logits_bytes=self.logits_bytes)
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


def weighted(batch: SequenceBatch | CogLMBatch) -> WeightedBatch:
    """A sequence batch as the loop takes it: its weight is the sum of its loss weights."""
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return WeightedBatch(tensors, float(batch.loss_weights.sum()))
