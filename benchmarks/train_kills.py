"""Training that is killed again and again: rank 0, another rank, Ray's controller, the driver, the raylet.

Command: make verify NAME=train_kills [ARGS="--kills 20 --steps 200"]     (about half an hour)
A small GPT is trained on Ray with two workers, once undisturbed and once with kill -9 at random moments of the parts in
turn, by DDP and by FSDP2. When the driver is gone, or ends because its Ray is, the same command is given again, as a
person would. Every worker notes the loss of each step to the bit, also of those that it does again; all must be those
of the undisturbed run. Reported are the steps that were done again and the time until the next new step.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from benchmarks.counting import Counting
from benchmarks.harness import REPOSITORY, Bar, Figures, UnmeasuredError, argument_parser, say, verify
from benchmarks.processes import ProcessWatch
from cogview.models.gpt import GPT, GPTConfig
from cogview.training.language_model import LanguageModelLoss
from cogview.training.loop import LoopConfig, Sharding, StepLoss, WeightedBatch
from cogview.training.ranks import Ranks
from pipelines.runtime.display import PlainDisplay
from pipelines.runtime.jobs import Job, JobRun, run_job
from pipelines.runtime.workers import TrainingJob, train_on_ray

MODEL = GPTConfig(vocab_size=200, max_positions=32, num_layers=2, hidden_size=32, num_heads=2, dropout=0.1)
ROWS, WORKERS, EVERY = 4, 2, 10
STEP_S = 0.15  # at least; workers whose raylet is dead go on for some seconds, and are not to reach the end
PATIENCE_S = 240.0
KINDS = ("rank 0", "rank 1", "controller", "driver", "raylet")
BARS = (
    Bar(figure="losses that differ", op="==", value=0),
    Bar(figure="steps without a loss", op="==", value=0),
    Bar(figure="most steps done again after a kill", op="<=", value=EVERY),
    Bar(figure="kills", op=">=", value=20),
)


class Note(NamedTuple):
    """A step of a worker, its loss to the bit, and the worker's process."""

    step: int
    loss: str
    process: int


class Noted(LanguageModelLoss):
    """The loss, noted to the bit by each worker for each of its steps."""

    def __init__(self, model: GPT) -> None:
        super().__init__(model)
        self.step = -1
        self.path = Path()

    def forward(self, *inputs: torch.Tensor, **named: torch.Tensor) -> StepLoss:  # type: ignore[override]
        """As ever."""
        loss = super().forward(*inputs, **named)
        if self.training:
            with open(self.path, "a") as file:
                note = {"step": self.step, "loss": float(loss.loss_sum).hex(), "process": os.getpid()}
                file.write(f"\n{json.dumps(note)}")  # on a line of its own, whatever a kill has cut before
        return loss


class NotingTask(Counting):
    """Counting that takes its time."""

    def __init__(self, output: Path, ranks: Ranks) -> None:
        super().__init__(MODEL, rows=ROWS)
        self.noted = Noted(self.gpt)
        self.noted.path = notes_of(output, ranks.rank)
        self.module = self.noted
        (output / f"rank_{ranks.rank}.pid").write_text(str(os.getpid()))

    def batch(self, step: int, ranks: Ranks) -> WeightedBatch:
        """This worker's rows of a step."""
        time.sleep(STEP_S)
        self.noted.step = step
        return super().batch(step, ranks)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The training."""

    loop: LoopConfig


def build(output: Path, ranks: Ranks) -> NotingTask:
    """Runs on each worker."""
    return NotingTask(output, ranks)


def train_noted(config: Config, run: JobRun) -> None:
    """The job."""
    job = TrainingJob(
        build=build,
        config=run.output,
        loop=config.loop,
        identity={"digest": run.digest},
        output=run.output,
        num_workers=WORKERS,
    )
    train_on_ray(job, run=run)


JOB = Job(name="train_kills", version=1, products=("metrics.jsonl",), main=train_noted)


def drive(root: Path, *, steps: int, sharding: Sharding) -> None:
    """What the driver's process does."""
    loop = LoopConfig(
        num_steps=steps,
        global_batch_size=ROWS,
        sharding=sharding,
        log_every=1,
        checkpoint_every=EVERY,
        seed=5,
        prefetching="off",  # the task notes the step of its last batch
    )
    run_job(JOB, Config(loop=loop), root=root, display=PlainDisplay([], stream=sys.stderr))


