"""A GPT that learns to count: a small training task, for benchmarks of the loop itself."""

import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.harness import UnmeasuredError
from cogview.models.gpt import GPT, GPTConfig
from cogview.models.published import save_model
from cogview.training.language_model import LanguageModelLoss
from cogview.training.loop import METRICS_NAME, WeightedBatch
from cogview.training.ranks import Ranks


class Counting:
    """Rows that count upwards from numbers that the step's seed draws; `rows` of them in a global batch.

    Half of a row counts as text, half as image. gpt: the model, always with the same first weights.
    """

    def __init__(self, model: GPTConfig, *, rows: int) -> None:
        torch.manual_seed(0)
        self.gpt = GPT(model)
        self.module: nn.Module = LanguageModelLoss(self.gpt)
        self.rows = rows

    def batch(self, step: int, ranks: Ranks) -> WeightedBatch:
        """This worker's rows of a step."""
        num_ids = self.gpt.config.vocab_size
        first = torch.randint(num_ids, (self.rows,), generator=torch.Generator().manual_seed(step))
        return self.counted_from(torch.chunk(first, ranks.world)[ranks.rank])

    def counted_from(self, first_B: Tensor) -> WeightedBatch:
        """Rows that count upwards from these numbers."""
        num_ids, length = self.gpt.config.vocab_size, self.gpt.config.max_positions
        ids = (first_B[:, None] + torch.arange(length + 1)) % num_ids
        positions = torch.arange(length).expand(len(ids), -1)
        tensors = {"ids": ids[:, :-1], "positions": positions, "labels": ids[:, 1:]}
        tensors |= {"loss_weights": torch.ones(len(ids), length), "image_part": positions >= length // 2}
        return WeightedBatch(tensors, float(len(ids) * length))

    def validate(self, step: int) -> Mapping[str, Any]:
        """Nothing is held out."""
        return {}

    def publish(self, output: Path) -> None:
        """The weights, as any model's."""
        save_model(self.gpt, output, settings={})


def run_workers(work: Callable[..., None], world: int, *arguments: Any) -> None:
    """Call `work(rank, world, *arguments)` in so many processes. UnmeasuredError if one fails."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(rank, world, *arguments), daemon=True) for rank in range(world)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise UnmeasuredError(f"one of {world} workers ended with exit code {worker.exitcode}")


@contextmanager
def process_group(rank: int, world: int, folder: Path) -> Iterator[None]:
    """One of the workers, who meet in a file of this folder; a lone one needs no group."""
    meeting = folder / "meeting"
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def read_losses(output: Path) -> dict[int, float]:
    """Loss by step. A step that was logged twice is a defect of the loop: ValueError."""
    lines = [json.loads(line) for line in (output / METRICS_NAME).read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    if len(steps) != len(set(steps)):
        raise ValueError(f"{output / METRICS_NAME}: a step is there twice")
    return {line["step"]: line["loss"] for line in lines if "loss" in line}
