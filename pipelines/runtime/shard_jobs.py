"""Shard in, shard out, on Ray Data: each task makes one output shard whole, enters it, and tells the driver its counts.

Ray Data carries task descriptions only; pixels never pass through the object store. Shards whose entry verifies are not
made again, so a rerun after any interruption does what is missing and nothing else. A picture that kills or hangs its
decoder costs its own row, not its shard (`cogview.records.containment`).
"""

import importlib
import json
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cogview.errors
from cogview.config import digest_of
from cogview.errors import CogViewError, ConfigError, ManifestError
from cogview.records.containment import contained
from cogview.shards.manifest import (
    ENTRY_FOLDER,
    ShardEntry,
    file_record,
    read_entry,
    read_manifest,
    remove_temporary,
    shard_name,
    write_entry,
    write_manifest,
    write_plan,
)
from pipelines.runtime.cluster import ensure_ray
from pipelines.runtime.failures import first_line
from pipelines.runtime.jobs import JobRun
from pipelines.runtime.ray_metrics import count_rows

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3  # of a shard whose process dies


class ShardFailedError(CogViewError):
    """A shard whose process died, or whose work raised, more often than it may."""


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One unit of work. input_digest: of everything that its bytes depend on; inputs: plain values for the worker."""

    shard: int
    input_digest: str
    inputs: Mapping[str, Any] = field(default_factory=dict)


Work = Callable[[ShardTask], ShardEntry]


def tasks_of(folder: Path) -> list[ShardTask]:
    """One task for each shard of an input folder, by its manifest."""
    shards = read_manifest(folder)["shards"]
    return [ShardTask(shard=entry["shard"], input_digest=digest_of(entry["files"])) for entry in shards]


def run_shards(
    work: Work,
    tasks: Sequence[ShardTask],
    *,
    folder: Path,
    run: JobRun,
    workers: int = 0,
    num_gpus: float = 0.0,
    as_actors: bool = False,
    imports: Sequence[str] = (),
    note: str = "shards",
) -> list[ShardEntry]:
    """Do the tasks that are not done yet, `workers` at a time (0: one for each CPU). Entries of all, in shard order.

    work: runs on a worker, leaves its files in `folder` and returns their entry; it must be picklable.
    num_gpus: that each task has to itself; as_actors: the processes stay between shards with what they have loaded;
    imports: modules that the work imports late, and that take long.
    """
    pending = [task for task in tasks if _entry(folder, task) is None]
    if pending:
        remove_temporary(folder)  # of a driver that died before
        write_plan(folder, {task.shard: task.input_digest for task in tasks}, note=note)
    rows_out = 0
    run.progress(len(tasks) - len(pending), len(tasks), note)
    results = _map(
        work, pending, folder=folder, workers=workers, num_gpus=num_gpus, as_actors=as_actors, imports=imports
    )
    for finished, result in enumerate(results, start=1):
        rows_out += result["rows_out"]
        run.progress(len(tasks) - len(pending) + finished, len(tasks), f"{note}, {rows_out:,} rows")
        logger.info("shard %d: %d in, %d out", result["shard"], result["rows_in"], result["rows_out"])
    if pending:
        remove_temporary(folder)  # of workers that died on the way
    entries = [_entry(folder, task) for task in tasks]
    missing = [task.shard for task, entry in zip(tasks, entries, strict=True) if entry is None]
    if missing:
        raise ManifestError(f"{folder}: shards {missing[:10]} were made but do not verify; run the job again")
    return [entry for entry in entries if entry is not None]


def shard_entry(
    folder: Path, task: ShardTask, *, rows_in: int, rows_out: int, rejected: Mapping[str, int], files: Sequence[str]
) -> ShardEntry:
    """The entry of a shard whose files lie in `folder`, after checking that every row is accounted for."""
    assert rows_in == rows_out + sum(rejected.values()), "every row that came in went out or was rejected"
    return ShardEntry(
        shard=task.shard,
        rows_in=rows_in,
        rows_out=rows_out,
        rejected=dict(rejected),
        files={name: file_record(folder / name) for name in files},
        input_digest=task.input_digest,
    )


def close_folder(run: JobRun, entries: Sequence[ShardEntry], *, extra: Mapping[str, Any]) -> None:
    """Write the manifest, score and show what went in and out. ConfigError if nothing is left."""
    manifest = write_manifest(run.output, entries, extra=extra)
    rejected = dict(sorted(manifest["rejected"].items(), key=lambda item: (-item[1], item[0])))
    total, kept = manifest["rows_in"], manifest["rows_out"]
    run.scores.update({"rows_in": total, "rows_out": kept, "rejected": total - kept})
    run.scores.update({f"rejected_{reason}": count for reason, count in rejected.items()})
    run.say(f"{kept:,} of {total:,} pairs kept, {total - kept:,} not")
    for reason, count in rejected.items():
        run.say(f"  {count:>9,}  {reason}")
    run.tracker.log_table([{"reason": reason, "count": count} for reason, count in rejected.items()], "reasons.json")
    if kept == 0:
        raise ConfigError(f"none of {total} candidates became a pair ({rejected}); check the data and the rules")


def _map(
    work: Work,
    tasks: Sequence[ShardTask],
    *,
    folder: Path,
    workers: int,
    num_gpus: float,
    as_actors: bool,
    imports: Sequence[str],
) -> Iterator[dict[str, Any]]:
    if not tasks:
        return
    ensure_ray()
    if not as_actors and not num_gpus:  # else the tasks run in other processes
        _begin_imports(work, imports, count=min(len(tasks), workers or _places(num_gpus=0.0)))
    import ray.data
    import ray.exceptions

    context = ray.data.DataContext.get_current()
    context.execution_no_progress_timeout_s = -1  # a polite scrape may finish no shard in half an hour
    context.enable_progress_bars = False
    rows = [{"shard": t.shard, "input_digest": t.input_digest, "inputs": json.dumps(dict(t.inputs))} for t in tasks]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    attempts = Attempts(folder=folder, run=uuid.uuid4().hex)
    if as_actors:
        size = min(len(tasks), workers or _places(num_gpus=num_gpus))
        results = dataset.map(
            ShardActor,
            fn_constructor_kwargs={"work": work, "attempts": attempts},
            compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
            num_cpus=1,
            num_gpus=num_gpus or None,
        )
    else:
        compute = ray.data.TaskPoolStrategy(size=workers or None)
        task = partial(_do_task, work=work, attempts=attempts)
        results = dataset.map(task, compute=compute, num_cpus=1, num_gpus=num_gpus or None)
    try:
        for row in results.iter_rows():
            if row["error"]:
                raise getattr(cogview.errors, row["error"], ShardFailedError)(row["message"])
            yield row
    except ray.exceptions.RayTaskError:
        raise  # a defect; its text holds the worker's traceback
    except ray.exceptions.RayError as error:
        raise ShardFailedError(
            f"Ray lost its workers ({first_line(error)}); finished shards in {folder} are kept: run again"
        ) from error


def _begin_imports(work: Work, imports: Sequence[str], *, count: int) -> None:
    """Workers import what their tasks will need, which takes seconds, while the driver still sets up Ray Data."""
    import ray

    begin = ray.remote(_import).options(num_cpus=1)
    for _ in range(count):
        begin.remote(work, ("ray.data", *imports))


def _import(work: Work, modules: Sequence[str]) -> None:
    """On a worker, where `work` has brought its own module along."""
    for name in modules:
        importlib.import_module(name)


def _places(*, num_gpus: float) -> int:
    """How many workers the cluster has room for. ConfigError if it has none of the GPUs that they need."""
    import ray

    resources = ray.cluster_resources()
    if not num_gpus:
        return max(1, int(resources.get("CPU", 1)))
    gpus = int(resources.get("GPU", 0) / num_gpus)
    if not gpus:
        raise ConfigError("device is cuda, but the cluster has no GPU; give --device cpu, or join a cluster with GPUs")
    return gpus


@dataclass(frozen=True, kw_only=True)
class Attempts:
    """How often each shard was begun in this run, on disk: a worker that dies takes all other memory of it along.

    Ray itself would start a worker anew for ever.
    """

    folder: Path
    run: str

    def begin(self, shard: int) -> int:
        """Count one more attempt; which one it is, from 1."""
        number = self._count(shard) + 1
        self._path(shard).parent.mkdir(parents=True, exist_ok=True)
        self._path(shard).write_text(f"{self.run} {number}")
        return number

    def end(self, shard: int) -> None:
        """The shard is done, or failed in a way that can be told."""
        if self._count(shard):
            self._path(shard).unlink(missing_ok=True)

    def _count(self, shard: int) -> int:
        """Of this run alone; 0 if another one was the last to begin."""
        path = self._path(shard)
        run, _, count = path.read_text().partition(" ") if path.exists() else ("", "", "")
        return int(count) if run == self.run and count.isdigit() else 0

    def _path(self, shard: int) -> Path:
        return self.folder / ENTRY_FOLDER / f".{shard_name(shard, 'attempts')}"


class ShardActor:
    """A worker that stays, so that what its work has loaded (a model on a GPU) serves all its shards."""

    def __init__(self, *, work: Work, attempts: Attempts) -> None:
        self._do_task = partial(_do_task, work=work, attempts=attempts)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return self._do_task(row)


def _do_task(row: dict[str, Any], *, work: Work, attempts: Attempts) -> dict[str, Any]:
    task = ShardTask(shard=row["shard"], input_digest=row["input_digest"], inputs=json.loads(row["inputs"]))
    result = {"shard": task.shard, "rows_in": 0, "rows_out": 0, "error": "", "message": ""}
    try:
        entry = _entry(attempts.folder, task) or _attempt(task, work=work, attempts=attempts)
    except CogViewError as error:  # as a value: of an error that is raised here, Ray Data hands over the text alone
        return {**result, "error": type(error).__name__, "message": str(error)}
    return {**result, "rows_in": entry.rows_in, "rows_out": entry.rows_out}


def _attempt(task: ShardTask, *, work: Work, attempts: Attempts) -> ShardEntry:
    """Make a shard, with more care where a worker has died of it; ShardFailedError where care did not help."""
    number = attempts.begin(task.shard)
    try:
        if number > MAX_ATTEMPTS:
            raise ShardFailedError(
                f"shard {task.shard}: its process died {MAX_ATTEMPTS} times, also while its pictures were decoded in "
                f"another; finished shards in {attempts.folder} are kept: free memory or give fewer --workers, look "
                "into Ray's logs for what kills it, and run again"
            )
        with contained(apart=number > 1):
            entry = work(task)
        write_entry(attempts.folder, entry)
        count_rows(attempts.folder.parent.name, entry)
    finally:
        attempts.end(task.shard)
    return entry


def _entry(folder: Path, task: ShardTask) -> ShardEntry | None:
    return read_entry(folder, task.shard, input_digest=task.input_digest)