def measure(*, kills: int, steps: int, seed: int) -> Figures:
    """Both ways to share the weights, undisturbed and killed."""
    chaos = Chaos(random.Random(seed))
    figures: dict[str, float | int | str] = {}
    shardings: tuple[Sharding, ...] = ("none", "full")
    differing = missing = 0
    for number, sharding in enumerate(shardings):
        with tempfile.TemporaryDirectory(prefix="cogview-train-kills-") as name:
            whole, hurt = Path(name) / "whole", Path(name) / "hurt"
            chaos.run(whole, steps=steps, sharding=sharding, kills=0)
            share = kills // len(shardings) + (number < kills % len(shardings))
            chaos.run(hurt, steps=steps, sharding=sharding, kills=share)
            for rank in range(WORKERS):
                wanted, found = read_notes(whole, rank), read_notes(hurt, rank)
                expected = {note.step: note.loss for note in wanted}
                differing += sum(expected[note.step] != note.loss for note in found)
                missing += len(expected.keys() - {note.step for note in found}) + steps - len(expected)
                figures[f"{sharding}/rank {rank}/losses compared"] = len(found)
    recoveries = sorted(chaos.recoveries)
    return {
        "losses that differ": differing,
        "steps without a loss": missing,
        "most steps done again after a kill": max(chaos.repeated, default=0),
        "kills": chaos.kills.total(),
        **{f"kills/{kind}": chaos.kills[kind] for kind in KINDS},
        "commands given again": chaos.restarts,
        "seconds to a new step/median": statistics.median(recoveries) if recoveries else 0.0,
        "seconds to a new step/p95": recoveries[int(0.95 * (len(recoveries) - 1))] if recoveries else 0.0,
        **figures,
    }


class Chaos:
    """Runs trainings, and kills parts of them. repeated: steps done again after each kill; recoveries: seconds."""

    def __init__(self, generator: random.Random) -> None:
        self.generator = generator
        self.kills: Counter[str] = Counter()
        self.repeated: list[int] = []
        self.recoveries: list[float] = []
        self.restarts = 0

    def run(self, root: Path, *, steps: int, sharding: Sharding, kills: int) -> None:
        """Bring a training to its end, with so many kills spread over it."""
        moments = sorted(self.generator.sample(range(2, steps - 5), kills))
        kinds = [KINDS[number % len(KINDS)] for number in range(kills)]
        watch = ProcessWatch(dict(os.environ))
        command = [sys.executable, "-m", "benchmarks.train_kills", "--drive", str(root)]
        command += ["--steps", str(steps), "--sharding", sharding]
        driver = start(command, watch, root)
        try:
            for moment, kind in zip(moments, kinds, strict=True):
                reached = partial(has_reached, root, moment)
                driver = self._wait_for(reached, driver, command, watch, root)
                if driver.poll() is not None:
                    break
                known = {note.process for note in read_notes(root, 0)}
                if not self._kill(kind, driver, watch, root):
                    continue
                started = time.monotonic()
                self.kills[kind] += 1
                driver = self._wait_for(partial(has_moved_on, root, known), driver, command, watch, root)
                old, new = steps_by(root, known)
                if new:
                    self.recoveries.append(time.monotonic() - started)
                    self.repeated.append(max(old) + 1 - new[0])
                    say(
                        f"{sharding}: {kind} killed, step {max(old)} was the last; on after {self.recoveries[-1]:.0f} s"
                    )
            while self._end_of(driver):
                driver = self._again(driver, command, watch, root)
        finally:
            watch.end_all()

    def _wait_for(
        self,
        is_there: Callable[[], bool],
        driver: subprocess.Popen[bytes],
        command: list[str],
        watch: ProcessWatch,
        root: Path,
    ) -> subprocess.Popen[bytes]:
        """Wait until the training has come so far; start it again whenever its driver has failed."""
        deadline = time.monotonic() + PATIENCE_S
        while not is_there():
            if driver.poll() not in (None, 0) or time.monotonic() > deadline:
                driver = self._again(driver, command, watch, root)
                deadline = time.monotonic() + PATIENCE_S
            if driver.poll() == 0:
                break
            time.sleep(0.02)
        return driver

    def _again(
        self, driver: subprocess.Popen[bytes], command: list[str], watch: ProcessWatch, root: Path
    ) -> subprocess.Popen[bytes]:
        """Give the command again; what the last one left is ended first."""
        self.restarts += 1
        if self.restarts > 100:
            raise UnmeasuredError(f"the training does not come to its end: {log_of(root).read_text()[-2000:]}")
        watch.end_all()
        driver.wait()
        return start(command, watch, root)

    def _end_of(self, driver: subprocess.Popen[bytes]) -> bool:
        """Wait for the driver; whether it failed."""
        try:
            return driver.wait(timeout=PATIENCE_S) != 0
        except subprocess.TimeoutExpired:
            return True

    def _kill(self, kind: str, driver: subprocess.Popen[bytes], watch: ProcessWatch, root: Path) -> bool:
        """Kill one part; False if there is none just now."""
        if kind == "driver":
            driver.kill()
            return True
        for process in watch.running():
            with suppress(psutil.Error):
                if is_part(process, kind, root):
                    process.kill()
                    return True
        return False


