"""The loop: exact resume, the same losses for any number of workers, and damaged checkpoints that are passed over."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cogview.errors import CheckpointError, ConfigError, DivergedError
from cogview.training.loop import STOP_NAME, LoopConfig, StepLoss, WeightedBatch, train
from cogview.training.optimization import OptimizerConfig
from cogview.training.ranks import Ranks
from tests.two_workers import process_group, run_two_workers

CONFIG = LoopConfig(
    num_steps=12,
    global_batch_size=8,
    optimizer=OptimizerConfig(learning_rate=1e-2),
    log_every=1,
    validate_every=6,
    checkpoint_every=4,
    keep_checkpoints=2,
    prefetching="off",  # tasks stop at a step
)
IDENTITY = {"digest": "abc"}


class Regression(nn.Module):
    """A small net with dropout, so that a resume that forgets the random state would show."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, inputs: Tensor, wanted: Tensor) -> StepLoss:
        losses = (self.layers(inputs).squeeze(1) - wanted).square()
        return StepLoss(losses.sum(), {"loss": (losses.detach().sum(), torch.tensor(float(len(losses))))})


class RegressionTask:
    """Rows by step: row r of step s is drawn from the seed (s, r), whoever computes it."""

    def __init__(
        self,
        *,
        stop_before: int = 10**9,
        poison_from: int = 10**9,
        dropout: float = 0.3,
        ask_to_stop_at: tuple[int, Path] | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = Regression()
        self.module.layers[1].p = dropout
        self.stop_before, self.poison_from, self.ask_to_stop_at = stop_before, poison_from, ask_to_stop_at

    def batch(self, step: int, ranks: Ranks) -> WeightedBatch:
        if step == self.stop_before:
            raise KeyboardInterrupt
        if self.ask_to_stop_at and step == self.ask_to_stop_at[0]:
            self.ask_to_stop_at[1].touch()
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(CONFIG.global_batch_size, 6, generator=generator)
        wanted = inputs.sum(dim=1) * (float("nan") if step >= self.poison_from else 1.0)
        size = CONFIG.global_batch_size // ranks.world
        mine = slice(ranks.rank * size, (ranks.rank + 1) * size)
        return WeightedBatch({"inputs": inputs[mine], "wanted": wanted[mine]}, float(size))

    def validate(self, step: int) -> Mapping[str, Any]:
        assert not self.module.training
        return {"validation_loss": float(step)}

    def publish(self, output: Path) -> None:
        torch.save(self.module.state_dict(), output / "published.pt")


def run(output: Path, task: RegressionTask | None = None, config: LoopConfig = CONFIG, **identity: str) -> None:
    train(task or RegressionTask(), config=config, output=output, identity=identity or IDENTITY, ranks=Ranks())


def losses(output: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert len(steps) == len(set(steps)), "a step was logged twice"
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_stopped_run_goes_on_with_identical_losses(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", RegressionTask(stop_before=10))
    assert max(losses(tmp_path / "stopped")) == 10
    run(tmp_path / "stopped")
    whole, resumed = losses(tmp_path / "whole"), losses(tmp_path / "stopped")
    assert {step: loss.hex() for step, loss in resumed.items()} == {step: loss.hex() for step, loss in whole.items()}
    assert sorted(whole) == list(range(1, 13))


def test_batches_made_ahead_change_nothing(tmp_path: Path) -> None:
    ahead = replace(CONFIG, prefetching="on")
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "ahead", RegressionTask(stop_before=10), config=ahead)
    run(tmp_path / "ahead", config=ahead)
    assert losses(tmp_path / "ahead") == losses(tmp_path / "whole")


def test_a_finished_run_only_publishes_again(tmp_path: Path) -> None:
    run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    run(tmp_path, RegressionTask(stop_before=0))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert (tmp_path / "published.pt").exists()


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    run(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000008", "step_00000012"]


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(tmp_path: Path, damage: str) -> None:
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "hurt", RegressionTask(stop_before=9))
    newest = tmp_path / "hurt" / "checkpoints" / "step_00000008"
    file = newest / ("manifest.json" if damage == "manifest" else "state.pt")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "flip":
        file.write_bytes(data)
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data[: len(data) // 2])
    run(tmp_path / "hurt")
    assert losses(tmp_path / "hurt") == losses(tmp_path / "whole")


def test_a_checkpoint_of_another_config_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(CheckpointError, match="digest = 'abc', this run has 'xyz'"):
        run(tmp_path, digest="xyz")


def test_a_checkpoint_whose_shapes_do_not_fit_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    task = RegressionTask()
    task.module.layers[0] = nn.Linear(6, 15)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        run(tmp_path, task)


def test_bad_steps_are_skipped_and_counted_until_they_are_too_many(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="not finite for 5 steps"):
        run(tmp_path, RegressionTask(poison_from=3), replace(CONFIG, max_bad_steps=5))
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["skipped_steps"] == 4
    state = torch.load(tmp_path / "checkpoints" / "step_00000004" / "state.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_two_workers_follow_the_losses_of_one(tmp_path: Path) -> None:
    train(RegressionTask(dropout=0.0), config=CONFIG, output=tmp_path / "1", identity=IDENTITY, ranks=Ranks())
    run_two_workers(_one_of_two, tmp_path / "2")
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert one.keys() == two.keys()
    assert all(two[step] == pytest.approx(loss, rel=1e-5) for step, loss in one.items())


def test_a_run_of_two_workers_can_go_on_with_one(tmp_path: Path) -> None:
    train(RegressionTask(dropout=0.0), config=CONFIG, output=tmp_path / "1", identity=IDENTITY, ranks=Ranks())
    run_two_workers(_one_of_two, tmp_path / "2")
    shutil.rmtree(tmp_path / "2" / "checkpoints" / "step_00000012")
    train(RegressionTask(dropout=0.0), config=CONFIG, output=tmp_path / "2", identity=IDENTITY, ranks=Ranks())
    assert losses(tmp_path / "2")[12] == pytest.approx(losses(tmp_path / "1")[12], rel=1e-4)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_rows_taken_some_at_a_time_give_the_same_losses(tmp_path: Path, size: int) -> None:
    run(tmp_path / "whole", RegressionTask(dropout=0.0))
    run(tmp_path / "pieces", RegressionTask(dropout=0.0), replace(CONFIG, micro_batch_size=size))
    assert losses(tmp_path / "pieces") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_no_more_rows_than_asked_for_go_through_the_model_at_once(tmp_path: Path) -> None:
    task, seen = RegressionTask(), []
    task.module.register_forward_pre_hook(lambda _, __, named: seen.append(len(named["inputs"])), with_kwargs=True)
    run(tmp_path, task, replace(CONFIG, micro_batch_size=3))
    assert seen == [3, 3, 2] * CONFIG.num_steps


def test_a_run_that_is_asked_to_stop_goes_on_with_identical_losses(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    task = RegressionTask(ask_to_stop_at=(6, tmp_path / "stopped" / STOP_NAME))
    assert not train(task, config=CONFIG, output=tmp_path / "stopped", identity=IDENTITY, ranks=Ranks())
    assert sorted(path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir())[-1] == "step_00000007"
    assert not (tmp_path / "stopped" / "published.pt").exists()
    (tmp_path / "stopped" / STOP_NAME).unlink()
    run(tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="global_batch_size=8 cannot be shared by 3"):
        train(RegressionTask(), config=CONFIG, output=tmp_path, identity=IDENTITY, ranks=Ranks(0, 3))


def _one_of_two(rank: int, output: Path) -> None:
    with process_group(rank, output.parent):
        train(RegressionTask(dropout=0.0), config=CONFIG, output=output, identity=IDENTITY, ranks=Ranks(rank, 2))
