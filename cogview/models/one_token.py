"""A model's step by one token, with as few operations as it can have (CogView, section 2.3: drawing with a cache).

In: the hidden states of one token of each row, [B, E]. Out: the same after all layers. A small batch waits for the
calls, not for the arithmetic: views of the weights are made once, tensors have two dimensions, and no module is called.
The numbers are those of the layers themselves.
"""

# B batch, E hidden, H heads, D head size, K keys

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cogview.models.norms import LayerNorm

Affine = tuple[Tensor, Tensor]  # weight [in, out] and bias
Layer = tuple[Any, ...]  # norms and affines in the order of their use
# On a CPU, products of some rows with weights that lie transposed take up to twice as long as with copies that do not
# (2 cores, 6 layers of 384: 6.7 ms against 4.3 with 8 rows, 13 against 5.7 with 16, no difference with 1 or 60).
COPIED_BATCHES = range(3, 49)
COPIED_BYTES = 2**30  # larger models are not copied


class Steps:
    """The layers of a model, taken apart.

    layers: of each the modules in the order of their use: norm, query_key_value, dense, norm (or nn.Identity), norm,
    h_to_4h, 4h_to_h, norm (or nn.Identity).
    """

    def __init__(self, layers: Iterable[Sequence[nn.Module]], *, num_heads: int) -> None:
        self.num_heads = num_heads
        self._layers = [
            (before, _affine(qkv), _affine(dense), behind, between, _affine(wide), _affine(narrow), last)
            for before, qkv, dense, behind, between, wide, narrow, last in layers
        ]
        self._copied: Sequence[Layer] | None = None

    def __call__(
        self, hidden_BE: Tensor, *, caches: Sequence[tuple[Tensor, ...]], filled: int, allowed: Tensor | None
    ) -> Tensor:
        """Hidden states [B, E] behind the last layer.

        caches: keys and values [B, H, K, D] of each layer, written at position `filled`; allowed: bool [B, 1, 1, K].
        """
        batch, width = hidden_BE.shape
        scale = math.sqrt(width // self.num_heads)
        layers = self._layers_for(hidden_BE)
        for (before, qkv, dense, behind, between, wide, narrow, last), (keys, values) in zip(
            layers, caches, strict=True
        ):
            mixed_BE = torch.addmm(qkv[1], normed(hidden_BE, before), qkv[0])
            q_BHD, k_BHD, v_BHD = mixed_BE.view(batch, 3, self.num_heads, -1).unbind(1)
            keys.select(2, filled).copy_(k_BHD)
            values.select(2, filled).copy_(v_BHD)
            attended_BH1D = nn.functional.scaled_dot_product_attention(
                (q_BHD / scale).unsqueeze(2),
                keys.narrow(2, 0, filled + 1),
                values.narrow(2, 0, filled + 1),
                attn_mask=allowed,
                scale=1.0,
            )
            merged_BE = torch.addmm(dense[1], attended_BH1D.reshape(batch, width), dense[0])
            hidden_BE = hidden_BE + normed(merged_BE, behind)
            wide_BE = nn.functional.gelu(torch.addmm(wide[1], normed(hidden_BE, between), wide[0]), approximate="tanh")
            hidden_BE = hidden_BE + normed(torch.addmm(narrow[1], wide_BE, narrow[0]), last)
        return hidden_BE

    def _layers_for(self, hidden_BE: Tensor) -> Sequence[Layer]:
        """The layers with their weights as they are multiplied fastest."""
        if hidden_BE.device.type != "cpu" or len(hidden_BE) not in COPIED_BATCHES:
            return self._layers
        if self._copied is None:
            affines = [affine for layer in self._layers for affine in layer if isinstance(affine, tuple)]
            is_small = sum(weight.nbytes for weight, _ in affines) <= COPIED_BYTES
            self._copied = [tuple(map(_copied, layer)) for layer in self._layers] if is_small else self._layers
        return self._copied


def can_step(modules: Iterable[nn.Module]) -> bool:
    """Whether these are the plain modules that `Steps` knows: no adapters beside them, none in training."""
    return all(type(module) in (nn.Linear, LayerNorm, nn.Identity) and not module.training for module in modules)


def normed(hidden_BE: Tensor, norm: nn.Module) -> Tensor:
    """What the norm gives, without the call of a module."""
    return norm.forward(hidden_BE) if isinstance(norm, LayerNorm) else hidden_BE


def _affine(linear: nn.Module) -> Affine:
    assert isinstance(linear, nn.Linear)
    return linear.weight.t(), linear.bias


def _copied(part: Any) -> Any:
    """An affine whose weight lies [in, out] in memory; a norm as it is."""
    return (part[0].contiguous(), part[1]) if isinstance(part, tuple) else part
