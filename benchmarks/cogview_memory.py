"""How CogView's release draws: of what it has read it keeps each layer's inputs, and projects all of them again.

In: a model of ours, token after token. Out: their hidden states. It is what our cache of keys and values is measured
beside.
"""

# B batch, L tokens, K tokens before them, E hidden

import torch
from torch import Tensor, nn

from cogview.models.gpt import GPT, Block


class CogViewMemory:
    """The inputs of every layer, for all tokens that were read."""

    def __init__(self, model: GPT, *, batch: int) -> None:
        self.model = model
        empty = model.word_embeddings.weight.new_empty(batch, 0, model.config.hidden_size)
        self._kept = [empty] * model.config.num_layers

    def read(self, ids_BL: Tensor, positions_BL: Tensor) -> Tensor:
        """The last token's hidden state after the last norm [B, E], once these are read as well."""
        transformer = self.model.transformer
        hidden_BLE: Tensor = self.model.word_embeddings(ids_BL) + transformer.position_embeddings(positions_BL)
        for index, block in enumerate(transformer.layers):
            assert isinstance(block, Block)
            known_BKE = self._kept[index]
            self._kept[index] = torch.cat([known_BKE, hidden_BLE], dim=1)
            hidden_BLE = _layer(block, hidden_BLE, known_BKE=known_BKE, num_heads=self.model.config.num_heads)
        last_BE: Tensor = transformer.final_layernorm(hidden_BLE[:, -1])
        return last_BE


def _layer(block: Block, hidden_BLE: Tensor, *, known_BKE: Tensor, num_heads: int) -> Tensor:
    """A layer that normalises and projects what it remembers once more."""
    batch, length, width = hidden_BLE.shape
    normed = torch.cat([block.input_layernorm(known_BKE), block.input_layernorm(hidden_BLE)], dim=1)
    attention, mlp = block.attention, block.mlp
    parts = _product(normed, attention.query_key_value).view(batch, normed.shape[1], 3, num_heads, -1)
    q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
    allowed = torch.ones(length, normed.shape[1], dtype=torch.bool, device=q.device).tril(normed.shape[1] - length)
    attended = nn.functional.scaled_dot_product_attention(q[:, :, -length:], k, v, attn_mask=allowed)
    merged = _product(attended.transpose(1, 2).reshape(batch, length, width), attention.dense)
    hidden_BLE = hidden_BLE + block.third_layernorm(merged)
    wide = _product(block.post_attention_layernorm(hidden_BLE), mlp.dense_h_to_4h)
    narrow = _product(nn.functional.gelu(wide, approximate="tanh"), mlp.dense_4h_to_h)
    widened: Tensor = block.fourth_layernorm(narrow)
    return hidden_BLE + widened


def _product(rows: Tensor, layer: nn.Linear) -> Tensor:
    """What a linear layer gives, by torch's own choice of a library."""
    return nn.functional.linear(rows, layer.weight, layer.bias)
