"""Rows come back as they were written, and damaged or foreign shards never do."""

import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cogview.errors import CogViewError, ConfigError, ManifestError, SchemaError, VocabularyError
from cogview.shards.manifest import MANIFEST_NAME, read_sealed, write_sealed
from cogview.shards.reader import TokenShards
from cogview.shards.writer import TokenRow, write_token_shard
from tests.shards.conftest import ORIGIN, WriteFolder, make_rows


def assert_same(shards: TokenShards, rows: list[TokenRow], indices: list[int]) -> None:
    found = shards.rows(np.array(indices, np.int64))
    wanted = [rows[index] for index in indices]
    assert len(found) == len(indices)
    assert found.keys == [row.key for row in wanted]
    assert found.texts == [row.text for row in wanted]
    assert [ids.tolist() for ids in found.text_ids] == [row.text_ids.tolist() for row in wanted]
    assert found.image_codes.tolist() == [row.image_codes.tolist() for row in wanted]
    assert found.image_codes.dtype == np.uint16


def test_rows_come_back_in_the_order_asked_for(tmp_path: Path, write_folder: WriteFolder) -> None:
    rows = write_folder(5, 0, 1, 17)
    shards = TokenShards.open(tmp_path)
    assert len(shards) == 23
    assert shards.grid == 3
    assert_same(shards, rows, list(range(23)))
    assert_same(shards, rows, [22, 0, 5, 5, 4, 6, 22])
    assert_same(shards, rows, [])
    for seed in range(20):
        assert_same(shards, rows, np.random.default_rng(seed).integers(0, 23, 11).tolist())


def test_without_texts_only_tokens_are_read(tmp_path: Path, write_folder: WriteFolder) -> None:
    rows = write_folder(5)
    found = TokenShards.open(tmp_path).rows(np.arange(5), with_texts=False)
    assert found.keys == found.texts == []
    assert found.image_codes.tolist() == [row.image_codes.tolist() for row in rows]


def test_an_empty_split_opens_and_has_no_rows(tmp_path: Path, write_folder: WriteFolder) -> None:
    write_folder(2, 3)
    shards = TokenShards.open(tmp_path, split="validation")
    assert len(shards) == 0
    assert len(shards.rows(np.empty(0, np.int64))) == 0
    with pytest.raises(IndexError):
        shards.rows(np.array([0]))


@pytest.mark.parametrize("index", [-1, 5])
def test_rows_outside_the_split_are_refused(tmp_path: Path, write_folder: WriteFolder, index: int) -> None:
    write_folder(5)
    with pytest.raises(IndexError, match="of 5 train rows"):
        TokenShards.open(tmp_path).rows(np.array([0, index]))


def test_unknown_split_is_refused(tmp_path: Path, write_folder: WriteFolder) -> None:
    write_folder(1)
    with pytest.raises(ConfigError, match="train and validation"):
        TokenShards.open(tmp_path, split="test")


def test_other_fingerprints_are_refused(tmp_path: Path, write_folder: WriteFolder) -> None:
    write_folder(1)
    shards = TokenShards.open(tmp_path)
    shards.require(text_tokenizer="a" * 64, image_tokenizer="b" * 64, vocabulary="c" * 64)
    shards.require()
    for name in ("text_tokenizer", "image_tokenizer", "vocabulary"):
        with pytest.raises(VocabularyError, match=name):
            shards.require(**{name: "f" * 64})


def test_a_shard_of_other_tokenizers_in_the_folder_is_refused(tmp_path: Path, write_folder: WriteFolder) -> None:
    write_folder(4, 4)
    foreign = tmp_path / "train" / "shard-00001.arrow"
    write_token_shard(foreign, make_rows(4, seed=1, start=4), origin=replace(ORIGIN, image_tokenizer="d" * 64))
    with pytest.raises(VocabularyError, match="image_tokenizer dddd"):
        TokenShards.open(tmp_path)


def test_a_shard_of_another_grid_is_refused(tmp_path: Path, write_folder: WriteFolder) -> None:
    write_folder(4)
    manifest = read_sealed(tmp_path / MANIFEST_NAME)
    manifest["extra"]["grid"] = 4
    write_sealed(tmp_path / MANIFEST_NAME, manifest)
    with pytest.raises(SchemaError, match="image_codes"):
        TokenShards.open(tmp_path)


