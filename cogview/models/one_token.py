"""A model's step by one token, with as few operations as it can have (CogView, section 2.3: drawing with a cache).

In: the hidden states of one token of each row, [B, E]. Out: the same after all layers. A small batch waits for the
calls, not for the arithmetic: views of the weights are made once, tensors have two dimensions, and no module is called.
The numbers are those of the layers themselves.
"""

# B batch, E hidden, H heads, D head size, K keys

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from cogview.models.norms import LayerNorm
from cogview.models.products import Linear, linear_gelu, onednn_gelu, onednn_linear, packed, takes_onednn

Affine = tuple[Tensor, Tensor]  # weight [out, in] and bias
Layer = tuple[Any, ...]  # norms and affines in the order of their use
Store = Callable[[Tensor, Tensor], Tensor]  # keeps the new [B, H, D] among [B, H, K, D], and gives those to look at
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
        weights = [part[0] for layer in self._layers for part in layer if isinstance(part, tuple)]
        self._has_room = sum(weight.nbytes for weight in weights) <= COPIED_BYTES
        self._is_onednn = all(map(takes_onednn, weights))
        self._copies: tuple[int | None, Sequence[Layer]] | None = None  # for so many rows, or None: for any number

    def __call__(
        self, hidden_BE: Tensor, *, caches: Sequence[tuple[Tensor, ...]], filled: int, allowed: Tensor | None
    ) -> Tensor:
        """Hidden states [B, E] behind the last layer.

        caches: keys and values [B, H, K, D] of each layer, written at position `filled`; allowed: bool [B, 1, 1, K].
        """

        def store(kept_BHKD: Tensor, new_BHD: Tensor) -> Tensor:
            kept_BHKD.select(2, filled).copy_(new_BHD)
            return kept_BHKD.narrow(2, 0, filled + 1)

        return self.through(hidden_BE, caches=caches, store=store, allowed=allowed)

    def through(
        self, hidden_BE: Tensor, *, caches: Sequence[tuple[Tensor, ...]], store: Store, allowed: Tensor | None
    ) -> Tensor:
        """The same for any way to keep keys and values."""
        batch, width = hidden_BE.shape
        scale = math.sqrt(width // self.num_heads)
        layers = self._layers_for(hidden_BE)
        product, product_gelu = (onednn_linear, onednn_gelu) if self._is_onednn else (nn.functional.linear, linear_gelu)
        for (before, qkv, dense, behind, between, wide, narrow, last), (keys, values) in zip(
            layers, caches, strict=True
        ):
            mixed_BE = product(normed(hidden_BE, before), *qkv)
            q_BHD, k_BHD, v_BHD = mixed_BE.view(batch, 3, self.num_heads, -1).unbind(1)
            attended_BH1D = nn.functional.scaled_dot_product_attention(
                (q_BHD / scale).unsqueeze(2),
                store(keys, k_BHD),
                store(values, v_BHD),
                attn_mask=allowed,
                scale=1.0,
            )
            merged_BE = product(attended_BH1D.reshape(batch, width), *dense)
            hidden_BE = hidden_BE + normed(merged_BE, behind)
            wide_BE = product_gelu(normed(hidden_BE, between), *wide)
            hidden_BE = hidden_BE + normed(product(wide_BE, *narrow), last)
        return hidden_BE

    def _layers_for(self, hidden_BE: Tensor) -> Sequence[Layer]:
        """The layers with their weights as they are multiplied fastest."""
        rows = len(hidden_BE)
        if self._is_onednn:
            return self._copied(partial(packed, rows=rows), rows=rows)
        if hidden_BE.device.type != "cpu" or rows not in COPIED_BATCHES:
            return self._layers
        return self._copied(_transposed, rows=None)

    def _copied(self, copy: Callable[[Tensor], Tensor], *, rows: int | None) -> Sequence[Layer]:
        """The layers with copies of their weights; those of another number of rows are given up."""
        if not self._has_room:
            return self._layers
        if self._copies is None or self._copies[0] != rows:
            self._copies = None
            copies = [
                tuple((copy(part[0]), part[1]) if isinstance(part, tuple) else part for part in layer)
                for layer in self._layers
            ]
            self._copies = rows, copies
        return self._copies[1]


def can_step(modules: Iterable[nn.Module]) -> bool:
    """Whether these are the plain modules that `Steps` knows: no adapters beside them, none in training."""
    return all(type(module) in (Linear, LayerNorm, nn.Identity) and not module.training for module in modules)


def normed(hidden_BE: Tensor, norm: nn.Module) -> Tensor:
    """What the norm gives, without the call of a module."""
    return norm.forward(hidden_BE) if isinstance(norm, LayerNorm) else hidden_BE


def _affine(linear: nn.Module) -> Affine:
    assert isinstance(linear, Linear)
    return linear.weight.detach(), linear.bias.detach()


def _transposed(weight_OI: Tensor) -> Tensor:
    """A copy that lies [in, out] in memory."""
    return weight_OI.t().contiguous().t()
