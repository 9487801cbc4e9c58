"""Token shards to the released layouts and back; rows of others are checked one by one, and nothing is unpickled."""

import os
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch

from cogview.errors import ConfigError, SchemaError
from cogview.shards.integer_rows import RowLayout, map_rows, read_row, write_rows
from cogview.shards.manifest import ShardEntry, read_manifest, shard_name, write_manifest
from cogview.shards.pickled_rows import open_lmdb, read_pickled_row
from cogview.shards.reader import TokenShards
from cogview.shards.schema import TokenOrigin
from cogview.shards.writer import TokenRow, write_token_shard
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.text import TextTokenizer, TextTokenizerConfig, train_text_tokenizer
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.tokenizers.vqvae import ImageTokenizer, VQVAEConfig
from pipelines import export_tokens, import_tokens
from tests.pipelines.job_runs import ShownRun, open_run

GRID, CODES, PIECES = 4, 64, 90
COGVIEW = RowLayout(layout="cogview", grid=32, num_image_codes=8192, num_text_pieces=50_000)
COGVIEW2 = RowLayout(layout="cogview2", grid=20, num_image_codes=20_000, num_text_pieces=130_000)


def test_rows_have_the_released_lengths_offsets_and_pads() -> None:
    codes = np.arange(2 * 1024, dtype=np.uint16).reshape(2, 1024)
    rows = write_rows([np.array([5, 6], np.int32), np.arange(70, dtype=np.int32)], codes, layout=COGVIEW)
    assert (rows.shape, rows.dtype) == ((2, 1088), np.int32)
    assert rows[0, :4].tolist() == [8197, 8198, -1, -1]
    assert rows[1, 63] == 8192 + 63
    assert rows[1, 64:].tolist() == codes[1].tolist()
    rows = write_rows([np.arange(4, 200, dtype=np.int32)], codes[:1, :400], layout=COGVIEW2)
    assert rows.shape == (1, 512)
    assert rows[0, 110:113].tolist() == [20_114, 20_003, 0]  # one pad at least, then the codes


def test_a_row_of_cogview2_may_hold_two_languages() -> None:
    row = np.full(512, 20_003, np.int32)
    row[:2], row[3:6], row[112:] = [20_100, 20_101], [90_000, 90_001, 90_002], 7
    texts, codes = read_row(row, layout=COGVIEW2)
    assert texts == [[100, 101], [70_000, 70_001, 70_002]]
    assert codes.dtype == np.uint16
    assert set(codes.tolist()) == {7}


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [(70, 8192, "codes_out_of_range"), (70, -1, "codes_out_of_range"), (0, 8191, "text_out_of_range"),
     (0, 58_192, "text_out_of_range"), (slice(0, 64), -1, "text_missing")],
)  # fmt: skip
def test_rows_that_cannot_be_have_a_reason(place: Any, value: int, reason: str) -> None:
    row = write_rows([np.array([5], np.int32)], np.zeros((1, 1024), np.uint16), layout=COGVIEW)[0]
    row[place] = value
    assert read_row(row, layout=COGVIEW) == reason


def test_a_file_of_other_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(bytes(4 * 1088 + 4))
    with pytest.raises(SchemaError, match="no whole number of rows of 1088 int32"):
        map_rows(tmp_path / "x.bin", layout=COGVIEW)


class Harmful:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def test_pickles_give_integers_and_run_nothing(tmp_path: Path) -> None:
    codes = np.arange(9, dtype=np.int64)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for kind in ("<i2", ">i4", "<i8", "<u2"):
            text, found = read_pickled_row(pickle.dumps(("一只猫", codes.astype(kind)), protocol=protocol))
            assert (text, found.tolist()) == ("一只猫", list(range(9)))
    assert read_pickled_row(pickle.dumps(([3, 4], list(range(9)))))[0] == [3, 4]
    canary = tmp_path / "canary"
    refused = [
        (Harmful(canary), codes),
        ("text", Harmful(canary)),
        ("text", torch.arange(3)),
        (Path("x"), codes),
        ("text", np.array([Harmful(canary)], object)),
    ]
    for row in refused:
        assert read_pickled_row(pickle.dumps(row)) == ("pickle_refused",)
    damaged = [b"", b"junk", pickle.dumps(("text", codes))[:-9], pickle.dumps("text"), pickle.dumps(("text", [0.5]))]
    damaged.append(pickle.dumps(("text", np.array([None], object))))
    for data in damaged:
        assert read_pickled_row(data) == ("pickle_damaged",)
    assert not canary.exists()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = [f"a {word} picture of number {n}" for n in range(60) for word in ("red", "blue", "large", "small")]
    train_text_tokenizer(texts, config=TextTokenizerConfig(num_pieces=PIECES, exact=False), output=folder / "text")
    torch.manual_seed(0)
    codebook = CodebookConfig(num_codes=CODES, code_dim=8)
    ImageTokenizer(VQVAEConfig(widths=(8, 8, 8), codebook=codebook)).save(folder / "image")
    return {"text_tokenizer": folder / "text", "image_tokenizer": folder / "image"}


