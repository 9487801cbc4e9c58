"""Candidates for pairs, before anything is fetched or opened, as a Parquet file whose row groups are the later shards.

A list of thirty million rows is written and read one shard at a time; whoever works on shard 42 reads row group 42.
"""

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from cogview.errors import SchemaError

SCHEMA = pa.schema([("source", pa.string()), ("captions", pa.list_(pa.string())), ("extra", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An image's URL or path, and the captions known so far (cleaned). extra: what else is known, as JSON values."""

    source: str
    captions: tuple[str, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)


def write_candidates(file: BinaryIO, candidates: Iterable[Candidate], *, shard_size: int) -> int:
    """Write candidates, `shard_size` to a row group. Returns how many there were."""
    remaining = iter(candidates)
    total = 0
    with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        while rows := list(itertools.islice(remaining, shard_size)):
            columns = {
                "source": [row.source for row in rows],
                "captions": [list(row.captions) for row in rows],
                "extra": [json.dumps(dict(row.extra), ensure_ascii=True, sort_keys=True) for row in rows],
            }
            writer.write_table(pa.table(columns, schema=SCHEMA), row_group_size=shard_size)
            total += len(rows)
    return total


def count_candidates(path: Path) -> tuple[int, int]:
    """(candidates, shards) in a file of `write_candidates`."""
    metadata = pq.read_metadata(path)
    return metadata.num_rows, metadata.num_row_groups


def read_candidates(path: Path, *, shard: int) -> list[Candidate]:
    """The candidates of one shard. SchemaError if the file is none of ours."""
    with pq.ParquetFile(path) as parquet:
        if not parquet.schema_arrow.equals(SCHEMA, check_metadata=False):
            raise SchemaError(f"{path} has columns {parquet.schema_arrow.names}, expected {SCHEMA.names}; delete it")
        rows = parquet.read_row_group(shard).to_pylist()
    return [
        Candidate(source=row["source"], captions=tuple(row["captions"]), extra=json.loads(row["extra"])) for row in rows
    ]
