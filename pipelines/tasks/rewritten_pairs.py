"""Jobs that look at every pair once and write its shard anew: more in each pair, or the reason why it is gone."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from cogview.records.pair import Failure, TextImagePair
from cogview.records.pair_shards import write_pair_shard
from cogview.records.tars import read_pairs
from cogview.shards.manifest import ShardEntry, atomic_file, read_manifest, shard_name
from pipelines.runtime.jobs import Job, plan_job
from pipelines.runtime.shard_jobs import ShardTask, shard_entry, tasks_of
from pipelines.runtime.shard_plan import TAR_HEADERS, ShardStep, shard_plan_lines, try_rows

Rewrite = Callable[[Sequence[TextImagePair]], list[TextImagePair | Failure]]


def rewrite_shard(task: ShardTask, *, pairs: Path, output: Path, batch_size: int, rewrite: Rewrite) -> ShardEntry:
    """On a worker: a shard of the folder `pairs` as `rewrite` leaves it, which gets `batch_size` pairs at a time.

    `rewrite` returns one outcome for each pair, in their order.
    """
    source = read_pairs(pairs / shard_name(task.shard, "tar"))

    def outcomes() -> Iterator[TextImagePair | Failure]:
        while batch := list(islice(source, batch_size)):
            yield from rewrite(batch)

    written = write_pair_shard(output, f"shard-{task.shard:05d}", outcomes(), open_file=atomic_file)
    return shard_entry(
        output, task, rows_in=written.rows, rows_out=written.ok, rejected=written.failed, files=written.files
    )


def rewriting_plan(
    job: Job, config: Any, *, root: Path, pairs: Path, rewrite: Rewrite, step: str, workers: int
) -> Iterator[str]:
    """What `--plan` tells of such a job: the shards, and an estimate from rewriting the first pairs."""
    planned, tasks = plan_job(job, config, root=root), tasks_of(pairs)
    first = (pair for task in tasks for pair in read_pairs(pairs / shard_name(task.shard, "tar")))
    trial = try_rows(first, rewrite, bytes_of=lambda pair: len(pair.image_bytes) + TAR_HEADERS)
    rows = read_manifest(pairs)["rows_out"]
    steps = [ShardStep(name=step, tasks=tasks)]
    return shard_plan_lines(planned, rows=rows, steps=steps, trial=trial, workers=workers)
