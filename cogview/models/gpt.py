"""CogView's GPT (sections 2.1, 2.3 and 2.4): a unidirectional transformer over text and image tokens.

In: token ids and position ids [B, L]. Out: hidden states or logits. What differs from GPT-2: Sandwich-LN (a norm
before *and* after each branch), pre-scaled norms, PB-relax attention, a shrunken embedding gradient; each is a
switch. Input and output embeddings are tied. Names of weights are those of the released checkpoints.
"""

# B batch, L sequence, E hidden, H heads, D head size, V vocabulary, K keys (cached and new)

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogview.errors import ConfigError
from cogview.models.attention import causal_mask, fused_attention, pb_relax_attention, plain_attention
from cogview.models.norms import LayerNorm

AttentionKind = Literal["fused", "pb_relax", "plain"]


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """A GPT's shape and its switches; the defaults are the released 4 B model, in the paper's training form.

    attention: "fused" (torch's kernel, fp32 softmax statistics), "pb_relax" (equation 4 as written) or "plain".
    embedding_gradient: the share of the gradient that reaches the embeddings (the paper's 0.1; the released code: 1).
    """

    vocab_size: int = 58240
    max_positions: int = 1089
    num_layers: int = 48
    hidden_size: int = 2560
    num_heads: int = 40
    dropout: float = 0.1
    layernorm_epsilon: float = 1e-5
    init_std: float = 0.02
    sandwich_ln: bool = True
    ln_prescale: bool = True
    attention: AttentionKind = "fused"
    embedding_gradient: float = 0.1
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}")
        if self.attention not in ("fused", "pb_relax", "plain"):
            raise ConfigError(f"attention={self.attention!r}: choose fused, pb_relax or plain")
        if not 0 < self.embedding_gradient <= 1:
            raise ConfigError(f"embedding_gradient={self.embedding_gradient}: choose a share above 0, up to 1")


class KeyValueCache:
    """Keys and values of all layers for a fixed number of positions, filled from the left.

    allowed_BK: bool, which cached positions may be looked at (False for the padding before a short prompt).
    """

    def __init__(self, config: GPTConfig, *, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        head_size = config.hidden_size // config.num_heads
        shape = (config.num_layers, 2, batch, config.num_heads, length, head_size)
        self.storage = torch.zeros(shape, dtype=dtype, device=device)
        self.allowed_BK = torch.ones(batch, length, dtype=torch.bool, device=device)
        self.filled = 0

    def extend(self, layer: int, k_BHLD: Tensor, v_BHLD: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values behind the filled ones; returns all of them [B, H, K, D]."""
        end = self.filled + k_BHLD.shape[2]
        if end > self.storage.shape[4]:
            raise ConfigError(f"the cache holds {self.storage.shape[4]} positions, {end} are needed; make it longer")
        self.storage[layer, 0, :, :, self.filled : end] = k_BHLD
        self.storage[layer, 1, :, :, self.filled : end] = v_BHLD
        return self.storage[layer, 0, :, :, :end], self.storage[layer, 1, :, :, :end]

    def attention_mask(self, num_queries: int) -> Tensor:
        """bool [B, 1, Q, K] for queries that follow the filled positions."""
        num_keys = self.filled + num_queries
        allowed_B1K = self.allowed_BK[:, None, :num_keys]
        if num_queries == 1:
            return allowed_B1K[:, None]
        causal_QK = causal_mask(num_queries, num_keys, device=allowed_B1K.device)
        # A padding query sees itself, or its softmax would have nothing to sum over.
        keys_K = torch.arange(num_keys, device=allowed_B1K.device)
        itself_QK = keys_K[self.filled :, None] == keys_K[None, :]
        return (causal_QK & allowed_B1K | itself_QK)[:, None]


class Attention(nn.Module):
    """Multi-head self-attention; rows of `query_key_value` are all queries, then all keys, then all values."""

    def __init__(self, config: GPTConfig, *, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_BLE: Tensor, cache: KeyValueCache | None, allowed: Tensor | None) -> Tensor:
        """[B, L, E] -> [B, L, E]; causal if `allowed` is None, else looking where the mask [B, 1, L, K] says."""
        batch, length, _ = hidden_BLE.shape
        qkv = self.query_key_value(hidden_BLE).view(batch, length, 3, self.config.num_heads, -1)
        q_BHLD, k_BHLD, v_BHLD = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if cache is not None:
            k_BHLD, v_BHLD = cache.extend(self.layer, k_BHLD, v_BHLD)
        attended_BHLD = self._attend(q_BHLD, k_BHLD, v_BHLD, allowed)
        merged: Tensor = self.dense(attended_BHLD.transpose(1, 2).reshape(batch, length, -1))
        return merged

    def _attend(self, q_BHLD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, allowed: Tensor | None) -> Tensor:
        dropout = self.config.dropout if self.training else 0.0
        if self.config.attention == "fused":
            return fused_attention(q_BHLD, k_BHKD, v_BHKD, allowed=allowed, dropout=dropout)
        if allowed is None:
            allowed = causal_mask(q_BHLD.shape[2], k_BHKD.shape[2], device=q_BHLD.device)
        form = pb_relax_attention if self.config.attention == "pb_relax" else plain_attention
        return form(q_BHLD, k_BHKD, v_BHKD, allowed=allowed, dropout=dropout)


class MLP(nn.Module):
    """Four times wider inside, with the tanh form of GELU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.dense_4h_to_h = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, hidden_BLE: Tensor) -> Tensor:
        """[B, L, E] -> [B, L, E]."""
        wide = nn.functional.gelu(self.dense_h_to_4h(hidden_BLE), approximate="tanh")
        narrow: Tensor = self.dense_4h_to_h(wide)
        return narrow


class Block(nn.Module):
    """h + LN(attention(LN(h))), then h + LN(mlp(LN(h))); without Sandwich-LN the outer norms are absent."""

    def __init__(self, config: GPTConfig, *, layer: int) -> None:
        super().__init__()
        self.input_layernorm = _norm(config)
        self.attention = Attention(config, layer=layer)
        self.third_layernorm = _norm(config) if config.sandwich_ln else nn.Identity()
        self.post_attention_layernorm = _norm(config)
        self.mlp = MLP(config)
        self.fourth_layernorm = _norm(config) if config.sandwich_ln else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_BLE: Tensor, cache: KeyValueCache | None = None, allowed: Tensor | None = None) -> Tensor:
        """[B, L, E] -> [B, L, E]."""
        attended_BLE = self.dropout(self.attention(self.input_layernorm(hidden_BLE), cache, allowed))
        hidden_BLE = hidden_BLE + self.third_layernorm(attended_BLE)
        widened_BLE = self.dropout(self.mlp(self.post_attention_layernorm(hidden_BLE)))
        summed: Tensor = hidden_BLE + self.fourth_layernorm(widened_BLE)
        return summed


