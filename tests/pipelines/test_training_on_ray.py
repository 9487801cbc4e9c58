"""Training on Ray with two workers: a killed worker changes no loss, and a hopeless run ends with its reason."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cogview.errors import DivergedError, VocabularyError
from cogview.models.gpt import GPTConfig
from cogview.models.published import load_model
from cogview.training.checkpoints import read_checkpoint
from cogview.training.loop import STOP_NAME, LoopConfig
from cogview.training.optimization import OptimizerConfig
from pipelines import pretrain
from pipelines.runtime.display import PlainDisplay
from pipelines.runtime.jobs import run_job
from tests.pipelines.trained_folders import TrainedFolders, write_trained_folders

pytestmark = pytest.mark.ray
NUM_STEPS = 60
KILL_AT = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> TrainedFolders:
    return write_trained_folders(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def config(folders: TrainedFolders) -> pretrain.Config:
    return pretrain.Config(
        tokens=folders.tokens,
        text_tokenizer=folders.text_tokenizer,
        image_tokenizer=folders.image_tokenizer,
        model=GPTConfig(num_layers=2, hidden_size=32, num_heads=2, dropout=0.1),
        max_text=40,
        loop=LoopConfig(num_steps=NUM_STEPS, global_batch_size=8, log_every=1, validate_every=30, checkpoint_every=5),
        num_workers=2,
        num_samples=4,
    )


@pytest.mark.usefixtures("ray_session")
def test_a_killed_worker_changes_no_loss(config: pretrain.Config, run_root: Path, quiet_display: PlainDisplay) -> None:
    whole = run_job(pretrain.JOB, config, root=run_root / "whole", display=quiet_display)
    killed: list[int] = []
    killer = threading.Thread(target=_kill_a_worker, args=(run_root / "killed", killed), daemon=True)
    killer.start()
    hurt = run_job(pretrain.JOB, config, root=run_root / "killed", display=quiet_display)
    assert killed, "no worker was killed: the run was over too soon"
    assert not psutil.pid_exists(killed[0])
    whole_losses, hurt_losses = _losses(whole.output), _losses(hurt.output)
    assert sorted(whole_losses) == list(range(1, NUM_STEPS + 1))
    assert hurt_losses == whole_losses
    assert hurt.digest == whole.digest, "the weights are the same bytes"
    model, settings = load_model(hurt.output)
    assert settings["num_steps"] == NUM_STEPS
    assert model.config.num_layers == 2
    assert (hurt.output / "samples" / "step_00000060.png").is_file()


@pytest.mark.usefixtures("ray_session")
def test_an_interrupted_run_leaves_a_checkpoint_of_its_last_step(
    config: pretrain.Config, run_root: Path, quiet_display: PlainDisplay
) -> None:
    endless = replace(config, loop=replace(config.loop, num_steps=100_000, checkpoint_every=100_000))
    threading.Thread(target=_interrupt, args=(run_root,), daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_job(pretrain.JOB, endless, root=run_root, display=quiet_display)
    (output,) = run_root.glob("pretrain/*")
    (checkpoint,) = (output / "checkpoints").iterdir()
    assert read_checkpoint(checkpoint).step == max(_losses(output)) >= KILL_AT
    assert not (output / STOP_NAME).exists()


@pytest.mark.usefixtures("ray_session")
def test_a_diverged_run_ends_with_its_reason_and_is_not_tried_again(
    config: pretrain.Config, run_root: Path, quiet_display: PlainDisplay
) -> None:
    optimizer = OptimizerConfig(learning_rate=1e30, clip_norm=0, warmup_share=0)
    hopeless = replace(config, loop=replace(config.loop, optimizer=optimizer, max_bad_steps=3))
    with pytest.raises(DivergedError, match="lower the learning rate"):
        run_job(pretrain.JOB, hopeless, root=run_root, display=quiet_display)


def test_tokens_of_another_tokenizer_are_refused_before_ray_starts(
    config: pretrain.Config, run_root: Path, quiet_display: PlainDisplay, tmp_path: Path
) -> None:
    others = write_trained_folders(tmp_path, seed=1)
    mixed = replace(config, image_tokenizer=others.image_tokenizer)
    with pytest.raises(VocabularyError, match="made with image_tokenizer"):
        run_job(pretrain.JOB, mixed, root=run_root, display=quiet_display)


def _kill_a_worker(root: Path, killed: list[int]) -> None:
    """kill -9 the second training worker once the run is on its way."""
    if _is_on_its_way(root):
        workers = [process for process in psutil.process_iter() if _is_training_worker(process)]
        victim = max(worker.pid for worker in workers)
        os.kill(victim, signal.SIGKILL)
        killed.append(victim)


def _interrupt(root: Path) -> None:
    """Ctrl-C in this process once the run is on its way."""
    if _is_on_its_way(root):
        os.kill(os.getpid(), signal.SIGINT)


def _is_on_its_way(root: Path) -> bool:
    """Wait until a run has logged `KILL_AT` steps; False if it never does."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if any(metrics.read_bytes().count(b"\n") >= KILL_AT for metrics in root.glob("pretrain/*/metrics.jsonl")):
            return True
        time.sleep(0.01)
    return False


def _is_training_worker(process: psutil.Process) -> bool:
    """Whether it is a training worker of the Ray that this process started."""
    try:
        is_worker = "RayTrainWorker" in " ".join(process.cmdline())
        return is_worker and os.getpid() in [parent.pid for parent in process.parents()]
    except psutil.Error:
        return False


def _losses(output: Path) -> dict[int, str]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert len(steps) == len(set(steps)), "a step was logged twice"
    return {line["step"]: float(line["loss"]).hex() for line in lines if "loss" in line}
