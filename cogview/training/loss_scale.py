"""The dynamic loss scale of fp16 (the release's loss scaler): as high as the gradients allow, found by trying.

In: whether a step's gradients were finite. Out: the factor for the next step's loss. fp16 loses what is smaller than
6e-8, which most gradients are; multiplied by the scale they fit, and the optimizer divides by it again.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cogview.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LossScaleConfig:
    """The released values: the scale doubles after `window` good steps in a row and never falls below `minimum`.

    initial: powers of two keep the scaling exact; hysteresis: the overflow at which the scale halves, counted since it
    last grew, so that 2 forgives one. Released without ZeRO: window 1000, minimum 0.01.
    """

    initial: float = 2.0**16
    window: int = 400
    hysteresis: int = 2
    minimum: float = 1.0

    def __post_init__(self) -> None:
        if self.window < 1 or self.hysteresis < 1:
            raise ConfigError(f"window={self.window}, hysteresis={self.hysteresis}: choose 1 or more")
        if not 0 < self.minimum <= self.initial:
            raise ConfigError(f"minimum={self.minimum}: choose a scale above 0, up to initial={self.initial}")


class LossScale:
    """The scale and what its next change depends on."""

    def __init__(self, config: LossScaleConfig) -> None:
        self.config = config
        self.value = config.initial
        self.patience = config.hysteresis
        self.good_steps = 0

    @property
    def can_fall(self) -> bool:
        """Whether an overflow can still be answered by a smaller scale."""
        return self.value > self.config.minimum

    def succeeded(self) -> None:
        """Count a step with finite gradients; `window` of them in a row double the scale."""
        self.good_steps += 1
        if self.good_steps % self.config.window == 0:
            self.value *= 2
            self.patience = self.config.hysteresis

    def overflowed(self) -> None:
        """Count a step with gradients beyond fp16; once patience is used up, each of them halves the scale."""
        self.good_steps = 0
        if self.patience > 1:
            self.patience -= 1
        else:
            self.value = max(self.value / 2, self.config.minimum)

    def state_dict(self) -> dict[str, float]:
        """For the checkpoint."""
        return {"value": self.value, "patience": self.patience, "good_steps": self.good_steps}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on where `state_dict` was taken."""
        self.value = float(state["value"])
        self.patience, self.good_steps = int(state["patience"]), int(state["good_steps"])
