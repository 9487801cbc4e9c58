"""The loss of CogView2's super-resolution models: cross-entropy over the masked codes of a grid."""

# B batch, C context, N codes of the grid, P codes that count, E hidden

import torch
from torch import Tensor, nn

from cogview.models.local_super_resolution import LocalSuperResolution
from cogview.training.cross_entropy import LOGITS_BYTES, token_losses
from cogview.training.loop import StepLoss


class MaskedCodesLoss(nn.Module):
    """A model with its loss, for the training loop. image_ids: codes are predicted among these ids alone."""

    def __init__(
        self, model: LocalSuperResolution, *, image_ids: range, mask_id: int, logits_bytes: int = LOGITS_BYTES
    ) -> None:
        super().__init__()
        self.model, self.image_ids, self.mask_id, self.logits_bytes = model, image_ids, mask_id, logits_bytes

    def forward(
        self,
        context_ids: Tensor,
        context_positions: Tensor,
        context_allowed: Tensor,
        context_seen: Tensor,
        codes: Tensor,
        is_masked: Tensor,
    ) -> StepLoss:
        """The sum of the masked codes' losses in fp32. codes: int64 [B, N]; is_masked: bool [B, N]."""
        ids_BN = torch.where(is_masked, self.mask_id, codes + self.image_ids.start)
        hidden_PE = self.model(
            context_ids,
            context_positions,
            context_allowed_BCC=context_allowed,
            context_seen_BC=context_seen,
            grid_ids_BN=ids_BN,
        )[is_masked]
        output_VE = self.model.gpt.word_embeddings.weight[self.image_ids.start : self.image_ids.stop]
        losses_P = token_losses(hidden_PE, output_VE, codes[is_masked], logits_bytes=self.logits_bytes)
        loss_sum = losses_P.sum()
        count = is_masked.sum()
        return StepLoss(loss_sum=loss_sum, reports={"loss": (loss_sum.detach(), count)})
