"""The only `import mlflow`: one run, fed through one thread, on whose behalf nothing ever stops or waits for long.

In: calls and points from `tracking`. Out: an MLflow run in the experiment `cogview/<job>`, continued by its id when the
job is. Failures are counted, and after a few of them in a row MLflow is left alone. By default runs are kept in SQLite
beside the run folders; MLFLOW_TRACKING_URI names another place.
"""

import json
import logging
import os
import queue
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.runtime.failures import Isolated
from pipelines.runtime.journal import Point

logger = logging.getLogger(__name__)

RUN_ID_NAME = "mlflow_run.txt"
DATABASE_NAME = "mlflow.db"
ARTIFACTS_NAME = "mlartifacts"

SQLITE = "sqlite:///"
LOCK_SECONDS = 10.0  # for another process to let go of the database
OPEN_SECONDS = 60.0  # to import MLflow and to reach it; only a server that is down takes so long
CLOSE_SECONDS = 30.0  # a job waits at most so long for MLflow at its end; the journal has everything anyway
MAX_FAILURES_IN_ROW = 5
BATCH_SIZE = 500  # MLflow takes at most 1,000 metrics in one call
DIGEST_TAG = "output_digest"  # of a run: what it wrote; of a model's version: which weights
# What MLflow calls experiments of training, beside those of language agents.
KIND = {"mlflow.experimentKind": "custom_model_development"}
NEWEST_ALIAS = "newest"
VALUE_LENGTH = 500  # characters of a param or a tag that are kept

# Quick to give up and quiet: a server that is away must not hold a job for minutes. Set values win.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "GIT_PYTHON_REFRESH": "quiet",
}


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, or the SQLite file beside the runs: `runs/mlflow.db` for `runs/<name>`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{runs_folder(root) / DATABASE_NAME}"


def artifact_folder(root: Path) -> Path:
    """Where a local MLflow keeps artifacts; a server in MLFLOW_TRACKING_URI decides for itself."""
    return runs_folder(root) / ARTIFACTS_NAME


def runs_folder(root: Path) -> Path:
    """The folder of all runs, absolute: the parent of `runs/<name>`."""
    return root.resolve().parent


class Sender:
    """The thread that talks to MLflow for one run. Metrics that wait together travel together."""

    def __init__(self, *, run_id_path: Path, root: Path, experiment: str, run_name: str) -> None:
        self._connect: Callable[[], tuple[Any, str]] = lambda: _open_run(root, run_id_path, experiment, run_name)
        self._queue: queue.Queue[_Message] = queue.Queue()
        self._connected = threading.Event()
        self._client: Any = None
        self._run_id = ""
        self._lost = 0
        self._failures_in_row = 0
        self._reasons: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._work, name="mlflow-sender", daemon=True)

    @property
    def reasons(self) -> str:
        """What went wrong, the most frequent first."""
        return "; ".join(f"{reason} ({count}x)" for reason, count in self._reasons.most_common(3))

    def open(self) -> None:
        """Start connecting, and wait a while: MLflow imports much, and so will the job, which must not mix."""
        self._thread.start()
        self._connected.wait(OPEN_SECONDS)

    def call(self, action: "_Action") -> None:
        """Queue `action(client, run_id)`."""
        self._queue.put(action)

    def metric(self, point: Point) -> None:
        """Queue one point."""
        self._queue.put(point)

    def close(self, status: str) -> int:
        """Send what waits, end the run, and return how many calls and points were lost."""
        self._queue.put(lambda client, run_id: client.set_terminated(run_id, status))
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._reasons["no answer in time"] += 1
            return self._lost + self._queue.qsize()
        return self._lost

    def _work(self) -> None:
        self._try(self._open, count=0)
        self._connected.set()
        waiting: list[Point] = []
        while True:
            message = self._queue.get()
            if isinstance(message, Point):
                waiting.append(message)
                if len(waiting) < BATCH_SIZE and not self._queue.empty():
                    continue
            if waiting:
                points, waiting = waiting, []
                self._try(partial(_send_points, points=points), count=len(points))
            if message is None:
                return
            if not isinstance(message, Point):
                self._try(message, count=1)

    def _open(self, _client: Any, _run_id: str) -> None:
        self._client, self._run_id = self._connect()

    def _try(self, action: "_Action", *, count: int) -> None:
        is_opening = action == self._open
        if self._failures_in_row >= MAX_FAILURES_IN_ROW or (self._client is None and not is_opening):
            self._lost += count
            return
        with Isolated() as call:
            action(self._client, self._run_id)
        if call.error is None:
            self._failures_in_row = 0
            return
        self._lost += count
        self._failures_in_row += 1
        lines = str(call.error).strip().splitlines()
        self._reasons[f"{type(call.error).__name__}: {lines[0][:120] if lines else ''}"] += 1
        logger.debug("MLflow call failed", exc_info=call.error)