def test_a_row_count_that_differs_from_the_manifest_is_refused(tmp_path: Path, write_folder: WriteFolder) -> None:
    write_folder(4)
    manifest = read_sealed(tmp_path / MANIFEST_NAME)
    manifest["extra"]["rows_train"] = 5
    write_sealed(tmp_path / MANIFEST_NAME, manifest)
    with pytest.raises(ManifestError, match="promises 5 train rows"):
        TokenShards.open(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_cut_shard_is_refused(tmp_path: Path, write_folder: WriteFolder, keep: int) -> None:
    write_folder(9)
    path = tmp_path / "train" / "shard-00000.arrow"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ManifestError, match=r"shard-00000.arrow does not match"):
        TokenShards.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"ARROW1\0\0", b"not an arrow file at all", b"ARROW1\0\0" + b"\xff" * 64])
def test_a_listed_file_that_is_no_arrow_file_is_refused(
    tmp_path: Path, write_folder: WriteFolder, content: bytes
) -> None:
    write_folder(9)
    (tmp_path / "train" / "shard-00000.arrow").write_bytes(content)
    manifest = read_sealed(tmp_path / MANIFEST_NAME)
    manifest["shards"][0]["files"]["train/shard-00000.arrow"]["bytes"] = len(content)
    write_sealed(tmp_path / MANIFEST_NAME, manifest)
    with pytest.raises(SchemaError, match="no whole Arrow file"):
        TokenShards.open(tmp_path)


def test_every_flipped_bit_is_found_by_a_deep_opening(tmp_path: Path, write_folder: WriteFolder) -> None:
    write_folder(9)
    path = tmp_path / "train" / "shard-00000.arrow"
    whole = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(whole) * 8, 200).tolist():
        flip_bit(path, whole, place)
        with pytest.raises(ManifestError):
            TokenShards.open(tmp_path, deep=True)


def test_a_flipped_bit_never_gives_ids_outside_the_vocabulary(tmp_path: Path, write_folder: WriteFolder) -> None:
    """Without sha256 a flip may change a token or a letter, but it raises or stays in range; it never crashes."""
    write_folder(9)
    path = tmp_path / "train" / "shard-00000.arrow"
    whole = path.read_bytes()
    outcomes = {"raised": 0, "read": 0}
    for place in np.random.default_rng(1).integers(0, len(whole) * 8, 1000).tolist():
        flip_bit(path, whole, place)
        try:
            rows = TokenShards.open(tmp_path).rows(np.arange(9))
        except CogViewError:
            outcomes["raised"] += 1
        else:
            outcomes["read"] += 1
            assert rows.image_codes.max() < 32
            assert all(ids.min(initial=0) >= 0 and ids.max(initial=0) < 50 for ids in rows.text_ids)
    assert outcomes["raised"] > 100
    assert outcomes["read"] > 100


def flip_bit(path: Path, whole: bytes, place: int) -> None:
    damaged = bytearray(whole)
    damaged[place // 8] ^= 1 << place % 8
    path.write_bytes(damaged)


def test_more_shards_than_open_files_are_allowed(tmp_path: Path, write_folder: WriteFolder) -> None:
    rows = write_folder(*[1] * 120)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        shards = TokenShards.open(tmp_path)
        assert_same(shards, rows, list(range(119, -1, -1)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("content", ["[]", "{}", '{"shards": [{}]}', '{"shards": 3, "extra": {}}', "nonsense"])
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(content)
    with pytest.raises(ManifestError, match="manifest"):
        TokenShards.open(tmp_path)


@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/hostname", "train/../../outside.arrow"])
def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "tokens"
    folder.mkdir()
    (tmp_path / "outside.arrow").write_bytes(b"x")
    entry = {"shard": 0, "files": {name: {"bytes": 1, "sha256": "0" * 64}}}
    write_sealed(folder / MANIFEST_NAME, {"shards": [entry], "extra": {}})
    with pytest.raises(ManifestError, match="outside its folder"):
        TokenShards.open(folder)


def test_a_folder_of_another_job_is_refused(tmp_path: Path) -> None:
    write_sealed(tmp_path / MANIFEST_NAME, {"shards": [], "extra": {}})
    with pytest.raises(ManifestError, match="tokenize_pairs"):
        TokenShards.open(tmp_path)
