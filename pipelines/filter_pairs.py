"""Keep the pairs that are worth training on; every other one is written down with its rule and reason.

Command: python -m pipelines filter_pairs smoke --pairs RUN/scrape_pairs/...
Reads:   an output folder of scrape_pairs or import_pairs
Writes:  shard-00000.tar + .parquet + _stats.json (the input's numbers), rejected/shard-00000.parquet, manifest.json
Time:    about 15 s for 10,000 pairs of 64 px on two cores

Each shard is judged by itself first, then repetitions are looked for among what was kept everywhere (the earliest of
the same images stays), then the shards are written: the outcome depends on neither order nor number of workers.
"""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cogview.config import digest_of, input_field, runtime_field
from cogview.errors import ConfigError
from cogview.filters.pairs import FilterRules, Judgement, judge_pair
from cogview.filters.repetition import repeated_captions, repeated_images
from cogview.records.pair import Failure, TextImagePair
from cogview.records.pair_shards import write_pair_shard
from cogview.records.tars import read_pairs
from cogview.shards.manifest import ShardEntry, atomic_file, read_manifest, shard_name
from pipelines.runtime.jobs import Job, JobRun
from pipelines.runtime.shard_jobs import ShardTask, close_folder, run_shards, shard_entry

WORK_FOLDER = "_work"
REJECTED_FOLDER = "rejected"
REPETITIONS_FOLDER = "repetitions"
REPETITIONS_NAME = "repetitions.parquet"

JUDGEMENT_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("rule", pa.string()),  # empty if the pair is kept so far
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("sha256", pa.string()),
    ]
)
REPETITION_SCHEMA = pa.schema([("shard", pa.int32()), *list(JUDGEMENT_SCHEMA)[:-1]])
REJECTED_SCHEMA = pa.schema(list(JUDGEMENT_SCHEMA)[:4])


@dataclass(frozen=True, kw_only=True)
class Config:
    """pairs: output folder of scrape_pairs or import_pairs; rules: what is kept; workers: 0 for one on each CPU."""

    pairs: Path | None = input_field(default=None)
    rules: FilterRules = field(default_factory=FilterRules)
    workers: int = runtime_field(0)

    def __post_init__(self) -> None:
        rules = self.rules
        if rules.min_caption > rules.max_caption or rules.min_caption < 1:
            raise ConfigError(f"rules.min_caption={rules.min_caption} must lie between 1 and {rules.max_caption}")
        if rules.max_aspect < 1.0:
            raise ConfigError(f"rules.max_aspect={rules.max_aspect} rejects every image; use 1.0 or more")
        if rules.max_caption_repeats < 0:
            raise ConfigError(f"rules.max_caption_repeats={rules.max_caption_repeats} is negative; 0 switches it off")


PAPER = Config(rules=FilterRules(min_side=128))
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": replace(PAPER, rules=FilterRules(min_side=32)),
}


def main(config: Config, run: JobRun) -> None:
    """Judge every shard, find repetitions across them, write what is kept and why the rest is not."""
    if config.pairs is None:
        raise ConfigError("pairs is not given; name the output folder of scrape_pairs or import_pairs with --pairs")
    work = run.output / WORK_FOLDER
    tasks = plan_shards(config.pairs)
    judge = partial(judge_shard, pairs=config.pairs, work=work, rules=config.rules)
    judged = run_shards(judge, tasks, folder=work, run=run, workers=config.workers, note="judged")
    find = partial(find_repetitions, work=work, rules=config.rules)
    run_shards(find, [whole_corpus(tasks)], folder=work / REPETITIONS_FOLDER, run=run, note="compared")
    write = partial(write_shard, pairs=config.pairs, work=work, output=run.output)
    entries = run_shards(write, tasks, folder=run.output, run=run, workers=config.workers, note="written")
    close_folder(run, entries, extra={"stage": "filter_pairs", "captions_dropped": count_dropped(judged)})
    shutil.rmtree(work)


def plan_shards(pairs: Path) -> list[ShardTask]:
    """One task for each shard of the input, by its manifest."""
    return [
        ShardTask(shard=entry["shard"], input_digest=digest_of(entry["files"]))
        for entry in read_manifest(pairs)["shards"]
    ]


def whole_corpus(tasks: list[ShardTask]) -> ShardTask:
    """The one task that looks at all shards."""
    shards = [task.shard for task in tasks]
    return ShardTask(shard=0, input_digest=digest_of([task.input_digest for task in tasks]), inputs={"shards": shards})


