"""The one training loop: a task's batches in, checkpoints and step metrics out; resume is exact.

The loop knows nothing of what is trained. A `Task` gives it a module whose forward returns a loss sum and what to
report, and batches addressed by step: batch = f(step, rank, number of ranks). So a resumed run needs the weights, the
optimizer, the random state of each rank and a few numbers. Losses are sums divided by the weight of the *global* batch,
so that the number of workers does not change what is minimised.

A step whose loss or gradient is not finite on any worker is skipped by all of them. It uses up its batch and counts
towards `num_steps`, so that the data position stays the step's number, but neither the optimizer nor the learning rate
advances: a run with k skipped steps ends k steps before the end of its schedule.

A worker whose rows do not fit into its memory takes them `micro_batch_size` at a time and adds up the gradients. A run
is asked to stop by a file named `stop` in its output: all workers finish the step, write a checkpoint and return.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cogview.config import require_positive
from cogview.errors import ConfigError, DivergedError
from cogview.training.averaging import AveragedWeights
from cogview.training.loss_scale import LossScale, LossScaleConfig
from cogview.training.metrics_file import MetricsFile
from cogview.training.optimization import OptimizerConfig, learning_rate_at
from cogview.training.precision import MasterWeights, Precision, check_precision, reduce_in_fp32
from cogview.training.prefetching import Batches
from cogview.training.ranks import Ranks
from cogview.training.saving import Saver
from cogview.training.speed import Speed

if TYPE_CHECKING:
    from cogview.training.sharding import ShardedWeights

logger = logging.getLogger(__name__)
METRICS_NAME = "metrics.jsonl"
CHECKPOINTS_NAME = "checkpoints"
STOP_NAME = "stop"
Sharding = Literal["none", "full"]
Prefetching = Literal["auto", "on", "off"]
# Batches on a CPU: after a step its cache holds nothing of the code that makes one, which then takes thrice as long.
AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """num_steps optimizer steps of global_batch_size rows each; the other fields say how often what happens.

    micro_batch_size: rows that a worker takes through the model at once, 0 for all of its share of the global batch.
    sharding: "none", every worker holds the whole model (DDP); "full", its share of it (FSDP2, GPTs only).
    precision: of parameters, activations and gradients; the optimizer's weights are fp32 always. loss_scale: of fp16.
    ema_decay: above 0, the average of the weights with this decay is what is validated and published.
    max_bad_steps: skipped steps in a row before DivergedError, but for those that only lower the loss scale;
    keep_checkpoints: how many of the newest stay. is_checkpoint_async: checkpoints are written while training goes on,
    from a copy in the CPU's memory; whoever is killed meanwhile goes on from the one before. prefetching: "on", a batch
    is made in a thread while the step before is computed, for tasks whose batch depends on the step alone; "auto", the
    same on a GPU, and several batches at once on a CPU, which has no core to spare.
    """

    num_steps: int
    global_batch_size: int
    micro_batch_size: int = field(default=0, metadata={"role": "runtime"})
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sharding: Sharding = field(default="none", metadata={"role": "runtime"})
    seed: int = 1
    precision: Precision = "fp32"
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    ema_decay: float = 0.0
    log_every: int = field(default=20, metadata={"role": "runtime"})
    validate_every: int = field(default=500, metadata={"role": "runtime"})
    checkpoint_every: int = field(default=500, metadata={"role": "runtime"})
    keep_checkpoints: int = field(default=3, metadata={"role": "runtime"})
    is_checkpoint_async: bool = field(default=False, metadata={"role": "runtime"})
    prefetching: Prefetching = field(default="auto", metadata={"role": "runtime"})
    max_bad_steps: int = 20

    def __post_init__(self) -> None:
        require_positive(self, "num_steps", "global_batch_size", "log_every", "validate_every", "checkpoint_every")
        check_precision(self.precision)
        if self.micro_batch_size < 0:
            raise ConfigError(f"micro_batch_size={self.micro_batch_size}: choose 1 or more, or 0 for all rows at once")
        if self.sharding not in get_args(Sharding):
            raise ConfigError(f"sharding={self.sharding!r}: choose {', '.join(get_args(Sharding))}")
        if self.prefetching not in get_args(Prefetching):
            raise ConfigError(f"prefetching={self.prefetching!r}: choose {', '.join(get_args(Prefetching))}")
        if self.sharding != "none" and self.ema_decay:
            raise ConfigError(f"ema_decay={self.ema_decay}: an average of sharded weights is not kept; choose 0")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay={self.ema_decay}: choose 0 for none, or a number below 1 such as 0.999")


@dataclass(frozen=True)
class StepLoss:
    """What a forward returns. `loss_sum`: to be divided by the global weight; `reports`: name -> (sum, weight)."""

    loss_sum: Tensor
    reports: Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class WeightedBatch:
    """A worker's share of a step's batch, and its weight in the loss (rows, or the sum of loss weights).

    operations: floating-point ones of its forward and backward pass, 0 where nobody has counted them.
    """

    tensors: Mapping[str, Tensor]
    weight: float
    operations: float = 0.0

    def pieces(self, size: int) -> list[dict[str, Tensor]]:
        """The tensors, `size` rows at a time; 0 for all at once."""
        split = {name: torch.split(tensor, size or len(tensor)) for name, tensor in self.tensors.items()}
        return [dict(zip(split, piece, strict=True)) for piece in zip(*split.values(), strict=True)]


class Task(Protocol):
    """What is trained. `module(**batch.tensors)` returns a StepLoss."""

    module: nn.Module

    def batch(self, step: int, ranks: Ranks) -> WeightedBatch: ...

    def validate(self, step: int) -> Mapping[str, float]: ...

    def publish(self, output: Path) -> None: ...


def train(task: Task, *, config: LoopConfig, output: Path, identity: Mapping[str, Any], ranks: Ranks) -> bool:
    """Train to `num_steps`, from the newest verified checkpoint in `output` if there is one, then publish the weights.

    Returns False where it was asked to stop before. Writes `checkpoints/`, `metrics.jsonl` (rank 0: one line for each
    logged step) and what `task.publish` writes. identity: what a checkpoint must agree with. Raises DivergedError,
    CheckpointError, StorageError.
    """
    loop = _Loop(task, config=config, output=output, identity=identity, ranks=ranks)
    with loop.saver, loop.batches:
        for step in range(loop.first_step, config.num_steps):
            is_stopped = loop.step(step)
            done = step + 1
            if is_stopped and done < config.num_steps:
                loop.save(done)
                return False
            if done % config.validate_every == 0 or done == config.num_steps:
                loop.validate(done)
            if done % config.checkpoint_every == 0 or done == config.num_steps:
                loop.save(done)
    loop.publish()
    return True


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
        torch.manual_seed(config.seed * 1000 + ranks.rank)
        task.module.to(ranks.device)
        self.weights = self._spread_weights()
        self.loss_scale = LossScale(config.loss_scale) if config.precision == "fp16" else None
        is_averaging = config.ema_decay > 0 and ranks.rank == 0  # the one that validates and publishes
        self.average = AveragedWeights(self.weights.named(), decay=config.ema_decay) if is_averaging else None
        self.model = self._shared_model()
        optional = {"loss_scale": self.loss_scale, "average": self.average}
        self.saver = Saver(
            output / CHECKPOINTS_NAME,
            weights=self.weights,
            parts={name: part for name, part in optional.items() if part is not None},
            ranks=ranks,
            identity=identity,
            keep=config.keep_checkpoints,
            is_async=config.is_checkpoint_async,
        )
        self.first_step, counts = self.saver.restore()
        self.skipped, self.bad_steps = counts.get("skipped", 0), counts.get("bad_steps", 0)
        self.metrics = MetricsFile(output / METRICS_NAME, first_step=self.first_step) if ranks.rank == 0 else None
        is_on_cpu = torch.device(ranks.device).type == "cpu"
        self.batches = Batches(
            lambda step: task.batch(step, ranks),
            end=config.num_steps,
            is_ahead=config.prefetching == "on" or (config.prefetching == "auto" and not is_on_cpu),
            at_once=AT_ONCE if config.prefetching == "auto" and is_on_cpu else 1,
        )
        self.sums: dict[str, Tensor] = {}
        self.speed = Speed(first_step=self.first_step, device=ranks.device, precision=config.precision)

    def step(self, step: int) -> bool:
        """One step; a loss or gradient that is not finite on any worker makes all of them skip it.

        Returns whether any worker was asked to stop.
        """
        rate = learning_rate_at(step - self.skipped, num_steps=self.config.num_steps, config=self.config.optimizer)
        scale = self.loss_scale.value if self.loss_scale else 1.0
        self.saver.check()
        with self.speed.waiting():
            batch = self.batches.take(step)
        self.speed.add(batch.operations)
        weight = self._sum_over_ranks(torch.tensor(batch.weight, dtype=torch.float64)).item()
        self.task.module.train()
        self.weights.zero_gradients()
        # DDP averages gradients over workers, the loss is a sum over all of them: hence the factor `world`.
        loss_sum = self._add_gradients(batch, factor=self.ranks.world / weight * scale)
        self.weights.take_gradients(loss_scale=scale)
        norm = self.weights.clip_gradients(self.config.optimizer.clip_norm)
        # Counted over the workers, so that all of them decide alike.
        not_finite = ~torch.isfinite(torch.stack([loss_sum, norm]))
        has_word = self.ranks.rank == 0 and (self.output / STOP_NAME).exists()
        is_asked = torch.tensor([has_word], device=not_finite.device)
        bad_losses, bad_norms, stops = self._sum_over_ranks(torch.cat([not_finite, is_asked]).double()).tolist()
        if bad_losses or bad_norms:
            self._skip(step, is_overflow=not bad_losses)
        else:
            self._advance(rate)
        if (step + 1) % self.config.log_every == 0 or step + 1 == self.config.num_steps:
            self._log(step + 1, rate=rate, norm=norm.item())
        return bool(stops)

    def validate(self, done: int) -> None:
        """Let rank 0 score the held-out rows while the others wait, or, with a share of the weights each, help."""
        if self.metrics is not None or not isinstance(self.weights, MasterWeights):
            self.task.module.eval()
            with torch.no_grad(), self._averaged():
                scores = self.task.validate(done)
            if self.metrics is not None:
                self.metrics.write({"step": done, **scores})
        if not isinstance(self.weights, MasterWeights):
            self.weights.gather_no_more()
        self.ranks.wait_for_all()

    def publish(self) -> None:
        """Let rank 0 publish the weights in fp32."""
        if self.ranks.rank == 0 or not isinstance(self.weights, MasterWeights):
            self.weights.restore_fp32()
        if self.ranks.rank == 0:
            with self._averaged():
                self.task.publish(self.output)

    def save(self, done: int) -> None:
        """Write a checkpoint, or begin to."""
        self.saver.save(done, counts={"skipped": self.skipped, "bad_steps": self.bad_steps})

    def _spread_weights(self) -> "MasterWeights | ShardedWeights":
        module, optimizer, precision = self.task.module, self.config.optimizer, self.config.precision
        if self.config.sharding == "none":
            return MasterWeights(module, config=optimizer, precision=precision)
        from cogview.training.sharding import ShardedWeights  # takes half as long to import as torch itself

        return ShardedWeights(module, config=optimizer, precision=precision, device=self.ranks.device)

    def _add_gradients(self, batch: WeightedBatch, *, factor: float) -> Tensor:
        """Forward and backward of the losses' sum times `factor`, some rows at a time. Returns the sum itself."""
        total = torch.zeros((), device=self.ranks.device)
        pieces = batch.pieces(self.config.micro_batch_size)
        for number, tensors in enumerate(pieces, start=1):
            with self._without_exchange() if number < len(pieces) else nullcontext():
                result: StepLoss = self.model(**{name: tensor.to(total.device) for name, tensor in tensors.items()})
                (result.loss_sum * factor).backward()  # type: ignore[no-untyped-call]
            total += result.loss_sum.detach().float()
            self._collect(result.reports)
        return total

    def _without_exchange(self) -> AbstractContextManager[None]:
        """Gradients stay on this worker while the body runs."""
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()  # type: ignore[no-any-return]
        return nullcontext()

    def _shared_model(self) -> nn.Module:
        """The module as all workers train it: their gradients are averaged, in fp32."""
        if self.ranks.world == 1 or not isinstance(self.weights, MasterWeights):
            return self.task.module
        model = DistributedDataParallel(self.task.module, broadcast_buffers=False, gradient_as_bucket_view=True)
        if self.config.precision != "fp32":
            model.register_comm_hook(None, reduce_in_fp32)
        return model

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Let the module compute with the averaged weights, if there are any."""
        if self.average is None:
            yield
        else:
            with self.average.in_place_of(self.task.module):
                yield

    def _advance(self, rate: float) -> None:
        self.bad_steps = 0
        self.weights.step(learning_rate=rate)
        if self.loss_scale is not None:
            self.loss_scale.succeeded()
        if self.average is not None:
            self.average.update(self.weights.named())

    def _skip(self, step: int, *, is_overflow: bool) -> None:
        """Count a step without an update; while the loss scale can fall, a gradient beyond fp16 only makes it fall."""
        self.skipped += 1
        if is_overflow and self.loss_scale is not None and self.loss_scale.can_fall:
            self.loss_scale.overflowed()
            logger.info("step %d: a gradient beyond fp16; skipped, loss scale %g", step, self.loss_scale.value)
            return
        self.bad_steps += 1
        logger.warning("step %d: the loss or its gradient is not finite; the step is skipped", step)
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
        # What no batch had, such as image tokens that count, has no average.
        averages = {name: (pair[0] / pair[1]).item() for name, pair in zip(names, pairs, strict=True) if pair[1] > 0}
        rows, tokens_per_row = self.config.global_batch_size, averages.get("tokens_per_row")
        speed = self.speed.read(done, global_batch_size=rows, tokens_per_row=tokens_per_row)
        line = {"step": done, **averages, "learning_rate": rate, "gradient_norm": norm, "skipped_steps": self.skipped}
        if self.loss_scale is not None:
            line["loss_scale"] = self.loss_scale.value
        self.metrics.write({**line, **speed})

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum on every worker; a lone worker's own values."""
        if self.ranks.world > 1:
            values = values.to(self.ranks.device)
            dist.all_reduce(values)
        return values
