"""A trained GPT taken up for further training: weights of its own in fp32, more positions, other switches."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cogview.errors import ConfigError
from cogview.models.gpt import GPT, GPTConfig

POSITIONS = "transformer.position_embeddings.weight"
SWITCHES = frozenset({"dropout", "attention", "sparse", "embedding_gradient", "activation_checkpointing"})


def continued(model: GPT, *, min_positions: int, changes: Mapping[str, Any]) -> GPT:
    """A copy of the model in fp32 that takes `min_positions` positions or more; changes: see `continued_config`."""
    config = continued_config(model.config, min_positions=min_positions, changes=changes)
    state = {name: value.float().clone() for name, value in model.state_dict().items()}
    state[POSITIONS] = longer_table(state[POSITIONS], min_positions)
    with torch.device("meta"):
        copy = GPT(config)
    copy.load_state_dict(state, assign=True)
    return copy


def continued_config(config: GPTConfig, *, min_positions: int, changes: Mapping[str, Any]) -> GPTConfig:
    """The config of such a copy. changes: fields that concern no weight (SWITCHES). ConfigError for another one."""
    others = sorted(changes.keys() - SWITCHES)
    if others:
        raise ConfigError(f"{others[0]} belongs to the weights of a trained model; only {sorted(SWITCHES)} can change")
    return replace(config, max_positions=max(config.max_positions, min_positions), **changes)


def longer_table(table_PE: Tensor, rows: int) -> Tensor:
    """A table of position embeddings with `rows` rows or more.

    New rows are copies of the last one: positions beyond the table then mean what they mean to the release, which
    clamps them to the last row in super-resolution, until training tells them apart.
    """
    missing = max(0, rows - len(table_PE))
    return torch.cat([table_PE, table_PE[-1:].expand(missing, -1)])
