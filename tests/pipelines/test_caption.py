"""A captioner finetuned from a small model: captions of files and of samples, and candidates in its order."""

import io
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageEnhance

from cogview.errors import CheckpointError, ConfigError
from cogview.evaluation.caption_loss import score_pairs
from cogview.models.published import load_model, save_model
from cogview.sampling.caption_search import draw_captions
from cogview.sampling.captioning import Captioner
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.text_to_image import TextToImage
from cogview.scenes.scene import corpus, draw_scene
from cogview.tokenizers.text import CHINESE_CHARACTER
from cogview.training.loop import LoopConfig, Ranks, train
from pipelines import caption, finetune_captioning, generate
from pipelines.runtime.chain import latest_output
from pipelines.runtime.jobs import COMPLETE_NAME, run_job
from pipelines.tasks.finetuning import build_task
from tests.pipelines.pair_folders import QuietDisplay
from tests.pipelines.trained_folders import GRID, LENGTH, TrainedFolders, write_trained_folders

PROMPTS = ("a large red circle on a blue background", "白色背景上的一个大红色圆形")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> TrainedFolders:
    return write_trained_folders(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def captioner(folders: TrainedFolders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the finetune's task, trained in this process."""
    output = tmp_path_factory.mktemp("captioner")
    loop = LoopConfig(num_steps=12, global_batch_size=4, log_every=4, validate_every=12, checkpoint_every=12)
    config = finetune_captioning.Config(**asdict(folders), loop=loop, num_validation_rows=4, num_samples=4)
    settings = finetune_captioning.finetuning(config, output=output)
    train(build_task(settings, Ranks()), config=loop, output=output, identity={}, ranks=Ranks())
    return output


@pytest.fixture(scope="module")
def drawing(folders: TrainedFolders, captioner: Path) -> generate.Config:
    return generate.Config(
        checkpoint=folders.checkpoint,
        text_tokenizer=folders.text_tokenizer,
        image_tokenizer=folders.image_tokenizer,
        captioner=captioner,
        prompt=PROMPTS,
        candidates=5,
        num_scenes=2,
        batch_size=3,
        shard_size=4,
        threads=1,
    )


@pytest.fixture
def captioning(folders: TrainedFolders, captioner: Path, tmp_path: Path) -> caption.Config:
    images = tmp_path / "images"
    (images / "inner").mkdir(parents=True)
    for number, row in enumerate(corpus(5, 3)):
        draw_scene(row.scene, image_size=50 + number).save(images / "inner" / f"{number}.png")
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    return caption.Config(
        images=images,
        captioner=captioner,
        text_tokenizer=folders.text_tokenizer,
        image_tokenizer=folders.image_tokenizer,
        batch_size=2,
        threads=1,
    )


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_the_finetune_on_ray_publishes_a_captioner(folders: TrainedFolders, run_root: Path) -> None:
    loop = LoopConfig(num_steps=2, global_batch_size=4, log_every=1)
    config = finetune_captioning.Config(**asdict(folders), loop=loop, num_workers=1, num_samples=2)
    done = run_job(finetune_captioning.JOB, config, root=run_root, display=QuietDisplay())
    assert done.scores["validation_text_loss"] > 0
    assert "image_loss" not in done.scores
    tokenizers = {"text_tokenizer": folders.text_tokenizer, "image_tokenizer": folders.image_tokenizer}
    assert Captioner.load(done.output, **tokenizers).has_end
    assert latest_output("finetune_captioning", flag="--captioner", root=run_root) == done.output


def rows_of(job: Any, config: Any, root: Path, name: str) -> tuple[Path, list[dict[str, Any]]]:
    done = run_job(job, config, root=root, display=QuietDisplay())
    return done.output, pq.read_table(done.output / name).to_pylist()


def test_the_finetune_shows_captions_and_scores_them(captioner: Path) -> None:
    lines = (captioner / "metrics.jsonl").read_text()
    assert "validation_cap_loss" in lines
    assert '"image_loss"' not in lines, "no image token counts"
    assert Image.open(captioner / "samples" / "step_00000012.png").width > 2 * 160


def test_pictures_get_captions_in_both_languages_and_broken_ones_a_reason(
    captioning: caption.Config, runs_folder: Path
) -> None:
    output, rows = rows_of(caption.JOB, captioning, runs_folder, "captions.parquet")
    assert [(row["path"], row["language"]) for row in rows] == [
        (f"inner/{number}.png", language) for number in range(3) for language in ("en", "zh")
    ]
    for row in rows:
        assert bool(CHINESE_CHARACTER.search(row["caption"])) <= (row["language"] == "zh")
        assert row["log_probability"] < 0
        assert row["prompt_cap_loss"] is None
    (rejected,) = pq.read_table(output / "rejected.parquet").to_pylist()
    assert rejected["path"] == "broken.jpg"
    assert rejected["reason"]
    assert Image.open(output / "captions.png").height > 3 * 160


@pytest.mark.parametrize(("method", "number"), [("greedy", 1), ("sampled", 3), ("beam", 3)])
def test_every_method_puts_the_likeliest_caption_first(
    captioning: caption.Config, runs_folder: Path, method: caption.Method, number: int
) -> None:
    config = replace(captioning, method=method, captions=number, language=("any",))
    _, rows = rows_of(caption.JOB, config, runs_folder, "captions.parquet")
    assert len(rows) <= 3 * number
    by_path = {path: [row for row in rows if row["path"] == path] for path in {row["path"] for row in rows}}
    assert len(by_path) == 3
    for some in by_path.values():
        assert [row["rank"] for row in some] == list(range(len(some)))
        if method == "sampled":
            assert len({row["seed"] for row in some}) == number


def test_what_cannot_be_captioned_is_refused(captioning: caption.Config, run_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="captions=2: method 'greedy' finds 1"):
        replace(captioning, method="greedy", captions=2)
    with pytest.raises(ConfigError, match="holds no picture"):
        caption.find_sources(replace(captioning, images=captioning.text_tokenizer))
    shutil.rmtree(captioning.images / "inner")
    with pytest.raises(ConfigError, match="none of 1 pictures could be read"):
        run_job(caption.JOB, captioning, root=run_root, display=QuietDisplay())
    with pytest.raises(ConfigError, match="make finetune-captioning"):
        caption.resolve(replace(captioning, captioner=None), root=tmp_path)


def test_a_captioner_does_not_draw_and_a_painter_does_not_caption(folders: TrainedFolders, captioner: Path) -> None:
    tokenizers = {"text_tokenizer": folders.text_tokenizer, "image_tokenizer": folders.image_tokenizer}
    with pytest.raises(CheckpointError, match="trained for captioning, not to draw"):
        TextToImage.load(captioner, **tokenizers)
    with pytest.raises(CheckpointError, match="not trained to caption"):
        Captioner.load(folders.checkpoint, **tokenizers)


def test_a_released_captioner_that_was_imported_writes_twenty_tokens(folders: TrainedFolders, tmp_path: Path) -> None:
    model, settings = load_model(folders.checkpoint)
    save_model(model, tmp_path, settings={**settings, "sources": {"mp_rank_00_model_states.pt": "0" * 64}})
    tokenizers = {"text_tokenizer": folders.text_tokenizer, "image_tokenizer": folders.image_tokenizer}
    captioner = Captioner.load(tmp_path, **tokenizers)
    assert captioner.text_budget == LENGTH - 4 - GRID**2
    codes_Bhw = torch.zeros(2, GRID, GRID, dtype=torch.int64)
    written = draw_captions(captioner, codes_Bhw, sampling=SamplingConfig(), seeds=[0, 1])
    assert [len(caption.pieces) for caption in written] == [20, 20]


def test_candidates_come_in_the_order_of_cap_loss(drawing: generate.Config, runs_folder: Path) -> None:
    output, rows = rows_of(generate.JOB, drawing, runs_folder, "samples.parquet")
    captioner = Captioner.load(
        drawing.captioner, text_tokenizer=drawing.text_tokenizer, image_tokenizer=drawing.image_tokenizer
    )
    codes_Bhw = torch.tensor([row["codes"] for row in rows]).view(-1, GRID, GRID)
    scores = score_pairs(captioner, [row["prompt"] for row in rows], codes_Bhw)
    assert [row["cap_loss"] for row in rows] == pytest.approx([score.cap_loss for score in scores], abs=1e-5)
    for index in range(4):
        candidates = [row for row in rows if row["prompt_index"] == index]
        by_rank = sorted(candidates, key=lambda row: row["rank"])
        assert [row["rank"] for row in by_rank] == list(range(5 if index < 2 else 1))
        assert [row["cap_loss"] for row in by_rank] == sorted(row["cap_loss"] for row in candidates)
        best = (output / "best" / f"{index:06d}.png").read_bytes()
        assert best == (output / by_rank[0]["path"]).read_bytes()
        assert (output / "candidates" / f"{index:06d}.png").is_file() == (index < 2)


def test_samples_are_captioned_beside_their_prompts(
    drawing: generate.Config, captioning: caption.Config, runs_folder: Path
) -> None:
    output, samples = rows_of(generate.JOB, drawing, runs_folder, "samples.parquet")
    config = replace(captioning, images=output, method="greedy", language=("any",))
    _, rows = rows_of(caption.JOB, config, runs_folder, "captions.parquet")
    assert [(row["path"], row["prompt"]) for row in rows] == [(row["path"], row["prompt"]) for row in samples]
    assert all(row["prompt_cap_loss"] > 0 for row in rows)


class Interrupting(QuietDisplay):
    """A display that ends the run, as Ctrl-C would, once so much is done."""

    def progress(self, done: float, total: float, note: str = "") -> None:
        if done >= 7:
            raise KeyboardInterrupt


def test_an_interrupted_drawing_goes_on_where_it_was(
    drawing: generate.Config, runs_folder: Path, run_root: Path
) -> None:
    _, whole = rows_of(generate.JOB, drawing, runs_folder, "samples.parquet")
    with pytest.raises(KeyboardInterrupt):
        run_job(generate.JOB, drawing, root=run_root, display=Interrupting())
    (folder,) = (run_root / "generate").iterdir()
    first = folder / "samples" / "000000.png"
    before = first.stat().st_mtime_ns
    output, rows = rows_of(generate.JOB, drawing, run_root, "samples.parquet")
    assert output == folder
    assert first.stat().st_mtime_ns == before
    assert rows == whole


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_pictures_are_the_same_on_ray(drawing: generate.Config, runs_folder: Path, run_root: Path) -> None:
    _, here = rows_of(generate.JOB, drawing, runs_folder, "samples.parquet")
    output, there = rows_of(generate.JOB, replace(drawing, workers=2), run_root, "samples.parquet")
    assert there == here
    assert (output / COMPLETE_NAME).is_file()


def test_known_seeds_draw_known_pictures_again(drawing: generate.Config, runs_folder: Path, run_root: Path) -> None:
    _, rows = rows_of(generate.JOB, drawing, runs_folder, "samples.parquet")
    seeds = (rows[3]["seed"], rows[1]["seed"])
    again = replace(drawing, prompt=PROMPTS[:1], seeds=seeds, num_scenes=0, captioner=None)
    output, known = rows_of(generate.JOB, again, run_root, "samples.parquet")
    assert [row["codes"] for row in known] == [rows[3]["codes"], rows[1]["codes"]]
    assert [row["rank"] for row in known] == [None, None]
    assert not (output / "best").exists()


def test_contrast_is_that_of_the_drawn_picture(drawing: generate.Config, runs_folder: Path, run_root: Path) -> None:
    output, rows = rows_of(generate.JOB, drawing, runs_folder, "samples.parquet")
    stronger, _ = rows_of(generate.JOB, replace(drawing, contrast=1.5), run_root, "samples.parquet")
    for row in rows[:3]:
        plain, strong = Image.open(output / row["path"]), Image.open(stronger / row["path"])
        assert np.array_equal(np.asarray(strong), np.asarray(ImageEnhance.Contrast(plain).enhance(1.5)))
    with pytest.raises(ConfigError, match="contrast=0"):
        replace(drawing, contrast=0.0)


def test_prompts_come_from_standard_input(
    drawing: generate.Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a red circle\n\n 一个红色圆形\n"))
    read = generate.resolve(replace(drawing, prompt=(), prompts_file=tmp_path / "-"), root=tmp_path)
    assert read.prompt == ("a red circle", "一个红色圆形")
    assert read.prompts_file is None
    assert read.num_scenes == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(ConfigError, match="standard input holds no caption"):
        generate.resolve(replace(drawing, prompts_file=tmp_path / "-"), root=tmp_path)


def test_sampling_is_recorded_in_seeds(captioning: caption.Config, runs_folder: Path) -> None:
    config = replace(captioning, method="sampled", captions=2, sampling=SamplingConfig(), language=("any",))
    _, rows = rows_of(caption.JOB, config, runs_folder, "captions.parquet")
    _, others = rows_of(caption.JOB, replace(config, seed=100), runs_folder, "captions.parquet")
    assert {row["seed"] for row in rows}.isdisjoint(row["seed"] for row in others)
    assert [row["caption"] for row in rows] != [row["caption"] for row in others]
