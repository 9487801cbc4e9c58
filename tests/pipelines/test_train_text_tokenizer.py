"""The job on real tars: what it writes, what it scores, what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cogview.errors import ConfigError, ManifestError, VocabularyError
from cogview.records.pair import Failure
from cogview.tokenizers.text import TextTokenizer, TextTokenizerConfig
from pipelines.runtime.jobs import Finished, run_job
from pipelines.train_text_tokenizer import JOB, PRESETS, Config, draw_shards
from tests.pipelines.pair_folders import QuietDisplay, make_pairs, write_pair_folder


def run(config: Config, root: Path, display: QuietDisplay | None = None) -> Finished:
    return run_job(JOB, config, root=root, display=display or QuietDisplay())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "test"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = [make_pairs(30, shard=0), make_pairs(20, shard=1)]
    shards[1].append(Failure(key="00001_00020", source="x", reason="timeout"))
    return write_pair_folder(tmp_path_factory.mktemp("pairs"), shards)


def test_it_trains_on_every_caption_and_scores_both_languages(root: Path, pairs: Path) -> None:
    display = QuietDisplay()
    done = run(replace(PRESETS["smoke"], pairs=pairs), root, display)
    tokenizer = TextTokenizer.load(done.output)
    settings = json.loads((done.output / "text.json").read_text())
    assert settings["settings"]["texts"] == 100  # 50 pairs, two captions each
    assert settings["fingerprint"] == tokenizer.fingerprint
    assert done.scores["pieces"] == tokenizer.num_pieces < 512
    lengths = [len(tokenizer.encode(caption)) for pair in make_pairs(30) for caption in pair.captions[:1]]
    assert done.scores["mean_pieces_en"] == pytest.approx(sum(lengths) / len(lengths), rel=0.1)
    assert done.scores["mean_pieces_zh"] > 1
    assert done.scores["unknown_share"] == 0
    assert any("512 pieces were asked for" in line for line in display.lines)
    assert display.notes[-1][:2] == (2, 2)
    segmentations = list(done.output.rglob("segmentations.json"))
    assert len(segmentations) == 1
    assert "▁a | ▁red" in segmentations[0].read_text()


def test_a_second_run_changes_nothing(root: Path, pairs: Path) -> None:
    config = replace(PRESETS["smoke"], pairs=pairs)
    first = run(config, root)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    second = run(config, root)
    assert second.was_done
    assert second.digest == first.digest
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_a_given_model_is_taken_as_it_is(tmp_path: Path, root: Path, pairs: Path) -> None:
    trained = run(replace(PRESETS["smoke"], pairs=pairs), root)
    model = tmp_path / "given.model"
    model.write_bytes((trained.output / "text.model").read_bytes())
    done = run(Config(pairs=pairs, model=model), root)
    assert done.output != trained.output
    assert (done.output / "text.model").read_bytes() == model.read_bytes()
    assert json.loads((done.output / "text.json").read_text())["settings"] == {"origin": "given.model"}
    assert done.scores["pieces"] == trained.scores["pieces"]


def test_a_given_file_that_is_no_model_is_refused(tmp_path: Path, root: Path, pairs: Path) -> None:
    model = tmp_path / "given.model"
    model.write_bytes(b"garbage")
    with pytest.raises(VocabularyError, match=r"given\.model.*give a SentencePiece"):
        run(Config(pairs=pairs, model=model), root)


def test_the_paper_preset_does_not_shrink_silently(root: Path, pairs: Path) -> None:
    assert PRESETS["paper"].tokenizer == TextTokenizerConfig()
    with pytest.raises(ConfigError, match=r"num_pieces is 50000, but 100 captions give \d+ at most"):
        run(replace(PRESETS["paper"], pairs=pairs), root)


def test_missing_pairs_are_named(tmp_path: Path, root: Path) -> None:
    with pytest.raises(ConfigError, match="--pairs"):
        run(PRESETS["smoke"], root)
    empty = write_pair_folder(tmp_path / "empty", [[Failure(key="a", source="x", reason="timeout")]])
    with pytest.raises(ConfigError, match="no caption"):
        run(replace(PRESETS["smoke"], pairs=empty), root)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file.txt").write_text("x")
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        run(replace(PRESETS["smoke"], pairs=tmp_path / "other"), root)


def test_large_corpora_are_read_by_whole_shards_drawn_by_the_seed() -> None:
    shards = [{"shard": number, "rows_out": 10} for number in range(100)]
    drawn = draw_shards(shards, num_pairs=95, seed=0)
    assert len(drawn) == 10
    assert [shard["shard"] for shard in drawn] == sorted(shard["shard"] for shard in drawn)
    assert drawn == draw_shards(shards, num_pairs=95, seed=0)
    assert drawn != draw_shards(shards, num_pairs=95, seed=1)
    assert draw_shards(shards, num_pairs=10**9, seed=0) == shards


def test_the_bilingual_preset_is_icetks_form() -> None:
    paper, smoke = PRESETS["bilingual"].tokenizer, PRESETS["bilingual_smoke"].tokenizer
    assert (paper.num_pieces, paper.model_type, paper.is_bilingual) == (130_000, "unigram", True)
    assert smoke.is_bilingual
    assert replace(smoke, is_bilingual=False) == PRESETS["smoke"].tokenizer
