"""CogView's GPT (sections 2.1, 2.3 and 2.4): a unidirectional transformer over text and image tokens.

In: token ids and position ids [B, L]. Out: hidden states or logits. What differs from GPT-2: Sandwich-LN (a norm
before *and* after each branch), pre-scaled norms, PB-relax attention, a shrunken embedding gradient; each is a
switch. Input and output embeddings are tied. Names of weights are those of the released checkpoints.
"""

# B batch, L sequence, E hidden, H heads, D head size, V vocabulary, K keys (cached and new)

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogview.errors import ConfigError
from cogview.models.attention import causal_mask, fused_attention, pb_relax_attention, plain_attention
from cogview.models.norms import LayerNorm
from cogview.models.one_token import Steps, can_step
from cogview.models.pivots import Pivots, SparseConfig, draw_pivots, inference_mask, needed_keys
from cogview.models.products import Linear, linear
from cogview.models.recorded_steps import RecordedSteps

AttentionKind = Literal["fused", "pb_relax", "plain", "sparse"]
Regions = Callable[[int], Tensor | Pivots | None]  # layer -> mask, pivots, or None: causal


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """A GPT's shape and its switches; the defaults are the released 4 B model, in the paper's training form.

    attention: "fused" (torch's kernel, fp32 softmax statistics), "pb_relax" (equation 4 as written), "plain",
        or "sparse" (three regions, appendix B; outside of training it is "fused" unless `sparse` says otherwise).
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
    sparse: SparseConfig = field(default_factory=SparseConfig)
    embedding_gradient: float = 0.1
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}")
        if self.attention not in get_args(AttentionKind):
            raise ConfigError(f"attention={self.attention!r}: choose one of {', '.join(get_args(AttentionKind))}")
        if self.attention == "sparse" and self.sparse.padding_id >= self.vocab_size:
            raise ConfigError(
                f"sparse.padding_id={self.sparse.padding_id} is not among vocab_size={self.vocab_size} ids; "
                "set sparse.num_image_ids and sparse.padding_id to those of the vocabulary"
            )
        if not 0 < self.embedding_gradient <= 1:
            raise ConfigError(f"embedding_gradient={self.embedding_gradient}: choose a share above 0, up to 1")


class KeyValueCache:
    """Keys and values of all layers for a fixed number of positions, filled from the left.

    allowed_BK: bool, which cached positions may be looked at (False for the padding before a short prompt);
    is_padded: whether that may be False anywhere; who knows that it is not says so, and spares the masks;
    ids_BK: int64, the tokens, which only sparse attention asks for.
    """

    def __init__(self, config: GPTConfig, *, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        head_size = config.hidden_size // config.num_heads
        shape = (config.num_layers, 2, batch, config.num_heads, length, head_size)
        self.storage = torch.zeros(shape, dtype=dtype, device=device)
        self.of_layers = [tuple(layer.unbind(0)) for layer in self.storage.unbind(0)]  # views: keys and values
        self.steps: Steps | None = None  # the layers taken apart, at the first step by one token
        self.recorded: RecordedSteps | None = None  # the same as one command, if the model is told to record
        self.allowed_BK = torch.ones(batch, length, dtype=torch.bool, device=device)
        self.ids_BK = torch.zeros(batch, length, dtype=torch.int64, device=device)
        self.is_padded = True
        self.filled = 0

    def extend(self, layer: int, k_BHLD: Tensor, v_BHLD: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values behind the filled ones; returns all of them [B, H, K, D]."""
        new = k_BHLD.shape[2]
        end = self.end(new)
        keys, values = self.of_layers[layer]
        keys.narrow(2, self.filled, new).copy_(k_BHLD)
        values.narrow(2, self.filled, new).copy_(v_BHLD)
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def remember(self, ids_BL: Tensor) -> Tensor:
        """Store the tokens behind the filled positions; returns all of them [B, K]."""
        end = self.end(ids_BL.shape[1])
        self.ids_BK[:, self.filled : end] = ids_BL
        return self.ids_BK[:, :end]

    def begin_with(self, prompts: "KeyValueCache", *, rows_B: Tensor) -> None:
        """Take over what `prompts` holds, its row rows_B[b] as row b: a prompt is read once for many samples."""
        end = prompts.filled
        self.storage[:, :, :, :, :end] = prompts.storage[:, :, rows_B, :, :end]
        self.allowed_BK[:, :end] = prompts.allowed_BK[rows_B, :end]
        self.ids_BK[:, :end] = prompts.ids_BK[rows_B, :end]
        self.is_padded, self.filled = prompts.is_padded, end

    def sees_all(self, num_queries: int) -> bool:
        """Whether such queries need no mask: nothing is padding, and they are alone or begin the sequence."""
        return not self.is_padded and (num_queries == 1 or self.filled == 0)

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

    def end(self, num_new: int) -> int:
        """How many positions are filled with so many more. ConfigError when there is no room for them."""
        end, length = self.filled + num_new, self.storage.shape[4]
        if end > length:
            raise ConfigError(f"the cache holds {length} positions, {end} are needed; make it longer")
        return end


