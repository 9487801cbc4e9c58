"""CogLM's pretraining: the same rows on any number of workers, exact resume, and what is published can be loaded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cogview.errors import ConfigError, VocabularyError
from cogview.models.gpt import GPTConfig
from cogview.models.pivots import SparseConfig
from cogview.models.published import load_model
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.cluster_choice import CogLMSampling
from cogview.sampling.coglm import CogLM
from cogview.sequences.coglm import PARTS, CogLMTasks
from cogview.training.loop import LoopConfig, Ranks, train
from cogview.training.optimization import OptimizerConfig
from pipelines import pretrain_coglm
from pipelines.runtime.display import PlainDisplay
from pipelines.runtime.gpus import UNKNOWN
from pipelines.runtime.jobs import run_job
from pipelines.tasks.language_model import Inputs
from pipelines.tasks.new_weights import TaskSettings
from tests.pipelines.trained_folders import TrainedFolders, write_trained_folders
from tests.two_workers import process_group, run_two_workers

STEPS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> TrainedFolders:
    return write_trained_folders(tmp_path_factory.mktemp("trained"), is_bilingual=True)


@pytest.fixture(scope="module")
def config(folders: TrainedFolders) -> pretrain_coglm.Config:
    return pretrain_coglm.Config(
        tokens=folders.tokens,
        text_tokenizer=folders.text_tokenizer,
        image_tokenizer=folders.image_tokenizer,
        model=GPTConfig(num_layers=2, hidden_size=32, num_heads=2, dropout=0.0),
        max_text=40,
        tasks=CogLMTasks(understanding_share=0.3, completion_share=0.2, text_only_share=0.1, patch_side=2),
        loop=LoopConfig(
            num_steps=STEPS,
            global_batch_size=8,
            log_every=1,
            validate_every=STEPS,
            checkpoint_every=2,
            keep_checkpoints=9,
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_share=0.0),
        ),
        num_workers=2,
        num_validation_rows=8,
        num_samples=2,
    )


@pytest.fixture(scope="module")
def alone(config: pretrain_coglm.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one worker."""
    return work(config, tmp_path_factory.mktemp("alone"), Ranks())


def work(config: pretrain_coglm.Config, output: Path, ranks: Ranks) -> Path:
    inputs = Inputs(
        **{name: getattr(config, name) for name in ("tokens", "text_tokenizer", "image_tokenizer")},
    )
    task = pretrain_coglm.build_task(TaskSettings(config=config, output=output, inputs=inputs), ranks)
    train(task, config=config.loop, output=output, identity={}, ranks=ranks)
    return output


def metrics(output: Path) -> dict[int, dict[str, Any]]:
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in found if "loss" in line}


def test_every_part_has_a_loss_of_its_own(alone: Path) -> None:
    logged = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in logged for name in line}
    assert names >= {f"{part}_loss" for part in PARTS}
    assert any(name.startswith("validation_") for name in names)
    assert (alone / "samples" / f"step_{STEPS:08d}.png").is_file()


def test_a_resumed_run_is_the_run_to_the_bit(config: pretrain_coglm.Config, alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"step_{STEPS:08d}")
    (tmp_path / "resumed" / "model.safetensors").unlink()
    work(config, tmp_path / "resumed", Ranks())
    assert (tmp_path / "resumed" / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    losses = [
        {step: line["loss"] for step, line in metrics(folder).items()} for folder in (alone, tmp_path / "resumed")
    ]
    assert losses[0] == losses[1]


def test_what_is_published_draws_and_knows_its_tokenizers(alone: Path, folders: TrainedFolders, tmp_path: Path) -> None:
    tokenizers = {"text_tokenizer": folders.text_tokenizer, "image_tokenizer": folders.image_tokenizer}
    coglm = CogLM.load(alone, **tokenizers)
    codes = coglm.draw(["a red circle"], seeds=[1], sampling=CogLMSampling(by_clusters=False, tokens=SamplingConfig()))
    assert codes.shape == (1, 4, 4)
    others = write_trained_folders(tmp_path / "others", seed=1, is_bilingual=True)
    with pytest.raises(VocabularyError, match="was trained with"):
        CogLM.load(alone, **{**tokenizers, "image_tokenizer": others.image_tokenizer})


def test_two_workers_have_the_losses_of_one_whole_or_in_shares(
    config: pretrain_coglm.Config, alone: Path, tmp_path: Path
) -> None:
    run_two_workers(_one_of_two, config, tmp_path)
    for name in ("none", "full"):
        together = metrics(tmp_path / name)
        for step, line in metrics(alone).items():
            assert together[step]["loss"] == pytest.approx(line["loss"], rel=1e-4), (name, step)
        weights, expected = (load_model(folder)[0].state_dict() for folder in (tmp_path / name, alone))
        for tensor in expected:
            assert torch.allclose(weights[tensor], expected[tensor], atol=2e-3), (name, tensor)


def _one_of_two(rank: int, config: pretrain_coglm.Config, folder: Path) -> None:
    with process_group(rank, folder):
        for sharding in ("none", "full"):
            spread = replace(config, loop=replace(config.loop, sharding=sharding))
            work(spread, folder / sharding, Ranks(rank=rank, world=2))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_the_job_trains_on_ray_and_is_done_once(
    config: pretrain_coglm.Config, run_root: Path, quiet_display: PlainDisplay
) -> None:
    first = run_job(pretrain_coglm.JOB, config, root=run_root, display=quiet_display)
    assert not first.was_done
    assert {"loss", "parameters", "validation_image_loss"} <= first.scores.keys()
    again = run_job(pretrain_coglm.JOB, config, root=run_root, display=quiet_display)
    assert again.was_done
    assert again.digest == first.digest


def test_a_tokenizer_that_is_not_bilingual_is_refused(
    config: pretrain_coglm.Config, run_root: Path, quiet_display: PlainDisplay, tmp_path: Path
) -> None:
    plain = write_trained_folders(tmp_path / "plain")
    wrong = replace(
        config, tokens=plain.tokens, text_tokenizer=plain.text_tokenizer, image_tokenizer=plain.image_tokenizer
    )
    with pytest.raises(VocabularyError, match="is-bilingual"):
        run_job(pretrain_coglm.JOB, wrong, root=run_root, display=quiet_display)


def test_sparse_attention_is_refused(
    config: pretrain_coglm.Config, run_root: Path, quiet_display: PlainDisplay
) -> None:
    sparse = SparseConfig(num_image_ids=32, padding_id=35)
    wrong = replace(config, model=replace(config.model, attention="sparse", sparse=sparse))
    with pytest.raises(ConfigError, match="causal"):
        run_job(pretrain_coglm.JOB, wrong, root=run_root, display=quiet_display)


def test_the_papers_plan_is_the_papers_model() -> None:
    text = "\n".join(pretrain_coglm.plan(pretrain_coglm.PAPER, gpus=UNKNOWN))
    assert "5,902,307,328" in text
    assert "steps: 300,000 of 4,096 rows x 512 tokens" in text
