"""Style learning on small real pictures: what is trained, written and drawn, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cogview.errors import ConfigError
from cogview.models.lora import ADAPTER_SETTINGS_NAME, ADAPTERS_NAME, LoRAConfig, count_adapters
from cogview.models.published import load_model
from cogview.scenes.scene import corpus, draw_scene
from cogview.shards.reader import TokenShards
from cogview.training.checkpoints import STATE_NAME
from pipelines import merge_adapters
from pipelines.finetune_style import JOB, PRESETS, Config, main, plan, resolve
from pipelines.runtime.gpus import GPUs
from pipelines.runtime.jobs import Finished, run_job
from pipelines.tasks.style_rows import StyleData, write_style_rows
from tests.pipelines.job_runs import open_run
from tests.pipelines.pair_folders import QuietDisplay
from tests.pipelines.trained_folders import GRID, TrainedFolders, write_trained_folders

COUNT = 24
SENTENCE = "An image of {style} style"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> TrainedFolders:
    return write_trained_folders(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes as they are, and in grey; with a duplicate, and a file that is no picture."""
    root = tmp_path_factory.mktemp("pictures")
    for style in ("plain", "grey_scale"):
        (root / style).mkdir()
        for number, scene in enumerate(corpus(3, COUNT)):
            picture = draw_scene(scene.scene, image_size=40)
            picture = picture.convert("L") if style == "grey_scale" else picture
            picture.save(root / style / f"{number}.png")
    (root / "plain" / "again.png").write_bytes((root / "plain" / "0.png").read_bytes())
    (root / "plain" / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    return root


@pytest.fixture(scope="module")
def config(folders: TrainedFolders, pictures: Path) -> Config:
    smoke = PRESETS["smoke"]
    loop = replace(smoke.loop, num_steps=6, global_batch_size=4, log_every=2, validate_every=3, checkpoint_every=3)
    return replace(
        smoke,
        data=pictures,
        checkpoint=folders.checkpoint,
        text_tokenizer=folders.text_tokenizer,
        image_tokenizer=folders.image_tokenizer,
        objects=("red circle", "blue square"),
        lora=LoRAConfig(rank=2),
        loop=loop,
    )


def rows_of(config: Config, output: Path, **changes: object) -> StyleData:
    assert config.data is not None
    assert config.text_tokenizer is not None
    assert config.image_tokenizer is not None
    data = StyleData(
        data=config.data,
        style="",
        sentence=SENTENCE,
        max_images=1000,
        text_tokenizer=config.text_tokenizer,
        image_tokenizer=config.image_tokenizer,
        grid=GRID,
    )
    return replace(data, **changes)  # type: ignore[arg-type]


def test_every_picture_of_a_style_has_the_same_sentence(config: Config, tmp_path: Path) -> None:
    run = open_run(tmp_path)
    styles = write_style_rows(rows_of(config, tmp_path), output=tmp_path / "tokens", run=run, device="cpu")
    assert styles == ["grey scale", "plain"]
    texts = [text for split in ("train", "validation") for text in all_texts(tmp_path / "tokens", split)]
    assert {text: texts.count(text) for text in texts} == {
        "An image of grey scale style": COUNT,
        "An image of plain style": COUNT,
    }
    assert len(all_texts(tmp_path / "tokens", "validation")) == 2, "each style has held-out pictures"
    rejected = pq.read_table(tmp_path / "tokens" / "rejected.parquet").to_pylist()
    assert sorted((row["source"], row["reason"]) for row in rejected) == [
        ("plain/again.png", "image_duplicate"),
        ("plain/torn.jpg", "not_an_image"),
    ]
    assert run.scores == {"pictures": 2 * COUNT, "rejected": 2}


def all_texts(folder: Path, split: str) -> list[str]:
    shards = TokenShards.open(folder, split=split)
    return list(shards.rows(torch.arange(len(shards)).numpy()).texts)


def test_no_more_pictures_than_asked_for(config: Config, tmp_path: Path) -> None:
    run = open_run(tmp_path)
    write_style_rows(rows_of(config, tmp_path, max_images=10), output=tmp_path / "tokens", run=run, device="cpu")
    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_text())
    assert manifest["extra"]["styles"] == {"grey scale": 10, "plain": 10}
    assert manifest["rejected"]["beyond_max_images"] == 2 * (COUNT - 10)
    assert manifest["rows_in"] == 2 * COUNT + 2 == manifest["rows_out"] + sum(manifest["rejected"].values())