class Attention(nn.Module):
    """Multi-head self-attention; rows of `query_key_value` are all queries, then all keys, then all values."""

    def __init__(self, config: GPTConfig, *, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.query_key_value = Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_BLE: Tensor, cache: KeyValueCache | None, allowed: Tensor | Pivots | None) -> Tensor:
        """[B, L, E] -> [B, L, E]; causal if `allowed` is None, else looking where mask [B, 1, L, K] or pivots say."""
        batch, length, _ = hidden_BLE.shape
        qkv = self.query_key_value(hidden_BLE).view(batch, length, 3, self.config.num_heads, -1)
        q_BHLD, k_BHLD, v_BHLD = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if cache is not None:
            k_BHLD, v_BHLD = cache.extend(self.layer, k_BHLD, v_BHLD)
        attended_BHLD = self._attend(q_BHLD, k_BHLD, v_BHLD, allowed)
        merged: Tensor = self.dense(attended_BHLD.transpose(1, 2).reshape(batch, length, -1))
        return merged

    def _attend(self, q_BHLD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, allowed: Tensor | Pivots | None) -> Tensor:
        dropout = self.config.dropout if self.training else 0.0
        if isinstance(allowed, Pivots):
            from cogview.models.sparse_attention import sparse_attention  # brings torch's compiler, which takes seconds

            return sparse_attention(q_BHLD, k_BHKD, v_BHKD, pivots=allowed, dropout=dropout)
        if self.config.attention in ("fused", "sparse"):
            if allowed is not None and self.config.attention == "sparse" and self.config.sparse.in_evaluation:
                k_BHKD, v_BHKD, allowed = needed_keys(k_BHKD, v_BHKD, allowed)
            return fused_attention(q_BHLD, k_BHKD, v_BHKD, allowed=allowed, dropout=dropout)
        if allowed is None:
            allowed = causal_mask(q_BHLD.shape[2], k_BHKD.shape[2], device=q_BHLD.device)
        form = pb_relax_attention if self.config.attention == "pb_relax" else plain_attention
        return form(q_BHLD, k_BHKD, v_BHKD, allowed=allowed, dropout=dropout)


