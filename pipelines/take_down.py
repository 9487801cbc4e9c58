"""Take pairs out of finished shards, because their owners want it: by URL, domain, or sha256 of the image.

Command: python -m pipelines take_down smoke --opt-out list.txt --folders RUN/scrape_pairs/... RUN/tokenize_pairs/...
Reads:   lists of URLs, domains and sha256 (one to a line); output folders of scrape_pairs, import_pairs, filter_pairs
         and tokenize_pairs
Writes:  into those folders: the shards anew without the pairs, a tombstone with the reason for each, manifests that
         fit; and taken_down.parquet, which names every pair that went
Time:    a second for 10,000 rows, and as long as a copy for each shard that holds one of them

What trained models have learned cannot be taken down here, nor can copies that others have made: train again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cogview.config import input_field
from cogview.errors import ConfigError, ManifestError
from cogview.records.opt_out import OptOut, read_opt_out
from cogview.records.pair_shards import TAKEN_DOWN, strike_pairs
from cogview.records.retrying import read_statuses
from cogview.shards.manifest import (
    ENTRY_FOLDER,
    MANIFEST_NAME,
    ShardEntry,
    atomic_file,
    file_record,
    read_json,
    read_sealed,
    shard_name,
    write_entry,
    write_manifest,
)
from cogview.shards.striking import read_rows, strike_rows
from pipelines.runtime.jobs import COMPLETE_NAME, CONFIG_NAME, Job, JobRun, restore_complete
from pipelines.runtime.locks import folder_lock

JOURNAL_NAME = "_taking_down.json"  # the folder's complete.json while shards are rewritten
RECORD_NAME = "taken_down.parquet"
RECORD_SCHEMA = pa.schema(
    [("folder", pa.string()), ("shard", pa.int32()), ("key", pa.string()), ("source", pa.string())]
)
MAX_LINEAGE = 10  # folders behind a folder


@dataclass(frozen=True, kw_only=True)
class Config:
    """opt_out: lists of whom to take down; folders: finished outputs of jobs, in which to do so.

    Images that are listed by their sha256 are found in tokens too, through the folder of pairs that these came from.
    """

    opt_out: tuple[str, ...] = input_field(default=())
    folders: tuple[str, ...] = input_field(default=())


PRESETS: dict[str, Config] = {"paper": Config(), "smoke": Config()}


def main(config: Config, run: JobRun) -> None:
    """Go through the folders one by one, and record what went."""
    if not config.opt_out or not config.folders:
        missing = "opt-out" if not config.opt_out else "folders"
        raise ConfigError(f"{missing} is not given; name lists with --opt-out and folders of shards with --folders")
    listed = read_opt_out(config.opt_out)
    records: list[dict[str, Any]] = []
    for number, folder in enumerate(map(Path, config.folders)):
        run.progress(number, len(config.folders), folder.name)
        with folder_lock(checked(folder)):
            struck = take_down(folder, listed)
        records += [{"folder": str(folder), **row} for row in struck]
        run.say(f"{len(struck):,} pairs taken down in {folder}")
    with atomic_file(run.output / RECORD_NAME) as file:
        pq.write_table(pa.Table.from_pylist(records, schema=RECORD_SCHEMA), file, compression="zstd")
    run.scores.update({"taken_down": len(records), "folders": len(config.folders)})


def checked(folder: Path) -> Path:
    """The folder, if a job has finished it, or a take-down of it was interrupted."""
    names = (COMPLETE_NAME, JOURNAL_NAME)
    if not (folder / MANIFEST_NAME).is_file() or not any((folder / name).is_file() for name in names):
        raise ConfigError(
            f"folders: {folder} is no finished folder of shards; give outputs of the jobs for pairs or tokens"
        )
    return folder


def take_down(folder: Path, listed: OptOut) -> list[dict[str, Any]]:
    """Strike what is listed from one folder. Rows of shard, key and source of what went.

    Until it is done the folder counts as unfinished; run again after an interruption, this goes on from there.
    """
    was_interrupted = not (folder / COMPLETE_NAME).is_file()
    if not was_interrupted:
        (folder / COMPLETE_NAME).replace(folder / JOURNAL_NAME)
    manifest = read_sealed(folder / MANIFEST_NAME)
    by_hash = keys_of_images(folder, listed)
    entries, records = [], []
    for plain in manifest["shards"]:
        entry = _newest(folder, ShardEntry(**plain))
        is_tokens = any(name.endswith(".arrow") for name in entry.files)
        strike = strike_tokens if is_tokens else strike_pair_shard
        entry, struck = strike(folder, entry, listed=listed, by_hash=by_hash)
        records += [{"shard": entry.shard, **row} for row in struck]
        entries.append(entry)
    if not records and not was_interrupted:
        (folder / JOURNAL_NAME).replace(folder / COMPLETE_NAME)
        return []
    write_manifest(folder, entries, extra={**manifest["extra"], **_totals(entries, manifest["extra"])})
    restore_complete(folder, journal=folder / JOURNAL_NAME)
    return records


def strike_pair_shard(
    folder: Path, entry: ShardEntry, *, listed: OptOut, by_hash: frozenset[str]
) -> tuple[ShardEntry, list[dict[str, Any]]]:
    """One shard of pairs without those that are listed."""
    stem = f"shard-{entry.shard:05d}"
    statuses = read_statuses(folder / f"{stem}.parquet")
    struck = [
        {"key": row["key"], "source": row["source"]}
        for row in statuses
        if row["status"] == "ok" and (listed.has_url(row["source"]) or row["key"] in by_hash)
    ]
    is_whole = all(_is_intact(folder, name, record) for name, record in entry.files.items())
    if not struck and is_whole:
        return entry, []
    counts = strike_pairs(folder, stem, keys={row["key"] for row in struck}, open_file=atomic_file)
    _reject(folder / "rejected" / shard_name(entry.shard, "parquet"), struck)
    files = {name: file_record(folder / name) for name in entry.files}
    return _enter(folder, replace(entry, rows_out=counts.ok, rejected=dict(counts.failed), files=files)), struck


def strike_tokens(
    folder: Path, entry: ShardEntry, *, listed: OptOut, by_hash: frozenset[str]
) -> tuple[ShardEntry, list[dict[str, Any]]]:
    """One shard of tokens without the rows of those that are listed. Counts are made of what is there now."""
    names = [name for name in entry.files if name.endswith(".arrow")]
    gone: dict[str, str] = {}
    for name in names:
        table = read_rows(folder / name)
        sources = dict(zip(table["key"].to_pylist(), table["source"].to_pylist(), strict=True))
        struck = strike_rows(folder / name, has_source=listed.has_url, keys=by_hash)
        gone |= {key: sources[key] for key in struck}
    is_whole = all(_is_intact(folder, name, record) for name, record in entry.files.items())
    if not gone and is_whole:
        return entry, []
    rows = [{"key": key, "source": source} for key, source in gone.items()]
    _reject(folder / "rejected" / shard_name(entry.shard, "parquet"), rows)
    tables = {name: read_rows(folder / name) for name in names}
    kept = len({key for table in tables.values() for key in table["key"].to_pylist()})
    others = {reason: count for reason, count in entry.rejected.items() if reason != TAKEN_DOWN}
    rejected = {**others, TAKEN_DOWN: entry.rows_in - kept - sum(others.values())}
    extra = {f"rows_{name.split('/')[0]}": len(table) for name, table in tables.items()}
    extra["text_ids"] = sum(len(ids) for table in tables.values() for ids in table["text_ids"].to_pylist())
    known = {name: count for name, count in extra.items() if name in entry.extra}
    files = {name: file_record(folder / name) for name in entry.files}
    changed = replace(entry, rows_out=kept, rejected=rejected, files=files, extra={**entry.extra, **known})
    return _enter(folder, changed), rows


def keys_of_images(folder: Path, listed: OptOut) -> frozenset[str]:
    """The keys of pairs whose image is listed by its sha256, here or in the folders that this one was made from."""
    if not listed.sha256:
        return frozenset()
    keys: set[str] = set()
    for source in lineage(folder):
        for path in sorted(source.glob("shard-*.parquet")):
            table = pq.read_table(path)
            digests = [table[name].to_pylist() for name in ("sha256", "original_sha256") if name in table.schema.names]
            rows = zip(table["key"].to_pylist(), *digests, strict=True)
            keys.update(key for key, *found in rows if not listed.sha256.isdisjoint(found))
    return frozenset(keys)


def lineage(folder: Path) -> Iterator[Path]:
    """The folder, and those whose pairs it was made from, as far as they are still there."""
    for _ in range(MAX_LINEAGE):
        yield folder
        try:
            pairs = read_json(folder / CONFIG_NAME)["config"].get("pairs")
        except (ManifestError, KeyError, AttributeError):
            return
        if not pairs or not Path(pairs).is_dir():
            return
        folder = Path(pairs)


def _newest(folder: Path, entry: ShardEntry) -> ShardEntry:
    """The shard's own entry, which an interrupted take-down may have written after the manifest."""
    path = folder / ENTRY_FOLDER / shard_name(entry.shard, "json")
    return ShardEntry(**read_sealed(path)) if path.is_file() else entry


