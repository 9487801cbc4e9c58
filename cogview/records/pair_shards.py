"""One finished shard of pairs: a tar in img2dataset's layout, a Parquet of what became of every candidate, and counts.

Where the bytes go is the caller's business (`open_file` opens a path for writing, whole or not at all).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from cogview.errors import ManifestError
from cogview.records.images import ImageSettings, store_image
from cogview.records.pair import Failure, TextImagePair, Unusable
from cogview.records.rights import read_rights, refuse_mining
from cogview.records.tars import read_pairs, write_pairs

MAX_SHARD_ROWS = 100_000  # keys have five digits for the row
TAKEN_DOWN = "taken_down"
OpenFile = Callable[[Path], AbstractContextManager[BinaryIO]]

STATUS_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("status", pa.string()),  # ok | failed
        ("reason", pa.string()),  # empty if ok
        ("detail", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("sha256", pa.string()),
        ("original_sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bytes", pa.int64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class ShardCounts:
    """`rows == ok + sum(failed.values())`; files: the names written."""

    rows: int
    ok: int
    failed: Mapping[str, int]
    files: tuple[str, ...]


def pair_key(shard: int, row: int) -> str:
    """The key of a candidate: unique in its corpus, and its place in it."""
    if not 0 <= row < MAX_SHARD_ROWS:
        raise ManifestError(f"shard {shard} has more than {MAX_SHARD_ROWS} rows; split it, or lower shard_size")
    return f"{shard:05d}_{row:05d}"


def store_pair(pair: TextImagePair, settings: ImageSettings) -> TextImagePair | Failure:
    """The pair with its image decoded, fitted and encoded anew; or why not.

    `extra` gets what the file says of its rights (`file_license`, `file_author`, ...), sha256, width and height of what
    is stored, and the sha256 of what came (`original_sha256`), by which its owner knows it.
    """
    rights = read_rights(pair.image_bytes)
    refused = refuse_mining(rights) if settings.honour_data_mining else None
    stored = refused or store_image(pair.image_bytes, settings)
    if isinstance(stored, Unusable):
        return Failure(key=pair.key, source=pair.source, reason=stored.reason, detail=stored.detail)
    known = {f"file_{name}": value for name, value in rights.items()}
    measures = {
        "sha256": hashlib.sha256(stored.data).hexdigest(),
        "original_sha256": hashlib.sha256(pair.image_bytes).hexdigest(),
        "width": stored.width,
        "height": stored.height,
    }
    return replace(pair, image_bytes=stored.data, extra={**pair.extra, **known, **measures})


def write_pair_shard(
    folder: Path, stem: str, outcomes: Iterable[TextImagePair | Failure], *, open_file: OpenFile
) -> ShardCounts:
    """Write `<stem>.tar`, `<stem>.parquet` and `<stem>_stats.json`. Outcomes are consumed one at a time, in order."""
    statuses: list[dict[str, Any]] = []

    def kept() -> Iterator[TextImagePair]:
        for outcome in outcomes:
            statuses.append(_status(outcome))
            if isinstance(outcome, TextImagePair):
                yield outcome

    names = (f"{stem}.tar", f"{stem}.parquet", f"{stem}_stats.json")
    with open_file(folder / names[0]) as file:
        ok = write_pairs(file, kept())
    with open_file(folder / names[1]) as file:
        pq.write_table(pa.Table.from_pylist(statuses, schema=STATUS_SCHEMA), file, compression="zstd")
    failed = Counter(status["reason"] for status in statuses if status["status"] == "failed")
    counts = ShardCounts(rows=len(statuses), ok=ok, failed=dict(sorted(failed.items())), files=names)
    stats = {"rows": counts.rows, "ok": counts.ok, "failed": counts.failed}
    with open_file(folder / names[2]) as file:
        file.write((json.dumps(stats, indent=2, sort_keys=True) + "\n").encode())
    assert len(statuses) == ok + failed.total(), "every candidate is either a pair or a failure"
    return counts


def strike_pairs(folder: Path, stem: str, *, keys: Collection[str], open_file: OpenFile) -> ShardCounts:
    """Write a finished shard anew without the pairs of these keys; each leaves a tombstone with its digests.

    It may be repeated after an interruption, when some of the three files are new already.
    """
    statuses = pq.read_table(folder / f"{stem}.parquet").to_pylist()
    return write_pair_shard(folder, stem, _struck(statuses, folder / f"{stem}.tar", set(keys)), open_file=open_file)


def _struck(statuses: Iterable[Mapping[str, Any]], tar: Path, keys: set[str]) -> Iterator[TextImagePair | Failure]:
    pairs = read_pairs(tar)
    pair = next(pairs, None)
    for status in statuses:
        here = pair if pair is not None and pair.key == status["key"] else None
        if here is not None:
            pair = next(pairs, None)
        is_struck = status["key"] in keys
        if status["status"] == "ok" and not is_struck:
            if here is None:
                raise ManifestError(f"{tar} does not hold {status['key']}; run the job that wrote it again")
            yield here
            continue
        known = {name: status[name] for name in ("sha256", "original_sha256") if status.get(name)}
        reason, detail = (TAKEN_DOWN, "") if is_struck else (status["reason"], status["detail"] or "")
        yield Failure(key=status["key"], source=status["source"], reason=reason, detail=detail, tombstone=known)


def _status(outcome: TextImagePair | Failure) -> dict[str, Any]:
    if isinstance(outcome, Failure):
        return {
            "key": outcome.key,
            "source": outcome.source,
            "status": "failed",
            "reason": outcome.reason,
            "detail": outcome.detail,
            **outcome.tombstone,
        }
    return {
        "key": outcome.key,
        "source": outcome.source,
        "status": "ok",
        "reason": "",
        "detail": "",
        "captions": list(outcome.captions),
        "sha256": outcome.extra.get("sha256"),
        "original_sha256": outcome.extra.get("original_sha256"),
        "width": outcome.extra.get("width"),
        "height": outcome.extra.get("height"),
        "bytes": len(outcome.image_bytes),
    }
