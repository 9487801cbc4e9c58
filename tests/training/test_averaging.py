"""The average of the weights: its arithmetic, that it changes no training, and who gets to see it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from cogview.errors import ConfigError
from cogview.training.averaging import AveragedWeights
from cogview.training.loop import LoopConfig
from tests.training.small_gpt import GPTTask, run


def test_the_average_follows_its_formula() -> None:
    averaged = AveragedWeights({"w": torch.tensor([0.0])}, decay=0.3)
    expected = 0.0
    for step, weight in enumerate([1.0, 2.0, 4.0, 8.0], start=1):
        averaged.update({"w": torch.tensor([weight])})
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    assert averaged.averages["w"].item() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_computes_with_the_averages_and_gets_its_weights_back(dtype: torch.dtype) -> None:
    module = nn.Linear(3, 2)
    averaged = AveragedWeights(dict(module.named_parameters()), decay=0.9)
    before = module.weight.detach().to(dtype).clone()
    module.to(dtype)
    averaged.averages["weight"].fill_(0.1)
    with averaged.in_place_of(module):
        assert torch.equal(module.weight, torch.full((2, 3), 0.1, dtype=dtype))
    assert torch.equal(module.weight, before)


def test_averaging_changes_no_training_but_what_is_validated_and_published(tmp_path: Path) -> None:
    plain, averaged = GPTTask(), GPTTask()
    lines = run(tmp_path / "plain", plain), run(tmp_path / "averaged", averaged, ema_decay=0.9)
    assert [line["loss"] for line in lines[0].values()] == [line["loss"] for line in lines[1].values()]
    state = torch.load(tmp_path / "averaged" / "checkpoints" / "step_00000010" / "state.pt", weights_only=True)
    average = state["average"]["averages"]["gpt.word_embeddings.weight"]
    assert state["average"]["num_updates"] == 10
    assert not torch.allclose(average, state["model"]["gpt.word_embeddings.weight"])
    assert torch.equal(averaged.validated[10], average)
    published = torch.load(tmp_path / "averaged" / "published.pt", weights_only=True)
    assert torch.equal(published["word_embeddings.weight"], average)
    assert torch.equal(plain.validated[10], state["model"]["gpt.word_embeddings.weight"])


def test_an_impossible_decay_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ema_decay=1\.0"):
        LoopConfig(num_steps=1, global_batch_size=1, ema_decay=1.0)
