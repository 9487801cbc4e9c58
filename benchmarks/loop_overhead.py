"""What Ray Train and the loop's bookkeeping cost: the step of the smoke run's GPT, with them and without.

Command: make verify NAME=loop_overhead [ARGS="--root runs/smoke --steps 150 --turns 5"]
*Bare* is the shortest loop that trains the same model on the same batches in this process: forward, backward, clipping,
Adam. *The loop* is that of every training, in this process too: it also sums over workers, looks for faults and for a
request to stop, logs, and writes a checkpoint and a score every 50 steps. *Ray Train* is the same loop as `pretrain`
runs it, with one worker, so that all three have the same threads. They take turns; a step's time is from one forward
pass to the next, without the steps of checkpoints and scores, which are told by themselves. Compared are the medians of
the steps within a turn, since a machine that others use too is slower in one minute than in the next; the bar is on the
median over the turns. Data wait is the share of the time in which the loop waits for a batch; the bare loop makes each
batch when it needs it.
"""

import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.chains import add_root, folders_by_field
from benchmarks.harness import Bar, Figures, argument_parser, say, verify
from cogview.config import input_field
from cogview.training.language_model import LanguageModelLoss
from cogview.training.loop import METRICS_NAME, LoopConfig, WeightedBatch, train
from cogview.training.metrics_file import read_metrics
from cogview.training.optimization import build_optimizer, clip_gradients, learning_rate_at
from cogview.training.ranks import Ranks
from pipelines.pretrain import PRESETS, build_task
from pipelines.runtime.cluster import ensure_ray, shutdown_ray
from pipelines.runtime.display import PlainDisplay
from pipelines.runtime.jobs import Job, JobRun, run_job
from pipelines.runtime.workers import TrainingJob, train_on_ray
from pipelines.tasks.language_model import PRODUCERS, Inputs, LanguageModelTask
from pipelines.tasks.new_weights import TaskSettings

WARM_UP, EVERY = 10, 50
THREADS = 2
TIMES_NAME = "times.json"
BARS = (
    Bar(figure="Ray Train/times the bare loop's step", op="<=", value=1.03),
    Bar(figure="Ray Train/data wait, share of the step", op="<", value=0.01),
)


class TimedTask:
    """The task of pretraining, which notes when the forward pass of each step begins."""

    def __init__(self, task: LanguageModelTask, output: Path) -> None:
        self.task, self.module, self.output = task, task.module, output
        self.times: list[float] = []
        self.module.register_forward_pre_hook(lambda module, inputs: self.times.append(time.perf_counter()))

    def batch(self, step: int, ranks: Ranks) -> WeightedBatch:
        """The rows of a step."""
        return self.task.batch(step, ranks)

    def validate(self, step: int) -> dict[str, float]:
        """Scores are another matter."""
        return {}

    def publish(self, output: Path) -> None:
        """The times instead of the weights."""
        (output / TIMES_NAME).write_text(json.dumps(self.times))


@dataclass(frozen=True, kw_only=True)
class Config:
    """turn: makes each run another one."""

    tokens: Path = input_field()
    text_tokenizer: Path = input_field()
    image_tokenizer: Path = input_field()
    loop: LoopConfig
    turn: int


def settings_of(config: Config, output: Path) -> TaskSettings:
    """What pretraining builds its task from."""
    inputs = Inputs(**{name: getattr(config, name) for name in PRODUCERS})
    return TaskSettings(config=replace(PRESETS["smoke"], loop=config.loop), output=output, inputs=inputs)


def build_timed(settings: TaskSettings, ranks: Ranks) -> TimedTask:
    """Runs on the worker."""
    torch.set_num_threads(THREADS)
    return TimedTask(build_task(settings, ranks), settings.output)


def train_timed(config: Config, run: JobRun) -> None:
    """The job: pretraining on Ray with one worker."""
    job = TrainingJob(
        build=build_timed,
        config=settings_of(config, run.output),
        loop=config.loop,
        identity={"digest": run.digest},
        output=run.output,
        num_workers=1,
    )
    train_on_ray(job, run=run)


