"""Tracking: the journal has everything, MLflow has it once, and MLflow's troubles never reach the job."""

import json
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from pipelines.runtime import mlflow_run
from pipelines.runtime.journal import JOURNAL_NAME, read_journal
from pipelines.runtime.mlflow_run import RUN_ID_NAME, tracking_uri
from pipelines.runtime.tracking import Tracker, open_tracker


@dataclass(frozen=True, kw_only=True)
class Config:
    num_steps: int = 8


@contextmanager
def tracker(root: Path, *, num_steps: int = 8, job: str = "count_words") -> Iterator[Tracker]:
    output = root / job / "abc"
    output.mkdir(parents=True, exist_ok=True)
    config = Config(num_steps=num_steps)
    with open_tracker(
        job=job, output=output, config=config, inputs={"pairs": "f" * 64}, digest="d" * 64, root=root
    ) as t:
        yield t


def log_steps(root: Path, steps: range, *, interrupted: bool = False) -> None:
    try:
        with tracker(root) as opened:
            for step in steps:
                opened.log_metrics({"loss": 1.0 / step}, step=step)
            if interrupted:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert interrupted


def run_of(root: Path, job: str = "count_words") -> tuple[MlflowClient, str]:
    return MlflowClient(tracking_uri(root)), (root / job / "abc" / RUN_ID_NAME).read_text().strip()


def logged_steps(root: Path) -> list[int]:
    client, run_id = run_of(root)
    return [point.step for point in client.get_metric_history(run_id, "loss")]


def journal_steps(root: Path) -> list[int]:
    records = read_journal(root / "count_words" / "abc" / JOURNAL_NAME)
    return [record["step"] for record in records if record["kind"] == "metrics"]


def test_a_run_has_params_digests_inputs_metrics_and_ends_as_finished(run_root: Path) -> None:
    with tracker(run_root) as opened:
        opened.log_metrics({"loss": 2.5, "psnr": 20.0}, step=3)
        opened.log_scores({"accuracy": 0.9, "note": "fine"})
    client, run_id = run_of(run_root)
    run = client.get_run(run_id)
    assert client.get_experiment(run.info.experiment_id).name == "cogview/count_words"
    kind = client.get_experiment(run.info.experiment_id).tags["mlflow.experimentKind"]
    assert kind == "custom_model_development"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"num_steps": "8"}
    assert run.data.metrics == {"loss": 2.5, "psnr": 20.0, "score/accuracy": 0.9}
    assert run.data.tags["digest"] == "d" * 64
    assert run.data.tags["score.note"] == "fine"
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("pairs", "f" * 36)


def test_weights_are_registered_once_and_carry_their_scores(run_root: Path) -> None:
    weights = run_root / "pretrain" / "abc"
    for digest in ("a" * 64, "a" * 64, "b" * 64):
        with tracker(run_root, job="pretrain") as opened:
            opened.log_output(digest)
            opened.log_model("cogview-once", weights, digest=digest)
    with tracker(run_root, job="evaluate") as opened:
        opened.log_model_scores("b" * 64, {"attributes/mean": 0.875, "reconstruction/psnr": 26.0})
    client, run_id = run_of(run_root, job="pretrain")
    assert client.get_run(run_id).data.tags["output_digest"] == "b" * 64
    versions = {
        version.tags["output_digest"]: version for version in client.search_model_versions("name = 'cogview-once'")
    }
    assert versions.keys() == {"a" * 64, "b" * 64}
    newest = client.get_model_version_by_alias("cogview-once", "newest")
    assert newest.tags["output_digest"] == "b" * 64
    assert newest.tags["attributes/mean"] == "0.875"
    assert newest.tags["scored_by"] == run_of(run_root, job="evaluate")[1]
    assert newest.source == weights.resolve().as_uri()
    assert "attributes/mean" not in versions["a" * 64].tags


