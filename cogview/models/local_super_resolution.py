"""CogView2's super-resolution models: a transformer that draws a large grid of codes with local attention.

In: a context (caption, and for direct super-resolution the small picture) and the ids of a large grid, in which a mask
token stands wherever a code is to be predicted. Out: hidden states of the grid, all at once.

*Direct*: the mask stands everywhere, the grid sees the small picture and itself through windows, and not
the caption. Its tokens have positions and an attention of their own in every layer; norms and MLP are those of the
backbone, which stays as it was. *Iterative*: a part of the grid is known; it sees itself through a window
and the whole caption; all weights are trained.

Context sees context alone, so it costs what it costs without the grid. Names of weights are those of the released
checkpoints: what the backbone does not have lies below `mixins`.
"""

# B batch, C context, M codes of the small picture, N codes of the large one, L all tokens, E hidden, H heads, D size

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogview.errors import ConfigError
from cogview.models.attention import fused_attention
from cogview.models.gpt import GPT, Block
from cogview.models.local_attention import local_attention
from cogview.models.local_rules import LocalRule, Window, square_window
from cogview.models.products import Linear

Stage = Literal["direct", "iterative"]
MIXINS = "mixins."


@dataclass(frozen=True, kw_only=True)
class LocalSuperResolutionConfig:
    """stage: see above. grid: codes along a side of the large picture; ratio: to those of the small one. The windows
    are CogView2's: 9 rows x 5 columns in the large picture, 5 x 5 in the small one."""

    stage: Stage = "direct"
    grid: int = 60
    ratio: int = 3
    window: Window = field(default_factory=lambda: square_window(5))
    small_window: Window = field(default_factory=lambda: Window(height=5, width=5))

    def __post_init__(self) -> None:
        if self.stage not in get_args(Stage):
            raise ConfigError(f"stage={self.stage!r}: choose {' or '.join(get_args(Stage))}")
        if self.ratio < 1 or self.grid < 1 or self.grid % self.ratio:
            raise ConfigError(f"grid={self.grid}, ratio={self.ratio}: choose a ratio, and a multiple of it as grid")

    @property
    def small_grid(self) -> int:
        """Codes along a side of the small picture."""
        return self.grid // self.ratio

    @property
    def is_direct(self) -> bool:
        """Whether the small picture is read, and the backbone frozen."""
        return self.stage == "direct"

    @property
    def rule(self) -> LocalRule:
        """What codes of the grid see of grids."""
        ratio = self.ratio if self.is_direct else 0
        return LocalRule(
            height=self.grid, width=self.grid, window=self.window, ratio=ratio, coarse_window=self.small_window
        )

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> "LocalSuperResolutionConfig":
        """From what `asdict` made of it."""
        windows = {name: Window(**stored[name]) for name in ("window", "small_window")}
        return cls(**{**stored, **windows})