def judge_shard(task: ShardTask, *, pairs: Path, work: Path, rules: FilterRules) -> ShardEntry:
    """On a worker: apply the rules to each pair of a shard and write the verdicts, not the pairs."""
    rows: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    for pair in read_pairs(pairs / shard_name(task.shard, "tar")):
        judgement = judge_pair(pair, rules)
        rows.append(_row(judgement))
        dropped.update(caption.reason for caption in judgement.dropped_captions)
    name = shard_name(task.shard, "parquet")
    _write_table(work / name, rows, JUDGEMENT_SCHEMA)
    reasons = Counter(row["reason"] for row in rows if row["rule"])
    entry = shard_entry(
        work, task, rows_in=len(rows), rows_out=len(rows) - reasons.total(), rejected=reasons, files=[name]
    )
    return replace(entry, extra={"captions_dropped": dict(sorted(dropped.items()))})


def find_repetitions(task: ShardTask, *, work: Path, rules: FilterRules) -> ShardEntry:
    """On one worker: among the pairs kept so far, those whose image or captions others have too."""
    kept = pa.concat_tables([_kept_rows(work, shard) for shard in task.inputs["shards"]])
    frequent = repeated_captions(_flat(kept["captions"]), at_most=rules.max_caption_repeats)
    repeated = repeated_images(kept["sha256"].to_pylist())
    rows: list[dict[str, Any]] = []
    if frequent or repeated.any():
        for row, is_repeated in zip(kept.to_pylist(), repeated.tolist(), strict=True):
            rows.extend(_without_repetition(row, is_repeated=is_repeated, frequent=frequent))
    folder = work / REPETITIONS_FOLDER
    _write_table(folder / REPETITIONS_NAME, rows, REPETITION_SCHEMA)
    return shard_entry(folder, task, rows_in=len(rows), rows_out=len(rows), rejected={}, files=[REPETITIONS_NAME])


def write_shard(task: ShardTask, *, pairs: Path, work: Path, output: Path) -> ShardEntry:
    """On a worker: write the kept pairs of a shard, what became of all of them, and why the rejected ones went."""
    verdicts = {row["key"]: row for row in pq.read_table(work / shard_name(task.shard, "parquet")).to_pylist()}
    repetitions = pq.read_table(work / REPETITIONS_FOLDER / REPETITIONS_NAME, filters=[("shard", "=", task.shard)])
    for row in repetitions.to_pylist():
        verdicts[row["key"]].update(row)
    outcomes = (_outcome(pair, verdicts[pair.key]) for pair in read_pairs(pairs / shard_name(task.shard, "tar")))
    counts = write_pair_shard(output, f"shard-{task.shard:05d}", outcomes, open_file=atomic_file)
    rejected_name = f"{REJECTED_FOLDER}/{shard_name(task.shard, 'parquet')}"
    _write_table(output / rejected_name, [row for row in verdicts.values() if row["rule"]], REJECTED_SCHEMA)
    files = (*counts.files, rejected_name)
    return shard_entry(output, task, rows_in=counts.rows, rows_out=counts.ok, rejected=counts.failed, files=files)


def count_dropped(entries: Iterable[ShardEntry]) -> dict[str, int]:
    """Captions that went while their pair stayed or went, by reason."""
    total: Counter[str] = Counter()
    for entry in entries:
        total.update(entry.extra["captions_dropped"])
    return dict(sorted(total.items()))


def _row(judgement: Judgement) -> dict[str, Any]:
    pair, rejected = judgement.pair, judgement.rejected
    return {
        "key": pair.key,
        "rule": rejected.rule if rejected else "",
        "reason": rejected.reason if rejected else "",
        "detail": rejected.detail if rejected else "",
        "captions": list(pair.captions),
        "sha256": pair.extra["sha256"],
    }


def _kept_rows(work: Path, shard: int) -> pa.Table:
    table = pq.read_table(work / shard_name(shard, "parquet"), filters=[("rule", "=", "")])
    return table.append_column("shard", pa.array([shard] * len(table), pa.int32()))


def _flat(captions: pa.ChunkedArray) -> Iterator[str]:
    for chunk in captions.chunks:
        yield from chunk.flatten().to_pylist()


def _without_repetition(row: dict[str, Any], *, is_repeated: bool, frequent: set[str]) -> Iterator[dict[str, Any]]:
    """The changed verdict of a pair that repetition concerns; nothing otherwise."""
    left = [caption for caption in row["captions"] if caption not in frequent]
    if is_repeated:
        yield {**row, "rule": "repeated_images", "reason": "image_duplicate"}
    elif not left:
        yield {**row, "rule": "repeated_captions", "reason": "caption_too_frequent"}
    elif len(left) < len(row["captions"]):
        yield {**row, "captions": left}


def _outcome(pair: TextImagePair, verdict: dict[str, Any]) -> TextImagePair | Failure:
    if not verdict["rule"]:
        return replace(pair, captions=tuple(verdict["captions"]))
    return Failure(key=pair.key, source=pair.source, reason=verdict["reason"], detail=verdict["detail"])


def _write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    with atomic_file(path) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, compression="zstd")


JOB = Job(name="filter_pairs", version=1, products=("manifest.json",), main=main)
