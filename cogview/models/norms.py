"""Layer normalisation that cannot overflow in half precision (CogView, section 2.4 and its appendix)."""

import torch
from torch import Tensor, nn

PRESCALED_RANGE = 8.0  # inputs are brought into [-8, 8]: far from overflow, and far from eps
SQUARABLE = (1e-12, 1e12)  # what fp32 can square with room to spare


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose input is first divided by its largest magnitude over the whole tensor, over eight.

    Deep activations reach 1e4 to 1e5, whose variance overflows fp16. LayerNorm is invariant to the scale of its input,
    so the divisor changes nothing but the range. It is one detached scalar a call; an all-zero input stays zero.

    In evaluation each row has its own divisor, where the release keeps the whole tensor's: the difference is that of
    eps alone, and no sample depends on what else is in its batch.
    """

    def __init__(self, hidden_size: int, *, eps: float, prescale: bool) -> None:
        super().__init__(hidden_size, eps=eps)
        self.prescale = prescale

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dimension of a tensor of any shape [..., hidden_size]."""
        if not self.prescale:
            return super().forward(input)
        tiny = torch.finfo(input.dtype).tiny
        if not self.training:
            # Into [-1, 1], with eps made smaller by the square of the range: the same numbers in fewer operations.
            largest = input.abs().amax(dim=-1, keepdim=True).clamp_min_(tiny)
            eps = self.eps / PRESCALED_RANGE**2
            return nn.functional.layer_norm(input / largest, self.normalized_shape, self.weight, self.bias, eps)
        lowest, highest = torch.aminmax(input.detach())
        divisor = (torch.maximum(highest, -lowest) / PRESCALED_RANGE).clamp_min(tiny)
        if input.device.type == "cpu" and input.dtype == torch.float32 and not torch.compiler.is_compiling():
            # Reading the number costs nothing here; on a GPU it would wait for all work before it.
            return self._divided_inside(input, divisor=float(divisor))
        return super().forward(input / divisor)

    def _divided_inside(self, input: Tensor, *, divisor: float) -> Tensor:
        """The same without a pass for the division: (x / c) / sqrt(var(x / c) + eps) = x / sqrt(var(x) + eps c^2)."""
        if not SQUARABLE[0] < divisor < SQUARABLE[1]:
            return super().forward(input / divisor)
        return nn.functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps * divisor**2)
