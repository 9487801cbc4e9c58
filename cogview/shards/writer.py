"""Token rows as one Arrow file: whole or absent, and the same bytes for the same rows.

In: rows of one split of one shard. Out: `<split>/shard-00042.arrow`, and its record for the manifest. The file is plain
Arrow IPC without compression, in one record batch, so that a reader maps it and takes rows without decoding any.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cogview.errors import SchemaError
from cogview.shards.manifest import atomic_file, file_record
from cogview.shards.schema import TokenOrigin, check_tokens, code_column, token_schema


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One caption of one image.

    text_ids: ids of the text tokenizer; image_codes: uint16 [grid * grid] by rows; other_codes: the same for each of
    the origin's other grids.
    """

    key: str
    text: str
    text_ids: npt.NDArray[np.int32]
    image_codes: npt.NDArray[np.uint16]
    source: str
    other_codes: Mapping[int, npt.NDArray[np.uint16]] = field(default_factory=dict)

    def codes(self, grid: int, *, origin: TokenOrigin) -> npt.NDArray[np.uint16]:
        """The codes of one of the origin's grids, uint16 [grid * grid]. SchemaError if they are missing or strange."""
        codes = self.image_codes if grid == origin.grid else self.other_codes.get(grid)
        if codes is None or codes.dtype != np.uint16 or codes.shape != (grid**2,):
            name = code_column(grid, origin=origin)
            found = "missing" if codes is None else f"{codes.dtype} {list(codes.shape)}"
            raise SchemaError(f"key {self.key!r}: {name} are {found}, a row of this grid has uint16 [{grid**2}]")
        return codes


def write_token_shard(path: Path, rows: Iterable[TokenRow], *, origin: TokenOrigin) -> dict[str, Any]:
    """Write the rows in their order and return the file's record (`bytes`, `sha256`).

    No rows make a valid file of zero rows. Raises SchemaError for a token id or a length that does not fit `origin`,
    StorageError on a full disk; in both cases nothing appears under `path`.
    """
    batch = token_batch(list(rows), origin=origin)
    check_tokens(batch, origin=origin, where=path.name)
    with atomic_file(path) as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    return file_record(path)


def token_batch(rows: list[TokenRow], *, origin: TokenOrigin) -> pa.RecordBatch:
    """The rows as one Arrow batch. SchemaError if an image does not have grid * grid codes of type uint16."""
    schema = token_schema(origin)
    text_ids = np.concatenate([row.text_ids for row in rows]) if rows else np.empty(0, np.int32)
    if not np.issubdtype(text_ids.dtype, np.integer):
        raise SchemaError(f"text_ids are {text_ids.dtype}; they must be integers")
    offsets = np.cumsum([0, *(len(row.text_ids) for row in rows)], dtype=np.int32)
    columns = {
        "key": pa.array([row.key for row in rows], pa.string()),
        "text": pa.array([row.text for row in rows], pa.string()),
        "text_ids": pa.ListArray.from_arrays(
            offsets, pa.array(text_ids, pa.int32()), type=schema.field("text_ids").type
        ),
        "source": pa.array([row.source for row in rows], pa.string()),
    }
    for grid in origin.grids:
        name = code_column(grid, origin=origin)
        codes = [row.codes(grid, origin=origin) for row in rows]
        values = pa.array(np.concatenate(codes) if codes else np.empty(0, np.uint16), pa.uint16())
        columns[name] = pa.FixedSizeListArray.from_arrays(values, type=schema.field(name).type)
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)
