"""Weights spread over two workers: the losses of one, exact resume by as many or fewer, whole weights at the end."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from cogview.errors import CheckpointError, ConfigError
from cogview.training.checkpoints import read_checkpoint
from cogview.training.loop import LoopConfig, train
from cogview.training.optimization import OptimizerConfig
from cogview.training.precision import Precision
from cogview.training.ranks import Ranks
from cogview.training.sharding import ShardedWeights
from tests.training.small_gpt import LOOP, GPTTask, lines, run
from tests.training.test_loop import RegressionTask
from tests.two_workers import process_group, run_two_workers

SHARDED = replace(LOOP, sharding="full")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs by two workers: `whole`, `stopped` (before step 7) and gone on with, `bf16`, `fp16`."""
    folder = tmp_path_factory.mktemp("sharded")
    run_two_workers(_one_of_two, folder)
    return folder


def test_two_workers_with_half_the_weights_each_have_the_losses_of_one(runs: Path, tmp_path: Path) -> None:
    alone = run(tmp_path, GPTTask(dropout=0.0))
    spread = lines(runs / "whole")
    assert spread.keys() == alone.keys()
    for step, line in alone.items():
        assert spread[step]["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert spread[step]["gradient_norm"] == pytest.approx(line["gradient_norm"], rel=1e-4)
    assert _loss_of(runs / "whole") == pytest.approx(_loss_of(tmp_path), rel=1e-4)


def test_a_worker_holds_half_of_weights_and_moments(runs: Path) -> None:
    numbers = torch.load(runs / "held.pt", weights_only=True)
    assert numbers["weights"] <= 0.51 * numbers["all"]
    assert numbers["moments"] <= 2 * 0.51 * numbers["all"]


def test_a_stopped_run_goes_on_with_identical_losses(runs: Path) -> None:
    stopped, whole = lines(runs / "stopped"), lines(runs / "whole")
    assert {step: line["loss"] for step, line in stopped.items()} == {
        step: line["loss"] for step, line in whole.items()
    }


def test_one_worker_goes_on_where_two_stopped(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "whole", tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    for later in ("step_00000009", "step_00000010"):
        shutil.rmtree(checkpoints / later)
    try:
        train(GPTTask(dropout=0.0), config=SHARDED, output=tmp_path / "run", identity={}, ranks=Ranks())
    finally:
        dist.destroy_process_group()
    assert lines(tmp_path / "run")[10]["loss"] == pytest.approx(lines(runs / "whole")[10]["loss"], rel=1e-4)


def test_a_damaged_share_is_found(runs: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(runs / "whole" / "checkpoints" / "step_00000010", tmp_path / "step_00000010")
    read_checkpoint(folder)
    share = next(folder.glob("__1_*.distcp"))
    data = bytearray(share.read_bytes())
    data[len(data) // 2] ^= 1
    share.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp does not match its manifest"):
        read_checkpoint(folder)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_close(runs: Path, precision: Precision) -> None:
    half, whole = lines(runs / precision), lines(runs / "whole")
    assert all(half[step]["loss"] == pytest.approx(line["loss"], rel=0.02) for step, line in whole.items())


def test_a_run_goes_on_with_the_sharding_it_began_with(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "whole", tmp_path / "run")
    with pytest.raises(CheckpointError, match="written with sharding='full'"):
        run(tmp_path / "run", GPTTask(dropout=0.0))


def test_what_is_no_gpt_is_not_sharded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layers of a GPT"):
        train(RegressionTask(), config=SHARDED, output=tmp_path, identity={}, ranks=Ranks())
    with pytest.raises(ConfigError, match="average of sharded weights"):
        replace(SHARDED, ema_decay=0.9)


def _loss_of(output: Path) -> float:
    """Of the published weights, on rows of a step that no run comes to."""
    task = GPTTask()
    task.gpt.load_state_dict(torch.load(output / "published.pt", weights_only=True))
    task.gpt.eval()
    total: torch.Tensor = task.module(**task.batch(99, Ranks()).tensors).loss_sum
    return total.item()


def _one_of_two(rank: int, folder: Path) -> None:
    with process_group(rank, folder):
        _train(folder / "whole", rank)
        try:
            _train(folder / "stopped", rank, GPTTask(dropout=0.0, stop_before=7))
        except KeyboardInterrupt:
            _train(folder / "stopped", rank)
        for precision in ("bf16", "fp16"):
            _train(folder / precision, rank, config=replace(SHARDED, precision=precision))
        if rank == 0:
            torch.save(_held(), folder / "held.pt")
        else:
            _held()


def _train(output: Path, rank: int, task: GPTTask | None = None, config: LoopConfig = SHARDED) -> None:
    train(task or GPTTask(dropout=0.0), config=config, output=output, identity={}, ranks=Ranks(rank, 2))


def _held() -> dict[str, int]:
    """Numbers that this worker holds after a step, of the weights and of Adam's moments; and in the whole model."""
    task = GPTTask()
    weights = ShardedWeights(task.module, config=OptimizerConfig(), precision="fp32", device="cpu")
    task.module(**task.batch(0, Ranks(dist.get_rank(), 2)).tensors).loss_sum.backward()
    weights.step(learning_rate=1e-3)
    moments = [value for state in weights.optimizer.state.values() for key, value in state.items() if key != "step"]
    return {
        "weights": sum(_local(weight) for weight in weights.named().values()),
        "moments": sum(_local(moment) for moment in moments),
        "all": sum(weight.numel() for weight in weights.named().values()),
    }


def _local(tensor: torch.Tensor) -> int:
    assert isinstance(tensor, DTensor)
    return tensor.to_local().numel()
