"""What Ray Train and the loop's bookkeeping cost: the step of the smoke run's GPT, with them and without.

Command: make verify NAME=loop_overhead [ARGS="--root runs/smoke --steps 150 --turns 3"]
*Bare* is the shortest loop that trains the same model on the same batches in this process: forward, backward, clipping,
Adam. *Ray Train* is the loop as `pretrain` runs it, with one worker, so that both have the same threads: it also sums
over workers, looks for faults and for a request to stop, logs, and writes a checkpoint and a score every 50 steps.
Both take turns; a step's time is from one forward pass to the next, without the steps of checkpoints and scores, which
are told by themselves. Compared are the medians of the steps within a turn, since a machine that others use too is
slower in one minute than in the next; the bar is on the median over the turns. Data wait is the share of the time in
which the loop waits for a batch; the bare loop makes each batch when it needs it.
Both compute on all cores but one, which is left to Ray's daemons, as a machine with GPUs has cores to spare. Told
beside is what they cost where there is none: an idle Ray takes some 7 % of a core, and whoever shares a step among all
cores waits for the slowest.
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
from cogview.training.loop import METRICS_NAME, LoopConfig, WeightedBatch
from cogview.training.metrics_file import read_metrics
from cogview.training.optimization import build_optimizer, clip_gradients, learning_rate_at
from cogview.training.ranks import Ranks
from pipelines.pretrain import PRESETS, build_task
from pipelines.runtime.cluster import ensure_ray, shutdown_ray, usable_cpus
from pipelines.runtime.display import PlainDisplay
from pipelines.runtime.jobs import Job, JobRun, run_job
from pipelines.runtime.workers import TrainingJob, train_on_ray
from pipelines.tasks.language_model import PRODUCERS, Inputs, LanguageModelTask
from pipelines.tasks.new_weights import TaskSettings

WARM_UP, EVERY = 10, 50
RATIO = "step, times the bare loop's"
TIMES_NAME = "times.json"
BARS = (
    Bar(figure=f"a core to spare/{RATIO}", op="<=", value=1.03),
    Bar(figure="a core to spare/data wait, share of the step", op="<", value=0.01),
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
    """threads: of torch; turn: makes each run another one."""

    tokens: Path = input_field()
    text_tokenizer: Path = input_field()
    image_tokenizer: Path = input_field()
    loop: LoopConfig
    threads: int
    turn: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the worker gets."""

    task: TaskSettings
    threads: int


def settings_of(config: Config, output: Path) -> TaskSettings:
    """What pretraining builds its task from."""
    inputs = Inputs(**{name: getattr(config, name) for name in PRODUCERS})
    return TaskSettings(config=replace(PRESETS["smoke"], loop=config.loop), output=output, inputs=inputs)


def build_timed(settings: Settings, ranks: Ranks) -> TimedTask:
    """Runs on the worker."""
    torch.set_num_threads(settings.threads)
    return TimedTask(build_task(settings.task, ranks), settings.task.output)


def train_timed(config: Config, run: JobRun) -> None:
    """The job: pretraining on Ray with one worker."""
    job = TrainingJob(
        build=build_timed,
        config=Settings(task=settings_of(config, run.output), threads=config.threads),
        loop=config.loop,
        identity={"digest": run.digest},
        output=run.output,
        num_workers=1,
    )
    train_on_ray(job, run=run)


JOB = Job(name="loop_overhead", version=1, products=(TIMES_NAME,), main=train_timed)


def measure(*, root: Path, steps: int, turns: int) -> Figures:
    """Both ways in turn, with a core to spare and without."""
    folders = folders_by_field(root, PRODUCERS)
    loop = replace(
        PRESETS["smoke"].loop, num_steps=steps, validate_every=EVERY, checkpoint_every=EVERY, keep_checkpoints=1
    )
    cores = usable_cpus()
    figures: dict[str, float | int | str] = {"steps of a turn": steps, "turns": turns}
    ensure_ray()
    with tempfile.TemporaryDirectory(prefix="cogview-loop-") as name:
        for words, threads in {"a core to spare": max(1, cores - 1), "no core to spare": cores}.items():
            found: dict[str, list[float]] = defaultdict(list)
            for turn in range(turns):
                config = Config(**folders, loop=loop, threads=threads, turn=turn)
                for figure, value in one_turn(config, Path(name)).items():
                    found[figure].append(value)
                say(f"{words}, turn {turn + 1}: {found[RATIO][-1]:.4f}")
            figures[f"{words}/threads"] = threads
            figures |= {f"{words}/{figure}": statistics.median(values) for figure, values in found.items()}
            figures |= {f"{words}/turn {number}, {RATIO}": value for number, value in enumerate(found[RATIO], start=1)}
    shutdown_ray()
    return figures


def one_turn(config: Config, folder: Path) -> dict[str, float]:
    """The bare loop, then Ray Train."""
    bare = statistics.median(step_seconds(bare_times(config, folder)))
    done = run_job(JOB, config, root=folder / "runs", display=PlainDisplay([], stream=sys.stderr))
    times = json.loads((done.output / TIMES_NAME).read_text())
    ray = statistics.median(step_seconds(times))
    lines = read_metrics(done.output / METRICS_NAME)
    return {
        RATIO: ray / bare,
        "data wait, share of the step": statistics.median(line["data_wait"] for line in lines if "data_wait" in line),
        "bare, seconds": bare,
        "Ray Train, seconds": ray,
        # What comes between these two steps besides the step.
        "checkpoint, seconds": statistics.median(
            times[step] - times[step - 1] - ray for step in range(EVERY, len(times), EVERY)
        ),
    }


def bare_times(config: Config, output: Path) -> list[float]:
    """Train with nothing but what trains."""
    torch.set_num_threads(config.threads)
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
    parser.add_argument("--turns", type=int, default=3, help="turns of both ways (default: 3)")
    flags = parser.parse_args()
    return verify(
        "loop_overhead",
        lambda: measure(root=flags.root, steps=flags.steps, turns=flags.turns),
        bars=BARS,
        save=flags.save,
    )


if __name__ == "__main__":
    sys.exit(main())
