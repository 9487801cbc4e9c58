"""The best of n, from pictures that a small real model draws: against plain counting, and what is refused."""

import csv
import json
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks.tiny_clip import write_clip
from cogview.errors import ConfigError
from cogview.evaluation.attributes import judge, scene_from_json
from cogview.evaluation.clip_network import ClipScorer
from cogview.models.published import load_model, save_model
from pipelines.rank_candidates import JOB, PRESETS, Config, metric_name, resolve
from pipelines.runtime.jobs import COMPLETE_NAME, Finished, run_job
from tests.pipelines.pair_folders import QuietDisplay
from tests.pipelines.trained_folders import LENGTH, write_trained_folders

SCENES, CANDIDATES = 3, 5


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    root = tmp_path_factory.mktemp("trained")
    folders = write_trained_folders(root)
    model, settings = load_model(folders.checkpoint)
    save_model(model, root / "captioner", settings={**settings, "task": "captioning", "length": LENGTH})
    return Config(
        **asdict(folders),
        captioner=root / "captioner",
        clip=write_clip(root / "clip"),
        num_scenes=SCENES,
        num_validation_prompts=0,
        candidates=CANDIDATES,
        batch_size=4,
        threads=1,
    )


@pytest.fixture(scope="module")
def ranked(config: Config, runs_folder: Path) -> Finished:
    return run_job(JOB, config, root=runs_folder / "ranked", display=QuietDisplay())


def read_rows(output: Path) -> list[dict[str, float]]:
    with open(output / "curves.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def drawn(output: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(output.glob("tables/*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_the_best_of_n_is_the_mean_over_all_choices(config: Config, ranked: Finished) -> None:
    rows, table, clip = read_rows(ranked.output), drawn(ranked.output), ClipScorer(config.clip)
    assert [row["n"] for row in rows] == list(range(1, CANDIDATES + 1))
    pictures = [Image.open(ranked.output / row["path"]).convert("RGB") for row in table]
    wrong = [1 - judge(p, expected=scene_from_json(row["scene"])).mean for p, row in zip(pictures, table, strict=True)]
    opinions = {
        "CapLoss": ("CapLoss", [row["cap_loss"] for row in table], 1),
        "CLIP": ("CLIP score", clip(pictures, [row["prompt"] for row in table]), -1),
        "the reader": ("wrong attributes", wrong, 1),
    }
    assert len(table) == SCENES * CANDIDATES
    for row in rows:
        for choice, (_, judged, sign) in opinions.items():
            for title, values, _ in opinions.values():
                found = []
                for start in range(0, len(table), CANDIDATES):
                    for chosen in combinations(range(start, start + CANDIDATES), int(row["n"])):
                        best = min(chosen, key=lambda place: sign * judged[place])
                        found.append(values[best])
                assert row[f"{title} of the best by {choice}"] == pytest.approx(np.mean(found), rel=1e-4, abs=1e-6)


def test_scores_and_page_tell_of_one_and_of_all(ranked: Finished) -> None:
    rows = read_rows(ranked.output)
    assert ranked.scores["captions"] == SCENES
    assert ranked.scores["cap_loss_of_one"] == pytest.approx(rows[0]["CapLoss of the best by CapLoss"])
    assert ranked.scores["cap_loss_of_best"] == pytest.approx(rows[-1]["CapLoss of the best by CapLoss"])
    assert ranked.scores["cap_loss_of_best"] < ranked.scores["cap_loss_of_one"]
    page = (ranked.output / "report.html").read_text()
    assert page.count("data:image/png") == 2
    assert f"{SCENES} captions, {CANDIDATES} candidates" in page
    assert Image.open(ranked.output / "candidates.png").width > 5 * 112


def test_held_out_captions_have_no_truth_to_compare_with(config: Config, runs_folder: Path) -> None:
    own = replace(config, clip=None, num_scenes=0, num_validation_prompts=2, candidates=2)
    done = run_job(JOB, own, root=runs_folder / "ranked", display=QuietDisplay())
    assert list(read_rows(done.output)[0]) == ["n", "CapLoss of the best by CapLoss"]
    assert "wrong_attributes_of_one" not in done.scores


@pytest.mark.parametrize(("data", "scenes"), [("demo site", PRESETS["smoke"].num_scenes), ("/data/mine", 0)])
def test_scenes_are_asked_of_models_that_saw_scenes(config: Config, tmp_path: Path, data: str, scenes: int) -> None:
    jobs = {"pretrain": config.checkpoint, "tokenize_pairs": config.tokens}
    jobs |= {"train_text_tokenizer": config.text_tokenizer, "train_image_tokenizer": config.image_tokenizer}
    stages = [{"job": job, "state": "done", "output": str(path)} for job, path in jobs.items()]
    chain = {"state": "done", "started": "2026-01-01", "stages": stages, "data": data}
    (tmp_path / "chain.json").write_text(json.dumps(chain))
    with pytest.raises(ConfigError, match="no finetune_captioning is done; run `make finetune-captioning`"):
        resolve(PRESETS["smoke"], root=tmp_path)
    finished = tmp_path / "finetune_captioning" / "0123"
    finished.mkdir(parents=True)
    (finished / COMPLETE_NAME).write_text("{}")
    found = resolve(PRESETS["smoke"], root=tmp_path)
    assert (found.captioner, found.checkpoint, found.num_scenes) == (finished, config.checkpoint, scenes)
    assert bool(found.num_validation_prompts) == (not scenes)


def test_one_candidate_is_no_choice() -> None:
    with pytest.raises(ConfigError, match="candidates=1: there is nothing to rank"):
        replace(PRESETS["smoke"], candidates=1)


def test_metric_names_are_such_as_mlflow_takes() -> None:
    assert metric_name("wrong attributes of the best by the reader") == "wrong_attributes/the_reader"
