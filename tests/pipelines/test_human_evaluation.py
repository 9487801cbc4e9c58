"""The job human_evaluation: models by name and folder, studies that are prepared once, one server at a time."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cogview.errors import ConfigError
from cogview.shards.manifest import write_json
from pipelines import count_votes, human_evaluation
from pipelines.judging.ballots import Ballots
from pipelines.judging.study import Study
from pipelines.runtime.flags import read_order
from pipelines.runtime.jobs import COMPLETE_NAME, CONFIG_NAME, plan_job, run_job
from tests.pipelines.pair_folders import QuietDisplay
from tests.pipelines.studies import (
    NUMBER,
    SHARE,
    judge_all,
    write_study,
    write_systems,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"))


def test_models_are_given_by_name_and_folder(tmp_path):
    systems = write_systems(tmp_path, number=2)
    config = human_evaluation.Config(models=(f"a model={systems.ours}", f"other={systems.named}"), recovered=False)
    found = human_evaluation.study_config(config, root=tmp_path)
    assert (found.names, found.folders) == (("a model", "other"), (systems.ours, systems.named))
    assert found.image_tokenizer is None
    for models, message in (
        (("nothing",), "give NAME=FOLDER"),
        (("=/x",), "give NAME=FOLDER"),
        ((f"a={systems.ours}", f"a={systems.named}"), "a name of its own"),
        ((f"a={tmp_path / 'missing'}",), "does not exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            human_evaluation.study_config(replace(config, models=models), root=tmp_path)


def test_without_models_the_last_chains_pictures_are_judged_and_not_a_prompt_drawn_since(tmp_path):
    for folder in ("generate/chain", "generate/since", "super_resolve/made"):
        (tmp_path / folder).mkdir(parents=True)
        write_json(tmp_path / folder / COMPLETE_NAME, {"digest": folder})
        time.sleep(0.01)
    stage = {"job": "generate", "state": "done", "output": "generate/chain"}
    write_json(tmp_path / "chain.json", {"state": "done", "started": "", "stages": [stage]})

    def judged(samples):
        settings = {"config": {"samples": str(tmp_path / samples)}}
        write_json(tmp_path / "super_resolve/made" / CONFIG_NAME, settings)
        found = human_evaluation.latest_models(tmp_path).values()
        return [folder.relative_to(tmp_path).as_posix() for folder in found]

    assert judged("generate/since") == ["generate/chain"]
    assert judged("generate/chain") == ["generate/chain", "super_resolve/made"]
    (tmp_path / "chain.json").unlink()
    assert judged("generate/since") == ["generate/since", "super_resolve/made"]


def test_a_study_is_prepared_once_and_its_votes_are_counted_once(tmp_path, run_root, caplog):
    systems = write_systems(tmp_path, number=4)
    order = read_order(["human_evaluation", "smoke", "--root", str(run_root), "--verbose"])
    config = human_evaluation.Config(
        models=(f"ours={systems.ours}", f"named={systems.named}"),
        image_tokenizer=systems.image_tokenizer,
        image_size=32,
        only_prepare=True,
    )
    (line,) = human_evaluation.main(config, order=order, command="")
    folder = Path(line.removeprefix("study: "))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert len(before) == 3 * (4 + 4)
    assert human_evaluation.main(config, order=order, command="") == [line]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")} == before
    study = Study.open(folder)
    with human_evaluation.open_ballots(config, study) as ballots:
        judge_all(ballots, "Ada", best="ours")
    counted = [
        run_job(count_votes.JOB, count_votes.resolve(count_votes.Config(), root=run_root), root=run_root, display=shown)
        for shown in (QuietDisplay(), QuietDisplay())
    ]
    assert [done.was_done for done in counted] == [False, True]
    assert counted[0].scores["best/ours"] == 1
    assert "MLflow missed" not in caplog.text
    with human_evaluation.open_ballots(config, study) as ballots:
        judge_all(ballots, "Bob", best="named")
    config_now = count_votes.resolve(count_votes.Config(), root=run_root)
    assert plan_job(count_votes.JOB, config_now, root=run_root).output != counted[0].output


def test_serving_and_counting_need_no_torch():
    code = "import sys, pipelines.human_evaluation, pipelines.count_votes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_cannot_be_served_is_refused():
    with pytest.raises(ConfigError, match="--token-file FILE"):
        human_evaluation.Config(host="0.0.0.0")
    with pytest.raises(ConfigError, match="port=70000"):
        human_evaluation.Config(port=70_000)
    with pytest.raises(ConfigError, match="each=-1"):
        human_evaluation.Config(each=-1)


def test_one_server_at_a_time_holds_the_votes(study):
    config = human_evaluation.Config()
    with human_evaluation.open_ballots(config, study) as ballots:
        assert isinstance(ballots, Ballots)
        with (
            pytest.raises(ConfigError, match=f"being written by process {os.getpid()}"),
            human_evaluation.open_ballots(config, study),
        ):
            pass


def test_the_share_of_the_paper_preset_is_within_what_is_prepared():
    paper = human_evaluation.PRESETS["paper"]
    assert paper.num_groups == 2950
    assert paper.planted <= paper.num_planted
    assert SHARE.measured < NUMBER
