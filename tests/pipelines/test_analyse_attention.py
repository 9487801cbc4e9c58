"""The analysis of a small real model: what is written, and what is refused."""

import csv
import json
import shutil
from dataclasses import replace

import pytest
from PIL import Image

from cogview.errors import ConfigError, VocabularyError
from pipelines.analyse_attention import JOB, Config, resolve
from pipelines.runtime.jobs import run_job
from tests.pipelines.pair_folders import QuietDisplay
from tests.pipelines.trained_folders import write_trained_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_trained_folders(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def config(folders):
    return Config(checkpoint=folders.checkpoint, tokens=folders.tokens, num_rows=5, batch_size=2)


@pytest.fixture(scope="module")
def finished(config, runs_folder):
    return run_job(JOB, config, root=runs_folder / "attention", display=QuietDisplay())


def test_every_head_has_a_line(finished):
    with open(finished.output / "heads.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["layer"], row["head"]) for row in rows] == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    assert all(0 <= float(row["text_share"]) <= 1 and float(row["tokens"]) >= 1 for row in rows)
    assert finished.scores["heads"] == 4
    assert finished.scores["rows"] == 5
    assert finished.scores["largest_score"] == pytest.approx(max(float(row["largest_score"]) for row in rows))


def test_the_page_holds_pictures_and_the_table(finished):
    page = (finished.output / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3
    assert page.count("<tr>") == 1 + 4
    assert "5 held-out rows" in page
    for name in ("attention_maps.png", "offsets.png", "heads.png"):
        assert min(Image.open(finished.output / name).size) > 100


def test_tokens_of_other_tokenizers_are_refused(config, tmp_path, run_root):
    other = write_trained_folders(tmp_path, seed=1)
    with pytest.raises(VocabularyError):
        run_job(JOB, replace(config, tokens=other.tokens), root=run_root, display=QuietDisplay())


def test_folders_come_from_the_last_chain(config, tmp_path):
    assert resolve(config, root=tmp_path) == config
    with pytest.raises(ConfigError):
        resolve(Config(), root=tmp_path)
    shutil.copytree(config.tokens, tmp_path / "tokens")
    stage = {"job": "tokenize_pairs", "output": "tokens", "state": "done"}
    (tmp_path / "chain.json").write_text(json.dumps({"state": "failed", "started": "", "stages": [stage]}))
    with pytest.raises(ConfigError, match="no pretrain is done"):
        resolve(Config(), root=tmp_path)
    assert resolve(Config(checkpoint=config.checkpoint), root=tmp_path).tokens == tmp_path / "tokens"


def test_without_folders_nothing_is_analysed(run_root):
    with pytest.raises(ConfigError, match="output folder of pretrain"):
        run_job(JOB, Config(), root=run_root, display=QuietDisplay())
