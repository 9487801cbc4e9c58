"""The training loop on Ray Train: the only place that starts training workers.

The driver passes a function that builds the task; each worker builds it, joins the process group and runs the loop of
`cogview.training.loop`, which resumes from the newest verified checkpoint. A worker that dies takes its group down,
Ray starts the group again, and the loop goes on from there. Whoever interrupts the driver (Ctrl-C, or the `kill` of a
batch system, or of a machine that is taken away) lets the workers finish their step and write a checkpoint. Workers
know nothing of MLflow: rank 0 appends to `metrics.jsonl`, and the driver follows that file for the display and the
tracker.
"""

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

import cogview.errors
from cogview.errors import CogViewError
from cogview.training.loop import METRICS_NAME, STOP_NAME, LoopConfig, Task, train
from cogview.training.ranks import Ranks
from pipelines.runtime.cluster import cluster_words, ensure_ray, usable_cpus
from pipelines.runtime.jobs import JobRun
from pipelines.runtime.ray_metrics import show_training

MAX_FAILURES = 8  # restarts of the worker group; never endless, for a defect would loop
PROCESS_GROUP_TIMEOUT_S = 600
FOLLOW_EVERY_S = 0.5
FAILURE_NAME = "failure.json"
RAY_FOLDER = ".ray_train"
PICTURE_KEY = "picture"  # in a line of metrics: a picture that was drawn at that step

BuildTask = Callable[[Any, Ranks], Task]


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What the workers need. build: a module-level function; config: what it is called with; identity: see the loop."""

    build: BuildTask
    config: Any
    loop: LoopConfig
    identity: Mapping[str, Any]
    output: Path
    num_workers: int


def train_on_ray(job: TrainingJob, *, run: JobRun) -> dict[str, float]:
    """Train to the end, following the metrics; returns the last logged values.

    Raises what stopped a worker, and KeyboardInterrupt once an interrupted run has written its checkpoint.
    """
    ensure_ray()
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    run.say(f"{job.num_workers} workers on {cluster_words()}")
    stop = job.output / STOP_NAME
    for stale in (job.output / FAILURE_NAME, job.output / RAY_FOLDER, stop):
        _remove(stale)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": job, "threads": max(1, usable_cpus() // job.num_workers)},
        torch_config=TorchConfig(timeout_s=PROCESS_GROUP_TIMEOUT_S),
        scaling_config=ray.train.ScalingConfig(num_workers=job.num_workers, use_gpu=has_gpus()),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str((job.output / RAY_FOLDER).resolve()),
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
    with following(job.output / METRICS_NAME, num_steps=job.loop.num_steps, run=run) as last:
        _fit(trainer.fit, on_interrupt=lambda: _ask_to_stop(stop, run=run))
    _raise_failure(job.output / FAILURE_NAME)
    _remove(job.output / RAY_FOLDER)
    if stop.exists():
        _remove(stop)
        raise KeyboardInterrupt
    return last


def train_and_score(
    build: BuildTask,
    config: Any,
    *,
    loop: LoopConfig,
    num_workers: int,
    run: JobRun,
    scores: Sequence[str],
    started_from: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Train in the run's own folder; what was logged last by the names of `scores` becomes the run's scores.

    build, config: see TrainingJob; started_from: what a checkpoint must agree with besides the run's digest. Returns
    all that was logged last, and raises what `train_on_ray` raises.
    """
    job = TrainingJob(
        build=build,
        config=config,
        loop=loop,
        identity={"digest": run.digest, **(started_from or {})},
        output=run.output,
        num_workers=num_workers,
    )
    last = train_on_ray(job, run=run)
    run.scores.update({name: last[name] for name in scores if name in last})
    return last


def _fit(fit: Callable[[], object], *, on_interrupt: Callable[[], None]) -> None:
    """Run Ray's `fit`, which would abort the workers at the first interrupt if it ran in the main thread."""
    executor = ThreadPoolExecutor(1)
    done = executor.submit(fit)
    executor.shutdown(wait=False)
    try:
        done.result()
    except KeyboardInterrupt:
        on_interrupt()
        done.result()


