import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cogview.errors import ManifestError
from cogview.records.images import ImageSettings
from cogview.records.pair import Failure, TextImagePair
from cogview.records.pair_shards import STATUS_SCHEMA, pair_key, store_pair, write_pair_shard
from cogview.records.tars import read_pairs
from cogview.shards.manifest import atomic_file
from tests.records.test_images import RED_TO_BLUE
from tests.records.web_site import encode


def stored(row: int) -> TextImagePair | Failure:
    data = encode(RED_TO_BLUE.rotate(row)) if row % 3 else b"<html>"
    return store_pair(
        TextImagePair(key=pair_key(4, row), captions=("x",), image_bytes=data, source=f"s{row}"), ImageSettings()
    )


def test_a_shard_accounts_for_every_candidate(tmp_path: Path) -> None:
    counts = write_pair_shard(tmp_path, "shard-00004", map(stored, range(10)), open_file=atomic_file)
    assert (counts.rows, counts.ok, counts.failed) == (10, 6, {"image_is_html": 4})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(counts.files)
    table = pq.read_table(tmp_path / "shard-00004.parquet")
    assert table.schema.equals(STATUS_SCHEMA)
    rows = {row["key"]: row for row in table.to_pylist()}
    assert len(rows) == 10
    assert rows["00004_00003"]["reason"] == "image_is_html"
    for pair in read_pairs(tmp_path / "shard-00004.tar"):
        row = rows[pair.key]
        assert row["status"] == "ok"
        assert row["sha256"] == hashlib.sha256(pair.image_bytes).hexdigest() == pair.extra["sha256"]
        assert (row["width"], row["height"], row["bytes"]) == (96, 64, len(pair.image_bytes))
    assert json.loads((tmp_path / "shard-00004_stats.json").read_text()) == {
        "rows": 10,
        "ok": 6,
        "failed": {"image_is_html": 4},
    }


def test_the_same_outcomes_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_pair_shard(tmp_path / name, "shard-00004", map(stored, range(10)), open_file=atomic_file)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_an_empty_shard_is_a_shard(tmp_path: Path) -> None:
    counts = write_pair_shard(tmp_path, "s", [], open_file=atomic_file)
    assert (counts.rows, counts.ok) == (0, 0)
    assert list(read_pairs(tmp_path / "s.tar")) == []


def test_a_shard_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> object:
        yield stored(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pair_shard(tmp_path, "s", broken(), open_file=atomic_file)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_keys_have_room_for_a_hundred_thousand_rows() -> None:
    assert pair_key(12, 99_999) == "00012_99999"
    with pytest.raises(ManifestError, match="split it"):
        pair_key(12, 100_000)