def _enter(folder: Path, entry: ShardEntry) -> ShardEntry:
    write_entry(folder, entry)
    return entry


def _is_intact(folder: Path, name: str, record: Any) -> bool:
    return (folder / name).is_file() and file_record(folder / name) == dict(record)


def _reject(path: Path, struck: Sequence[dict[str, Any]]) -> None:
    """Add the struck pairs to a list of rejected ones, if the folder keeps one; those that are there stay once."""
    if not struck or not path.is_file():
        return
    table = pq.read_table(path)
    there = set(table["key"].to_pylist())
    rows = [
        {**row, "rule": "take_down", "reason": TAKEN_DOWN, "detail": ""} for row in struck if row["key"] not in there
    ]
    added = pa.Table.from_pylist(rows, schema=table.schema)
    with atomic_file(path) as file:
        pq.write_table(pa.concat_tables([table, added]), file, compression="zstd")


def _totals(entries: Sequence[ShardEntry], extra: dict[str, Any]) -> dict[str, int]:
    """What the manifest adds up from its entries, such as rows_train."""
    names = [name for name in extra if entries and all(name in entry.extra for entry in entries)]
    return {name: sum(entry.extra[name] for entry in entries) for name in names if isinstance(extra[name], int)}


JOB = Job(name="take_down", version=1, products=(RECORD_NAME,), main=main)