def _ask_to_stop(stop: Path, *, run: JobRun) -> None:
    stop.parent.mkdir(parents=True, exist_ok=True)
    stop.touch()
    run.say("interrupted: the workers finish their step and write a checkpoint; once more ends them at once")


@contextmanager
def following(path: Path, *, num_steps: int, run: JobRun) -> Iterator[dict[str, float]]:
    """Show and track each new line of a metrics file while the body runs; yields the last value of each metric."""
    last: dict[str, float] = {}
    stop = threading.Event()
    follower = threading.Thread(target=_follow, args=(path, num_steps, run, last, stop), daemon=True)
    follower.start()
    try:
        yield last
    finally:
        stop.set()
        follower.join()


def _work(settings: Mapping[str, Any]) -> None:
    """One worker, from the process group to the published weights."""
    import ray.train
    import ray.train.torch
    import torch

    job: TrainingJob = settings["job"]
    context = ray.train.get_context()
    torch.set_num_threads(settings["threads"])
    device = str(ray.train.torch.get_device())
    ranks = Ranks(rank=context.get_world_rank(), world=context.get_world_size(), device=device)
    try:
        task = job.build(job.config, ranks)
        is_done = train(task, config=job.loop, output=job.output, identity=job.identity, ranks=ranks)
        if is_done and ranks.rank == 0:
            _remove(job.output / STOP_NAME)  # asked for in the last step
    except CogViewError as error:  # trying again would end the same way: tell the driver instead of Ray
        failure = {"error": type(error).__name__, "message": str(error)}
        (job.output / FAILURE_NAME).write_text(json.dumps(failure))


def _follow(path: Path, num_steps: int, run: JobRun, last: dict[str, float], stop: threading.Event) -> None:
    """Until told to stop, and once more then. The tracker itself leaves out what it has seen before a resume."""
    position, inode = 0, 0
    while True:
        is_last_time = stop.wait(FOLLOW_EVERY_S)
        if path.exists():
            if path.stat().st_ino != inode:  # a resumed run has put a shortened file in its place
                inode, position = path.stat().st_ino, 0
            with open(path, "rb") as file:
                file.seek(position)
                read = file.read()
            whole = read[: read.rfind(b"\n") + 1]
            position += len(whole)
            for text in whole.splitlines():
                _pass_on(json.loads(text), run=run, num_steps=num_steps, last=last)
        if is_last_time:
            return


def _pass_on(line: Mapping[str, Any], *, run: JobRun, num_steps: int, last: dict[str, float]) -> None:
    """One line of the metrics: numbers to the tracker and the display, the picture that it names to the tracker."""
    numbers = {name: value for name, value in line.items() if name not in ("step", PICTURE_KEY)}
    run.tracker.log_metrics(numbers, step=line["step"])
    show_training(run.output.parent.name, numbers)
    if PICTURE_KEY in line:
        path = run.output / line[PICTURE_KEY]
        run.tracker.log_image(Image.open(path), f"{path.parent.name}.png", step=line["step"])
    last.update(numbers)
    run.progress(line["step"], num_steps, _note(last))


def _note(last: Mapping[str, float]) -> str:
    names = {"loss": "loss", "image_loss": "image", "text_loss": "text", "psnr": "PSNR", "codes_in_use": "codes in use"}
    return ", ".join(f"{label} {last[name]:.3g}" for name, label in names.items() if name in last)


def _raise_failure(path: Path) -> None:
    if path.exists():
        failure = json.loads(path.read_text())
        raise getattr(cogview.errors, failure["error"])(failure["message"])


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def has_gpus() -> bool:
    """Whether the running Ray has a GPU anywhere."""
    import ray

    return bool(ray.cluster_resources().get("GPU", 0))