class Transformer(nn.Module):
    """Position embeddings, blocks and the last norm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.position_embeddings = nn.Embedding(config.max_positions, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer=layer) for layer in range(config.num_layers))
        self.final_layernorm = _norm(config)


class GPT(nn.Module):
    """The whole model. `forward` gives the last hidden states; `logits` projects them, onto all ids or some."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.transformer = Transformer(config)
        self.dropout = nn.Dropout(config.dropout)
        self.apply(self._initialise)

    def forward(self, ids_BL: Tensor, positions_BL: Tensor, *, cache: KeyValueCache | None = None) -> Tensor:
        """Hidden states [B, L, E] after the last norm. A cache is advanced by L positions."""
        hidden_BLE = self.word_embeddings(ids_BL) + self.transformer.position_embeddings(positions_BL)
        share = self.config.embedding_gradient
        if share < 1 and self.training:
            hidden_BLE = share * hidden_BLE + (1 - share) * hidden_BLE.detach()
        hidden_BLE = self.dropout(hidden_BLE)
        allowed = None if cache is None else cache.attention_mask(ids_BL.shape[1])
        for layer in self.transformer.layers:
            if self.config.activation_checkpointing and self.training:
                hidden_BLE = checkpoint(layer, hidden_BLE, use_reentrant=False)
            else:
                hidden_BLE = layer(hidden_BLE, cache, allowed)
        if cache is not None:
            cache.filled += ids_BL.shape[1]
        normed: Tensor = self.transformer.final_layernorm(hidden_BLE)
        return normed

    def logits(self, hidden: Tensor, *, ids: range | None = None) -> Tensor:
        """Scores over the vocabulary [..., V] of hidden states [..., E], or only over a range of ids."""
        weight_VE = self.word_embeddings.weight if ids is None else self.word_embeddings.weight[ids.start : ids.stop]
        return hidden @ weight_VE.T

    def _initialise(self, module: nn.Module) -> None:
        """N(0, 0.02); the outputs of both branches N(0, 0.02 / sqrt(2 layers)); biases 0, norms 1."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):
            std = self.config.init_std / (2 * self.config.num_layers) ** 0.5
            nn.init.normal_(module.attention.dense.weight, std=std)
            nn.init.normal_(module.mlp.dense_4h_to_h.weight, std=std)


def count_parameters(config: GPTConfig) -> int:
    """The number of weights, counted on the meta device: no memory is used."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(config).parameters())


def _norm(config: GPTConfig) -> LayerNorm:
    return LayerNorm(config.hidden_size, eps=config.layernorm_epsilon, prescale=config.ln_prescale)