def is_part(process: psutil.Process, kind: str, root: Path) -> bool:
    """Whether a process is this part of the training."""
    title = " ".join(process.cmdline())
    if kind == "controller":
        return title.startswith("ray::TrainController")
    if kind == "raylet":
        return bool(process.name() == "raylet")
    (path,) = list(root.glob(f"train_kills/*/rank_{kind.removeprefix('rank ')}.pid")) or [Path(os.devnull)]
    return path.read_text() == str(process.pid)


def start(command: list[str], watch: ProcessWatch, root: Path) -> subprocess.Popen[bytes]:
    """The driver, in a session of its own."""
    root.mkdir(parents=True, exist_ok=True)
    with open(log_of(root), "ab") as log:
        return subprocess.Popen(
            command, cwd=REPOSITORY, env=watch.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )


def log_of(root: Path) -> Path:
    """Where the driver writes."""
    return root.with_suffix(".log")


def notes_of(output: Path, rank: int) -> Path:
    """Where a worker notes its losses."""
    return output / f"losses_{rank}.jsonl"


def read_notes(root: Path, rank: int) -> list[Note]:
    """A worker's notes in their order; a line that a kill has cut is left out."""
    found = []
    for path in root.glob(f"train_kills/*/losses_{rank}.jsonl"):
        for line in path.read_text().splitlines():
            with suppress(ValueError, KeyError, TypeError):
                note: dict[str, Any] = json.loads(line)
                found.append(Note(int(note["step"]), str(note["loss"]), int(note["process"])))
    return found


def has_reached(root: Path, step: int) -> bool:
    """Whether rank 0 has noted a step."""
    return any(note.step >= step for note in read_notes(root, 0))


def steps_by(root: Path, known: Collection[int]) -> tuple[list[int], list[int]]:
    """The steps that these processes of rank 0 have noted, which may live on for a moment, and those of later ones."""
    notes = read_notes(root, 0)
    old = [note.step for note in notes if note.process in known]
    return old, [note.step for note in notes if note.process not in known]


def has_moved_on(root: Path, known: Collection[int]) -> bool:
    """Whether a later process has done a step that none of these had done."""
    old, new = steps_by(root, known)
    return bool(new) and max(new) > max(old)


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--kills", type=int, default=20, help="how many, DDP and FSDP2 together (default: 20)")
    parser.add_argument("--steps", type=int, default=200, help="of each training (default: 200)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: 1)")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sharding", default="none", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.drive:
        drive(flags.drive, steps=flags.steps, sharding=flags.sharding)
        return 0
    return verify(
        "train_kills",
        lambda: measure(kills=flags.kills, steps=flags.steps, seed=flags.seed),
        bars=BARS,
        save=flags.save,
    )


if __name__ == "__main__":
    sys.exit(main())
