"""Manifests and entries: whole or refused."""

import os
from pathlib import Path

import pytest

from cogview.errors import ManifestError, StorageError
from cogview.shards.manifest import (
    ShardEntry,
    atomic_file,
    read_entry,
    read_sealed,
    write_entry,
    write_json,
    write_sealed,
)

VALUES = {"rows_in": 12, "rejected": {"caption_missing": 2}, "text": "猫 ☃"}


def test_sealed_values_come_back(tmp_path: Path) -> None:
    write_sealed(tmp_path / "a.json", VALUES)
    assert read_sealed(tmp_path / "a.json") == VALUES


def test_every_flipped_bit_of_a_sealed_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_sealed(path, VALUES)
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ManifestError, match=r"a\.json is (damaged|missing or damaged)"):
            read_sealed(path)


def test_a_file_without_a_seal_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", VALUES)
    with pytest.raises(ManifestError, match="of an older version"):
        read_sealed(tmp_path / "a.json")


def test_an_entry_that_has_changed_is_not_done(tmp_path: Path) -> None:
    write_entry(tmp_path, ShardEntry(shard=3, rows_in=5, rows_out=5))
    assert read_entry(tmp_path, 3) is not None
    path = tmp_path / "_manifest" / "shard-00003.json"
    path.write_bytes(path.read_bytes().replace(b'"rows_in": 5', b'"rows_in": 6'))
    assert read_entry(tmp_path, 3) is None


def test_a_file_that_reads_back_differently_never_appears(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"a\.bin reads back differently"):
        write_to_a_failing_disk(tmp_path / "a.bin")
    assert list(tmp_path.iterdir()) == []


def write_to_a_failing_disk(path: Path) -> None:
    with atomic_file(path) as file:
        file.write(b"what should be there")
        file.flush()
        (temporary,) = path.parent.iterdir()
        with open(temporary, "r+b") as disk:
            disk.write(b"X")


def test_a_rename_that_was_not_done_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", lambda source, target: None)
    with pytest.raises(StorageError, match=r"was not renamed to .*part"), atomic_file(tmp_path / "part") as file:
        file.write(b"all of it")
    assert not any(tmp_path.iterdir())
