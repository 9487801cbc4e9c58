"""Low-rank adapters (Hu et al. 2021) on a GPT's linear layers: finetuning that trains some thousandths of the weights.

In: a GPT whose weights stay as they are. Out: the same GPT, in which every linear layer of every block also adds
scale x up(down(input)), with `down` [rank, in] and `up` [out, rank]; only those two are trained, and `up` starts at
zero, so that training begins with the model as it was. Saved are the adapters alone, with the sha256 of the weights
that they belong to; merged into these they are an ordinary model again, as fast as before and read by whatever reads
models.
"""

# R rank, I numbers in, O numbers out

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cogview.errors import CheckpointError, ConfigError
from cogview.models.gpt import GPT, GPTConfig
from cogview.models.products import Linear
from cogview.models.published import (
    WEIGHTS_NAME,
    file_sha256,
    load_model,
    read_settings,
    read_tensors,
    save_weights,
)

ADAPTERS_NAME = "lora.safetensors"
ADAPTER_SETTINGS_NAME = "lora.json"
DOWN, UP = "lora_down", "lora_up"
LINEARS_IN_BLOCK = 4


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """The adapters of all linear layers: attention's qkv and output, and the MLP's two.

    rank: numbers that pass through each adapter; 0 for none: then all weights are trained. alpha: what an adapter adds
    is multiplied by alpha / rank, so that the rank can be changed without a new learning rate; dropout: of its input.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError(f"rank={self.rank}: choose 1 or more, or 0 to train all weights")
        if not self.alpha > 0:
            raise ConfigError(f"alpha={self.alpha}: choose a number above 0, such as the rank")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout}: choose a share from 0, below 1")

    @property
    def scale(self) -> float:
        """What the adapters' outputs are multiplied by."""
        return self.alpha / self.rank


class LoRALinear(Linear):
    """A linear layer with frozen weights, under their old names, and an adapter beside them."""

    def __init__(self, base: nn.Linear, config: LoRAConfig, *, generator: torch.Generator) -> None:
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout = config.scale, nn.Dropout(config.dropout)
        down_RI = torch.randn(config.rank, base.in_features, generator=generator) / base.in_features**0.5
        device = base.weight.device  # in fp32, whatever the base is in: whoever trains rounds what needs a master
        self.lora_down = nn.Parameter(down_RI.to(device))
        self.lora_up = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))

    def forward(self, input: Tensor) -> Tensor:  # named as nn.Linear names it
        """[..., I] -> [..., O]."""
        narrow = nn.functional.linear(self.dropout(input), self.lora_down)
        return torch.add(super().forward(input), nn.functional.linear(narrow, self.lora_up), alpha=self.scale)


def add_lora(gpt: GPT, config: LoRAConfig, *, seed: int) -> None:
    """Freeze a GPT and give each linear layer an adapter, in place; what it computes does not change yet."""
    for parameter in gpt.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    layers = [
        (module, name, child)
        for module in gpt.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.Linear)
    ]
    for module, name, child in layers:
        setattr(module, name, LoRALinear(child, config, generator=generator).train(child.training))


def count_adapters(model: GPTConfig, config: LoRAConfig) -> int:
    """Trained numbers: rank x (in + out) of each linear layer, 16 x rank x width in a block."""
    widths = 4 + 2 + 5 + 5  # qkv: 1 in, 3 out; attention's output: 1, 1; the MLP: 1, 4 and 4, 1
    return model.num_layers * widths * config.rank * model.hidden_size


def save_adapters(gpt: GPT, folder: Path, *, config: LoRAConfig, settings: Mapping[str, Any], base_sha256: str) -> None:
    """Write the adapters alone, in fp32, and `settings` (as of a model) with the sha256 of the base's weights."""
    folder.mkdir(parents=True, exist_ok=True)
    adapters = {
        name: tensor.detach().float().cpu().contiguous()
        for name, tensor in gpt.state_dict().items()
        if name.endswith((DOWN, UP))
    }
    if not adapters:
        raise CheckpointError("this model has no adapters; give it some with add_lora before training")
    save_file(adapters, folder / ADAPTERS_NAME)
    digests = {"base_sha256": base_sha256, "sha256": file_sha256(folder / ADAPTERS_NAME)}
    document = {**settings, "lora": asdict(config), **digests}
    (folder / ADAPTER_SETTINGS_NAME).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def merge_adapters(base: Path, adapters: Path, output: Path) -> None:
    """Write a model folder whose weights are the base's with the adapters added, in the base's precision.

    The base is read from its file, so that training in half precision costs the frozen weights nothing. Raises
    CheckpointError when a file is missing or damaged, or the adapters belong to other weights.
    """
    settings = read_settings(adapters, ADAPTER_SETTINGS_NAME, what="adapters")
    updates = read_tensors(adapters / ADAPTERS_NAME, sha256=settings["sha256"])
    model, base_settings = load_model(base)
    if base_settings["sha256"] != settings["base_sha256"]:
        raise CheckpointError(
            f"{adapters / ADAPTER_SETTINGS_NAME} belongs to weights with sha256 {settings['base_sha256'][:12]}, and "
            f"{base / WEIGHTS_NAME} has {base_settings['sha256'][:12]}; give the model that it was trained from"
        )
    weights = dict(model.state_dict())
    scale = LoRAConfig(**settings["lora"]).scale
    for name in sorted(name.removesuffix(f".{DOWN}") for name in updates if name.endswith(DOWN)):
        weight_OI = weights[f"{name}.weight"]
        update_OI = updates[f"{name}.{UP}"] @ updates[f"{name}.{DOWN}"]
        weights[f"{name}.weight"] = (weight_OI.float() + scale * update_OI).to(weight_OI.dtype)
    ours = ("base_sha256", "sha256", "config")
    told = {name: value for name, value in settings.items() if name not in ours}
    save_weights(weights, output, config=model.config, settings=told)