@pytest.fixture(scope="module")
def tokens(tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of rows, one of whose texts is too long for a row of CogView's."""
    folder, text = tmp_path_factory.mktemp("tokens"), TextTokenizer.load(tokenizers["text_tokenizer"])
    image = ImageTokenizer.load(tokenizers["image_tokenizer"])
    origin = TokenOrigin(
        text_tokenizer=text.fingerprint,
        image_tokenizer=image.fingerprint,
        vocabulary=Vocabulary(CODES, text.num_pieces).fingerprint,
        num_image_codes=CODES,
        num_text_pieces=text.num_pieces,
        grid=GRID,
    )
    generator, entries = np.random.default_rng(0), []
    for shard in range(2):
        rows = [
            TokenRow(
                key=f"{shard}_{n}",
                text=(caption := f"a red picture of number {n}" + " blue" * (300 if n == 30 else 0)),
                text_ids=np.array(text.encode(caption), np.int32),
                image_codes=generator.integers(0, CODES, GRID**2, dtype=np.uint16),
                source="x",
            )
            for n in range(31)
        ]
        parts = {"train": rows[1:], "validation": rows[:1]}
        names = {split: f"{split}/{shard_name(shard, 'arrow')}" for split in parts}
        files = {
            names[split]: write_token_shard(folder / names[split], part, origin=origin) for split, part in parts.items()
        }
        entries.append(ShardEntry(shard=shard, rows_in=31, rows_out=31, files=files))
    write_manifest(folder, entries, extra={**origin.stored, "rows_train": 60, "rows_validation": 2})
    return folder


def imported(data: Path, output: Path, tokenizers: dict[str, Path], **changes: Any) -> ShownRun:
    run = open_run(output)
    settings = {"grid": GRID, "validation_fraction": 0.1, "shard_size": 25}
    import_tokens.main(import_tokens.Config(data=data, **tokenizers, **(settings | changes)), run)
    return run


def rows_of(folder: Path, splits: Sequence[str] = ("train", "validation")) -> set[tuple[str, bytes]]:
    found = set()
    for split in splits:
        shards = TokenShards.open(folder, split=split, deep=True)
        rows = shards.rows(np.arange(len(shards)))
        found |= {(ids.tobytes(), codes.tobytes()) for ids, codes in zip(rows.text_ids, rows.image_codes, strict=True)}
    return found


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("layout", ["cogview", "cogview2"])
def test_what_is_exported_comes_back(tmp_path: Path, tokens: Path, tokenizers: dict[str, Path], layout: str) -> None:
    run = open_run(tmp_path / "out")
    config = replace(export_tokens.PRESETS[layout], tokens=tokens)
    export_tokens.main(config, run)
    assert read_manifest(run.output, deep=True)["rows_out"] == 62
    assert run.scores["texts_cut"] == 2
    assert f"2 texts were cut to {config.max_text} ids" in run.lines[-1]
    folder = tmp_path / "bins"
    folder.mkdir()
    for path in run.output.rglob("*.bin"):
        path.rename(folder / f"{path.parent.name}-{path.name}")
    back = imported(folder, tmp_path / "back", tokenizers, layout=layout)
    expected = {(np.frombuffer(ids, np.int32)[: config.max_text].tobytes(), codes) for ids, codes in rows_of(tokens)}
    assert rows_of(back.output) == expected
    shards = TokenShards.open(back.output)
    shards.require(image_tokenizer=TokenShards.open(tokens).fingerprints["image_tokenizer"])
    text = TextTokenizer.load(tokenizers["text_tokenizer"])
    row = shards.rows(np.arange(1))
    assert row.texts[0] == text.decode(row.text_ids[0].tolist())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_an_lmdb_is_read_row_by_row_and_nothing_in_it_is_run(tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    codes = np.arange(GRID**2, dtype=np.int32)
    values: list[Any] = [("a red picture", codes), ([CODES + 5, CODES + 6, -1], codes.tolist())] * 20
    values += [(Harmful(tmp_path / "canary"), codes), ("x", codes[:9]), ("x", codes + CODES), ([5], codes), ("", codes)]
    with lmdb.open(str(tmp_path / "rows"), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for number, value in enumerate(values):
            transaction.put(str(number).encode(), pickle.dumps(value))
        transaction.put(b"length", str(len(values) + 1).encode())
    run = imported(tmp_path / "rows", tmp_path / "out", tokenizers, layout="lmdb")
    manifest = read_manifest(run.output, deep=True)
    assert (manifest["rows_in"], manifest["rows_out"]) == (46, 40)
    assert manifest["rejected"] == {
        "pickle_refused": 1,
        "codes_of_another_grid": 1,
        "codes_out_of_range": 1,
        "text_out_of_range": 1,
        "text_missing": 1,
        "row_missing": 1,
    }
    assert not (tmp_path / "canary").exists()
    ids = {tuple(np.frombuffer(ids, np.int32)) for ids, _ in rows_of(run.output)}
    assert ids == {(5, 6), tuple(TextTokenizer.load(tokenizers["text_tokenizer"]).encode("a red picture"))}


def test_what_is_no_lmdb_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"junk" * 5000)
    with pytest.raises(SchemaError, match="no LMDB that can be read"), open_lmdb(tmp_path):
        pass


def test_a_text_that_no_row_has_place_for_is_a_setting_that_cannot_work(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_text is 65; a row of cogview has place for 64"):
        export_tokens.main(export_tokens.Config(tokens=tokens, max_text=65), open_run(tmp_path))
