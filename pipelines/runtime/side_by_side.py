"""Trainings that are compared with each other, as many at a time as there is room for: each is one Ray task.

In: a training job for each part, of one worker, and the part's own run. Out: what each of them logged last, and what
they write. Every task runs the loop of `cogview.training.loop`, so that a comparison that was interrupted goes on from
the checkpoints of its parts, and a worker that dies is started again by Ray.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from cogview.training.loop import METRICS_NAME, train
from cogview.training.ranks import Ranks
from pipelines.runtime.cluster import ensure_ray, usable_cpus
from pipelines.runtime.failures import find_cause
from pipelines.runtime.jobs import JobRun
from pipelines.runtime.workers import MAX_FAILURES, TrainingJob, following, has_gpus


@dataclass(frozen=True, kw_only=True)
class Part:
    """A training with one worker, and the run that it reports to (see `pipelines.runtime.nested`)."""

    training: TrainingJob
    run: JobRun


def train_side_by_side(parts: Mapping[str, Part], *, run: JobRun, threads: int = 1) -> dict[str, dict[str, float]]:
    """Train every part to its end; returns part -> the last logged values.

    A part gets a GPU of its own where the cluster has any, else `threads` CPUs; those for which there is no room wait.
    run: of the whole comparison, which shows the steps of all parts together. The first error ends them all.
    """
    ensure_ray()
    threads = min(threads, usable_cpus())  # a task that asks for more than there is would wait for ever
    device, resources = ("cuda", {"num_gpus": 1}) if has_gpus() else ("cpu", {"num_cpus": threads})
    steps = dict.fromkeys(parts, 0.0)
    total = float(sum(part.training.loop.num_steps for part in parts.values()))
    last: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        for name, part in parts.items():
            display = _PartDisplay(name, run=run, steps=steps, total=total)
            path, num_steps = part.training.output / METRICS_NAME, part.training.loop.num_steps
            last[name] = stack.enter_context(
                following(path, num_steps=num_steps, run=replace(part.run, display=display))
            )
        _run_tasks([part.training for part in parts.values()], device=device, threads=threads, resources=resources)
    return last


class _PartDisplay:
    """The display as one part sees it: its steps are added to those of the others."""

    def __init__(self, name: str, *, run: JobRun, steps: dict[str, float], total: float) -> None:
        self._name, self._run, self._steps, self._total = name, run, steps, total

    def progress(self, done: float, total: float, note: str = "") -> None:
        """This part is at `done` of its own `total`."""
        self._steps[self._name] = done
        self._run.progress(sum(self._steps.values()), self._total, f"{self._name}: {note}")

    def say(self, line: str) -> None:
        """A line of this part."""
        self._run.say(f"{self._name}: {line}")


def _run_tasks(trainings: Sequence[TrainingJob], *, device: str, threads: int, resources: Mapping[str, Any]) -> None:
    import ray
    import ray.exceptions

    task = ray.remote(_train).options(max_retries=MAX_FAILURES, **resources)
    waiting = [task.remote(training, device, threads) for training in trainings]
    try:
        while waiting:
            done, waiting = ray.wait(waiting)
            ray.get(done)
    except ray.exceptions.RayError as error:
        cause = find_cause(error)
        if cause is None:
            raise
        raise cause from error
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


def _train(training: TrainingJob, device: str, threads: int) -> None:
    """One part, on a Ray worker."""
    torch.set_num_threads(threads)
    ranks = Ranks(device=device)
    train(
        training.build(training.config, ranks),
        config=training.loop,
        output=training.output,
        identity=training.identity,
        ranks=ranks,
    )