class MLP(nn.Module):
    """Four times wider inside, with the tanh form of GELU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, 4 * config.hidden_size)
        self.dense_4h_to_h = Linear(4 * config.hidden_size, config.hidden_size)

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

    def forward(
        self, hidden_BLE: Tensor, cache: KeyValueCache | None = None, allowed: Tensor | Pivots | None = None
    ) -> Tensor:
        """[B, L, E] -> [B, L, E]."""
        attended_BLE = self.dropout(self.attention(self.input_layernorm(hidden_BLE), cache, allowed))
        hidden_BLE = hidden_BLE + self.third_layernorm(attended_BLE)
        widened_BLE = self.dropout(self.mlp(self.post_attention_layernorm(hidden_BLE)))
        summed: Tensor = hidden_BLE + self.fourth_layernorm(widened_BLE)
        return summed

    def parts(self) -> tuple[nn.Module, ...]:
        """What a token passes through, in its order."""
        attention = (self.input_layernorm, self.attention.query_key_value, self.attention.dense, self.third_layernorm)
        mlp = (self.post_attention_layernorm, self.mlp.dense_h_to_4h, self.mlp.dense_4h_to_h, self.fourth_layernorm)
        return (*attention, *mlp)


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
        self.is_recorded = False  # see `record_steps`
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.transformer = Transformer(config)
        self.dropout = nn.Dropout(config.dropout)
        self.apply(self._initialise)

    def forward(
        self,
        ids_BL: Tensor,
        positions_BL: Tensor,
        *,
        cache: KeyValueCache | None = None,
        pivot_keys_B: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, L, E] after the last norm. A cache is advanced by L positions.

        allowed: [B, 1, L, K] instead of what is causal: bool, where a token may look, or what is added to its scores.
        pivot_keys_B: int64, numbers that decide the pivots of sparse attention (see `pivots.pivot_keys`); without them
        training takes them from torch's random state on the CPU, and evaluation 0.
        """
        hidden_BLE = self.word_embeddings(ids_BL) + self.transformer.position_embeddings(positions_BL)
        share = self.config.embedding_gradient
        if share < 1 and self.training:
            hidden_BLE = share * hidden_BLE + (1 - share) * hidden_BLE.detach()
        hidden_BLE = self.dropout(hidden_BLE)
        if cache is not None and ids_BL.shape[1] == 1 and self._steps(cache):
            return self._step(hidden_BLE, cache, allowed)
        regions_of = self._regions(ids_BL, cache, pivot_keys_B) if allowed is None else lambda layer: allowed
        for index, layer in enumerate(self.transformer.layers):
            if self.config.activation_checkpointing and self.training:
                hidden_BLE = checkpoint(layer, hidden_BLE, None, regions_of(index), use_reentrant=False)
            else:
                hidden_BLE = layer(hidden_BLE, cache, regions_of(index))
        if cache is not None:
            cache.filled += ids_BL.shape[1]
        normed: Tensor = self.transformer.final_layernorm(hidden_BLE)
        return normed

    def logits(self, hidden: Tensor, *, ids: range | None = None) -> Tensor:
        """Scores over the vocabulary [..., V] of hidden states [..., E], or only over a range of ids."""
        weight_VE = self.word_embeddings.weight if ids is None else self.word_embeddings.weight[ids.start : ids.stop]
        return linear(hidden, weight_VE)

    def compile_layers(self) -> None:
        """Compile every block in place: one graph, made at the first step, serves all of them. Needs a C++ compiler."""
        for layer in self.transformer.layers:
            layer.compile()

    def record_steps(self) -> None:
        """Record the steps by one token as CUDA graphs, which a GPU replays without waiting for Python.

        For weights that stay: a recording reads them where they lie. Attention in one of the written-out forms, or
        sparse in evaluation, is not recorded.
        """
        self.is_recorded = True

    def _steps(self, cache: KeyValueCache) -> bool:
        """Whether a step by one token may take the short way, which leads through torch's kernel alone."""
        is_sparse = self.config.attention == "sparse" and self.config.sparse.in_evaluation
        if self.training or is_sparse or self.config.attention in ("pb_relax", "plain"):
            return False
        if cache.steps is None:
            # Wrapped layers, as those of a model spread over workers, gather their weights when they are called.
            layers = [layer.parts() for layer in self.transformer.layers if type(layer) is Block]
            if len(layers) < self.config.num_layers or not all(map(can_step, layers)):
                return False
            cache.steps = Steps(layers, num_heads=self.config.num_heads)
        return True

    def _step(self, hidden_B1E: Tensor, cache: KeyValueCache, allowed: Tensor | None) -> Tensor:
        """Hidden states [B, 1, E] of one token after the last norm; the cache is advanced by it."""
        assert cache.steps is not None
        end = cache.end(1)
        if allowed is None and not cache.sees_all(1):
            allowed = cache.attention_mask(1)
        if self.is_recorded:
            cache.recorded = cache.recorded or RecordedSteps(cache.steps, caches=cache.of_layers)
            hidden_BE = cache.recorded(hidden_B1E[:, 0], filled=cache.filled, allowed=allowed)
        else:
            hidden_BE = cache.steps(hidden_B1E[:, 0], caches=cache.of_layers, filled=cache.filled, allowed=allowed)
        cache.filled = end
        normed: Tensor = self.transformer.final_layernorm(hidden_BE)
        return normed[:, None]

    def _regions(self, ids_BL: Tensor, cache: KeyValueCache | None, pivot_keys_B: Tensor | None) -> Regions:
        """Where each layer looks: the same for all with dense attention, drawn for each with sparse attention."""
        config, length = self.config.sparse, ids_BL.shape[1]
        if self.config.attention != "sparse" or not (self.training or config.in_evaluation):
            mask = None if cache is None or cache.sees_all(length) else cache.attention_mask(length)
            return lambda layer: mask
        if cache is not None:
            allowed, ids_BK = cache.attention_mask(length), cache.remember(ids_BL)
            max_positions = self.config.max_positions
            return lambda layer: inference_mask(
                allowed, ids_BK, layer=layer, max_positions=max_positions, config=config
            )
        if pivot_keys_B is None:
            pivot_keys_B = torch.randint(2**62, (len(ids_BL),)) if self.training else torch.zeros(len(ids_BL)).long()
        keys_B = pivot_keys_B.to(ids_BL.device)
        return lambda layer: draw_pivots(ids_BL, keys_B=keys_B, layer=layer, config=config)

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
