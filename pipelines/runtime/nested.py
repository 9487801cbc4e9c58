"""Runs inside a job's run: parts that are compared with each other, each with metrics of its own.

In: a running job and a part's name. Out: a tracker whose MLflow run is nested below the job's, and whose journal lies
in a folder of that name in the job's output.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.runtime.jobs import JobRun
from pipelines.runtime.mlflow_run import RUN_ID_NAME
from pipelines.runtime.tracking import Tracker, open_tracker

PARENT_TAG = "mlflow.parentRunId"  # MLflow shows a run with this tag below the run that it names


@contextmanager
def nested_tracker(run: JobRun, *, job: str, name: str, config: Any) -> Iterator[Tracker]:
    """A tracker for one part of a job, in `<output>/<name>`; it ends with the block, the job's own goes on."""
    output = run.output / name
    output.mkdir(exist_ok=True)
    root = run.output.parents[1]  # a job's output is <root>/<job>/<digest>
    with open_tracker(job=job, output=output, config=config, inputs={}, digest=run.digest, root=root) as tracker:
        parent = run.output / RUN_ID_NAME
        tags = {PARENT_TAG: parent.read_text().strip()} if parent.is_file() else {}  # absent when MLflow is away
        tracker.log_tags({**tags, "part": name})
        yield tracker
