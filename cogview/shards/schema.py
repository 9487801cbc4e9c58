"""The door between tokenizers and training: one row per (image, caption).

In: an Arrow table from anywhere. Out: the same table, checked, or a SchemaError that names the file, the column and the
row. Image codes are uint16 (a codebook has at most 65,536 codes), text ids are the text tokenizer's own, without the
vocabulary's offset. At 32x32 codes a row takes about 2.2 KB, so 30 million rows are about 65 GB, a quarter of what
the paper's own format took.

A folder may hold each picture at more than one size, for super-resolution: its main grid is the column `image_codes`,
every other grid a column of its own, such as `image_codes_16`. With one grid there is nothing but `image_codes`.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cogview.errors import SchemaError

MAX_IMAGE_CODES = 1 << 16  # codes are stored as uint16
SPLITS = ("train", "validation")


@dataclass(frozen=True, kw_only=True)
class TokenOrigin:
    """What the rows of a folder were made with; it travels in the manifest and in each shard's own metadata.

    text_tokenizer, image_tokenizer, vocabulary: fingerprints; grid: image codes along one side; other_grids: the same
    of the sizes that each picture was encoded at besides, in their order.
    """

    text_tokenizer: str
    image_tokenizer: str
    vocabulary: str
    num_image_codes: int
    num_text_pieces: int
    grid: int
    other_grids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.num_image_codes <= MAX_IMAGE_CODES:
            raise SchemaError(
                f"num_image_codes is {self.num_image_codes}; shards hold codes as uint16, so a codebook needs "
                f"1 to {MAX_IMAGE_CODES} codes"
            )
        if self.num_text_pieces < 1 or self.grid < 1:
            raise SchemaError(
                f"num_text_pieces is {self.num_text_pieces} and grid is {self.grid}; both must be at least 1"
            )
        if min(self.grids) < 1 or len(set(self.grids)) < len(self.grids):
            raise SchemaError(f"the grids are {list(self.grids)}; each must be at least 1 and be there once")

    @property
    def grids(self) -> tuple[int, ...]:
        """The main grid, then the others."""
        return (self.grid, *self.other_grids)

    @property
    def stored(self) -> dict[str, Any]:
        """The fields as a manifest holds them; with one grid there is no word of others."""
        fields = asdict(self)
        return fields if self.other_grids else {name: fields[name] for name in fields if name != "other_grids"}

    @property
    def metadata(self) -> dict[str, str]:
        """The same as strings, for an Arrow schema's metadata."""
        grids = {"other_grids": ",".join(map(str, self.other_grids))} if self.other_grids else {}
        return {name: str(value) for name, value in self.stored.items()} | grids


def code_column(grid: int, *, origin: TokenOrigin) -> str:
    """The name of the column that holds the codes of a grid."""
    return "image_codes" if grid == origin.grid else f"image_codes_{grid}"


def token_schema(origin: TokenOrigin) -> pa.Schema:
    """The columns of a shard, with its origin as metadata."""

    def codes(grid: int) -> pa.Field:
        kind = pa.list_(pa.field("item", pa.uint16(), nullable=False), grid**2)
        return pa.field(code_column(grid, origin=origin), kind, nullable=False)

    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("text", pa.string(), nullable=False),
            pa.field("text_ids", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
            codes(origin.grid),
            pa.field("source", pa.string(), nullable=False),
            *(codes(grid) for grid in origin.other_grids),
        ],
        metadata=origin.metadata,
    )


def check_schema(schema: pa.Schema, *, origin: TokenOrigin, where: str) -> None:
    """Raise SchemaError unless the columns are those of a shard of this grid. Nullability flags may differ."""
    wanted = token_schema(origin)
    if schema.names != wanted.names:
        raise SchemaError(f"{where} has the columns {schema.names}, a token shard has {wanted.names}")
    for field in wanted:
        found = schema.field(field.name).type
        # List types compare the nullability of their items as well; data decides about nulls, not the flag.
        if _shape_of(found) != _shape_of(field.type):
            raise SchemaError(f"{where}: column {field.name!r} is {found}, a token shard of this grid has {field.type}")


def check_structure(batch: pa.RecordBatch, *, where: str) -> None:
    """Raise SchemaError unless offsets, lengths and UTF-8 are sound and nothing is null. Token values are not read."""
    try:
        batch.validate(full=True)
    except pa.ArrowException as error:
        raise SchemaError(f"{where} is damaged: {error}; delete it and run tokenize_pairs again") from error
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        nested = column.values if pa.types.is_nested(column.type) else column
        if column.null_count or nested.null_count:
            raise SchemaError(f"{where}: column {name!r} has nulls; a token shard has none")


def check_tokens(batch: pa.RecordBatch, *, origin: TokenOrigin, where: str) -> None:
    """Raise SchemaError unless schema, structure and every token id of the batch are right. Reads all of it."""
    check_schema(batch.schema, origin=origin, where=where)
    check_structure(batch, where=where)
    text_ids, offsets = text_id_arrays(batch)
    check_ids(text_ids[offsets[0] : offsets[-1]], limit=origin.num_text_pieces, name="text_ids", where=where)
    for grid in origin.grids:
        name = code_column(grid, origin=origin)
        check_ids(image_code_array(batch, name=name), limit=origin.num_image_codes, name=name, where=where)


def check_ids(ids: npt.NDArray[np.int32] | npt.NDArray[np.uint16], *, limit: int, name: str, where: str) -> None:
    """Raise SchemaError unless every id is in [0, limit)."""
    if not ids.size:
        return
    lowest = int(ids.min()) if ids.dtype.kind == "i" else 0  # not looked for among unsigned numbers
    highest = int(ids.max())
    if lowest < 0 or highest >= limit:
        worst = highest if highest >= limit else lowest
        raise SchemaError(
            f"{where}: {name} holds {worst}, but ids go from 0 to {limit - 1}; the file is damaged or was made with "
            "another tokenizer, run tokenize_pairs again"
        )


def image_code_array(batch: pa.RecordBatch, *, name: str = "image_codes") -> npt.NDArray[np.uint16]:
    """The codes of one grid of a batch (`code_column`) as uint16 [rows, grid * grid], without a copy."""
    column = batch.column(name)
    codes: npt.NDArray[np.uint16] = column.flatten().to_numpy(zero_copy_only=True)
    return codes.reshape(len(batch), column.type.list_size)


def text_id_arrays(batch: pa.RecordBatch) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Text ids of a batch, not copied: values and offsets. Row `i` is `values[offsets[i] : offsets[i + 1]]`."""
    column = batch.column("text_ids")
    return column.values.to_numpy(zero_copy_only=True), column.offsets.to_numpy(zero_copy_only=True)


def _shape_of(kind: pa.DataType) -> tuple[str, ...]:
    if pa.types.is_fixed_size_list(kind):
        return ("fixed_size_list", str(kind.value_type), str(kind.list_size))
    if pa.types.is_list(kind):
        return ("list", str(kind.value_type))
    return (str(kind),)
