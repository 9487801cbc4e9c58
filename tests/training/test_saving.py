"""Checkpoints that are written beside the training are those that would have been written in its way."""

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cogview.errors import CheckpointError, StorageError
from cogview.training.checkpoints import latest_checkpoint, pending_folder, read_checkpoint, write_part
from cogview.training.loop import train
from cogview.training.optimization import OptimizerConfig
from cogview.training.precision import MasterWeights
from cogview.training.ranks import Ranks
from cogview.training.saving import Saver
from tests.training.small_gpt import LOOP, GPTTask, lines, run
from tests.two_workers import process_group, run_two_workers


def saver_of(root: Path, weights: MasterWeights) -> Saver:
    return Saver(root, weights=weights, parts={}, ranks=Ranks(), identity={}, keep=3, is_async=True)


def large_weights() -> MasterWeights:
    """Some that take a while to write."""
    return MasterWeights(nn.Linear(3000, 3000), config=OptimizerConfig(), precision="fp32")


def test_what_changes_meanwhile_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    weights = large_weights()
    with saver_of(tmp_path, weights) as saver:
        with torch.no_grad():
            weights.module.weight.fill_(1.0)
        saver.save(5, counts={"skipped": 2, "bad_steps": 1})
        with torch.no_grad():
            weights.module.weight.fill_(2.0)
    checkpoint = latest_checkpoint(tmp_path, identity={})
    assert checkpoint is not None
    assert checkpoint.load("state.pt")["model"]["weight"].unique().tolist() == [1.0]
    again = large_weights()
    assert saver_of(tmp_path, again).restore() == (5, {"skipped": 2, "bad_steps": 1})
    assert again.module.weight.unique().tolist() == [1.0]


def test_the_run_and_its_checkpoints_are_those_of_a_run_that_waits(tmp_path: Path) -> None:
    waiting = run(tmp_path / "waiting")
    beside = run(tmp_path / "beside", is_checkpoint_async=True)
    assert {step: line["loss"].hex() for step, line in beside.items()} == {
        step: line["loss"].hex() for step, line in waiting.items()
    }
    names = sorted(path.name for path in (tmp_path / "waiting" / "checkpoints").iterdir())
    assert sorted(path.name for path in (tmp_path / "beside" / "checkpoints").iterdir()) == names
    for name in names:
        found, wanted = (
            read_checkpoint(tmp_path / kind / "checkpoints" / name).load("state.pt") for kind in ("beside", "waiting")
        )
        assert str(found) == str(wanted)
        assert all(torch.equal(found["model"][key], value) for key, value in wanted["model"].items())


def test_an_interrupted_run_still_ends_its_checkpoint(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", GPTTask(stop_before=6), is_checkpoint_async=True)
    checkpoint = latest_checkpoint(tmp_path / "stopped" / "checkpoints", identity={})
    assert checkpoint is not None
    assert checkpoint.step == 6
    resumed = run(tmp_path / "stopped", is_checkpoint_async=True)
    assert {step: line["loss"] for step, line in resumed.items()} == {
        step: line["loss"] for step, line in whole.items()
    }


@contextmanager
def small_files_only(size: int) -> Iterator[None]:
    """Writing a file beyond so many bytes fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fails_beside_the_training_ends_it(tmp_path: Path) -> None:
    with small_files_only(2**15), pytest.raises(StorageError, match=r"cannot write .*state\.pt"):
        run(tmp_path, is_checkpoint_async=True)
    assert latest_checkpoint(tmp_path / "checkpoints", identity={}) is None


def test_a_full_disk_is_called_so_wherever_it_ends(tmp_path: Path) -> None:
    state = {f"tensor {number}": torch.arange(3000.0) for number in range(4)}
    write_part(tmp_path, 1, "state.pt", state)
    size = (pending_folder(tmp_path, 1) / "state.pt").stat().st_size
    for enough in range(0, size, 1024):
        with small_files_only(enough), pytest.raises(StorageError, match=r"cannot write .*state\.pt: File too large"):
            write_part(tmp_path, 2, "state.pt", state)
    assert not any(pending_folder(tmp_path, 2).iterdir())


def test_shares_of_two_workers_are_written_beside_the_training(tmp_path: Path) -> None:
    run_two_workers(_one_of_two, tmp_path)
    waiting, beside, resumed = (lines(tmp_path / name) for name in ("waiting", "beside", "stopped"))
    losses = {step: line["loss"] for step, line in waiting.items()}
    assert {step: line["loss"] for step, line in beside.items()} == losses
    assert {step: line["loss"] for step, line in resumed.items()} == losses
    assert list((tmp_path / "stopped" / "checkpoints" / "step_00000006").glob("__1_*.distcp"))


def _one_of_two(rank: int, folder: Path) -> None:
    sharded = replace(LOOP, sharding="full")
    beside = replace(sharded, is_checkpoint_async=True)
    with process_group(rank, folder):
        for name, config in (("waiting", sharded), ("beside", beside)):
            task = GPTTask(dropout=0.0)
            train(task, config=config, output=folder / name, identity={}, ranks=Ranks(rank, 2))
        try:
            task = GPTTask(dropout=0.0, stop_before=8)
            train(task, config=beside, output=folder / "stopped", identity={}, ranks=Ranks(rank, 2))
        except KeyboardInterrupt:
            task = GPTTask(dropout=0.0)
            train(task, config=beside, output=folder / "stopped", identity={}, ranks=Ranks(rank, 2))
        own = folder / f"own_{rank}"  # as on machines that share no storage
        if rank == 0:
            shutil.copytree(folder / "waiting", own)
        with pytest.raises(CheckpointError, match="not all workers see the same checkpoint"):
            train(GPTTask(dropout=0.0), config=sharded, output=own, identity={}, ranks=Ranks(rank, 2))
