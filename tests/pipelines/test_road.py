"""The road's plan: which jobs a kind of data takes, and whose output each of them reads."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from cogview.errors import ConfigError
from cogview.tokenizers.adversarial import VQGANTraining
from pipelines import road
from pipelines.road import PRESETS, plan_stages
from pipelines.runtime.chain import ChainStage

SMOKE = PRESETS["smoke"]


def names(stages: list[ChainStage]) -> list[str]:
    return [stage.job.name for stage in stages]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    (folder / "a.txt").write_text("a red square")
    return folder


def table(tmp_path: Path, image: str) -> Path:
    path = tmp_path / "pairs.csv"
    path.write_text(f"picture,titel\n{image},ein rotes Quadrat\n")
    return path


@pytest.mark.parametrize("preset", ["paper", "smoke"])
def test_every_preset_walks_from_pairs_to_scores_and_every_stage_reads_earlier_ones(preset: str) -> None:
    stages = plan_stages(PRESETS[preset])
    assert names(stages) == [
        "scrape_pairs",
        "filter_pairs",
        "train_text_tokenizer",
        "train_image_tokenizer",
        "tokenize_pairs",
        "pretrain",
        "generate",
        "evaluate",
    ]
    for position, stage in enumerate(stages):
        assert set(stage.reads.values()) <= set(names(stages[:position]))
        assert all(getattr(stage.config, field) is None for field in stage.reads)


@pytest.mark.parametrize(("preset", "grid"), [("fashion_paper", 50), ("fashion_smoke", 16)])
def test_fashion_goes_as_far_as_the_tokens_of_a_vqgan(preset: str, grid: int) -> None:
    stages = {stage.job.name: stage.config for stage in plan_stages(PRESETS[preset])}
    assert list(stages)[-1] == "tokenize_pairs"
    model = stages["train_image_tokenizer"].model
    assert isinstance(model, VQGANTraining)
    assert stages["tokenize_pairs"].image_size == grid * model.stride == stages["scrape_pairs"].image.image_size


def test_a_folder_of_pictures_is_imported_and_its_own_captions_are_drawn(pictures: Path) -> None:
    stages = {stage.job.name: stage for stage in plan_stages(replace(SMOKE, data=pictures))}
    assert "scrape_pairs" not in stages
    assert stages["import_pairs"].config.data == pictures
    assert stages["filter_pairs"].reads == {"pairs": "import_pairs"}
    assert stages["generate"].config.num_scenes == 0
    assert stages["generate"].config.num_validation_prompts == road.OWN_PROMPTS
    assert not stages["evaluate"].config.demo


def test_a_table_of_urls_is_scraped_with_the_columns_that_are_given(tmp_path: Path) -> None:
    path = table(tmp_path, "https://example.org/a.png")
    config = replace(SMOKE, data=path, caption_columns=("titel",), image_column="picture")
    first = plan_stages(config)[0]
    assert first.job.name == "scrape_pairs"
    assert (first.config.table, first.config.demo) == (path, None)
    assert (first.config.caption_fields, first.config.image_column) == (("titel",), "picture")


def test_a_table_of_files_is_imported(tmp_path: Path, pictures: Path) -> None:
    path = table(tmp_path, "pictures/a.png")
    config = replace(SMOKE, data=path, caption_columns=("titel",), image_column="picture")
    assert plan_stages(config)[0].job.name == "import_pairs"


def test_a_table_without_a_caption_column_says_which_columns_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its columns are picture, titel"):
        plan_stages(replace(SMOKE, data=table(tmp_path, "pictures/a.png"), caption_columns=("zh,en",)))


def test_caption_columns_may_be_one_word_with_commas(pictures: Path) -> None:
    config = replace(SMOKE, data=pictures, caption_columns=("zh, en", "de"))
    assert plan_stages(config)[0].config.caption_fields == ("zh", "en", "de")


def test_the_road_may_end_early(pictures: Path) -> None:
    stages = plan_stages(replace(SMOKE, data=pictures, until="filter_pairs"))
    assert names(stages) == ["import_pairs", "filter_pairs"]
    with pytest.raises(ConfigError, match="choose one of the road's jobs, scrape_pairs, filter_pairs"):
        plan_stages(replace(SMOKE, until="filter"))


def test_columns_without_data_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --data too"):
        plan_stages(replace(SMOKE, caption_columns=("zh",)))
    with pytest.raises(ConfigError, match="is an empty folder"):
        plan_stages(replace(SMOKE, data=tmp_path))
