"""CogLM's training loss: cross-entropy of what is hidden, reported for each part of it (CogView2)."""

# B batch, L sequence, N labels, E hidden, V vocabulary

import torch
from torch import Tensor, nn

from cogview.models.attention import staged_mask
from cogview.models.gpt import GPT
from cogview.sequences.coglm import PARTS
from cogview.training.cross_entropy import LOGITS_BYTES, token_losses
from cogview.training.loop import StepLoss


class CogLMLoss(nn.Module):
    """A GPT with CogLM's masks and loss, for the training loop. logits_bytes: see `token_losses`."""

    def __init__(self, gpt: GPT, *, logits_bytes: int = LOGITS_BYTES) -> None:
        super().__init__()
        self.gpt, self.logits_bytes = gpt, logits_bytes

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        stages: Tensor,
        groups: Tensor,
        labels: Tensor,
        parts: Tensor,
        loss_weights: Tensor,
    ) -> StepLoss:
        """The weighted sum of the labels' losses in fp32 (arguments: see CogLMBatch), and that of each part."""
        counted_BL = loss_weights > 0
        hidden_NE = self.gpt(ids, positions, allowed=staged_mask(stages, groups))[counted_BL]
        output_VE = self.gpt.word_embeddings.weight
        losses_N = token_losses(hidden_NE, output_VE, labels[counted_BL], logits_bytes=self.logits_bytes)
        weights_N, parts_N = loss_weights[counted_BL], parts[counted_BL]
        loss_sum = (losses_N * weights_N).sum()
        plain_N = losses_N.detach()
        reports = {
            "loss": (loss_sum.detach(), weights_N.sum()),
            "tokens_per_row": (torch.tensor(float(len(plain_N))), torch.tensor(float(len(ids)))),
        }
        for number, part in enumerate(PARTS):
            ours_N = parts_N == number
            reports[f"{part}_loss"] = (plain_N[ours_N].sum(), ours_N.sum())
        return StepLoss(loss_sum=loss_sum, reports=reports)
