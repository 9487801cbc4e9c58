"""The fashion model: the paper's sizes, sparse attention in training, and a start from other image codes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogview.errors import CheckpointError, ConfigError, VocabularyError
from cogview.models.gpt import GPTConfig, count_parameters
from cogview.models.pivots import SparseConfig
from cogview.models.published import SETTINGS_NAME, load_model, save_model
from cogview.sequences.layout import TASKS
from cogview.training.loop import train
from cogview.training.ranks import Ranks
from pipelines.finetune_fashion import PRESETS, Config, TaskSettings, build_task, plan, resolve
from pipelines.runtime.gpus import UNKNOWN
from pipelines.tasks.language_model import require_inputs
from tests.pipelines.trained_folders import GRID, LENGTH, TrainedFolders, write_trained_folders

MODEL = GPTConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=2,
    dropout=0.0,
    attention="sparse",
    sparse=SparseConfig(num_pivots=8, block_size=4, window_blocks=2),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> TrainedFolders:
    return write_trained_folders(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def config(folders: TrainedFolders) -> Config:
    smoke = PRESETS["smoke"]
    return replace(
        smoke,
        tokens=folders.tokens,
        text_tokenizer=folders.text_tokenizer,
        image_tokenizer=folders.image_tokenizer,
        model=MODEL,
        max_text=20,
        num_samples=2,
        num_validation_rows=4,
        loop=replace(smoke.loop, num_steps=6, global_batch_size=4, log_every=2, validate_every=6, checkpoint_every=6),
    )


def settings_of(config: Config, output: Path) -> TaskSettings:
    return TaskSettings(config=config, output=output, inputs=require_inputs(config))


def test_the_paper_has_50_by_50_codes_and_sparse_attention() -> None:
    paper = PRESETS["paper"]
    overhead = TASKS["text_to_image"].overhead()
    assert 50 * 50 + paper.max_text + overhead <= paper.model.max_positions
    assert (paper.model.num_layers, paper.model.attention) == (36, "sparse")
    (row,) = [line for line in plan(paper, gpus=UNKNOWN) if line.startswith("this run")]
    assert f"{count_parameters(paper.model):,}" in row


def test_it_trains_sparsely_draws_and_publishes(config: Config, tmp_path: Path) -> None:
    task = build_task(settings_of(config, tmp_path), Ranks())
    assert "pivot_keys" in task.batch(0, Ranks()).tensors
    train(task, config=config.loop, output=tmp_path, identity={}, ranks=Ranks())
    gpt, settings = load_model(tmp_path)
    assert settings["grid"] == GRID
    assert gpt.config.sparse.num_image_ids == 32
    assert "started_from" not in settings
    assert (tmp_path / "samples" / "step_00000006.png").is_file()


def known_codes(folders: TrainedFolders, output: Path) -> Path:
    """The trained checkpoint as pretrain publishes it: with its number of image codes."""
    gpt, settings = load_model(folders.checkpoint)
    gpt.config = replace(gpt.config, sparse=replace(gpt.config.sparse, num_image_ids=32))
    save_model(gpt, output, settings={key: settings[key] for key in ("fingerprints", "grid", "length")})
    return output


def test_it_goes_on_from_a_trained_model(config: Config, folders: TrainedFolders, tmp_path: Path) -> None:
    checkpoint = known_codes(folders, tmp_path / "known")
    task = build_task(settings_of(replace(config, checkpoint=checkpoint), tmp_path), Ranks())
    old, settings = load_model(checkpoint)
    for name, value in old.transformer.layers.state_dict().items():
        assert torch.equal(task.gpt.transformer.layers.state_dict()[name], value), name
    assert task.config.published == {"started_from": settings["sha256"]}
    positions = task.gpt.transformer.position_embeddings.weight
    first = LENGTH - GRID**2 - 1
    kept = old.transformer.position_embeddings.weight[first : first + GRID**2]
    assert torch.allclose(positions[23 : 23 + GRID**2], kept), "the same grid is not stretched"


def test_a_checkpoint_that_does_not_fit_is_refused(config: Config, folders: TrainedFolders, tmp_path: Path) -> None:
    others = write_trained_folders(tmp_path / "others", seed=1)
    with pytest.raises(VocabularyError, match="was trained with text_tokenizer"):
        build_task(settings_of(replace(config, checkpoint=others.checkpoint), tmp_path), Ranks())
    with pytest.raises(CheckpointError, match=f"num_image_ids=8192 in {SETTINGS_NAME}"):
        build_task(settings_of(replace(config, checkpoint=folders.checkpoint), tmp_path), Ranks())
    checkpoint = known_codes(folders, tmp_path / "known")
    deeper = replace(config, checkpoint=checkpoint, model=replace(MODEL, num_layers=3))
    with pytest.raises(ConfigError, match="num_layers=3: the checkpoint has 2"):
        build_task(settings_of(deeper, tmp_path), Ranks())


def test_inputs_come_from_the_last_chain(config: Config, tmp_path: Path) -> None:
    unknown = replace(config, tokens=None)
    assert resolve(unknown, root=tmp_path) == unknown, "a plan needs no chain"
    chain = {"state": "done", "started": "now", "stages": []}
    (tmp_path / "chain.json").write_text(json.dumps(chain))
    with pytest.raises(ConfigError, match="no tokenize_pairs is done"):
        resolve(unknown, root=tmp_path)
