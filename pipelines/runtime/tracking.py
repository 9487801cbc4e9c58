"""MLflow behind one door: what a job tells of itself goes to a local journal at once, and to MLflow when MLflow can.

In: config, input digests, metrics, figures, images, tables, files. Out: `tracking.jsonl` and `tracking/` in the job's
output folder, and one MLflow run in the experiment `cogview/<job>`. The journal is the truth: an interrupted job goes
on with the same MLflow run, logs no (key, step) twice, and sends what MLflow missed. Nothing that MLflow does can stop
a job or hold it for long: calls go through one background thread, failures are counted, and after a few of them in a
row MLflow is left alone.
"""

import json
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogview.config import flatten
from pipelines.runtime.journal import JOURNAL_NAME, Journal, Point
from pipelines.runtime.mlflow_run import (
    DIGEST_TAG,
    RUN_ID_NAME,
    VALUE_LENGTH,
    Sender,
    describe,
    log_inputs,
    log_step_image,
    register_model,
    score_model,
    send_missing,
    set_tags,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

logger = logging.getLogger(__name__)

MEDIA_FOLDER = "tracking"


class Tracker:
    """What a job logs to. Every method returns at once and never raises on account of MLflow."""

    def __init__(self, *, output: Path, journal: Journal, sender: "Sender") -> None:
        self._media = output / MEDIA_FOLDER
        self._journal = journal
        self._sender = sender

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Log numbers at a step. What was logged at this or a later step already, by this key, is left as it is."""
        new = {key: float(value) for key, value in metrics.items() if step > self._journal.last_step.get(key, step - 1)}
        if not new:
            return
        self._journal.write("metrics", step=step, metrics=new)
        now = int(time.time() * 1000)
        for key, value in new.items():
            self._journal.last_step[key] = step
            self._sender.metric(Point(key, value, step, now))

    def log_scores(self, scores: Mapping[str, Any]) -> None:
        """Log a job's final scores: numbers as metrics named `score/<name>`, the rest as tags."""
        numbers = {f"score/{key}": float(value) for key, value in scores.items() if _is_number(value)}
        others = {f"score.{key}": str(value) for key, value in scores.items() if not _is_number(value)}
        self.log_metrics(numbers)
        if others:
            self.log_tags(others)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._journal.write("tags", tags=dict(tags))
        self._sender.call(lambda client, run_id: set_tags(client, run_id, tags))

    def log_inputs(self, inputs: Mapping[str, str]) -> None:
        """Log data sets by name and digest, as MLflow's dataset inputs."""
        self._journal.write("inputs", inputs=dict(inputs))
        self._sender.call(lambda client, run_id: log_inputs(client, run_id, inputs))

    def log_output(self, digest: str) -> None:
        """Log the digest of what the run wrote: runs that read it have it among their inputs."""
        self.log_tags({DIGEST_TAG: digest})

    def log_model(self, name: str, folder: Path, *, digest: str) -> None:
        """Enter the weights in a folder among the registered models, as the newest version."""
        self._journal.write("model", name=name, folder=str(folder), digest=digest)
        self._sender.call(partial(register_model, name=name, folder=folder, digest=digest))

    def log_model_scores(self, digest: str, scores: Mapping[str, float]) -> None:
        """Write scores to the registered versions of the weights with this digest."""
        texts = {name: f"{value:.6g}" for name, value in scores.items()}
        self._journal.write("model_scores", digest=digest, scores=texts)
        self._sender.call(partial(score_model, digest=digest, scores=texts))

    def log_figure(self, figure: "Figure", name: str) -> None:
        """Log a matplotlib figure under a file name such as `loss.png`."""
        path = self._media_path(name)
        figure.savefig(path, dpi=120, bbox_inches="tight")
        self._send_file("figure", path, name)

    def log_image(self, image: "Image", name: str, *, step: int | None = None) -> None:
        """Log a picture. With a step, MLflow shows the pictures of one name behind a slider."""
        stem, suffix = os.path.splitext(name)
        path = self._media_path(name if step is None else f"{stem}_{step:08d}{suffix or '.png'}")
        image.save(path)
        if step is None:
            self._send_file("image", path, name)
            return
        self._journal.write("image", name=name, file=path.name, step=step)
        self._sender.call(lambda client, run_id: log_step_image(client, run_id, path, stem, step))

    def log_table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Log rows under a name such as `samples.json`; MLflow shows them as a table."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = {"columns": columns, "data": [[row.get(column) for column in columns] for row in rows]}
        path = self._media_path(name)
        path.write_text(json.dumps(table, ensure_ascii=False, default=str), encoding="utf-8")
        self._send_file("table", path, name)

    def log_artifact(self, path: Path, *, folder: str = "") -> None:
        """Log a file of the output as it is."""
        self._journal.write("artifact", path=str(path), folder=folder)
        self._sender.call(lambda client, run_id: client.log_artifact(run_id, str(path), folder or None))

    def _media_path(self, name: str) -> Path:
        path = self._media / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _send_file(self, kind: str, path: Path, name: str) -> None:
        folder = os.path.dirname(name)
        self._journal.write(kind, name=name, file=str(path.relative_to(self._media)))
        self._sender.call(lambda client, run_id: client.log_artifact(run_id, str(path), folder or None))


@contextmanager
def open_tracker(
    *, job: str, output: Path, config: Any, inputs: Mapping[str, str], digest: str, root: Path
) -> Iterator[Tracker]:
    """A tracker for a job that is about to work in `output`; the MLflow run ends with the block."""
    journal = Journal(output / JOURNAL_NAME)
    params = {key: str(value)[:VALUE_LENGTH] for key, value in flatten(config).items()}
    tags = {"digest": digest, **{f"input.{name}": value for name, value in inputs.items()}, **_git_tags()}
    journal.write("start", job=job, params=params, tags=tags)
    sender = Sender(
        run_id_path=output / RUN_ID_NAME, root=root, experiment=f"cogview/{job}", run_name=f"{root.name}/{output.name}"
    )
    sender.open()
    status = "FAILED"
    try:
        sender.call(partial(describe, params=params, tags=tags))
        if journal.points:
            sender.call(partial(send_missing, points=journal.points))
        tracker = Tracker(output=output, journal=journal, sender=sender)
        if inputs:
            tracker.log_inputs(inputs)
        yield tracker
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        journal.write("end", status=status)
        lost = sender.close(status)
        if lost:
            logger.warning("MLflow missed %d calls (%s); %s has them all", lost, sender.reasons, journal.path)
        journal.close()


def _git_tags() -> dict[str, str]:
    git = shutil.which("git")
    if git is None:
        return {}
    command = [git, "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (subprocess.SubprocessError, OSError):
        return {}
    return {"git_sha": answer.stdout.strip()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
