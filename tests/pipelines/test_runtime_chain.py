"""A chain runs what is not done, in order, and its record on disk says what happened."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cogview.config import input_field
from cogview.errors import ConfigError
from pipelines.runtime.chain import CHAIN_NAME, ChainStage, read_chain, run_chain
from pipelines.runtime.display import PlainDisplay
from pipelines.runtime.jobs import Finished, Job, JobRun
from pipelines.runtime.status import as_plain, chain_lines, current_chain, latest_root


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Splits a text into words."""

    text: Path | None = input_field(default=None)
    lower: bool = True
    comment: str = ""


@dataclass(frozen=True, kw_only=True)
class CountConfig:
    """Counts words of at least `min_length` letters."""

    words: Path | None = input_field(default=None)
    min_length: int = 1


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Writes the counts as a sentence."""

    words: Path | None = input_field(default=None)
    counts: Path | None = input_field(default=None)
    fail: bool = False


def split(config: SplitConfig, run: JobRun) -> None:
    assert config.text is not None
    text = config.text.read_text()
    (run.output / "words.json").write_text(json.dumps((text.lower() if config.lower else text).split()))
    run.progress(1, 1, "split")


def count(config: CountConfig, run: JobRun) -> None:
    assert config.words is not None
    words = json.loads((config.words / "words.json").read_text())
    kept = [word for word in words if len(word) >= config.min_length]
    (run.output / "counts.json").write_text(json.dumps({word: kept.count(word) for word in sorted(set(kept))}))
    run.scores["words"] = len(kept)


def report(config: ReportConfig, run: JobRun) -> None:
    assert config.counts is not None
    if config.fail:
        raise ConfigError("fail=True: leave it out")
    counts = json.loads((config.counts / "counts.json").read_text())
    (run.output / "report.txt").write_text(f"{len(counts)} different words\n")
    run.scores["different"] = len(counts)


SPLIT = Job(name="split_text", version=1, products=("words.json",), main=split)
COUNT = Job(name="count_words", version=1, products=("counts.json",), main=count)
REPORT = Job(name="report_counts", version=1, products=("report.txt",), main=report)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("A red circle and a blue circle")
    return path


def chain(
    text: Path, *, lower: bool = True, comment: str = "", min_length: int = 1, fail: bool = False
) -> list[ChainStage]:
    return [
        ChainStage(job=SPLIT, config=SplitConfig(text=text, lower=lower, comment=comment)),
        ChainStage(job=COUNT, config=CountConfig(min_length=min_length), reads={"words": "split_text"}),
        ChainStage(job=REPORT, config=ReportConfig(fail=fail), reads={"words": "split_text", "counts": "count_words"}),
    ]


def run(stages: Sequence[ChainStage], root: Path) -> dict[str, Finished]:
    display = PlainDisplay([stage.job.name for stage in stages], stream=sys.stdout)
    return run_chain(stages, root=root, display=display, facts={"preset": "smoke", "command": "make pretrain"})


def worked(finished: dict[str, Finished]) -> list[str]:
    return [name for name, done in finished.items() if not done.was_done]


def states(root: Path) -> list[str]:
    return [stage["state"] for stage in read_chain(root)["stages"]]


def test_a_chain_runs_in_order_and_records_outputs_seconds_and_scores(text: Path, run_root: Path) -> None:
    finished = run(chain(text), run_root)
    assert worked(finished) == ["split_text", "count_words", "report_counts"]
    assert (finished["report_counts"].output / "report.txt").read_text() == "5 different words\n"
    record = read_chain(run_root)
    assert record["state"] == "done"
    assert record["preset"] == "smoke"
    assert [stage["job"] for stage in record["stages"]] == ["split_text", "count_words", "report_counts"]
    assert record["stages"][1]["scores"] == {"words": 7}
    assert run_root / record["stages"][1]["output"] == finished["count_words"].output
    assert not record["stages"][1]["was_done"]


def test_a_finished_chain_run_again_works_nothing_and_changes_no_file(text: Path, run_root: Path) -> None:
    run(chain(text), run_root)
    before = {path: path.stat().st_mtime_ns for path in run_root.parent.rglob("*")}
    assert worked(run(chain(text), run_root)) == []
    assert {path: path.stat().st_mtime_ns for path in run_root.parent.rglob("*")} == before


def test_a_changed_setting_reruns_its_stage_and_what_depends_on_it(text: Path, run_root: Path) -> None:
    run(chain(text), run_root)
    assert worked(run(chain(text, min_length=2), run_root)) == ["count_words", "report_counts"]
    assert worked(run(chain(text, min_length=2), run_root)) == []


def test_going_back_to_an_earlier_setting_is_free_and_recorded(text: Path, run_root: Path) -> None:
    first = run(chain(text), run_root)
    run(chain(text, min_length=2), run_root)
    assert worked(run(chain(text), run_root)) == []
    assert run_root / read_chain(run_root)["stages"][1]["output"] == first["count_words"].output


def test_a_rerun_with_the_same_bytes_does_not_reach_later_stages(text: Path, run_root: Path) -> None:
    run(chain(text), run_root)
    assert worked(run(chain(text, comment="the same words"), run_root)) == ["split_text"]


def test_a_changed_text_reruns_everything(text: Path, run_root: Path) -> None:
    run(chain(text), run_root)
    text.write_text("Another text")
    assert worked(run(chain(text), run_root)) == ["split_text", "count_words", "report_counts"]


def test_a_damaged_product_is_made_again_and_nothing_else(text: Path, run_root: Path) -> None:
    finished = run(chain(text), run_root)
    (finished["count_words"].output / "counts.json").write_text("{}")
    assert worked(run(chain(text), run_root)) == ["count_words"]


def test_a_failed_stage_is_recorded_with_its_reason_and_the_chain_goes_on_from_there(
    text: Path, run_root: Path
) -> None:
    with pytest.raises(ConfigError, match="fail=True"):
        run(chain(text, fail=True), run_root)
    assert states(run_root) == ["done", "done", "failed"]
    record = current_chain(run_root)
    assert (record["state"], record["error"]) == ("failed", "fail=True: leave it out")
    assert "continue with: make pretrain" in chain_lines(record, root=run_root)
    assert worked(run(chain(text), run_root)) == ["report_counts"]
    assert states(run_root) == ["done", "done", "done"]


def test_an_interrupted_chain_says_so_and_what_was_not_reached_waits(text: Path, run_root: Path) -> None:
    def interrupt(config: CountConfig, run: JobRun) -> None:
        raise KeyboardInterrupt

    stages = chain(text)
    stages[1] = replace(stages[1], job=replace(COUNT, main=interrupt))
    with pytest.raises(KeyboardInterrupt):
        run(stages, run_root)
    assert states(run_root) == ["done", "interrupted", "waiting"]
    assert set(read_chain(run_root)["stages"][2]) == {"job", "state"}
    assert worked(run(chain(text), run_root)) == ["count_words", "report_counts"]


def test_an_input_set_by_hand_in_a_chain_is_refused(text: Path, run_root: Path) -> None:
    stages = chain(text)
    stages[1] = replace(stages[1], config=CountConfig(words=text))
    with pytest.raises(ConfigError, match=r"count_words.words=.*text.txt: in a chain this is the output of split_text"):
        run(stages, run_root)


HOLDER = """
import sys, time
from pathlib import Path
from pipelines.runtime.locks import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_chain_under_one_root_is_refused_and_leaves_the_record_alone(text: Path, run_root: Path) -> None:
    run(chain(text), run_root)
    before = (run_root / CHAIN_NAME).read_bytes()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run_root)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"is being written by process {holder.pid}"):
            run(chain(text, min_length=2), run_root)
        assert worked(run(chain(text), run_root)) == []  # what is done needs no lock
    finally:
        holder.kill()
        holder.communicate()
    assert (run_root / CHAIN_NAME).read_bytes() == before


