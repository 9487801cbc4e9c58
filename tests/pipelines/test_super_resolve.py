"""Samples and picture files in, larger pictures out: what is written, what decides a picture, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cogview.errors import CheckpointError, ConfigError, VocabularyError
from cogview.evaluation.grids import to_pictures
from cogview.models.published import load_model, save_model
from cogview.sampling.hierarchical_magnifier import HierarchicalSampling
from cogview.sampling.hierarchy import LoPARConfig
from cogview.sampling.lopar import rank_grid
from cogview.sampling.super_resolution import Magnifier
from cogview.scenes.scene import corpus, draw_scene
from cogview.tokenizers.vqvae import ImageTokenizer
from pipelines.runtime.jobs import Finished, digest_input, run_job
from pipelines.super_resolve import JOB, Config, load_magnifier, main, resolve
from tests.pipelines.job_runs import ShownRun, open_run
from tests.pipelines.pair_folders import QuietDisplay
from tests.pipelines.trained_folders import GRID, LENGTH, TrainedFolders, write_trained_folders
from tests.sampling.small_stages import LARGE, publish_stage

CAPTIONS = ("a large red circle on a blue background", "白色背景上的一个大红色圆形", "a star")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> TrainedFolders:
    return write_trained_folders(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def finetuned(folders: TrainedFolders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, said to be finetuned: it draws noise, but from the right prompts."""
    folder = tmp_path_factory.mktemp("finetuned")
    model, settings = load_model(folders.checkpoint)
    grids = {"task": "super_resolution", "grid": GRID, "other_grids": [GRID // 2], "length": LENGTH}
    save_model(model, folder, settings={**settings, **grids})
    return folder


@pytest.fixture(scope="module")
def samples(folders: TrainedFolders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What generate leaves behind, of which this job reads the table."""
    folder = tmp_path_factory.mktemp("samples")
    codes = np.random.default_rng(0).integers(0, 32, (len(CAPTIONS), GRID * GRID))
    rows = [
        {
            "prompt": caption,
            "latin_prompt": f"prompt {number}",
            "kind": "given",
            "language": "",
            "scene": "",
            "codes": codes[number].tolist(),
            "path": f"samples/{number:06d}.png",
        }
        for number, caption in enumerate(CAPTIONS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "samples.parquet")
    return folder


@pytest.fixture(scope="module")
def config(folders: TrainedFolders, finetuned: Path, samples: Path) -> Config:
    return Config(
        checkpoint=finetuned,
        text_tokenizer=folders.text_tokenizer,
        image_tokenizer=folders.image_tokenizer,
        samples=samples,
        batch_size=2,
        threads=1,
    )


def magnify(config: Config, output: Path) -> tuple[ShownRun, list[dict[str, object]]]:
    run = open_run(output)
    run.inputs = {"checkpoint": "c" * 64}
    main(config, run)
    return run, pq.read_table(output / "samples.parquet").to_pylist()


@pytest.fixture(scope="module")
def magnified(config: Config, runs_folder: Path) -> tuple[Finished, list[dict[str, object]]]:
    done = run_job(JOB, config, root=runs_folder / "super_resolve", display=QuietDisplay())
    return done, pq.read_table(done.output / "samples.parquet").to_pylist()


def test_every_sample_is_there_at_twice_the_size(config: Config, magnified) -> None:
    done, rows = magnified
    assert [row["prompt"] for row in rows] == list(CAPTIONS)
    assert len({row["seed"] for row in rows}) == 3
    tokenizer = ImageTokenizer.load(config.image_tokenizer)
    for row in rows:
        assert (row["height"], row["width"]) == (2 * GRID, 2 * GRID)
        codes_1hw = torch.tensor(row["codes"]).view(1, 2 * GRID, 2 * GRID)
        expected = to_pictures(tokenizer.decode(codes_1hw))[0]
        assert np.array_equal(np.asarray(Image.open(done.output / row["path"])), np.asarray(expected))
        assert row["checkpoint"] == digest_input(config.checkpoint, field_name="checkpoint")
    assert Image.open(done.output / "sheet.png").width > 3 * 192
    assert {"edges_enlarged", "edges_drawn"} <= done.scores.keys()


def test_a_picture_does_not_depend_on_the_batch(config: Config, magnified, tmp_path: Path) -> None:
    _, alone = magnify(replace(config, batch_size=1), tmp_path / "alone")
    assert [row["codes"] for row in alone] == [row["codes"] for row in magnified[1]]
    _, first = magnify(replace(config, num_pictures=1, seed=1), tmp_path / "first")
    assert first[0]["codes"] != alone[0]["codes"]
    _, raster = magnify(replace(config, order="raster"), tmp_path / "raster")
    assert [row["codes"] for row in raster] != [row["codes"] for row in alone]


def test_what_was_magnified_can_be_magnified_again(config: Config, magnified, tmp_path: Path) -> None:
    done, _ = magnified
    _, rows = magnify(replace(config, samples=done.output, num_pictures=1), tmp_path)
    assert (rows[0]["height"], len(rows[0]["codes"])) == (4 * GRID, 16 * GRID * GRID)


def test_picture_files_of_any_shape_are_magnified(config: Config, tmp_path: Path) -> None:
    for number, (scene, size) in enumerate(zip(corpus(0, 3), ((40, 61), (120, 90), (8, 8)), strict=True)):
        draw_scene(scene.scene, image_size=128).resize(size).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"{scene.english}\n")
    (tmp_path / "3.png").write_bytes(b"<html>")
    (tmp_path / "3.txt").write_text("not a picture\n")
    draw_scene(scene.scene, image_size=64).save(tmp_path / "4.png")
    run, rows = magnify(replace(config, samples=None, pictures=tmp_path, short_side=32), tmp_path / "output")
    assert [(row["source"], row["height"], row["width"]) for row in rows] == [("0.png", 12, 8), ("1.png", 8, 10)]
    assert Image.open(run.output / rows[0]["path"]).size == (64, 96)
    left_out = [line for line in run.lines if line.startswith("left out")]
    assert left_out == [
        "left out: 2.png (smaller than the squares that the model reads)",
        "left out: 3.png (image_is_html)",
        "left out: 4.png (caption_missing)",
    ]


def test_what_cannot_be_magnified_is_refused(config: Config, folders: TrainedFolders, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not for super-resolution"):
        magnify(replace(config, checkpoint=folders.checkpoint), tmp_path)
    with pytest.raises(ConfigError, match="no whole samples"):
        magnify(replace(config, samples=folders.text_tokenizer), tmp_path)
    with pytest.raises(ConfigError, match="name the output folder of generate"):
        magnify(replace(config, samples=None), tmp_path)
    table = pq.read_table(config.samples / "samples.parquet").to_pylist()
    pq.write_table(pa.Table.from_pylist([{**table[0], "codes": [99] * 16}]), tmp_path / "samples.parquet")
    with pytest.raises(VocabularyError, match="has the code 99, but the image tokenizer has 32 codes"):
        magnify(replace(config, samples=tmp_path), tmp_path)
    with pytest.raises(ConfigError, match="both given"):
        replace(config, pictures=tmp_path)
    with pytest.raises(ConfigError, match="batch_size=0"):
        replace(config, batch_size=0)


def test_what_is_not_given_is_what_was_made_last(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `make finetune-super-resolution` first, or give --checkpoint"):
        resolve(replace(config, checkpoint=None), root=tmp_path)
    newest = tmp_path / "finetune_super_resolution" / "abc"
    newest.mkdir(parents=True)
    (newest / "complete.json").write_text("{}")
    assert resolve(replace(config, checkpoint=None), root=tmp_path).checkpoint == newest
    with pytest.raises(ConfigError, match="run `make generate` first, or give --samples"):
        resolve(replace(config, samples=None), root=tmp_path)


def test_the_sampler_of_the_release_can_be_had(config: Config, folders: TrainedFolders) -> None:
    imported = replace(config, checkpoint=folders.checkpoint, layout="super_resolution_released", keeps_position=True)
    magnifier = load_magnifier(imported)
    assert isinstance(magnifier, Magnifier)
    assert magnifier.keeps_position
    assert (magnifier.side, magnifier.text_budget) == (2, 44)


@pytest.fixture(scope="module")
def stages(config: Config, folders: TrainedFolders, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The config of CogView2's road."""
    root = tmp_path_factory.mktemp("stages")
    paths = {name: publish_stage(root / name, folders, stage=name) for name in ("direct", "iterative")}
    sampling = HierarchicalSampling(by_clusters=False, lopar=LoPARConfig(top_k=(12,)))
    return replace(
        config, checkpoint=paths["direct"], refiner=paths["iterative"], is_hierarchical=True, hierarchical=sampling
    )


def test_three_times_the_size_is_drawn_at_once_and_refined(stages: Config, tmp_path: Path) -> None:
    run, rows = magnify(stages, tmp_path / "both")
    assert [(row["height"], row["width"]) for row in rows] == [(LARGE, LARGE)] * len(CAPTIONS)
    assert Image.open(run.output / rows[0]["path"]).size == (8 * LARGE, 8 * LARGE)
    _, alone = magnify(replace(stages, batch_size=1), tmp_path / "alone")
    assert [row["codes"] for row in alone] == [row["codes"] for row in rows]
    _, direct = magnify(replace(stages, refines=False, refiner=None), tmp_path / "direct")
    kept = (rank_grid(LARGE, LARGE) <= 0).flatten()
    for first, second in zip(direct, rows, strict=True):
        assert torch.equal(torch.tensor(first["codes"])[kept], torch.tensor(second["codes"])[kept])
        assert first["codes"] != second["codes"]


def test_picture_files_become_the_square_that_is_read(stages: Config, tmp_path: Path) -> None:
    for number, (scene, size) in enumerate(zip(corpus(0, 3), ((40, 61), (120, 90), (8, 8)), strict=True)):
        draw_scene(scene.scene, image_size=128).resize(size).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"{scene.english}\n")
    _, rows = magnify(replace(stages, samples=None, pictures=tmp_path), tmp_path / "output")
    assert [(row["source"], row["height"], row["width"]) for row in rows] == [
        ("0.png", LARGE, LARGE),
        ("1.png", LARGE, LARGE),
    ]


def test_stages_that_are_not_given_are_those_made_last(stages: Config, tmp_path: Path) -> None:
    open_config = replace(stages, checkpoint=None, refiner=None)
    for job in ("finetune_direct_sr", "finetune_iterative_sr"):
        with pytest.raises(ConfigError, match=f"run `make {job.replace('_', '-')}` first"):
            resolve(open_config, root=tmp_path)
        newest = tmp_path / job / "abc"
        newest.mkdir(parents=True)
        (newest / "complete.json").write_text("{}")
    found = resolve(open_config, root=tmp_path)
    assert (found.checkpoint, found.refiner) == (tmp_path / "finetune_direct_sr" / "abc", newest)
    with pytest.raises(ConfigError, match="refiner is not given; name the output folder of finetune_iterative_sr"):
        load_magnifier(replace(stages, refiner=None))