_Action = Callable[[Any, str], None]
_Message = _Action | Point | None


def _open_run(root: Path, run_id_path: Path, experiment: str, run_name: str) -> tuple[Any, str]:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri = tracking_uri(root)
    if uri.startswith(SQLITE):
        _check_database(Path(uri.removeprefix(SQLITE)))
    client = MlflowClient(tracking_uri=uri)
    location = None if os.environ.get("MLFLOW_TRACKING_URI") else artifact_folder(root).as_uri()
    experiment_id = _experiment_id(client, experiment, location)
    if run_id_path.exists():
        run_id = run_id_path.read_text().strip()
        try:
            client.update_run(run_id, status="RUNNING")
            return client, run_id
        except MlflowException:
            logger.debug("%s does not know run %s; starting another", uri, run_id)
    run_id = client.create_run(experiment_id, run_name=run_name).info.run_id
    run_id_path.write_text(run_id + "\n")
    return client, run_id


def _check_database(path: Path) -> None:
    """OSError or sqlite3.Error unless the database can be written now; MLflow itself would try for two minutes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=LOCK_SECONDS)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.rollback()


def _experiment_id(client: Any, name: str, location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    for _ in range(2):  # another process may create it between the question and the order
        found = client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(client.create_experiment(name, artifact_location=location, tags=KIND))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    raise MlflowException(f"experiment {name} can be neither found nor created")


def describe(client: Any, run_id: str, *, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
    """Set the params that are not set yet, and the tags."""
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params  # a param can be set once; runtime fields may differ on resume
    client.log_batch(run_id, params=[Param(key, value) for key, value in params.items() if key not in known])
    set_tags(client, run_id, tags)


def set_tags(client: Any, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags; long values are cut."""
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(key, value[:VALUE_LENGTH]) for key, value in tags.items()])


def _send_points(client: Any, run_id: str, points: Sequence[Point]) -> None:
    from mlflow.entities import Metric

    client.log_batch(run_id, metrics=[Metric(p.key, p.value, p.milliseconds, p.step) for p in points])


def send_missing(client: Any, run_id: str, points: Sequence[Point]) -> None:
    """Send those of the points that the run does not have."""
    keys = {point.key for point in points}
    there = {(key, point.step) for key in keys for point in client.get_metric_history(run_id, key)}
    missing = [point for point in points if (point.key, point.step) not in there]
    for start in range(0, len(missing), BATCH_SIZE):
        _send_points(client, run_id, missing[start : start + BATCH_SIZE])


def log_inputs(client: Any, run_id: str, inputs: Mapping[str, str]) -> None:
    """Log data sets by name and digest."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    client.log_inputs(
        run_id,
        datasets=[
            DatasetInput(
                dataset=Dataset(
                    name=name, digest=digest[:36], source_type="local", source=json.dumps({"digest": digest})
                ),
                tags=[InputTag("mlflow.data.context", name)],
            )
            for name, digest in inputs.items()
        ],
    )


def register_model(client: Any, run_id: str, *, name: str, folder: Path, digest: str) -> None:
    """Enter the weights in a folder as the newest version of a registered model, unless their digest is there."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}'")
    known = [version for version in versions if version.tags.get(DIGEST_TAG) == digest]
    version = (
        known[0]
        if known
        else client.create_model_version(
            name, source=folder.resolve().as_uri(), run_id=run_id, tags={DIGEST_TAG: digest}
        )
    )
    client.set_registered_model_alias(name, NEWEST_ALIAS, version.version)


def score_model(client: Any, run_id: str, *, digest: str, scores: Mapping[str, str]) -> None:
    """Tag every registered version of these weights with scores, and with the run that found them."""
    for version in client.search_model_versions(f"tags.{DIGEST_TAG} = '{digest}'"):
        for key, value in {**scores, "scored_by": run_id}.items():
            client.set_model_version_tag(version.name, version.version, key, value)


def log_step_image(client: Any, run_id: str, path: Path, key: str, step: int) -> None:
    """Log a picture that belongs to a step; pictures of one key share a slider."""
    from PIL import Image

    with Image.open(path) as image:
        client.log_image(run_id, image.convert("RGB"), key=key.replace("/", "-"), step=step)
