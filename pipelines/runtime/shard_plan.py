"""`--plan` of a job that works shard by shard: what is done, what is left, and about what that takes.

In: the job's tasks, and a trial of its work on a few rows in this process. Out: lines of text. Nothing is written,
fetched or started; an estimate is the trial times the rows that are left, and says so.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from cogview.shards.manifest import read_entry
from pipelines.runtime.cluster import usable_cpus
from pipelines.runtime.display import duration
from pipelines.runtime.jobs import Plan, read_finished
from pipelines.runtime.shard_jobs import ShardTask

TRIED_ROWS = 48
RAY_START_S = 10  # on a laptop
TAR_HEADERS = 3 * 1024  # of a pair's image, text and JSON in a tar, each rounded up to blocks
MB = 1_000_000
Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What rows took in one process. bytes_out: what they leave on disk."""

    rows: int
    seconds: float
    bytes_out: int


@dataclass(frozen=True, kw_only=True)
class ShardStep:
    """One pass over shards. name: in the past, such as `written`; folder: where its entries lie, below the output."""

    name: str
    tasks: Sequence[ShardTask]
    folder: str = "."

    def count_done(self, output: Path) -> int:
        """Shards whose entry verifies."""
        entries = (read_entry(output / self.folder, task.shard, input_digest=task.input_digest) for task in self.tasks)
        return sum(entry is not None for entry in entries)


def try_rows(
    rows: Iterable[Row], work: Callable[[Sequence[Row]], object], *, bytes_of: Callable[[Row], int]
) -> Trial | None:
    """Time the work on a few rows. bytes_of: what a row leaves on disk. None without rows."""
    chosen = list(islice(rows, TRIED_ROWS))
    if not chosen:
        return None
    work(chosen[:1])  # loads what the rest finds loaded
    started = time.perf_counter()
    work(chosen)
    seconds = time.perf_counter() - started
    return Trial(rows=len(chosen), seconds=seconds, bytes_out=sum(map(bytes_of, chosen)))


def shard_plan_lines(
    plan: Plan, *, rows: int, steps: Sequence[ShardStep], trial: Trial | None, workers: int, notes: Sequence[str] = ()
) -> Iterator[str]:
    """The plan. rows: of the whole input; steps: the last one leaves what the job is for; notes: said before."""
    last = steps[-1] if steps else None
    shards = f" in {len(last.tasks):,} shards" if last else ""
    yield f"{plan.job.name}: {rows:,} rows{shards}"
    yield from notes
    finished = read_finished(plan.job, plan.output)
    state = "done" if finished else "begun" if plan.output.exists() else "not begun"
    yield f"output: {plan.output} ({state})"
    if finished or last is None:
        if finished:
            yield "nothing is left to do"
            return
        left = float(rows)
    else:
        done = {step.name: step.count_done(plan.output) for step in steps}
        width = max(map(len, done))
        for step in steps:
            pending = len(step.tasks) - done[step.name]
            yield f"  {step.name:<{width}}  {done[step.name]:>6,} done  {pending:>6,} pending"
        left = rows * (1 - done[last.name] / max(1, len(last.tasks)))
    yield from _estimate(left, trial=trial, workers=workers or usable_cpus(), output=plan.output)


def _estimate(left: float, *, trial: Trial | None, workers: int, output: Path) -> Iterator[str]:
    if trial is None:
        return
    pace, size = trial.seconds / trial.rows, trial.bytes_out / trial.rows
    yield (
        f"time: about {duration(left * pace / workers + RAY_START_S)} for {left:,.0f} rows on {workers} workers "
        f"({1000 * pace:.2g} ms a row, of {trial.rows} tried here; {RAY_START_S} s of it for Ray to start)"
    )
    existing = next(folder for folder in (output, *output.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    yield f"disk: about {left * size / MB:,.0f} MB ({size / 1000:.3g} kB a row); {free / MB:,.0f} MB are free"
