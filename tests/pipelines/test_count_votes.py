"""Counting votes: tables, figure and report say what the votes say, and the same votes are counted once."""

import csv
from dataclasses import replace

import pytest
from PIL import Image

from cogview.errors import ConfigError, ManifestError
from cogview.evaluation.human_votes import FIGURES, SCALES
from pipelines.count_votes import Config, main, read_counted, resolve
from pipelines.judging.ballots import VOTES_FOLDER, Share
from pipelines.judging.study import RECOVERED
from tests.pipelines.job_runs import open_run
from tests.pipelines.studies import NUMBER, open_ballots, write_study

BASE = {"ours": 6, "named": 4, "listed": 2, RECOVERED: 9}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study that three people have judged: two choose the truth, the third, inattentive, what stands first."""
    study = write_study(tmp_path_factory.mktemp("study"))
    ballots = open_ballots(study.folder / VOTES_FOLDER, study, Share(measured=0, repeated=2, planted=2))
    for name in ("Ada", "<b>Bob</b>", "Sleepy"):
        evaluator = ballots.join(name)
        while (ballot := ballots.next_ballot(evaluator)) is not None:
            wanted = "right" if ballot.kind == "planted" else RECOVERED
            best = 0 if ballot.kind != "planted" else (ballot.models.index(wanted) + 1) % 4
            if name != "Sleepy":
                best = ballot.models.index(wanted)
            overall = [BASE.get(model, 1) for model in ballot.models]
            scores = [{name: min(value, highest) for name, highest in SCALES.items()} for value in overall]
            ballots.vote(evaluator, place=ballot.place, best=best, scores=scores, seconds=2)
    ballots.close()
    return study


@pytest.fixture(scope="module")
def counted(study, tmp_path_factory):
    run = open_run(tmp_path_factory.mktemp("counted"))
    main(resolve(Config(study=study.folder), root=study.folder), run)
    return run


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_table_has_every_figure_of_every_model(counted, study):
    table = {(row["model"], row["figure"]): row for row in rows(counted.output / "models.csv")}
    assert set(table) == {(model, figure) for model in study.models for figure in FIGURES}
    for model, value in BASE.items():
        assert float(table[model, "overall"]["value"]) == value
        assert float(table[model, "relevance"]["value"]) == min(value, 5)
        assert table[model, "best"]["n"] == str(3 * NUMBER)
    share = float(table[RECOVERED, "best"]["value"])
    assert share >= 2 / 3
    assert float(table[RECOVERED, "best"]["low"]) <= share <= float(table[RECOVERED, "best"]["high"])
    assert counted.scores[f"best/{RECOVERED}"] == pytest.approx(share, abs=1e-4)
    assert (counted.scores["votes"], counted.scores["evaluators"], counted.scores["groups"]) == (24, 3, 8)
    assert counted.scores["attention"] == pytest.approx(4 / 6)


def test_evaluators_and_votes_have_tables_of_their_own(counted):
    reports = {row["evaluator"]: row for row in rows(counted.output / "evaluators.csv")}
    assert reports["Ada"]["planted_right"] == reports["Ada"]["planted"] == "2"
    assert reports["Sleepy"]["planted_right"] == "0"
    assert {row["counts"] for row in reports.values()} == {"yes"}
    votes = rows(counted.output / "votes.csv")
    assert len(votes) == 3 * (NUMBER + 2 + 2) * 4
    assert sum(int(row["best"]) for row in votes) == 3 * (NUMBER + 2 + 2)


def test_inattentive_evaluators_can_be_left_out(study, tmp_path):
    run = open_run(tmp_path)
    main(resolve(Config(study=study.folder, least_attention=0.5), root=study.folder), run)
    assert (run.scores["evaluators"], run.scores[f"best/{RECOVERED}"]) == (2, 1)
    reports = {row["evaluator"]: row["counts"] for row in rows(run.output / "evaluators.csv")}
    assert reports == {"Ada": "yes", "<b>Bob</b>": "yes", "Sleepy": "no"}


def test_the_figure_and_the_report_can_be_looked_at(counted):
    assert Image.open(counted.output / "figure_10.png").width > 1000
    page = (counted.output / "report.html").read_text()
    assert "&lt;b&gt;Bob&lt;/b&gt;" in page
    assert "<b>Bob</b>" not in page
    assert "24 votes of 3 evaluators on 8 of 8 groups" in page
    assert page.count("<img") == 1
    assert f"of votes: {RECOVERED} is the best" in page


def test_the_votes_that_are_counted_are_named_by_number_and_digest(study, tmp_path):
    config = resolve(Config(study=study.folder), root=tmp_path)
    assert config.number == 3 * (NUMBER + 2 + 2)
    assert resolve(Config(study=study.folder), root=tmp_path) == config
    earlier = resolve(Config(study=study.folder, number=5), root=tmp_path)
    assert len(read_counted(earlier)) == 5
    assert earlier.digest != config.digest
    with pytest.raises(ConfigError, match="has other votes"):
        read_counted(replace(earlier, number=6))


def test_without_votes_or_a_study_the_remedy_is_to_ask_people(study, tmp_path):
    with pytest.raises(ConfigError, match="make human-evaluation"):
        resolve(Config(), root=tmp_path)
    (tmp_path / "study").mkdir()
    with pytest.raises(ManifestError, match="nobody has judged yet"):
        resolve(Config(study=tmp_path / "study"), root=tmp_path)
    everyone = resolve(Config(study=study.folder, least_attention=1.0), root=tmp_path)
    assert everyone.number == 36
    with pytest.raises(ConfigError, match=r"least_attention=1\.5"):
        Config(least_attention=1.5)