def test_a_style_of_few_pictures_is_refused(config: Config, tmp_path: Path) -> None:
    (tmp_path / "data" / "rare").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "data" / "rare" / "a.png")
    data = rows_of(config, tmp_path, data=tmp_path / "data")
    with pytest.raises(ConfigError, match="1 usable pictures of rare, and a style needs 4"):
        write_style_rows(data, output=tmp_path / "tokens", run=open_run(tmp_path / "run"), device="cpu")


@pytest.mark.parametrize(
    ("name", "template"), [("sentence", "An image"), ("prompt", "A {object}"), ("plain", "{thing}"), ("prompt", "{")]
)
def test_templates_need_their_places(config: Config, name: str, template: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}="):
        replace(config, **{name: template})


def test_a_plan_tells_what_adapters_save() -> None:
    lines = list(plan(PRESETS["paper_lora"], gpus=GPUs(memory=16)))
    assert any("rank 16, 31,457,280 parameters" in line for line in lines)
    whole = replace(PRESETS["paper_lora"], lora=LoRAConfig())
    with pytest.raises(ConfigError, match="--gpu-memory 16: a worker needs"):
        list(plan(whole, gpus=GPUs(memory=16)))


def test_the_model_comes_from_the_last_chain(config: Config, tmp_path: Path) -> None:
    unknown = replace(config, checkpoint=None)
    assert resolve(unknown, root=tmp_path) == unknown, "a plan needs no chain"
    with pytest.raises(ConfigError, match="checkpoint is not given; name the output folder of pretrain"):
        main(unknown, open_run(tmp_path))
    chain = {"state": "done", "started": "now", "stages": []}
    (tmp_path / "chain.json").write_text(json.dumps(chain))
    with pytest.raises(ConfigError, match="no pretrain is done"):
        resolve(unknown, root=tmp_path)


@pytest.fixture(scope="module")
def finished(config: Config, runs_folder: Path, ray_session: None) -> Finished:
    return run_job(JOB, config, root=runs_folder / "style", display=QuietDisplay())


@pytest.mark.ray
def test_adapters_and_a_merged_model_are_published(finished: Finished, config: Config) -> None:
    assert config.checkpoint is not None
    base, base_settings = load_model(config.checkpoint)
    merged, settings = load_model(finished.output)
    assert settings["styles"] == ["grey scale", "plain"]
    assert settings["started_from"] == base_settings["sha256"]
    linear = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, base.state_dict()[name])}
    assert changed == {name for name in base.state_dict() if name.endswith(tuple(f"{part}.weight" for part in linear))}
    assert finished.scores["trained_parameters"] == count_adapters(base.config, LoRAConfig(rank=2))
    assert (finished.output / ADAPTERS_NAME).is_file()


@pytest.mark.ray
def test_checkpoints_hold_no_frozen_weight(finished: Finished) -> None:
    states = sorted(finished.output.glob(f"checkpoints/step_*/{STATE_NAME}"))
    assert states
    assert all("lora" in name for name in torch.load(states[-1], weights_only=True)["model"])


@pytest.mark.ray
def test_the_sheet_shows_each_object_in_each_style(finished: Finished) -> None:
    width, height = Image.open(finished.output / "styles.png").size
    assert width > 3 * 160
    assert height > 2 * 160


@pytest.mark.ray
def test_adapters_alone_are_merged_into_the_same_model(finished: Finished, config: Config, run_root: Path) -> None:
    adapters = run_root / "sent"
    adapters.mkdir(parents=True)
    for name in (ADAPTERS_NAME, ADAPTER_SETTINGS_NAME):
        shutil.copy(finished.output / name, adapters / name)
    asked = merge_adapters.Config(checkpoint=config.checkpoint, adapters=adapters)
    merged = run_job(merge_adapters.JOB, asked, root=run_root, display=QuietDisplay())
    first, second = load_model(finished.output)[0].state_dict(), load_model(merged.output)[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
