"""Finetuning with adapters in the real loop: small checkpoints, an exact resume, and a base that stays as it was."""

from pathlib import Path

import pytest
import torch

from cogview.errors import CheckpointError
from cogview.models.lora import LoRAConfig, count_adapters
from cogview.training.checkpoints import STATE_NAME, latest_checkpoint
from cogview.training.precision import Precision
from tests.training.small_gpt import MODEL, GPTTask, run

LORA = LoRAConfig(rank=2, dropout=0.1)
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])


@PRECISIONS
def test_a_stopped_run_with_adapters_goes_on_exactly(tmp_path: Path, precision: Precision) -> None:
    whole = run(tmp_path / "whole", GPTTask(lora=LORA), precision=precision)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", GPTTask(lora=LORA, stop_before=7), precision=precision)
    resumed = run(tmp_path / "stopped", GPTTask(lora=LORA), precision=precision)
    assert {step: line["loss"] for step, line in resumed.items()} == {
        step: line["loss"] for step, line in whole.items()
    }
    assert whole[10]["loss"] < whole[1]["loss"]


def test_a_checkpoint_holds_the_adapters_alone(tmp_path: Path) -> None:
    task = GPTTask(lora=LORA)
    before = {name: tensor.clone() for name, tensor in task.gpt.state_dict().items()}
    run(tmp_path, task)
    checkpoint = latest_checkpoint(tmp_path / "checkpoints", identity={})
    assert checkpoint is not None
    saved = checkpoint.load(STATE_NAME)["model"]
    assert sum(tensor.numel() for tensor in saved.values()) == count_adapters(MODEL, LORA)
    assert (checkpoint.folder / STATE_NAME).stat().st_size < 60_000
    changed = {name for name, tensor in task.gpt.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name.removeprefix("gpt.") for name in saved}


def test_a_checkpoint_of_adapters_is_none_of_the_whole_model(tmp_path: Path) -> None:
    run(tmp_path, GPTTask(lora=LORA))
    with pytest.raises(CheckpointError, match=r"does not fit .*lacks gpt.word_embeddings.weight"):
        run(tmp_path, GPTTask(), num_steps=12)
