"""One transformer on a device for several sets of weights: CogView2's stages take turns in the memory of one model.

In: a model on its device, and what each stage has in its place, in the memory of the machine or mapped to files. Out:
the model with the weights of the stage that is next. Stages whose backbones are the same need no second set.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from cogview.errors import ConfigError
from cogview.models.gpt import GPT


class SharedBackbone:
    """weights: name of a stage -> the tensors of its backbone; holds: whose weights `gpt` has now."""

    def __init__(self, gpt: GPT, weights: Mapping[str, Mapping[str, Tensor]], *, holds: str) -> None:
        self.gpt, self.holds = gpt, holds
        self._weights = dict(weights)
        shapes = {name: value.shape for name, value in gpt.state_dict().items()}
        for stage, tensors in self._weights.items():
            if {name: value.shape for name, value in tensors.items()} != shapes:
                raise ConfigError(f"the backbone of the {stage} stage has another shape; they cannot take turns")

    @torch.no_grad()
    def use(self, stage: str) -> None:
        """Bring the weights of a stage to the device, unless they are there."""
        if stage == self.holds:
            return
        for name, value in self.gpt.state_dict().items():
            value.copy_(self._weights[stage][name])
        self.holds = stage
