"""Adam, its parameter groups, and the schedule (CogView, section 2.3; the release's scripts)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cogview.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The paper's Adam: peak learning rate 3e-4, betas 0.9 and 0.95, weight decay 0.04.

    warmup_share: the share of steps with a rising rate (paper: 2 %); final_share: where the cosine ends, as a share
    of the peak (release: 0.1); schedule: "paper" ends there, "released" stops short of it by the warm-up's share, as
    its scheduler does; clip_norm: the largest gradient norm, 0 for none (release: 0.1 under ZeRO, else 1.0).
    """

    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.04
    warmup_share: float = 0.02
    final_share: float = 0.1
    schedule: Literal["paper", "released"] = "paper"
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate={self.learning_rate}: choose a number above 0")
        if not 0 <= self.warmup_share < 1:
            raise ConfigError(f"warmup_share={self.warmup_share}: choose a share from 0, below 1")
        if self.schedule not in ("paper", "released"):
            raise ConfigError(f"schedule={self.schedule!r}: choose paper or released")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW in two groups: matrices and embeddings decay, norms and biases do not."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                (kept if isinstance(module, nn.LayerNorm) or name == "bias" else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    # One kernel for each tensor: the other forms need memory for temporaries, and time for their many small steps.
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)


def learning_rate_at(step: int, *, num_steps: int, config: OptimizerConfig) -> float:
    """The rate of a step: a linear warm-up, then a cosine down to `final_share` of the peak.

    step: from 0, of the steps that were not skipped; num_steps: of the whole run.
    """
    warmup = max(1, round(config.warmup_share * num_steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    length = num_steps if config.schedule == "released" else max(1, num_steps - warmup)
    progress = min(1.0, (step - warmup) / length)
    falling = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_share + (1 - config.final_share) * falling)


def clip_gradients(model: nn.Module, *, norm: float) -> Tensor:
    """Scale gradients to at most `norm` (0: leave them); returns the norm before, a scalar."""
    return nn.utils.clip_grad_norm_(model.parameters(), norm if norm > 0 else math.inf)
