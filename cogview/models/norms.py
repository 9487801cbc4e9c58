"""Layer normalisation that cannot overflow in half precision (CogView, section 2.4 and its appendix)."""

import torch
from torch import Tensor, nn

PRESCALED_RANGE = 8.0  # inputs are brought into [-8, 8]: far from overflow, and far from eps


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose input is first divided by its largest magnitude over the whole tensor, over eight.

    Deep activations reach 1e4 to 1e5, whose variance overflows fp16. LayerNorm is invariant to the scale of its input,
    so the divisor changes nothing but the range. It is one detached scalar a call; an all-zero input stays zero.
    """

    def __init__(self, hidden_size: int, *, eps: float, prescale: bool) -> None:
        super().__init__(hidden_size, eps=eps)
        self.prescale = prescale

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dimension of a tensor of any shape [..., hidden_size]."""
        if self.prescale:
            lowest, highest = torch.aminmax(input.detach())
            largest = torch.maximum(highest, -lowest)
            input = input / (largest / PRESCALED_RANGE).clamp_min(torch.finfo(input.dtype).tiny)
        return super().forward(input)
