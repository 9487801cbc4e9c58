"""Keep the pairs that are worth training on; every other one is written down with its rule and reason.

Command: python -m pipelines filter_pairs smoke --pairs RUN/scrape_pairs/...
Reads:   an output folder of scrape_pairs or import_pairs
Writes:  shard-00000.tar + .parquet + _stats.json (the input's numbers), rejected/shard-00000.parquet, funnel/ (counts
         and samples of each shard), report.html, manifest.json
Time:    about 13 s for 8,000 pairs of 64 px on two cores

Each shard is judged by itself first. The keys of what it keeps go to buckets on disk, where wordings and images are
compared across shards (the earliest of the same images stays), then the shards are written: the outcome depends on
neither order nor number of workers, and the driver sees counts only.
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cogview.config import digest_of, input_field, runtime_field
from cogview.filters.corpus import (
    count_buckets,
    exchange_captions,
    exchange_images,
    frequent_captions,
    read_judged,
    repeated_images,
    without_frequent,
    write_judged,
)
from cogview.filters.funnel import SAMPLE_SCHEMA, Funnel, Samples
from cogview.filters.likeness import SIGNATURE_BYTES, likeness, reduce_image
from cogview.filters.pairs import FilterRules, Judgement, judge_pair
from cogview.filters.repetition import repetition_table
from cogview.filters.verdicts import Rejected
from cogview.records.pair import Failure, TextImagePair
from cogview.records.pair_shards import MAX_SHARD_ROWS, pair_key, write_pair_shard
from cogview.records.tars import read_pairs
from cogview.shards.manifest import ShardEntry, atomic_file, read_manifest, shard_name, write_json
from pipelines.runtime.jobs import Job, JobRun, given_folders, plan_job
from pipelines.runtime.shard_jobs import ShardTask, close_folder, run_shards, shard_entry, tasks_of
from pipelines.runtime.shard_plan import TAR_HEADERS, ShardStep, shard_plan_lines, try_rows
from pipelines.tasks.funnel import FUNNEL_FOLDER, read_funnels, write_funnel_report

WORK_FOLDER = "_work"
JUDGED, SETTLED, FREQUENT, REPETITIONS = "judged", "settled", "frequent", "repetitions"  # below WORK_FOLDER
REJECTED_FOLDER = "rejected"
REJECTED_SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "rule", "reason", "detail")])
FREQUENT_SCHEMA = pa.schema([("key", pa.uint64()), ("is_near", pa.bool_())])


@dataclass(frozen=True, kw_only=True)
class Config:
    """pairs: output folder of scrape_pairs or import_pairs; rules: what is kept; workers: 0 for one on each CPU."""

    pairs: Path | None = input_field(default=None)
    rules: FilterRules = field(default_factory=FilterRules)
    workers: int = runtime_field(0)


PAPER = Config(
    rules=FilterRules(
        min_side=128,
        scripts=("han", "latin"),
        max_caption_repeats=1000,  # of 30 million
        max_near_caption_repeats=10_000,
        max_image_copies=100,
    )
)
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": replace(PAPER, rules=FilterRules(min_side=32)),  # whatever language and wording a small corpus has
}


def main(config: Config, run: JobRun) -> None:
    """Judge every shard, find repetitions across them, write what is kept and why the rest is not."""
    pairs = given_folders(config, {"pairs": "scrape_pairs or import_pairs"})["pairs"]
    tasks = tasks_of(pairs)
    filtering = plan_filtering(config, pairs, output=run.output)
    work, buckets, workers = run.output / WORK_FOLDER, plan_buckets(tasks, filtering.buckets), config.workers
    run_shards(filtering.judge, tasks, folder=work / JUDGED, run=run, workers=workers, note="judged")
    if filtering.counts_captions:
        run_shards(filtering.count, buckets, folder=work / FREQUENT, run=run, workers=workers, note="counted")
        run_shards(filtering.settle, tasks, folder=work / SETTLED, run=run, workers=workers, note="settled")
    compared = run_shards(
        filtering.compare, buckets, folder=work / REPETITIONS, run=run, workers=workers, note="compared"
    )
    entries = run_shards(filtering.write, tasks, folder=run.output, run=run, workers=workers, note="written")
    funnel, samples = read_funnels(run.output, [task.shard for task in tasks])
    unseen = sum(entry.extra["unseen"] for entry in compared)
    run.scores.update({"captions_dropped": funnel.dropped.total(), "captions_redacted": funnel.redacted})
    counts = {"captions_dropped": dict(sorted(funnel.dropped.items())), "captions_redacted": funnel.redacted}
    close_folder(run, entries, extra={"stage": "filter_pairs", **counts, "comparisons_left_out": unseen})
    write_funnel_report(funnel, samples, run=run, rules=config.rules)
    shutil.rmtree(work)


def plan(config: Config, *, root: Path) -> Iterator[str]:
    """What `--plan` tells: every pass over the shards, and an estimate from the first pairs."""
    pairs = given_folders(config, {"pairs": "scrape_pairs or import_pairs"})["pairs"]
    planned = plan_job(JOB, config, root=root)
    filtering = plan_filtering(config, pairs, output=planned.output)
    tasks = tasks_of(pairs)
    buckets = plan_buckets(tasks, filtering.buckets)
    counting = [
        ShardStep(name="counted", tasks=buckets, folder=f"{WORK_FOLDER}/{FREQUENT}"),
        ShardStep(name="settled", tasks=tasks, folder=f"{WORK_FOLDER}/{SETTLED}"),
    ]
    steps = [
        ShardStep(name="judged", tasks=tasks, folder=f"{WORK_FOLDER}/{JUDGED}"),
        *(counting if filtering.counts_captions else ()),
        ShardStep(name="compared", tasks=buckets, folder=f"{WORK_FOLDER}/{REPETITIONS}"),
        ShardStep(name="written", tasks=tasks),
    ]

    first = (pair for task in tasks for pair in read_pairs(pairs / shard_name(task.shard, "tar")))
    trial = try_rows(first, lambda tried: len(judge_all(iter(tried), config.rules)), bytes_of=_bytes_on_disk)
    rows = read_manifest(pairs)["rows_out"]
    return shard_plan_lines(planned, rows=rows, steps=steps, trial=trial, workers=config.workers)


def plan_buckets(tasks: Sequence[ShardTask], buckets: int) -> list[ShardTask]:
    """One task for each part of the keys of all shards."""
    digest = digest_of([task.input_digest for task in tasks])
    return [ShardTask(shard=bucket, input_digest=digest_of([digest, bucket, buckets])) for bucket in range(buckets)]


def plan_filtering(config: Config, pairs: Path, *, output: Path) -> "Filtering":
    """What the workers need to know."""
    manifest = read_manifest(pairs)
    return Filtering(
        pairs=pairs,
        output=output,
        rules=config.rules,
        shards=tuple(entry["shard"] for entry in manifest["shards"]),
        buckets=count_buckets(manifest["rows_out"]),
    )


@dataclass(frozen=True, kw_only=True)
class Filtering:
    """The work on shards and buckets; workers get it pickled. shards: all of the input's."""

    pairs: Path
    output: Path
    rules: FilterRules
    shards: tuple[int, ...]
    buckets: int

    @property
    def counts_captions(self) -> bool:
        """Whether any rule is about how often a caption occurs."""
        return self.rules.max_caption_repeats > 0 or self.rules.max_near_caption_repeats > 0

    @property
    def work(self) -> Path:
        """Where everything lies that is not needed at the end."""
        return self.output / WORK_FOLDER

    @property
    def verdicts(self) -> Path:
        """The verdicts that images are compared by, and shards written by."""
        return self.work / (SETTLED if self.counts_captions else JUDGED)

    def judge(self, task: ShardTask) -> ShardEntry:
        """Apply the rules to each pair of a shard; write verdicts and keys, not the pairs."""
        folder = self.work / JUDGED
        judged = judge_all(read_pairs(self.pairs / shard_name(task.shard, "tar")), self.rules)
        names = [write_judged(folder, task.shard, judged)]
        table = read_judged(folder, task.shard)
        if self.counts_captions:
            names.append(exchange_captions(folder, task.shard, table, buckets=self.buckets, rules=self.rules))
        else:
            names += exchange_images(folder, task.shard, table, buckets=self.buckets, rules=self.rules)
        return _all_rows(folder, task, len(judged), names)

    def count(self, task: ShardTask) -> ShardEntry:
        """Of one bucket: which captions too many pairs have."""
        folder, name = self.work / FREQUENT, shard_name(task.shard, "parquet")
        wordings, near = frequent_captions(self.work / JUDGED, self.shards, bucket=task.shard, rules=self.rules)
        is_near = np.arange(len(wordings) + len(near)) >= len(wordings)
        table = pa.table([pa.array(np.concatenate([wordings, near])), pa.array(is_near)], schema=FREQUENT_SCHEMA)
        _write_table(folder / name, table)
        return _all_rows(folder, task, len(table), [name])

    def settle(self, task: ShardTask) -> ShardEntry:
        """Drop the captions that are too frequent, and leave the keys of the images that are then still kept."""
        folder = self.work / SETTLED
        tables = [pq.read_table(self.work / FREQUENT / shard_name(b, "parquet")) for b in range(self.buckets)]
        frequent = pa.concat_tables(tables)
        wordings, near = (
            set(frequent.filter(pa.compute.equal(frequent["is_near"], is_near))["key"].to_pylist())
            for is_near in (False, True)
        )
        rows = read_judged(self.work / JUDGED, task.shard, with_signatures=True).to_pylist()
        rows = [without_frequent(row, wordings=wordings, near=near, rules=self.rules) for row in rows]
        names = [write_judged(folder, task.shard, rows)]
        table = read_judged(folder, task.shard)
        names += exchange_images(folder, task.shard, table, buckets=self.buckets, rules=self.rules)
        return _all_rows(folder, task, len(rows), names)

    def compare(self, task: ShardTask) -> ShardEntry:
        """Of one bucket: which images repeat an earlier one, to the byte or to the eye."""
        folder, name = self.work / REPETITIONS, shard_name(task.shard, "parquet")
        same, near = repeated_images(self.verdicts, self.shards, bucket=task.shard, rules=self.rules)
        table = repetition_table(same, near, max_copies=self.rules.max_image_copies)
        _write_table(folder / name, table)
        return replace(_all_rows(folder, task, len(table), [name]), extra={"unseen": near.unseen})

    def write(self, task: ShardTask) -> ShardEntry:
        """Write the kept pairs of a shard, what became of all of them, and why the rejected ones went."""
        rows = read_judged(self.verdicts, task.shard).to_pylist()
        for row, rejected in self._repetitions(task.shard).items():
            rows[row].update(rule=rejected.rule, reason=rejected.reason, detail=rejected.detail)
        funnel, samples = Funnel(), Samples()
        pairs = read_pairs(self.pairs / shard_name(task.shard, "tar"))
        outcomes = (_outcome(pair, row, funnel, samples) for pair, row in zip(pairs, rows, strict=True))
        counts = write_pair_shard(self.output, f"shard-{task.shard:05d}", outcomes, open_file=atomic_file)
        rejected_name = f"{REJECTED_FOLDER}/{shard_name(task.shard, 'parquet')}"
        rejects = [{name: row[name] for name in REJECTED_SCHEMA.names} for row in rows if row["rule"]]
        _write_table(self.output / rejected_name, pa.Table.from_pylist(rejects, schema=REJECTED_SCHEMA))
        counted, shown = (f"{FUNNEL_FOLDER}/{shard_name(task.shard, suffix)}" for suffix in ("json", "parquet"))
        write_json(self.output / counted, funnel.as_plain())
        _write_table(self.output / shown, pa.Table.from_pylist(samples.rows(), schema=SAMPLE_SCHEMA))
        files = (*counts.files, rejected_name, counted, shown)
        return shard_entry(
            self.output, task, rows_in=counts.rows, rows_out=counts.ok, rejected=counts.failed, files=files
        )

    def _repetitions(self, shard: int) -> dict[int, Rejected]:
        """Row -> why; equal bytes before equal looks, and of several earlier images the earliest."""
        first, last = shard * MAX_SHARD_ROWS, (shard + 1) * MAX_SHARD_ROWS - 1
        is_here = [("place", ">=", first), ("place", "<=", last)]
        paths = [self.work / REPETITIONS / shard_name(bucket, "parquet") for bucket in range(self.buckets)]
        found = [row for path in paths for row in pq.read_table(path, filters=is_here).to_pylist()]
        found.sort(key=lambda row: (row["place"], row["is_near"], row["earlier"]), reverse=True)
        return {
            row["place"] - first: Rejected(row["reason"], f"as {_key_at(row['earlier'])}", row["rule"]) for row in found
        }


