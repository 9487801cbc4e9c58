"""A folder may hold each picture at several sizes; one with a single size is what it always was."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cogview.errors import ConfigError, SchemaError, VocabularyError
from cogview.shards.manifest import MANIFEST_NAME, ShardEntry, read_sealed, write_manifest, write_sealed
from cogview.shards.reader import TokenShards
from cogview.shards.schema import TokenOrigin, check_tokens
from cogview.shards.writer import TokenRow, token_batch, write_token_shard
from tests.shards.conftest import ORIGIN, make_rows

GRIDS = replace(ORIGIN, other_grids=(2, 4))


def rows_of_three_sizes(count: int) -> list[TokenRow]:
    generator = np.random.default_rng(7)

    def codes(grid: int) -> np.ndarray:
        return generator.integers(0, 32, grid**2, dtype=np.uint16)

    return [replace(row, other_codes={2: codes(2), 4: codes(4)}) for row in make_rows(count)]


def write(folder: Path, rows: list[TokenRow], *, origin: TokenOrigin = GRIDS) -> Path:
    names = {split: f"{split}/shard-00000.arrow" for split in ("train", "validation")}
    files = {
        name: write_token_shard(folder / name, rows if split == "train" else [], origin=origin)
        for split, name in names.items()
    }
    entry = ShardEntry(shard=0, rows_in=len(rows), rows_out=len(rows), files=files)
    write_manifest(folder, [entry], extra={**origin.stored, "rows_train": len(rows), "rows_validation": 0})
    return folder


def test_codes_of_every_size_come_back(tmp_path: Path) -> None:
    rows = rows_of_three_sizes(20)
    shards = TokenShards.open(write(tmp_path, rows), deep=True)
    assert (shards.grid, shards.other_grids) == (3, (2, 4))
    order = np.array([7, 0, 19, 7])
    found = shards.rows(order, other_grids=(4, 2))
    for grid in (4, 2):
        assert found.other_codes[grid].shape == (4, grid**2)
        assert np.array_equal(found.other_codes[grid], [rows[row].other_codes[grid] for row in order])
    assert np.array_equal(found.image_codes, [rows[row].image_codes for row in order])


def test_other_sizes_are_read_only_when_they_are_asked_for(tmp_path: Path) -> None:
    shards = TokenShards.open(write(tmp_path, rows_of_three_sizes(3)))
    assert shards.rows(np.arange(3)).other_codes == {}
    with pytest.raises(ConfigError, match=r"has codes of 3x3, 2x2, 4x4, not of 5x5.*--other-image-sizes"):
        shards.rows(np.arange(3), other_grids=(5,))


def test_a_folder_of_one_size_has_the_bytes_it_had_before_there_were_others(tmp_path: Path) -> None:
    """Of the first release: whoever changes these bytes makes every finished run tokenize and train again."""
    row = TokenRow(
        key="k", text="t", text_ids=np.array([1, 2], np.int32), image_codes=np.arange(9, dtype=np.uint16), source="s"
    )
    write(tmp_path, [row], origin=ORIGIN)
    shard = pa.ipc.open_file(tmp_path / "train" / "shard-00000.arrow")
    assert shard.schema.names == ["key", "text", "text_ids", "image_codes", "source"]
    assert b"other_grids" not in shard.schema.metadata
    extra = json.loads((tmp_path / MANIFEST_NAME).read_text())["extra"]
    assert sorted(extra) == sorted([*ORIGIN.metadata, "rows_train", "rows_validation"])
    assert list(ORIGIN.metadata) == [
        "text_tokenizer", "image_tokenizer", "vocabulary", "num_image_codes", "num_text_pieces", "grid",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ({2: np.zeros(4, np.uint16)}, "image_codes_4 are missing"),
        ({2: np.zeros(4, np.uint16), 4: np.zeros(15, np.uint16)}, r"image_codes_4 are uint16 \[15\]"),
        ({2: np.zeros(4, np.uint16), 4: np.full(16, 32, np.uint16)}, "image_codes_4 holds 32"),
    ],
)
def test_codes_of_another_size_are_checked_as_the_main_ones_are(codes: dict[int, np.ndarray], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        check_tokens(token_batch([replace(make_rows(1)[0], other_codes=codes)], origin=GRIDS), origin=GRIDS, where="x")


def test_sizes_are_told_apart_by_the_origin(tmp_path: Path) -> None:
    write(tmp_path, rows_of_three_sizes(2))
    manifest = read_sealed(tmp_path / MANIFEST_NAME)
    manifest["extra"]["other_grids"] = [4, 2]
    write_sealed(tmp_path / MANIFEST_NAME, manifest)
    with pytest.raises((SchemaError, VocabularyError), match=r"other_grids|columns"):
        TokenShards.open(tmp_path)
    with pytest.raises(SchemaError, match=r"the grids are \[3, 3\]"):
        replace(ORIGIN, other_grids=(3,))
