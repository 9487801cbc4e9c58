"""How far the ingestion jobs of a run are, shard by shard, from the disk alone.

In: a run's root. Out: one `ShardProgress` for each folder into which shards are written, also amid a run, after a kill,
and while Ray is down. A shard is done if its entry verifies; what it was to be made of is in the plan that
`run_shards` leaves, or in the manifest of an older run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cogview.errors import ManifestError
from cogview.shards.manifest import ENTRY_FOLDER, MANIFEST_NAME, PLAN_NAME, read_entry, read_json, read_sealed

NAMED = 5  # pending shards that are named


@dataclass(frozen=True, kw_only=True)
class ShardProgress:
    """One folder of shards.

    name: relative to the root; note: what is done to them; pending: numbers of those not done; begun: of these, how
    many a worker was at when it was last heard of; rows_in, rows_out: of the shards that are done.
    """

    name: str
    note: str
    done: int
    pending: tuple[int, ...]
    begun: int
    rows_in: int
    rows_out: int

    @property
    def line(self) -> str:
        """For people."""
        total = self.done + len(self.pending)
        words = f"{self.done:,} of {total:,} {self.note}, {self.rows_out:,} of {self.rows_in:,} rows kept"
        if self.pending:
            more = f" and {len(self.pending) - NAMED:,} more" if len(self.pending) > NAMED else ""
            words += f"; pending: {', '.join(map(str, self.pending[:NAMED]))}{more} ({self.begun} begun)"
        return words


def shard_progress(root: Path) -> list[ShardProgress]:
    """All folders of shards below a root, by name."""
    return [_progress(folder, root=root) for folder in sorted(_shard_folders(root))]


def shard_lines(progress: Sequence[ShardProgress]) -> list[str]:
    """One aligned line for each folder."""
    width = max((len(item.name) for item in progress), default=0)
    return [f"  {item.name:<{width}}  {item.line}" for item in progress]


def plain_progress(progress: Sequence[ShardProgress]) -> list[dict[str, Any]]:
    """The same for programs."""
    return [asdict(item) for item in progress]


def _shard_folders(root: Path) -> Iterator[Path]:
    """Those with entries: `<job>/<digest>`, and what a job keeps below it while it runs."""
    return (path.parent for path in root.glob(f"*/*/**/{ENTRY_FOLDER}") if path.is_dir())


def _progress(folder: Path, *, root: Path) -> ShardProgress:
    note, digests = _plan(folder)
    entries = {shard: read_entry(folder, shard, input_digest=digest) for shard, digest in digests.items()}
    done = [entry for entry in entries.values() if entry is not None]
    return ShardProgress(
        name=folder.relative_to(root).as_posix(),
        note=note,
        done=len(done),
        pending=tuple(shard for shard, entry in entries.items() if entry is None),
        begun=sum(1 for _ in (folder / ENTRY_FOLDER).glob(".*.attempts")),
        rows_in=sum(entry.rows_in for entry in done),
        rows_out=sum(entry.rows_out for entry in done),
    )


def _plan(folder: Path) -> tuple[str, dict[int, str]]:
    """What was done to the shards, and the input digest of each of them; nothing of a folder that says neither."""
    try:
        plan = read_json(folder / ENTRY_FOLDER / PLAN_NAME)
        return str(plan["note"]), {int(shard): str(digest) for shard, digest in plan["shards"].items()}
    except (ManifestError, LookupError, TypeError, ValueError, AttributeError):
        pass
    try:
        shards = read_sealed(folder / MANIFEST_NAME)["shards"]
        return "shards", {int(entry["shard"]): str(entry["input_digest"]) for entry in shards}
    except (ManifestError, LookupError, TypeError, ValueError):
        return "shards", {}
