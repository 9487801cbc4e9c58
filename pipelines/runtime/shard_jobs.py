"""Shard in, shard out, on Ray Data: each task makes one output shard whole, enters it, and tells the driver its counts.

Ray Data carries task descriptions only; pixels never pass through the object store. Shards whose entry verifies are not
made again, so a rerun after any interruption does what is missing and nothing else.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cogview.errors
from cogview.errors import CogViewError, ConfigError, ManifestError
from cogview.shards.manifest import ShardEntry, file_record, read_entry, write_entry, write_manifest
from pipelines.runtime.cluster import ensure_ray
from pipelines.runtime.failures import first_line
from pipelines.runtime.jobs import JobRun

logger = logging.getLogger(__name__)

MAX_RETRIES = 2  # of a task whose process dies; Ray's own default never gives up


class ShardFailedError(CogViewError):
    """A shard whose process died, or whose work raised, more often than it may."""


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One unit of work. input_digest: of everything that its bytes depend on; inputs: plain values for the worker."""

    shard: int
    input_digest: str
    inputs: Mapping[str, Any] = field(default_factory=dict)


Work = Callable[[ShardTask], ShardEntry]


def run_shards(
    work: Work,
    tasks: Sequence[ShardTask],
    *,
    folder: Path,
    run: JobRun,
    workers: int = 0,
    num_gpus: float = 0.0,
    note: str = "shards",
) -> list[ShardEntry]:
    """Do the tasks that are not done yet, `workers` at a time (0: one for each CPU). Entries of all, in shard order.

    work: runs on a worker, leaves its files in `folder` and returns their entry; it must be picklable.
    num_gpus: that each task has to itself; tasks wait until the cluster has them.
    """
    pending = [task for task in tasks if _entry(folder, task) is None]
    rows_out = 0
    run.progress(len(tasks) - len(pending), len(tasks), note)
    for finished, result in enumerate(_map(work, pending, folder=folder, workers=workers, num_gpus=num_gpus), start=1):
        rows_out += result["rows_out"]
        run.progress(len(tasks) - len(pending) + finished, len(tasks), f"{note}, {rows_out:,} rows")
        logger.info("shard %d: %d in, %d out", result["shard"], result["rows_in"], result["rows_out"])
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
    work: Work, tasks: Sequence[ShardTask], *, folder: Path, workers: int, num_gpus: float
) -> Iterator[dict[str, Any]]:
    if not tasks:
        return
    ensure_ray()
    import ray.data
    import ray.exceptions

    context = ray.data.DataContext.get_current()
    context.execution_no_progress_timeout_s = -1  # a polite scrape may finish no shard in half an hour
    context.enable_progress_bars = False
    rows = [{"shard": t.shard, "input_digest": t.input_digest, "inputs": json.dumps(dict(t.inputs))} for t in tasks]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    results = dataset.map(
        partial(_do_task, work=work, folder=folder),
        num_cpus=1,
        num_gpus=num_gpus or None,
        concurrency=workers or None,
        max_retries=MAX_RETRIES,
    )
    try:
        for row in results.iter_rows():
            if row["error"]:
                raise getattr(cogview.errors, row["error"])(row["message"])
            yield row
    except ray.exceptions.RayTaskError:
        raise  # a defect; its text holds the worker's traceback
    except ray.exceptions.RayError as error:
        raise ShardFailedError(
            f"a shard's process died {MAX_RETRIES + 1} times ({first_line(error)}); finished shards are kept: free "
            f"memory, or look for the record that kills its reader among the shards that {folder} lacks, and run again"
        ) from error


def _do_task(row: dict[str, Any], *, work: Work, folder: Path) -> dict[str, Any]:
    task = ShardTask(shard=row["shard"], input_digest=row["input_digest"], inputs=json.loads(row["inputs"]))
    result = {"shard": task.shard, "rows_in": 0, "rows_out": 0, "error": "", "message": ""}
    try:
        entry = work(task)
        write_entry(folder, entry)
    except CogViewError as error:  # as a value: of an error that is raised here, Ray Data hands over the text alone
        return {**result, "error": type(error).__name__, "message": str(error)}
    return {**result, "rows_in": entry.rows_in, "rows_out": entry.rows_out}


def _entry(folder: Path, task: ShardTask) -> ShardEntry | None:
    return read_entry(folder, task.shard, input_digest=task.input_digest)
