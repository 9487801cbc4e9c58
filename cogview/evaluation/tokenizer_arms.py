"""The arms of a comparison of image tokenizers: what each differs in, and how its loss fell (CogView, figure 2).

In: one config and what to vary of it; the metrics file of a training. Out: arms with names, their L2 curves.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cogview.errors import ConfigError
from cogview.tokenizers.codebook import Rule
from cogview.tokenizers.vqvae import VQVAEConfig

FINAL_SHARE = 0.1  # of the steps, over which the final L2 is the mean: a single batch is easy or hard by chance


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A tokenizer to be trained. name: of letters, digits, `_`, `-` and `.`; the rule, then what else is varied."""

    name: str
    model: VQVAEConfig

    @property
    def rule(self) -> Rule:
        """What trains its codebook."""
        return self.model.codebook.rule


def combine_arms(
    model: VQVAEConfig,
    *,
    rules: Sequence[Rule],
    num_codes: Sequence[int],
    code_dims: Sequence[int],
    width_factors: Sequence[float],
) -> list[Arm]:
    """Every combination of these values, in this order. An empty sequence leaves the model as it is.

    width_factors: of the channels of all hidden layers.
    """
    book = model.codebook
    arms = []
    for rule, codes, dim, factor in itertools.product(
        rules or (book.rule,), num_codes or (book.num_codes,), code_dims or (book.code_dim,), width_factors or (1.0,)
    ):
        varied = {"codes": (codes, num_codes), "dim": (dim, code_dims), "width": (factor, width_factors)}
        words = [f"{word}-{value:g}" for word, (value, values) in varied.items() if len(values) > 1]
        codebook = replace(book, rule=rule, num_codes=codes, code_dim=dim)
        widths = tuple(max(1, round(width * factor)) for width in model.widths)
        arms.append(Arm(name="_".join([rule, *words]), model=replace(model, codebook=codebook, widths=widths)))
    twice = [arm.name for arm in arms if sum(other.name == arm.name for other in arms) > 1]
    if twice:
        raise ConfigError(f"the arm {twice[0]} is asked for twice; leave out repeated rules, sizes and widths")
    return arms


@dataclass(frozen=True, kw_only=True)
class ArmTrace:
    """An arm's L2 in normalised pixels, as points (step, L2).

    training: means over the batches since the point before, of what the decoder saw; held_out: of pictures that were
    not trained on, each vector taking its nearest code. steps_per_second: of the whole training, by its own clock.
    """

    arm: Arm
    training: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...]
    steps_per_second: float

    @property
    def final_l2(self) -> float:
        """The mean training L2 over the last tenth of the steps."""
        first = self.training[-1][0] * (1 - FINAL_SHARE)
        values = [l2 for step, l2 in self.training if step > first]
        return sum(values) / len(values)

    def rows(self) -> list[dict[str, str | int | float]]:
        """The points as rows of a table."""
        curves: Mapping[str, tuple[tuple[int, float], ...]] = {"training": self.training, "held_out": self.held_out}
        return [
            {"arm": self.arm.name, "pictures": name, "step": step, "l2": float(f"{l2:.6g}")}
            for name, points in curves.items()
            for step, l2 in points
        ]


def read_trace(arm: Arm, metrics: Path, *, batch_size: int) -> ArmTrace:
    """The curves of a finished training from its metrics file, JSON lines with `step` and `l2` or `validation_l2`.

    batch_size: rows of a step, for lines tell the rows per second since the line before.
    """
    lines = [json.loads(text) for text in metrics.read_text().splitlines()]
    timed = [(line["step"], line["rows_per_second"] / batch_size) for line in lines if "rows_per_second" in line]
    starts = [0, *(step for step, _ in timed)]
    seconds = sum((step - start) / rate for (step, rate), start in zip(timed, starts, strict=False))
    return ArmTrace(
        arm=arm,
        training=tuple((line["step"], line["l2"]) for line in lines if "l2" in line),
        held_out=tuple((line["step"], line["validation_l2"]) for line in lines if "validation_l2" in line),
        steps_per_second=timed[-1][0] / seconds,
    )


def spread(values: Sequence[float]) -> float:
    """(largest - smallest) / smallest: how far apart the arms are."""
    return (max(values) - min(values)) / min(values)