def judge_all(pairs: Iterator[TextImagePair], rules: FilterRules) -> list[dict[str, Any]]:
    """The verdict on each pair, and of the kept ones how their images look."""
    rows, reduced = [], []
    for pair in pairs:
        judgement = judge_pair(pair, rules)
        rows.append(_row(judgement))
        if judgement.rejected is None and judgement.image is not None and rules.near_levels >= 0:
            reduced.append(reduce_image(judgement.image))
    looks = likeness(reduced)
    kept = (row for row in rows if not row["rule"])
    for row, looks_like, signature in zip(kept, looks.hashes_N.tolist(), looks.signatures_NS, strict=False):
        row.update(likeness=looks_like, signature=signature.tobytes())
    return rows


def _row(judgement: Judgement) -> dict[str, Any]:
    pair, rejected = judgement.pair, judgement.rejected or Rejected("")
    sha256 = pair.extra.get("sha256") or hashlib.sha256(pair.image_bytes).hexdigest()
    return {
        "key": pair.key,
        "rule": rejected.rule,
        "reason": rejected.reason,
        "detail": rejected.detail,
        "captions": list(pair.captions),
        "dropped": [dropped.reason for dropped in judgement.dropped_captions],
        "redacted": judgement.num_redacted,
        "digest": bytes.fromhex(sha256)[:16],
        "likeness": 0,
    }