class LocalSuperResolution(nn.Module):
    """A GPT or CogLM as backbone, with positions for the grid and, in the direct stage, an attention for it."""

    def __init__(self, gpt: GPT, config: LocalSuperResolutionConfig) -> None:
        super().__init__()
        self.config, self.gpt, self.rule = config, gpt, config.rule
        width = gpt.config.hidden_size
        positions = nn.Module()
        positions.position_embeddings = nn.Embedding(config.grid**2, width)
        self.mixins = nn.ModuleDict({"extra_position_embedding": positions})
        if config.is_direct:
            plus, layers = nn.Module(), range(gpt.config.num_layers)
            plus.query_key_value = nn.ModuleList(Linear(width, 3 * width) for _ in layers)
            plus.dense = nn.ModuleList(Linear(width, width) for _ in layers)
            self.mixins["attention_plus"] = plus
            gpt.requires_grad_(False)

    @torch.no_grad()
    def start_from_backbone(self, *, first_position: int) -> None:
        """Give the grid what the backbone knows: its attention in every layer, and its positions of a small picture,
        which begin at `first_position` and are laid over the grid like tiles. ConfigError where they are not there."""
        side, ratio = self.config.small_grid, self.config.ratio
        table_PE = self.gpt.transformer.position_embeddings.weight
        small_ME = table_PE[first_position : first_position + side**2]
        if len(small_ME) < side**2:
            raise ConfigError(
                f"the backbone has {len(table_PE)} positions, but a picture of {side} x {side} codes from position "
                f"{first_position} on needs {first_position + side**2}; give a backbone for such pictures"
            )
        tiles = small_ME.view(side, side, -1).repeat(ratio, ratio, 1)
        self.extra_positions.weight.copy_(tiles.flatten(0, 1))
        if self.config.is_direct:
            for layer, block in enumerate(self.blocks()):
                for name, linear in self._own_attention(layer).items():
                    linear.load_state_dict(getattr(block.attention, name).state_dict())

    def forward(
        self,
        context_ids_BC: Tensor,
        context_positions_BC: Tensor,
        *,
        context_allowed_BCC: Tensor,
        context_seen_BC: Tensor,
        grid_ids_BN: Tensor,
    ) -> Tensor:
        """Hidden states of the grid after the last norm, [B, N, E].

        context_allowed_BCC: bool, who sees whom in the context; its last tokens are the small picture, if one is read.
        context_seen_BC: bool, what of the context the iterative stage sees, which is the caption.
        """
        num_context, num_seen = context_ids_BC.shape[1], self._num_seen(context_ids_BC.shape[1])
        context_BCE = self._embedded(context_ids_BC, self.gpt.transformer.position_embeddings(context_positions_BC))
        grid_BNE = self._embedded(grid_ids_BN, self.extra_positions.weight)
        hidden_BLE = self.gpt.dropout(torch.cat([context_BCE, grid_BNE], dim=1))
        seen_BC = context_seen_BC[:, :num_seen]
        for layer, block in enumerate(self.blocks()):
            if self.gpt.config.activation_checkpointing and self.training:
                hidden_BLE = checkpoint(
                    self._layer, layer, block, hidden_BLE, context_allowed_BCC, seen_BC, use_reentrant=False
                )
            else:
                hidden_BLE = self._layer(layer, block, hidden_BLE, context_allowed_BCC, seen_BC)
        normed_BNE: Tensor = self.gpt.transformer.final_layernorm(hidden_BLE[:, num_context:])
        return normed_BNE

    @property
    def extra_positions(self) -> nn.Embedding:
        """The positions of the grid."""
        table = self.mixins["extra_position_embedding"].position_embeddings
        assert isinstance(table, nn.Embedding)
        return table

    def blocks(self) -> Iterator[Block]:
        """The backbone's layers."""
        for block in self.gpt.transformer.layers:
            assert isinstance(block, Block)
            yield block

    def mixin_tensors(self) -> dict[str, Tensor]:
        """What the backbone does not have, under the released names."""
        return {name: value for name, value in self.state_dict().items() if name.startswith(MIXINS)}

    def _num_seen(self, num_context: int) -> int:
        """How many of the context's keys stand before those of the grids: in the direct stage none."""
        return 0 if self.config.is_direct else num_context

    def _own_attention(self, layer: int) -> dict[str, nn.Module]:
        plus = self.mixins["attention_plus"]
        return {name: plus.get_submodule(f"{name}.{layer}") for name in ("query_key_value", "dense")}

    def _embedded(self, ids: Tensor, positions: Tensor) -> Tensor:
        embedded: Tensor = self.gpt.word_embeddings(ids) + positions
        share = self.gpt.config.embedding_gradient
        if share < 1 and self.training:
            embedded = share * embedded + (1 - share) * embedded.detach()
        return embedded

    def _layer(self, layer: int, block: Block, hidden_BLE: Tensor, allowed_BCC: Tensor, seen_BC: Tensor) -> Tensor:
        """A layer of the backbone, whose attention is dense in the context and local in the grid."""
        attended_BLE = self._attention(layer, block, block.input_layernorm(hidden_BLE), allowed_BCC, seen_BC)
        hidden_BLE = hidden_BLE + block.third_layernorm(block.dropout(attended_BLE))
        widened_BLE = block.dropout(block.mlp(block.post_attention_layernorm(hidden_BLE)))
        summed: Tensor = hidden_BLE + block.fourth_layernorm(widened_BLE)
        return summed

    def _attention(self, layer: int, block: Block, normed_BLE: Tensor, allowed_BCC: Tensor, seen_BC: Tensor) -> Tensor:
        num_context = allowed_BCC.shape[1]
        context_BCE, grid_BNE = normed_BLE[:, :num_context], normed_BLE[:, num_context:]
        base = {name: getattr(block.attention, name) for name in ("query_key_value", "dense")}
        own = self._own_attention(layer) if self.config.is_direct else base
        context_qkv = self._heads(base["query_key_value"](context_BCE))
        grid_qkv = self._heads(own["query_key_value"](grid_BNE))
        read_BHCD = fused_attention(*context_qkv, allowed=allowed_BCC[:, None])
        first_key = num_context - self.rule.num_coarse if self.config.is_direct else 0
        keys, values = (
            torch.cat([of_context[:, :, first_key:], of_grid], dim=2)
            for of_context, of_grid in zip(context_qkv[1:], grid_qkv[1:], strict=True)
        )
        context_BC = seen_BC if seen_BC.shape[1] else None
        drawn_BHND = local_attention(grid_qkv[0], keys, values, rule=self.rule, context_BC=context_BC)
        merged = [base["dense"](_merged(read_BHCD)), own["dense"](_merged(drawn_BHND))]
        return torch.cat(merged, dim=1)

    def _heads(self, qkv_BLX: Tensor) -> tuple[Tensor, ...]:
        batch, length, _ = qkv_BLX.shape
        return qkv_BLX.view(batch, length, 3, self.gpt.config.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _merged(heads_BHLD: Tensor) -> Tensor:
    return heads_BHLD.transpose(1, 2).flatten(2)
