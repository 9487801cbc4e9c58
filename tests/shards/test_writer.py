"""A token shard is whole or absent, and the same rows make the same bytes."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cogview.errors import SchemaError
from cogview.shards.manifest import file_record
from cogview.shards.schema import TokenOrigin, check_tokens, token_schema
from cogview.shards.writer import TokenRow, token_batch, write_token_shard
from tests.shards.conftest import ORIGIN, make_rows


def test_the_same_rows_make_the_same_bytes(tmp_path: Path) -> None:
    records = [write_token_shard(tmp_path / name, make_rows(20), origin=ORIGIN) for name in ("a", "b")]
    assert records[0] == records[1] == file_record(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_the_file_is_plain_arrow_with_its_origin(tmp_path: Path) -> None:
    write_token_shard(tmp_path / "shard.arrow", make_rows(3), origin=ORIGIN)
    table = pa.ipc.open_file(tmp_path / "shard.arrow").read_all()
    assert table.schema.names == ["key", "text", "text_ids", "image_codes", "source"]
    assert table.schema.field("image_codes").type.list_size == 9
    assert table.schema.field("image_codes").type.value_type == pa.uint16()
    assert table.schema.field("text_ids").type.value_type == pa.int32()
    assert table.schema.metadata[b"image_tokenizer"] == b"b" * 64
    assert table["text"].to_pylist() == ["第 0 caption", "第 1 caption", "第 2 caption"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_codes": np.full(9, 32, np.uint16)}, "image_codes holds 32"),
        ({"image_codes": np.zeros(8, np.uint16)}, r"uint16 \[8\]"),
        ({"image_codes": np.zeros(9, np.int64)}, r"int64 \[9\]"),
        ({"text_ids": np.array([50], np.int32)}, "text_ids holds 50"),
        ({"text_ids": np.array([-1], np.int32)}, "text_ids holds -1"),
        ({"text_ids": np.array([0.5])}, "float64"),
    ],
)
def test_tokens_that_do_not_fit_are_refused_and_leave_no_file(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    row: TokenRow = replace(make_rows(1)[0], **change)
    with pytest.raises(SchemaError, match=message):
        write_token_shard(tmp_path / "shard.arrow", [row], origin=ORIGIN)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_storage_error_and_leaves_no_file(tmp_path: Path) -> None:
    program = """
import resource, signal, sys
from pathlib import Path
from cogview.errors import StorageError
from cogview.shards.writer import write_token_shard
from tests.shards.conftest import ORIGIN, make_rows
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    write_token_shard(Path(sys.argv[1]), make_rows(500), origin=ORIGIN)
except StorageError as error:
    raise SystemExit(0 if "free space" in str(error) else 3)
raise SystemExit(4)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "shard.arrow")], cwd=root, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert list(tmp_path.iterdir()) == []


def test_codebooks_larger_than_uint16_are_refused() -> None:
    with pytest.raises(SchemaError, match="65536"):
        replace(ORIGIN, num_image_codes=65_537)
    assert replace(ORIGIN, num_image_codes=65_536).num_image_codes == 65_536


def batch_with(name: str, column: pa.Array) -> pa.RecordBatch:
    batch = token_batch(make_rows(2), origin=ORIGIN)
    index = batch.schema.get_field_index(name)
    return batch.set_column(index, name, column)


@pytest.mark.parametrize(
    ("name", "column", "message"),
    [
        ("text", pa.array(["a", None]), "column 'text' has nulls"),
        ("text_ids", pa.array([[1, None], [2]], pa.list_(pa.int32())), "column 'text_ids' has nulls"),
        ("text_ids", pa.array([[1], [2]], pa.list_(pa.int64())), "column 'text_ids' is list"),
        ("image_codes", pa.array([[1] * 9, None], pa.list_(pa.uint16(), 9)), "column 'image_codes' has nulls"),
        ("image_codes", pa.array([[1] * 9] * 2, pa.list_(pa.int32(), 9)), "column 'image_codes' is fixed_size_list"),
        ("image_codes", pa.array([[1] * 9] * 2, pa.list_(pa.uint16())), "column 'image_codes' is list"),
        ("key", pa.array([b"a", b"b"]), "column 'key' is binary"),
    ],
)
def test_foreign_columns_are_named(name: str, column: pa.Array, message: str) -> None:
    with pytest.raises(SchemaError, match=f"here.*{message}"):
        check_tokens(batch_with(name, column), origin=ORIGIN, where="here")


def test_missing_columns_are_named() -> None:
    batch = token_batch(make_rows(2), origin=ORIGIN).drop_columns(["text_ids"])
    with pytest.raises(SchemaError, match=r"\['key', 'text', 'image_codes', 'source'\]"):
        check_tokens(batch, origin=ORIGIN, where="here")


def test_offsets_past_the_end_are_found() -> None:
    offsets, values = np.array([0, 2, 3], np.int32), pa.array([1, 2, 3], pa.int32())
    kind = token_schema(ORIGIN).field("text_ids").type
    broken = pa.Array.from_buffers(kind, 2, [None, pa.py_buffer(offsets)], children=[values])
    offsets[1] = 9  # under Arrow's feet, as a damaged file does
    with pytest.raises(SchemaError, match="damaged"):
        check_tokens(batch_with("text_ids", broken), origin=ORIGIN, where="here")


def test_nullability_flags_of_other_writers_are_accepted() -> None:
    """Data decides about nulls: a shard rewritten by another tool has the same rows with other flags."""
    schema = pa.schema([pa.field(field.name, field.type) for field in token_schema(ORIGIN)])
    batch = pa.RecordBatch.from_arrays(token_batch(make_rows(2), origin=ORIGIN).columns, schema=schema)
    check_tokens(batch, origin=ORIGIN, where="here")
    assert isinstance(ORIGIN, TokenOrigin)
