"""A moving average of the weights over the last steps, for evaluation: it scores better than any single step.

In: the fp32 weights after each step. Out: their average, in the module's place while it is scored or published. Buffers
are not averaged: those of a codebook are moving averages themselves.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class AveragedWeights:
    """average <- d average + (1 - d) weights, where d rises to `decay` as (1 + steps) / (10 + steps).

    So the weights of the first steps, which are far from all later ones, are soon forgotten.
    """

    def __init__(self, weights: Mapping[str, Tensor], *, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.averages = {name: tensor.detach().clone() for name, tensor in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Take in the weights after one more step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, average in self.averages.items():
            average.lerp_(weights[name], 1 - decay)

    @contextmanager
    def in_place_of(self, module: nn.Module) -> Iterator[None]:
        """Let the module compute with the averages, rounded to its precision, while the body runs."""
        named = [(name, parameter) for name, parameter in module.named_parameters() if name in self.averages]
        weights = [parameter.data for _, parameter in named]
        for name, parameter in named:
            parameter.data = self.averages[name].to(parameter.dtype)
        try:
            yield
        finally:
            for (_, parameter), data in zip(named, weights, strict=True):
                parameter.data = data

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"averages": self.averages, "num_updates": self.num_updates}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. KeyError or RuntimeError if it is of other weights."""
        self.num_updates = int(state["num_updates"])
        for name, average in self.averages.items():
            average.copy_(state["averages"][name])
