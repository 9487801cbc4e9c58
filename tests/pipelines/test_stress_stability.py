"""The stress test on a model of two layers: rows, arms, what is written, and the nested runs."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.errors import ConfigError
from cogview.evaluation.stability import HALF_LIMIT
from cogview.evaluation.stress_arms import ARMS
from cogview.scenes.scene import corpus, draw_scene
from pipelines.runtime.jobs import run_job
from pipelines.runtime.journal import read_journal
from pipelines.stress_stability import JOB, PRESETS, VOCABULARY, arm_model, plot_traces, scene_batches, train_arm
from tests.pipelines.pair_folders import QuietDisplay

SMALL = replace(
    PRESETS["smoke"],
    model=replace(PRESETS["smoke"].model, num_layers=2, hidden_size=16, num_heads=1),
    grid=2,
    max_text=6,
    num_steps=3,
)


@pytest.fixture(scope="module")
def finished(runs_folder):
    return run_job(JOB, SMALL, root=runs_folder / "stress", display=QuietDisplay())


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_captions_and_mosaics_of_scenes():
    batches = list(scene_batches(replace(SMALL, grid=4)))
    assert len(batches) == SMALL.num_steps
    rows = corpus(SMALL.seed, SMALL.batch_size)
    for ids, row in zip(batches[0].ids.tolist(), rows, strict=True):
        assert bytes(id - VOCABULARY.text_offset for id in ids[1:7]) == row.english.encode()[:6]
        codes = np.array(ids[9 : 9 + 16]).reshape(4, 4)
        colours = np.asarray(draw_scene(row.scene).resize((4, 4), Image.Resampling.BOX)) // 64
        assert (codes == colours @ [16, 4, 1]).all()


def test_arms_differ_in_the_two_remedies_only():
    plain, both = arm_model(SMALL, "neither"), arm_model(SMALL, "both")
    assert (plain.sandwich_ln, plain.ln_prescale, plain.attention) == (False, False, "plain")
    assert (both.sandwich_ln, both.ln_prescale, both.attention) == (True, True, "pb_relax")
    assert replace(both, sandwich_ln=False, ln_prescale=False, attention="plain") == plain


def test_an_arm_ends_at_its_first_overflow_and_half_precision_agrees():
    """At a rate of 20 the main branch of two layers is beyond fp16 within a few steps."""
    config = replace(SMALL, num_steps=20, optimizer=replace(SMALL.optimizer, learning_rate=20.0))
    trace = train_arm(config, "neither")
    assert trace.overflow is not None
    assert len(trace.records) < 20
    assert not trace.half_is_finite
    for record in trace.records[:-1]:
        assert not any(reading.overflows for reading in record.readings)
    assert trace.overflow in trace.records[-1].readings
    assert trace.overflow.value > HALF_LIMIT


def test_training_in_fp16_itself_ends_too():
    config = replace(SMALL, precision="fp16", num_steps=20)
    calm = train_arm(replace(config, num_steps=2), "both")
    assert calm.overflow is None
    assert calm.half_is_finite
    wild = train_arm(replace(config, optimizer=replace(SMALL.optimizer, learning_rate=20.0)), "neither")
    assert wild.overflow is not None
    assert not wild.half_is_finite


def test_the_same_seed_trains_alike_and_another_does_not():
    torch.manual_seed(5)
    first = train_arm(SMALL, "both")
    torch.manual_seed(6)
    assert train_arm(SMALL, "both") == first
    assert train_arm(replace(SMALL, seed=2), "both").records[-1].loss != first.records[-1].loss


def test_training_lowers_the_loss():
    config = replace(SMALL, num_steps=25, optimizer=replace(SMALL.optimizer, learning_rate=0.01))
    losses = [record.loss for record in train_arm(config, "both").records]
    assert losses[-1] < losses[0] - 1


def test_tables_and_plot_are_written(finished):
    rows = read_csv(finished.output / "by_step.csv")
    assert {row["arm"] for row in rows} == set(ARMS)
    assert {row["point"] for row in rows} >= {"loss", "residual", "scores", "variance"}
    layers = {(row["point"], row["layer"]) for row in read_csv(finished.output / "by_layer.csv")}
    assert layers == {*(("residual", str(layer)) for layer in range(3)), ("scores", "0"), ("scores", "1")}
    assert json.loads((finished.output / "arms.json").read_text()).keys() == ARMS.keys()
    assert min(Image.open(finished.output / "stability.png").size) > 300
    assert {f"{arm}/finished" for arm in ARMS} <= finished.scores.keys()


def test_each_arm_is_a_run_below_the_jobs_run(finished):
    parent = (finished.output / "mlflow_run.txt").read_text().strip()
    runs = {parent}
    for arm in ARMS:
        folder = finished.output / arm
        records = read_journal(folder / "tracking.jsonl")
        tags = {name: value for record in records if record["kind"] == "tags" for name, value in record["tags"].items()}
        assert tags["mlflow.parentRunId"] == parent
        assert any("max_residual" in record["metrics"] for record in records if record["kind"] == "metrics")
        runs.add((folder / "mlflow_run.txt").read_text().strip())
    assert len(runs) == 1 + len(ARMS)


def test_a_cross_marks_where_an_arm_ended():
    config = replace(SMALL, num_steps=20, optimizer=replace(SMALL.optimizer, learning_rate=20.0))
    traces = [train_arm(config, "neither"), train_arm(SMALL, "both")]
    ended = traces[0].overflow.point
    _, branch, scores = plot_traces(traces).axes
    marked = [len([line for line in axes.lines if line.get_marker() == "X"]) for axes in (branch, scores)]
    assert marked == [int(ended == "residual"), int(ended == "scores")]


def test_numbers_below_one_are_refused():
    with pytest.raises(ConfigError, match="grid=0"):
        replace(SMALL, grid=0)
