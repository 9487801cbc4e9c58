"""The one training loop: a task's batches in, checkpoints and step metrics out; resume is exact.

The loop knows nothing of what is trained. A `Task` gives it a module whose forward returns a loss sum and what to
report, and batches addressed by step: batch = f(step, rank, number of ranks). So a resumed run needs the weights, the
optimizer, the random state of each rank and one integer. Losses are sums divided by the weight of the *global* batch,
so that the number of workers does not change what is minimised.
"""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cogview.errors import CheckpointError, ConfigError, DivergedError
from cogview.training.checkpoints import STATE_NAME, Checkpoint, latest_checkpoint, publish, write_part
from cogview.training.optimization import OptimizerConfig, build_optimizer, clip_gradients, learning_rate_at

logger = logging.getLogger(__name__)
METRICS_NAME = "metrics.jsonl"
CHECKPOINTS_NAME = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """num_steps optimizer steps of global_batch_size rows each; the other fields say how often what happens.

    max_bad_steps: non-finite losses in a row before DivergedError; keep_checkpoints: how many of the newest stay.
    """

    num_steps: int
    global_batch_size: int
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = 1
    log_every: int = field(default=20, metadata={"role": "runtime"})
    validate_every: int = field(default=500, metadata={"role": "runtime"})
    checkpoint_every: int = field(default=500, metadata={"role": "runtime"})
    keep_checkpoints: int = field(default=3, metadata={"role": "runtime"})
    max_bad_steps: int = 20

    def __post_init__(self) -> None:
        for name in ("num_steps", "global_batch_size", "log_every", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: choose 1 or more")


@dataclass(frozen=True)
class Ranks:
    """Which worker this is, of how many, and where it computes."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    def share(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """This worker's part of a global batch of row indices: contiguous, so that the parts in order are the whole."""
        return np.split(rows, self.world)[self.rank]


@dataclass(frozen=True)
class StepLoss:
    """What a forward returns. `loss_sum`: to be divided by the global weight; `reports`: name -> (sum, weight)."""

    loss_sum: Tensor
    reports: Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class WeightedBatch:
    """A worker's share of a step's batch, and its weight in the loss (rows, or the sum of loss weights)."""

    tensors: Mapping[str, Tensor]
    weight: float


class Task(Protocol):
    """What is trained. `module(**batch.tensors)` returns a StepLoss."""

    module: nn.Module

    def batch(self, step: int, ranks: Ranks) -> WeightedBatch: ...

    def validate(self, step: int) -> Mapping[str, float]: ...

    def publish(self, output: Path) -> None: ...


def train(task: Task, *, config: LoopConfig, output: Path, identity: Mapping[str, Any], ranks: Ranks) -> None:
    """Train to `num_steps`, from the newest verified checkpoint in `output` if there is one, then publish the weights.

    Writes `checkpoints/`, `metrics.jsonl` (rank 0: one line for each logged step) and what `task.publish` writes.
    identity: what a checkpoint must agree with. Raises DivergedError, CheckpointError, StorageError.
    """
    loop = _Loop(task, config=config, output=output, identity=identity, ranks=ranks)
    for step in range(loop.first_step, config.num_steps):
        loop.step(step)
        done = step + 1
        if done % config.validate_every == 0 or done == config.num_steps:
            loop.validate(done)
        if done % config.checkpoint_every == 0 or done == config.num_steps:
            loop.save(done)
    if ranks.rank == 0:
        task.publish(output)


class _Loop:
    """The state that survives from step to step."""

    def __init__(
        self, task: Task, *, config: LoopConfig, output: Path, identity: Mapping[str, Any], ranks: Ranks
    ) -> None:
        if config.global_batch_size % ranks.world:
            raise ConfigError(
                f"global_batch_size={config.global_batch_size} cannot be shared by {ranks.world} workers; "
                f"choose a multiple of {ranks.world}"
            )
        self.task, self.config, self.output, self.ranks = task, config, output, ranks
        self.identity = dict(identity)
        torch.manual_seed(config.seed * 1000 + ranks.rank)
        task.module.to(ranks.device)
        self.optimizer = build_optimizer(task.module, config.optimizer)
        self.model = DistributedDataParallel(task.module, broadcast_buffers=False) if ranks.world > 1 else task.module
        self.first_step, self.bad_steps, self.skipped = 0, 0, 0
        checkpoint = latest_checkpoint(output / CHECKPOINTS_NAME, identity=self.identity)
        if checkpoint is not None:
            self._restore(checkpoint)
        self.metrics = _MetricsFile(output / METRICS_NAME, first_step=self.first_step) if ranks.rank == 0 else None
        self.sums: dict[str, Tensor] = {}
        self.tokens_started, self.started = self.first_step, time.monotonic()

    def step(self, step: int) -> None:
        """One optimizer step; a non-finite loss or gradient on any worker skips it on all."""
        rate = learning_rate_at(step, num_steps=self.config.num_steps, config=self.config.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.task.batch(step, self.ranks)
        self.task.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        result: StepLoss = self.model(**{name: tensor.to(self.ranks.device) for name, tensor in batch.tensors.items()})
        weight = self._sum_over_ranks(torch.tensor(batch.weight, dtype=torch.float64)).item()
        # DDP averages gradients over workers, the loss is a sum over all of them: hence the factor `world`.
        (result.loss_sum * (self.ranks.world / weight)).backward()  # type: ignore[no-untyped-call]
        norm = clip_gradients(self.task.module, norm=self.config.optimizer.clip_norm)
        if math.isfinite(norm.item()):
            self.optimizer.step()
            self.bad_steps = 0
        else:
            self._skip(step)
        self._collect(result.reports)
        if (step + 1) % self.config.log_every == 0 or step + 1 == self.config.num_steps:
            self._log(step + 1, rate=rate, norm=norm.item())

    def validate(self, done: int) -> None:
        """Let rank 0 score the held-out rows while the others wait."""
        if self.metrics is not None:
            self.task.module.eval()
            with torch.no_grad():
                self.metrics.write({"step": done, **self.task.validate(done)})
        self._barrier()

    def save(self, done: int) -> None:
        """Write a checkpoint: every rank its random state, rank 0 the rest and, when all are there, the manifest."""
        root = self.output / CHECKPOINTS_NAME
        write_part(root, done, f"rank_{self.ranks.rank:04d}.pt", {"random_state": torch.get_rng_state()})
        if self.ranks.rank == 0:
            state = {
                "model": self.task.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": done,
                "skipped": self.skipped,
            }
            write_part(root, done, STATE_NAME, state)
        self._barrier()
        if self.ranks.rank == 0:
            publish(root, done, identity=self.identity, keep=self.config.keep_checkpoints)
        self._barrier()

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.load(STATE_NAME)
        try:
            self.task.module.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{checkpoint.folder} does not fit the model of this config: {error}") from error
        own_part = f"rank_{self.ranks.rank:04d}.pt"
        if (checkpoint.folder / own_part).exists():  # with more workers than before, the new ones start from the seed
            torch.set_rng_state(checkpoint.load(own_part)["random_state"])
        self.first_step, self.skipped = checkpoint.step, int(state["skipped"])
        logger.info("rank %d goes on from %s", self.ranks.rank, checkpoint.folder)

    def _skip(self, step: int) -> None:
        self.bad_steps += 1
        self.skipped += 1
        logger.warning("step %d: the gradient is not finite; the step is skipped", step)
        if self.bad_steps >= self.config.max_bad_steps:
            raise DivergedError(
                f"the loss was not finite for {self.bad_steps} steps up to step {step}; lower the learning rate "
                f"({self.config.optimizer.learning_rate}) or go on from an older checkpoint in {self.output}"
            )

    def _collect(self, reports: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        for name, (total, weight) in reports.items():
            pair = torch.stack([total.detach().double().cpu(), weight.detach().double().cpu()])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def _log(self, done: int, *, rate: float, norm: float) -> None:
        """Averages since the last line, over all workers."""
        names = sorted(self.sums)
        pairs = self._sum_over_ranks(torch.stack([self.sums[name] for name in names]))
        self.sums = {}
        if self.metrics is None:
            return
        averages = {name: (pair[0] / pair[1].clamp_min(1e-12)).item() for name, pair in zip(names, pairs, strict=True)}
        seconds = time.monotonic() - self.started
        per_second = (done - self.tokens_started) * self.config.global_batch_size / max(seconds, 1e-9)
        line = {"step": done, **averages, "learning_rate": rate, "gradient_norm": norm, "skipped_steps": self.skipped}
        self.metrics.write({**line, "rows_per_second": round(per_second, 2)})

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.ranks.world > 1:
            dist.all_reduce(values)
        return values

    def _barrier(self) -> None:
        if self.ranks.world > 1:
            dist.barrier()


class _MetricsFile:
    """`metrics.jsonl`: after a resume, lines behind the checkpoint are dropped, for they will be written again."""

    def __init__(self, path: Path, *, first_step: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _lines(path) if line["step"] <= first_step] if first_step else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, path)

    def write(self, line: Mapping[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(dict(line)) + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a line cut by a kill is left out."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text().splitlines():
        try:
            found.append(json.loads(text))
        except ValueError:
            logger.warning("%s: a cut line is left out", path)
    return found
