"""A small GPT at work, for tests of the loop: rows by step from a seed, and faults where a test asks for them."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview.models.gpt import GPT, GPTConfig
from cogview.models.lora import LoRAConfig, add_lora
from cogview.training.language_model import LanguageModelLoss
from cogview.training.loop import LoopConfig, StepLoss, WeightedBatch, train
from cogview.training.loss_scale import LossScaleConfig
from cogview.training.optimization import OptimizerConfig
from cogview.training.ranks import Ranks

MODEL = GPTConfig(vocab_size=40, max_positions=9, num_layers=2, hidden_size=16, num_heads=2, dropout=0.1, init_std=0.2)
ALL_WEIGHTS = LoRAConfig()
LOOP = LoopConfig(
    num_steps=10,
    global_batch_size=4,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_share=0.0),
    loss_scale=LossScaleConfig(initial=2.0**10, window=4),
    log_every=1,
    validate_every=5,
    checkpoint_every=3,
    prefetching="off",  # tasks poison a step when they are asked for it
)


class Poisoned(LanguageModelLoss):
    """Its loss is NaN while `is_poisoned`, on the worker that sets it."""

    is_poisoned = False

    def forward(self, *inputs: Tensor, **named: Tensor) -> StepLoss:
        loss = super().forward(*inputs, **named)
        return replace(loss, loss_sum=loss.loss_sum * (float("nan") if self.is_poisoned else 1.0))


class GPTTask:
    """The task. poison: steps at which the last worker's loss is NaN; stop_before: where the run is interrupted.

    lora: with a rank, only its adapters are trained.
    """

    def __init__(
        self,
        *,
        poison: range = range(0),
        stop_before: int = -1,
        dropout: float = 0.1,
        lora: LoRAConfig = ALL_WEIGHTS,
    ) -> None:
        torch.manual_seed(0)
        self.gpt = GPT(replace(MODEL, dropout=dropout))
        if lora.rank:
            add_lora(self.gpt, lora, seed=1)
        self.module = Poisoned(self.gpt)
        self.poison, self.stop_before = poison, stop_before
        self.validated: dict[int, Tensor] = {}

    def batch(self, step: int, ranks: Ranks) -> WeightedBatch:
        if step == self.stop_before:
            raise KeyboardInterrupt
        self.module.is_poisoned = step in self.poison and ranks.rank == ranks.world - 1
        size = LOOP.global_batch_size // ranks.world
        rows = slice(ranks.rank * size, (ranks.rank + 1) * size)
        ids = torch.randint(40, (LOOP.global_batch_size, 1), generator=torch.Generator().manual_seed(step))
        ids = ((ids + torch.arange(9)) % 40)[rows]  # each row counts upwards: something to learn
        positions = torch.arange(8).expand(size, -1)
        tensors = {"ids": ids[:, :-1], "positions": positions, "labels": ids[:, 1:]}
        tensors |= {"loss_weights": torch.ones(size, 8), "image_part": positions > 3}
        return WeightedBatch(tensors, float(8 * size))

    def validate(self, step: int) -> Mapping[str, Any]:
        self.validated[step] = self.gpt.word_embeddings.weight.detach().clone()
        return {}

    def publish(self, output: Path) -> None:
        torch.save(self.gpt.state_dict(), output / "published.pt")


def run(output: Path, task: GPTTask | None = None, **changes: Any) -> dict[int, dict[str, Any]]:
    """Train alone with some fields of the config changed; returns the lines of the metrics by step."""
    train(task or GPTTask(), config=replace(LOOP, **changes), output=output, identity={}, ranks=Ranks())
    return lines(output)


def lines(output: Path) -> dict[int, dict[str, Any]]:
    """The logged steps of a run."""
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in found if "loss" in line}
