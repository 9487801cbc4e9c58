"""The arms of the stress test, and what became of each (CogView, section 2.4 and figure 4 (b)).

In: a GPT's config. Out: the same model with and without Sandwich-LN and PB-relax. What a training of it has measured
is kept as a trace: its steps, their readings, and the tensor that ended it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cogview.evaluation.stability import MATERIALISED, STATISTICS, Reading
from cogview.models.gpt import AttentionKind, GPTConfig


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training of the stress test. pb_relax: equation 4 in attention *and* pre-scaled norms, the paper's pair."""

    sandwich_ln: bool
    pb_relax: bool

    def apply(self, config: GPTConfig) -> GPTConfig:
        """The model of this arm: the same shape, with the switches set."""
        attention: AttentionKind = "pb_relax" if self.pb_relax else "plain"
        return replace(config, sandwich_ln=self.sandwich_ln, ln_prescale=self.pb_relax, attention=attention)


ARMS: dict[str, Arm] = {
    "neither": Arm(sandwich_ln=False, pb_relax=False),
    "Sandwich-LN only": Arm(sandwich_ln=True, pb_relax=False),
    "PB-relax only": Arm(sandwich_ln=False, pb_relax=True),
    "both": Arm(sandwich_ln=True, pb_relax=True),
}


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step of an arm: its loss and all readings, in the order of computation."""

    step: int
    loss: float
    readings: Sequence[Reading]

    def by_layer(self, point: str) -> dict[int, float]:
        """layer -> the largest reading of a point."""
        largest: dict[int, float] = {}
        for reading in self.readings:
            if reading.point == point:
                largest[reading.layer] = _larger(reading.value, largest.get(reading.layer, 0.0))
        return largest

    def maxima(self) -> dict[str, float]:
        """point -> its largest reading over all layers."""
        present = {reading.point for reading in self.readings}
        points = [point for point in (*MATERIALISED, *STATISTICS) if point in present]
        return {f"max_{point}": max(self.by_layer(point).values()) for point in points}


@dataclass(frozen=True, kw_only=True)
class ArmTrace:
    """What became of an arm. `overflow`: the tensor that ended it; `half_is_finite`: of a last forward in real fp16."""

    name: str
    num_steps: int
    records: Sequence[StepRecord]
    overflow: Reading | None
    half_is_finite: bool

    @property
    def verdict(self) -> str:
        """One line for people."""
        if self.overflow is None:
            return f"finished {self.num_steps} steps"
        return f"{self.overflow.point} overflows in layer {self.overflow.layer} at step {self.records[-1].step}"

    def summary(self) -> dict[str, Any]:
        """Scores: steps with finite numbers, whether that is all of them, where it ended, the largest readings."""
        finished = self.overflow is None
        where = {} if self.overflow is None else {"overflow": f"{self.overflow.point} of layer {self.overflow.layer}"}
        largest: dict[str, float] = {}
        for record in self.records:
            for name, value in record.maxima().items():
                largest[name] = max(value, largest.get(name, 0.0))
        steps = self.num_steps if finished else self.records[-1].step
        facts = {"finished": int(finished), "steps": steps, "half_is_finite": int(self.half_is_finite)}
        return {**facts, **where, "loss": self.records[-1].loss, **largest}


def _larger(one: float, other: float) -> float:
    """The larger one; NaN is larger than anything."""
    return one if math.isnan(one) or one > other else other
