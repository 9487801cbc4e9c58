"""Rows taken out of a finished token shard: the file is written anew without them, whole or not at all."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cogview.errors import SchemaError
from cogview.shards.manifest import atomic_file


def strike_rows(path: Path, *, has_source: Callable[[str], bool], keys: Collection[str]) -> list[str]:
    """Take out the rows of these keys, and those whose source is listed. The keys that went, each once."""
    table = read_rows(path)
    wanted = set(keys)
    struck = [
        key in wanted or has_source(source)
        for key, source in zip(table["key"].to_pylist(), table["source"].to_pylist(), strict=True)
    ]
    if not any(struck):
        return []
    gone = table["key"].filter(pa.array(struck)).to_pylist()
    kept = table.filter(pc.invert(pa.array(struck))).combine_chunks()
    with atomic_file(path) as file, pa.ipc.new_file(file, kept.schema) as writer:
        for batch in kept.to_batches() or [pa.RecordBatch.from_pylist([], schema=kept.schema)]:
            writer.write_batch(batch)
    return list(dict.fromkeys(gone))


def read_rows(path: Path) -> Any:
    """A token shard as an Arrow table with its metadata. SchemaError if it is none."""
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
            table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise SchemaError(f"{path} is no sound token shard: {error}; run tokenize_pairs again") from error
    if not {"key", "source", "text_ids"} <= set(table.schema.names):
        raise SchemaError(f"{path} has the columns {table.schema.names}; rows are found by key and source")
    return table
