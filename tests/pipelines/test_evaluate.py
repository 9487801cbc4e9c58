"""Scores with a small real model: what they are computed from, what is written, and what is refused."""

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cogview.errors import CheckpointError, ConfigError, VocabularyError
from cogview.evaluation.attributes import judge, scene_from_json, score_attributes
from cogview.scenes.scene import draw_scene
from cogview.shards.reader import TokenShards
from pipelines import evaluate, generate
from pipelines.evaluate import JOB, Config, plot_losses, read_metrics
from pipelines.runtime.jobs import run_job
from tests.pipelines.pair_folders import QuietDisplay
from tests.pipelines.trained_folders import GRID, ROWS, write_trained_folders

NUM_SCENES = 12
SCORES = {
    *(f"attributes/{name}" for name in ("mean", "shape", "colour", "size", "background", "position", "count")),
    *("reconstruction/attributes", "reconstruction/psnr", "loss/validation_image", "loss/validation_text"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return asdict(write_trained_folders(tmp_path_factory.mktemp("trained")))


@pytest.fixture(scope="module")
def samples(folders, runs_folder):
    config = generate.Config(**folders, num_scenes=NUM_SCENES, two_shape_share=0.5)
    return run_job(generate.JOB, config, root=runs_folder / "evaluate", display=QuietDisplay()).output


@pytest.fixture(scope="module")
def config(folders, samples):
    return Config(**folders, samples=samples, num_reconstructions=6)


@pytest.fixture(scope="module")
def scored(config, runs_folder):
    return run_job(JOB, config, root=runs_folder / "evaluate", display=QuietDisplay())


def read_scores(done):
    return json.loads((done.output / "scores.json").read_text())


def test_every_score_has_its_number_and_its_source(scored):
    scores = read_scores(scored)["scores"]
    assert set(scores) == SCORES
    assert {name: score["value"] for name, score in scores.items()} == scored.scores
    assert all(score["n"] > 0 and score["source"] for score in scores.values())
    assert scores["attributes/mean"]["n"] == NUM_SCENES
    assert scores["reconstruction/psnr"]["n"] == 6


def test_attribute_scores_are_those_of_the_pictures_on_disk(scored, samples):
    rows = pq.read_table(samples / "samples.parquet").to_pylist()
    judged = [judge(Image.open(samples / row["path"]), expected=scene_from_json(row["scene"])) for row in rows]
    expected = score_attributes(judged, seed=1)
    scores = read_scores(scored)["scores"]
    for name, score in expected.items():
        assert scores[f"attributes/{name}"]["value"] == score.value


def test_right_pictures_score_one(config, samples, tmp_path, run_root):
    """The same samples, but each picture painted over with the scene that its caption asks for."""
    shutil.copytree(samples, tmp_path / "right")
    for row in pq.read_table(samples / "samples.parquet").to_pylist():
        draw_scene(scene_from_json(row["scene"])).save(tmp_path / "right" / row["path"])
    (tmp_path / "right/complete.json").unlink()
    done = run_job(JOB, replace(config, samples=tmp_path / "right"), root=run_root, display=QuietDisplay())
    assert done.scores["attributes/mean"] == 1.0
    groups = read_scores(done)["groups"]
    assert set(groups) == {"all", "one shape", "two shapes", "English", "Chinese"}
    assert groups["one shape"]["mean"]["n"] + groups["two shapes"]["mean"]["n"] == NUM_SCENES


def test_losses_cover_the_held_out_rows(scored, config):
    scores = read_scores(scored)["scores"]
    shards = TokenShards.open(config.tokens, split="validation")
    texts = shards.rows(np.arange(len(shards))).text_ids
    assert len(shards) == 2 * ROWS["validation"]
    assert scores["loss/validation_image"]["n"] == len(shards) * GRID**2
    # ROI1, the text cut to its budget, BASE, BOI1; a row of 64 tokens leaves 44 beside 16 codes and 4 command tokens.
    assert scores["loss/validation_text"]["n"] == sum(min(44, len(text)) + 3 for text in texts)


def test_fewer_loss_rows_can_be_asked_for(config, run_root):
    done = run_job(JOB, replace(config, num_loss_rows=5, demo=False), root=run_root, display=QuietDisplay())
    scores = read_scores(done)["scores"]
    assert scores["loss/validation_image"]["n"] == 5 * GRID**2
    assert not any(name.startswith("reconstruction/") for name in scores)


def test_pictures_curves_and_report_are_written(scored):
    for name in ("samples.png", "reconstructions.png", "curves.png"):
        assert min(Image.open(scored.output / name).size) > 200
    report = (scored.output / "report.html").read_text()
    for expected in ("attributes/mean", "reconstruction/psnr", "two shapes", "generate", "Reconstructions"):
        assert expected.lower() in report.lower()
    assert report.count('src="data:image/png;base64,') == NUM_SCENES + 2
    assert 'alt="Unseen scenes' in report


def test_samples_of_another_checkpoint_are_refused(config, tmp_path, run_root):
    shutil.copytree(config.checkpoint, tmp_path / "copy")
    (tmp_path / "copy/metrics.jsonl").write_text('{"step": 1, "image_loss": 2.0}\n')
    with pytest.raises(CheckpointError, match="were drawn with checkpoint"):
        run_job(JOB, replace(config, checkpoint=tmp_path / "copy"), root=run_root, display=QuietDisplay())


def test_tokens_of_other_tokenizers_are_refused(config, tmp_path, run_root):
    other = write_trained_folders(tmp_path, seed=1)
    with pytest.raises(VocabularyError, match="run tokenize_pairs"):
        run_job(JOB, replace(config, tokens=other.tokens), root=run_root, display=QuietDisplay())


def test_missing_inputs_name_their_flag(config, folders, run_root):
    with pytest.raises(ConfigError, match="--samples FOLDER"):
        run_job(JOB, replace(config, samples=None), root=run_root, display=QuietDisplay())
    with pytest.raises(ConfigError, match="give the output of generate"):
        run_job(JOB, replace(config, samples=folders["tokens"]), root=run_root, display=QuietDisplay())


def test_a_cut_metrics_line_is_left_out(folders):
    lines = read_metrics(folders["checkpoint"] / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 5]
    assert read_metrics(folders["tokens"] / "metrics.jsonl") == []


def test_curves_show_training_and_held_out_losses(folders):
    figure = plot_losses(read_metrics(folders["checkpoint"] / "metrics.jsonl"))
    image, text = figure.axes
    assert [line.get_label() for line in image.lines] == ["training", "held out"]
    assert list(image.lines[0].get_ydata()) == [3.0 / step for step in range(1, 6)]
    assert list(text.lines[1].get_ydata()) == [1.1]


def test_the_smoke_preset_is_for_the_demo():
    assert evaluate.PRESETS["smoke"].demo
    assert not evaluate.PRESETS["paper"].demo