def test_pictures_tables_and_files_reach_mlflow_and_stay_beside_the_output(run_root: Path, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    report = tmp_path / "report.html"
    report.write_text("<p>fine</p>")
    figure = Figure()
    figure.subplots().plot([3, 2, 1])
    with tracker(run_root) as opened:
        opened.log_figure(figure, "loss.png")
        opened.log_image(Image.new("RGB", (8, 8), "red"), "grid.png", step=100)
        opened.log_image(Image.new("RGB", (8, 8), "blue"), "grid.png")
        opened.log_table([{"prompt": "红色圆形", "seed": 1}, {"prompt": "a star"}], "samples.json")
        opened.log_artifact(report)
    client, run_id = run_of(run_root)
    assert {item.path for item in client.list_artifacts(run_id)} >= {
        "loss.png",
        "grid.png",
        "samples.json",
        "report.html",
    }
    stepped = [item.path for item in client.list_artifacts(run_id, "images")]
    assert any("grid" in path and "step" in path for path in stepped), stepped
    media = run_root / "count_words" / "abc" / "tracking"
    assert Image.open(media / "grid_00000100.png").getpixel((0, 0)) == (255, 0, 0)
    table = json.loads((media / "samples.json").read_text(encoding="utf-8"))
    assert table == {"columns": ["prompt", "seed"], "data": [["红色圆形", 1], ["a star", None]]}


def test_a_resumed_job_continues_its_run_without_a_second_point_for_any_step(run_root: Path) -> None:
    log_steps(run_root, range(1, 6), interrupted=True)
    client, first = run_of(run_root)
    assert client.get_run(first).info.status == "KILLED"
    log_steps(run_root, range(3, 9))  # from the checkpoint at step 2
    client, second = run_of(run_root)
    assert second == first
    assert logged_steps(run_root) == list(range(1, 9))
    assert journal_steps(run_root) == list(range(1, 9))
    assert client.get_run(first).info.status == "FINISHED"


def test_a_job_that_fails_ends_its_run_as_failed_and_its_error_goes_on(run_root: Path) -> None:
    with pytest.raises(ValueError, match="broken"), tracker(run_root):
        raise ValueError("broken")
    client, run_id = run_of(run_root)
    assert client.get_run(run_id).info.status == "FAILED"


@contextmanager
def locked_database(root: Path) -> Iterator[None]:
    root.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(root.parent / "mlflow.db", isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        connection.close()


def test_a_locked_database_costs_the_job_nothing_and_the_next_attempt_sends_what_is_missing(
    run_root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mlflow_run, "LOCK_SECONDS", 0.2)
    with locked_database(run_root), caplog.at_level(logging.WARNING):
        log_steps(run_root, range(1, 5), interrupted=True)
    assert journal_steps(run_root) == [1, 2, 3, 4]
    (warning,) = [record.getMessage() for record in caplog.records if "MLflow missed" in record.getMessage()]
    assert "locked" in warning
    log_steps(run_root, range(3, 9))
    assert logged_steps(run_root) == list(range(1, 9))


def test_an_unwritable_database_does_not_stop_a_job(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "runs" / "mine"
    (tmp_path / "runs" / "mlflow.db").mkdir(parents=True)  # a folder in the place of the file
    log_steps(root, range(1, 4))
    assert journal_steps(root) == [1, 2, 3]
    assert sum("MLflow missed" in record.getMessage() for record in caplog.records) == 1


def test_a_server_that_is_down_does_not_stop_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the discard port: nothing listens there
    monkeypatch.setattr(mlflow_run, "OPEN_SECONDS", 0.5)
    monkeypatch.setattr(mlflow_run, "CLOSE_SECONDS", 0.5)
    root = tmp_path / "runs" / "mine"
    log_steps(root, range(1, 4))
    assert journal_steps(root) == [1, 2, 3]


def test_a_journal_with_a_torn_last_line_is_read_up_to_it_and_continued(run_root: Path) -> None:
    log_steps(run_root, range(1, 4), interrupted=True)
    path = run_root / "count_words" / "abc" / JOURNAL_NAME
    with open(path, "a") as file:
        file.write('{"kind": "metrics", "step": 4, "metr')
    log_steps(run_root, range(3, 7))
    assert journal_steps(run_root) == [1, 2, 3, 4, 5, 6]
    assert logged_steps(run_root) == [1, 2, 3, 4, 5, 6]


def test_two_jobs_write_into_one_database_each_into_its_experiment(run_root: Path) -> None:
    with tracker(run_root, job="first"), tracker(run_root, job="second") as second:
        second.log_metrics({"loss": 1.0}, step=1)
    names = set()
    for job in ("first", "second"):
        client, run_id = run_of(run_root, job)
        names.add(client.get_experiment(client.get_run(run_id).info.experiment_id).name)
    assert names == {"cogview/first", "cogview/second"}
