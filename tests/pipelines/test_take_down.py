import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cogview.config import input_field
from cogview.errors import ConfigError, ManifestError
from cogview.records.pair import Failure, TextImagePair
from cogview.records.pair_shards import strike_pairs
from cogview.records.tars import read_pairs
from cogview.shards.manifest import (
    MANIFEST_NAME,
    ShardEntry,
    atomic_file,
    read_entry,
    read_manifest,
    write_entry,
    write_manifest,
)
from cogview.shards.reader import TokenShards
from cogview.shards.schema import SPLITS, TokenOrigin
from cogview.shards.writer import TokenRow, write_token_shard
from pipelines import take_down as taking_down
from pipelines.runtime.jobs import Finished, Job, JobRun, digest_input, read_finished, run_job
from pipelines.take_down import JOB, JOURNAL_NAME, Config
from tests.pipelines.pair_folders import QuietDisplay, make_pairs, write_pair_folder

ORIGIN = TokenOrigin(
    text_tokenizer="t", image_tokenizer="i", vocabulary="v", num_image_codes=16, num_text_pieces=9, grid=2
)
ROWS = 6


def image_digest(shard: int, row: int) -> str:
    return hashlib.sha256(f"{shard}-{row}".encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class TokenConfig:
    pairs: Path | None = input_field(default=None)


def pairs_of_shard(shard: int) -> list[TextImagePair | Failure]:
    rows = []
    for number, pair in enumerate(make_pairs(ROWS, shard=shard)):
        assert isinstance(pair, TextImagePair)
        extra = {
            **pair.extra,
            "sha256": image_digest(shard, number),
            "original_sha256": image_digest(shard, 100 + number),
        }
        rows.append(replace(pair, extra=extra))
    return [*rows, Failure(key=f"{shard:05d}_{ROWS:05d}", source="https://gone.org/x", reason="http_404")]


def write_pairs_job(config: TokenConfig, run: JobRun) -> None:
    write_pair_folder(run.output, [pairs_of_shard(shard) for shard in range(2)])


def write_tokens_job(config: TokenConfig, run: JobRun) -> None:
    entries = []
    for shard in range(2):
        pairs = [pair for pair in pairs_of_shard(shard) if isinstance(pair, TextImagePair)]
        files, counts = {}, {}
        for split, chosen in (("train", pairs[:4]), ("validation", pairs[4:])):
            rows = [
                TokenRow(
                    key=pair.key,
                    text=text,
                    text_ids=np.arange(3, dtype=np.int32),
                    image_codes=np.full(4, int(pair.key[-1]), np.uint16),
                    source=pair.source,
                )
                for pair in chosen
                for text in pair.captions
            ]
            name = f"{split}/shard-{shard:05d}.arrow"
            files[name] = write_token_shard(run.output / name, rows, origin=ORIGIN)
            counts[f"rows_{split}"] = len(rows)
        extra = {**counts, "text_ids": 3 * sum(counts.values())}
        entry = ShardEntry(shard=shard, rows_in=ROWS, rows_out=ROWS, files=files, extra=extra)
        write_entry(run.output, entry)
        entries.append(entry)
    totals = {f"rows_{split}": sum(entry.extra[f"rows_{split}"] for entry in entries) for split in SPLITS}
    write_manifest(run.output, entries, extra={**asdict(ORIGIN), **totals})


@dataclass(frozen=True, kw_only=True)
class Corpus:
    root: Path
    pairs: Finished
    tokens: Finished
    list: Path

    def take_down(self, *lines: str, folders: tuple[Path, ...] = ()) -> Finished:
        self.list.write_text("\n".join(lines))
        given = folders or (self.pairs.output, self.tokens.output)
        config = Config(opt_out=(str(self.list),), folders=tuple(map(str, given)))
        return run_job(JOB, config, root=self.root, display=QuietDisplay())

    def keys(self) -> list[str]:
        return [pair.key for tar in sorted(self.pairs.output.glob("*.tar")) for pair in read_pairs(tar)]

    def token_keys(self) -> list[str]:
        keys: set[str] = set()
        for split in SPLITS:
            shards = TokenShards.open(self.tokens.output, split=split, deep=True)
            keys.update(shards.rows(np.arange(len(shards))).keys)
        return sorted(keys)


PAIRS_JOB = Job(name="filter_pairs", version=1, products=(MANIFEST_NAME,), main=write_pairs_job)
TOKENS_JOB = Job(name="tokenize_pairs", version=1, products=(MANIFEST_NAME,), main=write_tokens_job)


@pytest.fixture
def corpus(run_root: Path, tmp_path: Path) -> Corpus:
    pairs = run_job(PAIRS_JOB, TokenConfig(), root=run_root, display=QuietDisplay())
    tokens = run_job(TOKENS_JOB, TokenConfig(pairs=pairs.output), root=run_root, display=QuietDisplay())
    return Corpus(root=run_root, pairs=pairs, tokens=tokens, list=tmp_path / "out.txt")


def test_urls_domains_and_images_go_from_pairs_and_tokens(corpus: Corpus) -> None:
    before = corpus.keys()
    done = corpus.take_down(
        "https://example.org/0/1", image_digest(1, 4), f"sha256:{image_digest(0, 100 + 5)}", "nowhere.org"
    )
    gone = {"00000_00001", "00001_00004", "00000_00005"}
    assert corpus.keys() == corpus.token_keys() == [key for key in before if key not in gone]
    assert done.scores["taken_down"] == 6
    record = pq.read_table(done.output / "taken_down.parquet").to_pylist()
    assert {row["key"] for row in record if row["folder"] == str(corpus.tokens.output)} == gone
    for finished, job, rows_in in ((corpus.pairs, PAIRS_JOB, 14), (corpus.tokens, TOKENS_JOB, 12)):
        manifest = read_manifest(finished.output, deep=True)
        assert manifest["rejected"]["taken_down"] == 3
        assert manifest["rows_in"] == rows_in == manifest["rows_out"] + sum(manifest["rejected"].values())
        again = read_finished(job, finished.output)
        assert again is not None
        assert again.digest != finished.digest
    statuses = pq.read_table(corpus.pairs.output / "shard-00000.parquet").to_pylist()
    assert (statuses[1]["reason"], statuses[1]["captions"], statuses[1]["sha256"]) == (
        "taken_down",
        None,
        image_digest(0, 1),
    )
    assert statuses[6]["reason"] == "http_404"
    tokens = read_manifest(corpus.tokens.output)
    assert (tokens["extra"]["rows_train"], tokens["extra"]["rows_validation"]) == (14, 4)
    entry = read_entry(corpus.tokens.output, 1, deep=True)
    assert entry is not None
    assert entry.extra["text_ids"] == 3 * (8 + 2)
    assert b"https://example.org/0/1" not in (corpus.tokens.output / "train" / "shard-00000.arrow").read_bytes()


def test_a_domain_empties_everything_and_leaves_sound_folders(corpus: Corpus) -> None:
    corpus.take_down("*.org")
    assert corpus.keys() == corpus.token_keys() == []
    assert read_manifest(corpus.pairs.output, deep=True)["rows_out"] == 0


def test_shards_without_a_listed_pair_stay_as_they_are(corpus: Corpus) -> None:
    untouched = (corpus.pairs.output / "shard-00001.tar").stat().st_mtime_ns
    corpus.take_down("https://example.org/0/1")
    assert (corpus.pairs.output / "shard-00001.tar").stat().st_mtime_ns == untouched
    digest = digest_input(corpus.pairs.output, field_name="pairs")
    assert corpus.take_down("https://example.org/0/1").scores["taken_down"] == 0
    assert digest_input(corpus.pairs.output, field_name="pairs") == digest


def test_images_are_found_in_tokens_after_their_pairs_are_gone(corpus: Corpus) -> None:
    corpus.take_down(image_digest(0, 2), folders=(corpus.pairs.output,))
    assert "00000_00002" in corpus.token_keys()
    corpus.take_down(image_digest(0, 2), folders=(corpus.tokens.output,))
    assert "00000_00002" not in corpus.token_keys()


@pytest.mark.parametrize("where", ["write_entry", "write_manifest", "restore_complete"])
def test_an_interrupted_take_down_is_finished_by_the_next(
    corpus: Corpus, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*given: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(taking_down, where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            corpus.take_down("https://example.org/0/1")
    assert (corpus.pairs.output / JOURNAL_NAME).is_file()
    assert read_finished(PAIRS_JOB, corpus.pairs.output) is None
    corpus.take_down("https://example.org/0/1")
    assert "00000_00001" not in corpus.keys() + corpus.token_keys()
    for finished in (corpus.pairs, corpus.tokens):
        manifest = read_manifest(finished.output, deep=True)
        assert manifest["rejected"]["taken_down"] == 1
        assert not (finished.output / JOURNAL_NAME).exists()
        assert digest_input(finished.output, field_name="pairs")


@pytest.mark.parametrize("suffix", [".tar", ".parquet", "_stats.json"])
def test_striking_goes_on_from_any_half_written_shard(tmp_path: Path, suffix: str) -> None:
    folder = write_pair_folder(tmp_path, [pairs_of_shard(0)])

    def failing(path: Path) -> Any:
        if path.name.endswith(suffix):
            raise OSError("the disk went away")
        return atomic_file(path)

    strike: Callable[..., Any] = strike_pairs
    with pytest.raises(OSError, match="went away"):
        strike(folder, "shard-00000", keys={"00000_00003"}, open_file=failing)
    counts = strike(folder, "shard-00000", keys={"00000_00003"}, open_file=atomic_file)
    assert (counts.rows, counts.ok, counts.failed) == (7, 5, {"http_404": 1, "taken_down": 1})
    assert strike(folder, "shard-00000", keys=set(), open_file=atomic_file) == counts
    (folder / "shard-00000.tar").write_bytes(bytes(10240))
    with pytest.raises(ManifestError, match="does not hold 00000_00000"):
        strike(folder, "shard-00000", keys=set(), open_file=atomic_file)


def test_what_is_missing_is_named(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="folders is not given"):
        run_job(JOB, Config(opt_out=(__file__,)), root=corpus.root, display=QuietDisplay())
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x").write_text("x")
    with pytest.raises(ConfigError, match="no finished folder of shards"):
        corpus.take_down("a.org", folders=(tmp_path / "empty",))
