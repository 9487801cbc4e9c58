"""A job's run without the job: what the runtime hands to `main`, for tests of what lies below it."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.runtime.jobs import JobRun
from pipelines.runtime.journal import JOURNAL_NAME, Journal
from pipelines.runtime.tracking import Sender, Tracker
from tests.pipelines.pair_folders import QuietDisplay


@dataclass(kw_only=True)
class ShownRun(JobRun):
    """A run that remembers what it has shown."""

    display: QuietDisplay

    @property
    def lines(self) -> list[str]:
        return self.display.lines

    @property
    def notes(self) -> list[tuple[float, float, str]]:
        return self.display.notes


def open_run(output: Path) -> ShownRun:
    """A run that writes to `output` and keeps its journal there; its sender was never opened, so MLflow is away."""
    output.mkdir(parents=True, exist_ok=True)
    sender = Sender(run_id_path=output / "mlflow_run.txt", root=output, experiment="cogview/test", run_name="test")
    tracker = Tracker(output=output, journal=Journal(output / JOURNAL_NAME), sender=sender)
    return ShownRun(output=output, digest="d" * 64, inputs={}, display=QuietDisplay(), tracker=tracker)