def _outcome(pair: TextImagePair, row: dict[str, Any], funnel: Funnel, samples: Samples) -> TextImagePair | Failure:
    rejected = Rejected(row["reason"], row["detail"], row["rule"]) if row["rule"] else None
    funnel.add(pair, row["captions"], rejected)
    funnel.dropped.update(row["dropped"])
    funnel.redacted += row["redacted"]
    samples.add(pair, row["captions"] or pair.captions, rejected)
    if rejected is None:
        return replace(pair, captions=tuple(row["captions"]))
    return Failure(key=pair.key, source=pair.source, reason=rejected.reason, detail=rejected.detail)


def _bytes_on_disk(pair: TextImagePair) -> int:
    return len(pair.image_bytes) + TAR_HEADERS + SIGNATURE_BYTES


def _key_at(place: int) -> str:
    return pair_key(*divmod(place, MAX_SHARD_ROWS))


def _all_rows(folder: Path, task: ShardTask, rows: int, names: Sequence[str]) -> ShardEntry:
    return shard_entry(folder, task, rows_in=rows, rows_out=rows, rejected={}, files=names)


def _write_table(path: Path, table: pa.Table) -> None:
    with atomic_file(path) as file:
        pq.write_table(table, file, compression="zstd")


JOB = Job(name="filter_pairs", version=2, products=("manifest.json", "report.html"), main=main)