def test_a_chain_that_was_killed_is_not_shown_as_running(text: Path, run_root: Path) -> None:
    run(chain(text), run_root)
    record = json.loads((run_root / CHAIN_NAME).read_text())
    record["state"] = record["stages"][2]["state"] = "running"
    (run_root / CHAIN_NAME).write_text(json.dumps(record))
    assert current_chain(run_root)["state"] == "interrupted"
    assert current_chain(run_root)["stages"][2]["state"] == "interrupted"


def test_status_tells_stages_scores_and_paths_to_people_and_programs(text: Path, run_root: Path) -> None:
    run(chain(text), run_root)
    (run_root / "grid.png").write_bytes(b"picture")
    record = current_chain(run_root)
    lines = "\n".join(chain_lines(record, root=run_root))
    assert "count_words    done" in lines
    assert "different  5" in lines
    assert f"sample grid: {run_root / 'grid.png'}" in lines
    assert "make dashboard" in lines
    plain = json.loads(json.dumps(as_plain(record, root=run_root)))
    assert plain["scores"] == {"different": 5}
    assert plain["paths"]["grid"] == str(run_root / "grid.png")
    assert Path(plain["stages"][0]["output"]).is_dir()


def test_the_latest_root_is_the_one_that_started_last(text: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with pytest.raises(ConfigError, match="has no run yet"):
        latest_root(runs)
    for name, started in (("older", "2026-01-01T00:00:00+00:00"), ("newer", "2026-01-02T00:00:00+00:00"), ("cut", "")):
        (runs / name).mkdir(parents=True)
        content = json.dumps({"state": "done", "started": started, "seconds": 1.0, "stages": []})
        (runs / name / CHAIN_NAME).write_text(content if started else content[:9])
    assert latest_root(runs) == runs / "newer"
