"""Super-resolution is finetuned on squares of two sizes: what they show, what the rows are, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.errors import ConfigError
from cogview.models.published import load_model
from cogview.sampling.super_resolution import Magnifier
from cogview.scenes.scene import corpus, draw_scene
from cogview.sequences.layout import TASKS
from cogview.shards.reader import TokenShards
from cogview.tokenizers.pixels import pixel_batch
from cogview.tokenizers.vqvae import ImageTokenizer
from cogview.training.loop import LoopConfig, train
from cogview.training.optimization import OptimizerConfig
from cogview.training.ranks import Ranks
from pipelines.finetune_super_resolution import PRESETS, Config, draw_scenes, plan, resolve, settings_of
from pipelines.runtime.gpus import UNKNOWN
from pipelines.tasks.finetuning import build_task
from pipelines.tasks.scene_squares import SceneSquares
from tests.pipelines.job_runs import open_run
from tests.pipelines.trained_folders import GRID, LENGTH, write_trained_folders

SIDE = GRID // 2
SCENES = SceneSquares(num_scenes=10, image_size=32, squares_per_scene=5, validation_share=0.2)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folders = write_trained_folders(tmp_path_factory.mktemp("trained"))
    return Config(
        checkpoint=folders.checkpoint,
        text_tokenizer=folders.text_tokenizer,
        image_tokenizer=folders.image_tokenizer,
        side=SIDE,
        scenes=SCENES,
        dropout=0.0,
        loop=LoopConfig(
            num_steps=12,
            global_batch_size=4,
            log_every=4,
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_share=0.0),
        ),
        num_validation_rows=8,
    )


@pytest.fixture(scope="module")
def tokens(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_scenes(config, run=open_run(tmp_path_factory.mktemp("run")))


def test_a_square_is_the_same_part_of_a_scene_at_both_sizes(config: Config, tokens: Path) -> None:
    assert config.image_tokenizer is not None
    image = ImageTokenizer.load(config.image_tokenizer)
    shards = TokenShards.open(tokens, deep=True)
    assert (shards.grid, shards.other_grids, len(shards)) == (GRID, (SIDE,), 8 * 5)
    rows = shards.rows(np.arange(len(shards)), other_grids=(SIDE,))
    scenes = list(corpus(SCENES.seed, SCENES.num_scenes))
    for number, scene in enumerate(scenes[:8]):
        large = draw_scene(scene.scene, image_size=64)
        small = large.resize((32, 32), Image.Resampling.LANCZOS)
        codes = [image.encode(pixel_batch([np.asarray(picture)]))[0].numpy() for picture in (small, large)]
        pairs = {
            (*codes[0][y : y + 2, x : x + 2].ravel(), *codes[1][2 * y : 2 * y + 4, 2 * x : 2 * x + 4].ravel())
            for y in range(3)
            for x in range(3)
        }
        for row in range(5 * number, 5 * number + 5):
            assert (*rows.other_codes[SIDE][row], *rows.image_codes[row]) in pairs
            assert rows.texts[row] in (scene.english, scene.chinese)


def test_scenes_are_drawn_once(config: Config, tokens: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tokens.rglob("*.arrow")}
    assert draw_scenes(config, run=open_run(tokens.parent)) == tokens
    assert {path: path.stat().st_mtime_ns for path in tokens.rglob("*.arrow")} == before


def test_the_model_learns_and_can_magnify(config: Config, tokens: Path, tmp_path: Path) -> None:
    settings = settings_of(config, tokens=tokens, output=tmp_path)
    task = build_task(settings, Ranks())
    before = task.validate(0)
    train(task, config=config.loop, output=tmp_path, identity={}, ranks=Ranks())
    after = task.validate(12)
    assert after["validation_image_loss"] < before["validation_image_loss"]
    assert 0 <= after["validation_codes_right"] <= 1
    assert Image.open(tmp_path / "samples" / "step_00000012.png").width > 3 * 160
    _, published = load_model(tmp_path)
    assert (published["task"], published["grid"], published["other_grids"]) == ("super_resolution", GRID, [SIDE])
    assert config.text_tokenizer is not None
    assert config.image_tokenizer is not None
    magnifier = Magnifier.load(tmp_path, text_tokenizer=config.text_tokenizer, image_tokenizer=config.image_tokenizer)
    assert magnifier.text_budget == LENGTH - 4 - GRID**2  # as much as in pretraining
    drawn = magnifier.magnify(["a red circle"], torch.zeros(1, 4, 6, dtype=torch.int64), seeds=[1])
    assert drawn.shape == (1, 8, 12)


@pytest.mark.parametrize(("layout", "commands"), [("paper", 8), ("released", 9)])
def test_rows_are_those_of_the_layout(config: Config, tokens: Path, tmp_path: Path, layout: str, commands: int) -> None:
    settings = settings_of(replace(config, layout=layout), tokens=tokens, output=tmp_path)
    task = build_task(settings, Ranks())
    batch = task.batch(0, Ranks()).tensors
    vocabulary = task.parts.vocabulary
    pos0, roi2 = vocabulary.command("POS0"), vocabulary.command("ROI2")
    assert bool((batch["ids"] == pos0).any()) == (layout == "released")
    assert batch["positions"][batch["ids"] == roi2].tolist() == [0] * 4
    assert task.config.sequence.length == LENGTH - 4 - GRID**2 + commands + SIDE**2 + GRID**2
    # The second picture begins anew at 0, so the table need not grow; it only would for longer texts.
    assert task.gpt.config.max_positions == LENGTH
    assert task.config.layout == TASKS[settings.task]


def test_the_prompt_may_count_less_than_what_is_drawn(config: Config, tokens: Path, tmp_path: Path) -> None:
    batches = [
        build_task(settings_of(replace(config, prompt_loss_weight=weight), tokens=tokens, output=tmp_path), Ranks())
        .batch(0, Ranks())
        .tensors
        for weight in (1.0, 0.0, 0.5)
    ]
    after = GRID**2 + 3  # labels from BASE behind ROI2 to EOI2
    whole, drawn, half = (batch["loss_weights"] for batch in batches)
    assert drawn.sum().item() == 4 * after
    assert (whole > 0).sum().item() > 4 * after
    assert torch.equal(half, (whole + drawn) / 2)


def test_rows_of_other_grids_are_refused(config: Config, tokens: Path) -> None:
    with pytest.raises(ConfigError, match="with side=4 they must be 8 x 8, and besides 4 x 4"):
        settings_of(replace(config, side=4), tokens=tokens, output=Path())
    with pytest.raises(ConfigError, match=r"tokenize_pairs super_resolution .* as 32 x 32 codes and as 16 x 16"):
        draw_scenes(replace(config, side=16, scenes=None), run=open_run(tokens.parent))


def test_a_plan_needs_rows(config: Config, tokens: Path) -> None:
    lines = list(plan(replace(config, tokens=tokens), gpus=UNKNOWN))
    assert any(line.startswith("steps: 12 of 4 rows") for line in lines)
    with pytest.raises(ConfigError, match="give --tokens"):
        plan(config, gpus=UNKNOWN)


def test_settings_that_cannot_work_are_refused(config: Config, tmp_path: Path) -> None:
    for change, message in (
        ({"side": 3}, "side=3"),
        ({"prompt_loss_weight": -1.0}, "give 0 or more"),
        ({"layout": "mine"}, "choose one of paper, released"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(config, **change)
    for change, message in (({"num_scenes": 0}, "num_scenes=0"), ({"validation_share": 0.0}, "both sides need one")):
        with pytest.raises(ConfigError, match=message):
            replace(SCENES, **change)
    for size in (12, 8):
        with pytest.raises(ConfigError, match=f"image_size={size}"):
            draw_scenes(replace(config, scenes=replace(SCENES, image_size=size)), run=open_run(tmp_path / str(size)))
    with pytest.raises(ConfigError, match="make pretrain"):
        resolve(PRESETS["smoke"], root=tmp_path)


def test_the_paper_reads_squares_of_128_pixels() -> None:
    assert PRESETS["paper"].side * 8 == 128
    assert PRESETS["paper"].loop.num_steps == 20_000
    assert PRESETS["smoke"].scenes is not None
