"""Scores of a user's own classifier travel with the pairs, and filter_pairs can limit them."""

from dataclasses import replace
from pathlib import Path

import pytest

from cogview.errors import ConfigError
from cogview.filters.pairs import FilterRules, judge_pair
from cogview.records.pair import TextImagePair
from cogview.records.tars import read_pairs
from cogview.shards.manifest import read_manifest
from pipelines.score_pairs import PRESETS, load_scorer, main, plan
from tests.pipelines.job_runs import open_run
from tests.pipelines.pair_folders import make_pairs, write_pair_folder

SCORER = """
import numpy as np

def score(pictures):
    assert 0 < len(pictures) <= 3, len(pictures)
    means = [np.asarray(picture).mean(axis=(0, 1)) / 255 for picture in pictures]
    return [{"redness": mean[0], "brightness": mean.mean()} for mean in means]
"""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = [make_pairs(8, shard=shard) for shard in (0, 1)]
    shards[1][2] = replace(shards[1][2], image_bytes=b"no picture")
    return write_pair_folder(tmp_path_factory.mktemp("pairs"), shards)


@pytest.fixture
def scorer(tmp_path: Path) -> Path:
    path = tmp_path / "by_colour.py"
    path.write_text(SCORER)
    return path


def score_of(pair: TextImagePair) -> tuple[float, float]:
    return pair.extra["redness"], round(pair.extra["brightness"], 3)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_scores_travel_with_the_pairs_and_can_be_limited(pairs: Path, scorer: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    config = replace(PRESETS["smoke"], pairs=pairs, scorer=scorer, batch_size=3)
    main(config, open_run(output))
    found = list(read_pairs(output / "shard-00000.tar"))
    assert [pair.captions for pair in found] == [pair.captions for pair in read_pairs(pairs / "shard-00000.tar")]
    assert [score_of(pair) for pair in found[:4]] == [(1.0, 0.333), (0.0, 0.167), (0.0, 0.333), (0.0, 0.0)]
    manifest = read_manifest(output, deep=True)
    assert (manifest["rows_in"], manifest["rows_out"]) == (16, 15)
    assert sum(manifest["rejected"].values()) == 1
    rules = FilterRules(min_side=8, min_contrast=0.0, limits=("redness<=0.5",))
    verdicts = [judge_pair(pair, rules).rejected for pair in found[:4]]
    assert [verdict and verdict.reason for verdict in verdicts] == ["score_beyond_limit", None, None, None]


def test_a_plan_tries_the_scorer(pairs: Path, tmp_path: Path) -> None:
    path = tmp_path / "any_number.py"
    path.write_text(SCORER.replace("<= 3", "<= 300"))
    lines = list(plan(replace(PRESETS["smoke"], pairs=pairs, scorer=path), root=tmp_path / "runs"))
    assert lines[0] == "score_pairs: 16 rows in 2 shards"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "has no function score"),
        ("def score(pictures): return []", "0 results for"),
        ("def score(pictures): return [1.0 for _ in pictures]", "give a dict of numbers"),
        ("def score(pictures): return [{'p': float('nan')} for _ in pictures]", "numbers that are finite"),
        ("def score(pictures): return [{'p': 'high'} for _ in pictures]", "give a dict of numbers"),
    ],
)
def test_a_scorer_that_says_nothing_of_use_is_named(pairs: Path, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        list(plan(replace(PRESETS["smoke"], pairs=pairs, scorer=path), root=tmp_path / "runs"))


def test_a_scorer_is_a_python_file(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--scorer"):
        list(plan(replace(PRESETS["smoke"], pairs=pairs), root=tmp_path / "runs"))
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match="give a Python file"):
        load_scorer(tmp_path / "weights.bin")