JOB = Job(name="loop_overhead", version=1, products=(TIMES_NAME,), main=train_timed)


def measure(*, root: Path, steps: int, turns: int) -> Figures:
    """All three in turn."""
    folders = folders_by_field(root, PRODUCERS)
    loop = replace(
        PRESETS["smoke"].loop, num_steps=steps, validate_every=EVERY, checkpoint_every=EVERY, keep_checkpoints=1
    )
    found: dict[str, list[float]] = defaultdict(list)
    ensure_ray()
    with tempfile.TemporaryDirectory(prefix="cogview-loop-") as name:
        for turn in range(turns):
            one = one_turn(Config(**folders, loop=loop, turn=turn), Path(name) / str(turn))
            for figure, value in one.items():
                found[figure].append(value)
            say(f"turn {turn + 1}: " + ", ".join(f"{figure} {value:.4g}" for figure, value in one.items()))
    shutdown_ray()
    return {
        **{figure: statistics.median(values) for figure, values in found.items()},
        **{
            f"turn {number}/{who}, times the bare loop's step": found[f"{who}/times the bare loop's step"][number - 1]
            for number in range(1, turns + 1)
            for who in ("the loop", "Ray Train")
        },
        "steps of a turn": steps,
    }


def one_turn(config: Config, folder: Path) -> dict[str, float]:
    """The three of them, one after another."""
    bare = statistics.median(step_seconds(bare_times(config, folder)))
    alone = statistics.median(step_seconds(loop_times(config, folder)))
    done = run_job(JOB, config, root=folder / "runs", display=PlainDisplay([], stream=sys.stderr))
    times = json.loads((done.output / TIMES_NAME).read_text())
    ray = statistics.median(step_seconds(times))
    lines = read_metrics(done.output / METRICS_NAME)
    return {
        "Ray Train/times the bare loop's step": ray / bare,
        "Ray Train/data wait, share of the step": statistics.median(
            line["data_wait"] for line in lines if "data_wait" in line
        ),
        "the loop/times the bare loop's step": alone / bare,
        "bare/seconds a step": bare,
        # What comes between these two steps besides the step.
        "Ray Train/seconds a checkpoint": statistics.median(
            times[step] - times[step - 1] - ray for step in range(EVERY, len(times), EVERY)
        ),
    }


def loop_times(config: Config, output: Path) -> list[float]:
    """Train with the loop, without Ray."""
    task = TimedTask(build_task(settings_of(config, output), Ranks()), output)
    train(task, config=config.loop, output=output, identity={}, ranks=Ranks())
    return task.times


def bare_times(config: Config, output: Path) -> list[float]:
    """Train with nothing but what trains."""
    torch.set_num_threads(THREADS)
    task = TimedTask(build_task(settings_of(config, output), Ranks()), output)
    module, loop = task.module, config.loop
    assert isinstance(module, LanguageModelLoss)
    module.train()
    optimizer = build_optimizer(module, loop.optimizer)
    for step in range(loop.num_steps):
        batch = task.batch(step, Ranks())
        optimizer.zero_grad(set_to_none=True)
        loss = module(**batch.tensors).loss_sum / batch.weight
        loss.backward()
        clip_gradients(module, norm=loop.optimizer.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, num_steps=loop.num_steps, config=loop.optimizer)
        optimizer.step()
    return task.times


def step_seconds(times: list[float]) -> list[float]:
    """From one step to the next, without the first ones and those behind which a checkpoint is written."""
    return [times[step + 1] - times[step] for step in range(WARM_UP, len(times) - 1) if (step + 1) % EVERY]


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    add_root(parser)
    parser.add_argument("--steps", type=int, default=150, help="steps of each turn (default: 150)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each way (default: 5)")
    flags = parser.parse_args()
    return verify(
        "loop_overhead",
        lambda: measure(root=flags.root, steps=flags.steps, turns=flags.turns),
        bars=BARS,
        save=flags.save,
    )


if __name__ == "__main__":
    sys.exit(main())
